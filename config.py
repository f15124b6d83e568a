"""Every setting of a run, with its default for each data set. Edit here, or give any field as a flag.

python mms_train.py --test-vendor D --ratio 0.05 --num-epoch 50
python mms_train.py --help
"""

import math
import sys
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, get_args, get_origin

import tyro

from utils.errors import UserError

FIELD_PX = 288  # the field of view: the paper's image size
CANVAS_PX = 300  # the prepared images: a margin of 6 px around the field of view, for random shifts

# Settings that neither the method nor its result depends on.
RUNTIME_SETTINGS = frozenset({
    "data_root", "out_root", "run_name", "restart", "save_every", "device", "workers", "wandb", "compile",
    "checkpoint_activations", "keep_epochs", "monitor_pseudo_labels",
})  # fmt: skip


def pixel_mm(spacing: float, size: int) -> float:
    """Return the mm per px of the field of view at `size` px, where the canvas has `spacing` mm per px."""
    return spacing * FIELD_PX / size


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training run. Lengths in px are given for 288 px, whatever the image size."""

    demo: bool = False  # a small run on synthetic data, which it makes itself: the same program, only smaller

    # --- data ---
    data_root: str  # folder that `prepare` has written
    # held out: never seen in training; "none" trains on all domains, for use on other data
    test_domain: Annotated[str, tyro.conf.arg(aliases=["--test-vendor"])]
    ratio: float  # share of the patients that is labelled; 1: all of them, the fully supervised upper bound
    val_patients: int = 0  # labelled patients per source domain that only select the checkpoint, instead of training
    use_extra_unlabeled: bool = False  # train on the scans that come without masks, too
    image_size: int = FIELD_PX  # px; smaller images show the same field of view more coarsely

    # --- augmentation ---
    rotation: int = 90  # degrees: angles are U{0..rotation}
    max_shift: int = 6  # px, the largest random shift along each axis
    flip: bool = True  # horizontally and vertically, each with probability 0.5
    blur: bool = True  # Gaussian, sigma U(0.25, 1.25) px
    histogram_matching: bool = True  # to random images of the first source domain; at test time to their mean
    fourier_aug: bool = True  # the second view; without it only cps_loss "plain" is possible
    fourier_mode: Literal["AS", "AM"] = "AS"  # AS swaps the low-frequency amplitude, AM mixes the whole of it
    fourier_window: float = 0.01  # L of AS: half-width of the swapped square, as a share of 288 px
    fourier_ratio: float = 1.0  # lambda of AS: share of the other image's amplitude
    fourier_alpha: float = 0.3  # the largest share in AM
    cutmix: bool = True  # pseudo supervision on pairs of images mixed by boxes

    # --- method ---
    cps_loss: Literal["pixel", "scalar", "plain"] = "pixel"  # use of the confidence: see utils/method/losses.py
    cps_weight: float  # beta; 0: supervised only
    cps_warmup: float = 0  # epochs before the pseudo supervision begins
    cps_ramp: float = 0  # epochs over which its weight then rises to cps_weight
    dice_background: bool = True  # the supervised Dice loss counts the background as a class, too
    pretrained: str = "timm"  # ImageNet backbone: "timm", "none" or the path of a resnet50_v1c.pth
    init_from: str | None = None  # folder of a run whose best networks this one begins with, instead of pretrained ones

    # --- optimisation ---
    lr: float = 1e-4  # of AdamW, constant
    weight_decay: float = 0.01
    num_epoch: int = 50  # an epoch shows every unlabelled image once (with CutMix, once more as a partner)
    batch_size: int = 32  # labelled images per batch and process, with twice as many unlabelled (no CutMix: as many)
    accumulate: int = 1  # batches per step, whose gradients are averaged: a large batch on a small GPU
    max_steps: int | None = None  # end after this many steps in all
    seed: int = 0  # of weights, sampling, augmentation and dropout

    # --- run ---
    run_name: str  # folder under out_root; {test_domain}, {ratio}, {seed} stand for the settings
    out_root: str = "runs"
    restart: bool = False  # delete the run of this name and begin anew, instead of resuming it
    save_every: int = 0  # steps between checkpoints inside an epoch; 0: at epoch ends only
    keep_epochs: int = 0  # number of last epochs whose networks stay in epochs/, beside the best (0.3 GB each)
    device: str = "auto"  # "cuda", "cpu", or "auto": a GPU where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 autocast where it is faster
    compile: bool = False  # torch.compile the networks: minutes at the start, then faster steps
    checkpoint_activations: bool = False  # recompute them in the backward pass: less memory, slower steps
    monitor_pseudo_labels: bool = False  # compare them with hidden source masks each epoch; training is unchanged
    workers: int = 4  # processes for each of the two loaders; 0: read in the training process
    wandb: bool = True  # online when an account is configured, else into the run folder only

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for settings that cannot work."""
        rules = {
            "--ratio must be in (0, 1]": 0 < self.ratio <= 1,
            f"--image-size must be 32 to {FIELD_PX}": 32 <= self.image_size <= FIELD_PX,
            "--batch-size must be at least 2: image pooling has a BatchNorm": self.batch_size >= 2,
            "--max-shift must be 0 to 6 px": 0 <= self.max_shift <= 6,
            "--rotation must be 0 to 360": 0 <= self.rotation <= 360,
            "--fourier-window must be at least 0, and its square of 2 floor(288 L) + 1 px within the --image-size": (
                self.fourier_window >= 0 and 2 * int(FIELD_PX * self.fourier_window) + 1 <= self.image_size
            ),
            "--fourier-ratio must be in [0, 1]": 0 <= self.fourier_ratio <= 1,
            "--fourier-alpha must be in [0, 1]": 0 <= self.fourier_alpha <= 1,
            "every --cps-loss but plain needs --fourier-aug": (
                self.fourier_aug or self.cps_loss == "plain" or self.cps_weight == 0
            ),
            "--num-epoch must be at least 1": self.num_epoch >= 1,
            "--accumulate must be at least 1": self.accumulate >= 1,
            "--max-steps must be at least 1": self.max_steps is None or self.max_steps >= 1,
            "--lr must be positive": 0 < self.lr < math.inf,
            "--run-name must name a folder of its own": self.run_name.strip("./ ") != "",
        }
        counts = ("seed", "val_patients", "save_every", "keep_epochs", "workers")
        for name in (*counts, "cps_weight", "cps_warmup", "cps_ramp", "weight_decay"):
            rules[f"--{name.replace('_', '-')} must not be negative"] = getattr(self, name) >= 0
        for field in fields(self):
            if get_origin(field.type) is Literal:
                choices = get_args(field.type)
                rule = f"--{field.name.replace('_', '-')} must be one of {', '.join(choices)}"
                rules[rule] = getattr(self, field.name) in choices
        for rule, holds in rules.items():
            if not holds:
                raise UserError(rule)


MMS = Config(
    data_root="data/mms",
    test_domain="D",
    ratio=0.02,
    cps_weight=3.0,
    run_name="mms_{test_domain}_{ratio}_seed{seed}",
)

SCGM = Config(
    data_root="data/scgm",
    test_domain="4",
    ratio=0.2,
    max_shift=0,
    flip=False,
    blur=False,
    histogram_matching=False,
    fourier_ratio=0.8,
    cps_weight=1.5,
    cps_warmup=4,
    dice_background=False,
    run_name="scgm_{test_domain}_{ratio}_seed{seed}",
)

# What replaces the settings of a data set under --pretrained none, unless given by flags: networks that know nothing
# need a larger rate, and at first only teach each other noise.
FROM_SCRATCH = {"lr": 1e-3, "cps_warmup": 15, "cps_ramp": 5}

# What is wanted within minutes, on a CPU and from scratch: small images and batches, a larger rate, and pseudo labels
# only after the networks have learnt something from the labelled images.
DEMO = {"demo": True, "batch_size": 4, "lr": 1e-3, "pretrained": "none", "workers": 0, "wandb": False}
MMS_DEMO = replace(
    MMS,
    **DEMO,
    data_root="data/mms_demo",
    run_name="mms_demo",
    ratio=0.3,
    image_size=80,
    num_epoch=2,
    max_steps=300,
    cps_warmup=1.7,
    cps_ramp=0.06,
)
SCGM_DEMO = replace(
    SCGM,
    **DEMO,
    data_root="data/scgm_demo",
    run_name="scgm_demo",
    image_size=112,
    num_epoch=3,
    max_steps=180,
    cps_warmup=2.7,
    cps_ramp=0.08,
)


@dataclass(frozen=True, kw_only=True)
class CommandLine(Config):
    """Settings of one training run, or of one after the other with several seeds."""

    seeds: tuple[int, ...] = ()  # train once with each of these, one run after the other, instead of with --seed


def from_cli(base: Config, demo: Config) -> list[Config]:
    """Return the settings of each run: those of `base`, or with --demo of `demo`, changed by the flags.

    Where a flag takes the pretrained weights away, FROM_SCRATCH goes before `base`.
    """
    default = CommandLine(**vars(demo if "--demo" in sys.argv[1:] else base))
    parsed = tyro.cli(CommandLine, default=default)
    if parsed.pretrained == "none" != default.pretrained and not parsed.init_from:
        parsed = tyro.cli(CommandLine, default=replace(default, **FROM_SCRATCH))
    settings = dict(vars(parsed))
    seeds, cfg = settings.pop("seeds"), Config(**settings)
    if seeds and "{seed" not in cfg.run_name:
        cfg = replace(cfg, run_name=f"{cfg.run_name}_seed{{seed}}")
    runs = [replace(cfg, seed=seed) for seed in dict.fromkeys(seeds)] or [cfg]
    try:
        return [replace(run, run_name=run.run_name.format(**vars(run))) for run in runs]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--run-name {cfg.run_name}: only settings may stand in braces ({error})") from error
