"""Every setting of a run, with its default for each data set. Edit here, or give it as a flag.

python mms_train.py --test-vendor D --ratio 0.05 --num-epoch 50
python mms_train.py --help
"""

import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import tyro

from utils.errors import UserError

FIELD_PX = 288  # the field of view: the paper's image size
CANVAS_PX = 300  # the prepared images: a margin of 6 px around the field of view, for random shifts


# What the settings can be.
RANGES = dict.fromkeys(("fourier_ratio", "fourier_alpha", "intensity_aug"), (0, 1))
RANGES |= {"image_size": (32, FIELD_PX), "field": (96, FIELD_PX), "rotation": (0, 360),
           "max_shift": (0, (CANVAS_PX - FIELD_PX) // 2)}  # fmt: skip
LEAST = dict.fromkeys(("seed", "val_patients", "save_every", "keep_epochs", "workers", "cps_weight", "cps_warmup",
                       "cps_ramp", "weight_decay", "lr_power", "cross_entropy"), 0)  # fmt: skip
LEAST |= {"num_epoch": 1, "accumulate": 1, "batch_size": 2}


def pixel_mm(spacing: float, size: int, field: int = FIELD_PX) -> float:
    """Return the mm per px where `field` px of the canvas, of `spacing` mm, are shown on `size` px."""
    return spacing * field / size


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is trained on, and which domain is held out."""

    data_root: str  # Folder of the prepared data, as `prepare` has written it.
    # Domain to hold out, which training never sees; "none" trains on all, for use on other data.
    test_domain: Annotated[str, tyro.conf.arg(aliases=["--test-vendor"])]
    ratio: float  # Share of labelled patients, in (0, 1]; 1 is the upper bound.
    labeled_patients: str | None = None  # File of the labelled patients, a code per line; no --ratio.
    val_patients: int = 0  # Labelled patients per source domain that only select weights.
    use_extra_unlabeled: bool = False  # Train on source scans without masks, too.
    image_size: int = FIELD_PX  # Image size in px, 32 to 288; the field of view stays.
    field: int = FIELD_PX  # Width of the central field of view, in px of the prepared images, 96 to 288.


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """Random changes of the images; lengths in px are given for 288 px, whatever the image size."""

    rotation: int = 90  # Largest rotation in degrees, 0 to 360.
    max_shift: int = 6  # Largest shift along each axis in px, 0 to 6.
    flip: bool = True  # Flip horizontally and vertically, each with probability 0.5.
    blur: bool = True  # Blur with a Gaussian of a sigma drawn from 0.25 to 1.25 px.
    histogram_matching: bool = True  # Match histograms to the first source domain.
    fourier_aug: bool = True  # Make Fourier views, which all but --cps-loss plain need.
    fourier_mode: Literal["AS", "AM"] = "AS"  # Swap low amplitudes or mix all.
    fourier_window: float = 0.01  # Half-width of what AS swaps, a share of 288 px (L).
    fourier_ratio: float = 1.0  # Share of the other image's amplitude in AS, 0 to 1 (lambda).
    fourier_alpha: float = 0.3  # Largest share of its amplitude in AM, 0 to 1 (alpha).
    intensity_aug: float = 0  # Share of the images to learn on whose gray values change, 0 to 1.
    cutmix: bool = True  # Give the pseudo supervision pairs of images that are mixed by boxes.


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The objective, and what the networks begin with."""

    # Weigh each pixel by its confidence (pixel), the mean loss, as released (scalar), or nothing.
    cps_loss: Literal["pixel", "scalar", "plain"] = "pixel"
    cps_weight: float  # Weight of the pseudo supervision (beta), at least 0; 0: none.
    cps_warmup: float = 0  # Number of epochs before the pseudo supervision begins.
    cps_ramp: float = 0  # Number of epochs over which its weight then rises to --cps-weight.
    dice_background: bool = True  # The Dice loss has a background class, too.
    cross_entropy: float = 0  # Weight of the labelled images' cross entropy beside their Dice loss.
    robust: bool = False  # Begin with the recipe ROBUST in place of the paper's settings.
    pretrained: str = "timm"  # ImageNet weights: "timm", "none", or a resnet50_v1c.pth.
    init_from: str | None = None  # Run folder to take the first weights from.


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings:
    """How the weights are updated, and for how long."""

    # Learning rate of AdamW in the first step, above 0.
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 1e-4
    lr_power: float = 0  # The rate falls as (1 - step / steps) to this power; 0 keeps it.
    weight_decay: float = 0.01  # Weight decay of AdamW, at least 0.
    num_epoch: int = 50  # Epochs; one shows every unlabelled image once.
    batch_size: int = 32  # Labelled images per batch and process, at least 2.
    accumulate: int = 1  # Batches whose gradients make a step, for a small GPU.
    max_steps: int | None = None  # Steps after which training ends.
    seed: int = 0  # Seed of weights, sampling, augmentation and dropout, at least 0.


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where the run is written, and on what it is computed; its result does not depend on these."""

    demo: bool = False  # Train small, on synthetic data that it makes itself.
    run_name: str  # Folder in --out-root; {seed}, {ratio}, ... stand for settings.
    out_root: str = "runs"  # Folder of all runs.
    restart: bool = False  # Delete the run of this name and begin anew, instead of resuming it.
    save_every: int = 0  # Steps between checkpoints inside an epoch; 0 saves at epoch ends only.
    keep_epochs: int = 0  # Number of last epochs whose networks stay in epochs/, 0.3 GB each.
    device: str = "auto"  # "cuda", "cpu", or "auto" for a GPU where there is one.
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # Auto: bf16 if faster.
    compile: bool = False  # Compile the networks: minutes at the start, then faster steps.
    checkpoint_activations: bool = False  # Recompute activations: less memory, slower.
    monitor_pseudo_labels: bool = False  # Compare pseudo labels with hidden masks.
    workers: int = 4  # Processes for each of the two loaders; 0 reads in the training process.
    wandb: bool = True  # Log to wandb, online where an account is configured.


GROUPS = (DataSettings, AugmentationSettings, MethodSettings, OptimisationSettings, RunSettings)


@dataclass(frozen=True, kw_only=True)
class Config(*reversed(GROUPS)):
    """Settings of one training run, those of all groups."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.out_root) / self.run_name

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for settings that cannot work."""
        rules = {
            "--ratio must be in (0, 1]": 0 < self.ratio <= 1,
            "--fourier-window must be at least 0, and its square of 2 floor(288 L) + 1 px within the --image-size": (
                self.fourier_window >= 0 and 2 * int(FIELD_PX * self.fourier_window) + 1 <= self.image_size
            ),
            "every --cps-loss but plain needs --fourier-aug": (
                self.fourier_aug or self.cps_loss == "plain" or self.cps_weight == 0
            ),
            "--max-steps must be at least 1": self.max_steps is None or self.max_steps >= 1,
            "--lr must be positive": 0 < self.lr < math.inf,
            "--field must be even": self.field % 2 == 0,
            "--run-name must name a folder of its own": self.run_name.strip("./ ") != "",
        }
        for field in fields(self):
            flag, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            if field.name in RANGES:
                low, high = RANGES[field.name]
                rules[f"{flag} must be {low} to {high}"] = low <= value <= high
            elif field.name in LEAST:
                rules[f"{flag} must be at least {LEAST[field.name]}"] = value >= LEAST[field.name]
            elif get_origin(field.type) is Literal:
                choices = get_args(field.type)
                rules[f"{flag} must be one of {', '.join(choices)}"] = value in choices
        for rule, holds in rules.items():
            if not holds:
                raise UserError(rule)


# Settings that the result does not depend on ("precision" changes its last digits).
RUNTIME_SETTINGS = frozenset({field.name for field in fields(RunSettings)} | {"data_root"}) - {"demo", "precision"}


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

# What replaces the paper's settings under --robust: measured on scanners never seen (docs/results.md).
ROBUST = {"robust": True, "lr_power": 0.9, "cross_entropy": 1.0, "field": 200, "intensity_aug": 0.5}

# What is wanted within minutes, on a CPU and from scratch: small images of the middle, a larger rate that falls, and
# pseudo labels only after the networks have learnt something from the labelled images.
DEMO = {"demo": True, "lr": 1e-3, "lr_power": 0.9, "cross_entropy": 1.0, "image_size": 64, "batch_size": 8,
        "pretrained": "none", "workers": 0, "wandb": False}  # fmt: skip
MMS_DEMO = replace(
    MMS,
    **DEMO,
    data_root="data/mms_demo",
    run_name="mms_demo",
    ratio=0.3,
    field=200,
    num_epoch=2,
    max_steps=152,
    cps_warmup=1.7,
)
SCGM_DEMO = replace(
    SCGM,
    **DEMO,
    data_root="data/scgm_demo",
    run_name="scgm_demo",
    field=144,
    num_epoch=5,
    max_steps=150,
    cps_warmup=4.5,
)


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Train two networks that teach each other, with one domain held out; the same command resumes a run.

    Most runs need no more than --test-domain, --ratio, --seed (or --seeds), --data-root, --run-name and --demo.
    """

    seeds: tuple[int, ...] = ()  # Train once with each of these seeds, one run after the other.
    data: DataSettings
    augmentation: AugmentationSettings
    method: MethodSettings
    optimisation: OptimisationSettings
    run: RunSettings


def _parse(default: Config) -> tuple[Config, tuple[int, ...]]:
    """Read the command line, whose flags change `default`; return the settings and the seeds."""
    names = [field.name for field in fields(CommandLine)][1:]
    settings = {group: {field.name: getattr(default, field.name) for field in fields(group)} for group in GROUPS}
    groups = {name: group(**settings[group]) for name, group in zip(names, GROUPS, strict=True)}
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[CommandLine], default=CommandLine(**groups))
    return Config(**{key: value for name in names for key, value in vars(getattr(parsed, name)).items()}), parsed.seeds


def from_cli(base: Config, demo: Config) -> list[Config]:
    """Return the settings of each run: those of `base`, or with --demo of `demo`, changed by the flags.

    With --robust, ROBUST goes before them; where a flag takes the pretrained weights away, FROM_SCRATCH.
    """
    default = demo if "--demo" in sys.argv[1:] else base
    default = replace(default, **ROBUST) if "--robust" in sys.argv[1:] else default
    cfg, seeds = _parse(default)
    if cfg.pretrained == "none" != default.pretrained and not cfg.init_from:
        cfg, seeds = _parse(replace(default, **FROM_SCRATCH))
    if seeds and "{seed" not in cfg.run_name:
        cfg = replace(cfg, run_name=f"{cfg.run_name}_seed{{seed}}")
    runs = [replace(cfg, seed=seed) for seed in dict.fromkeys(seeds)] or [cfg]
    try:
        return [replace(run, run_name=run.run_name.format(**vars(run))) for run in runs]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--run-name {cfg.run_name}: only settings may stand in braces ({error})") from error
