"""Training: the step, and the loop around it that never loses a run.

Everything random in a step follows from (seed, step): sampling, augmentation, CutMix and dropout. A checkpoint
therefore needs no generator states, and a run that was stopped anywhere continues bit for bit on a CPU.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from config import RUNTIME_SETTINGS, Config
from utils.data.loaders import Loaders
from utils.distributed import Process, any_process, autocast_context, average, gather, main_first, unflatten
from utils.errors import UserError
from utils.evaluation.predict import mean_dice, predict_scans
from utils.files import RECORD, OutputFolder, folder_lock, read_json, require_space, write_json
from utils.method.augment import Augmentation, cutmix_mask
from utils.method.losses import cross_pseudo_loss, dice_loss, kl_variance
from utils.plots import plot_curves, plot_training_samples
from utils.run.checkpoint import is_intact, load_checkpoint, provenance, save_checkpoint, save_networks
from utils.run.logger import Logger

EXIT_INTERRUPTED = 75  # after SIGTERM, SIGUSR1 or Ctrl-C: the state is saved, run the same command to go on
MAX_BAD_STEPS = 10  # non-finite steps in a row before training gives up
SYNC_EVERY = 10  # steps between looks at the device's counters, for the progress bar

# What may differ between the command that began a run and the one that resumes it.
FREE_ON_RESUME = RUNTIME_SETTINGS | {"num_epoch", "max_steps"}

RUN_FILES = (
    "config.json", "split.json", "log.jsonl", "curves.png", "last.pt", "previous.pt", "best.safetensors",
    "not_finite.txt", "wandb_id",
)  # fmt: skip
SELECTION = "highest ensemble Dice (paper protocol) on labelled source images; the target domain is never looked at"


class UnlabeledViews(NamedTuple):
    """Views of the unlabelled batch: u0 and, with CutMix, its partners u1. (B, 1, H, W) each."""

    plain: Sequence[torch.Tensor]  # (u0,) or (u0, u1)
    fourier: Sequence[torch.Tensor] | None  # as plain; None without Fourier augmentation
    box_mask: torch.Tensor | None  # (B, 1, H, W), 1 where u1 shows

    def mix(self, pair: Sequence[torch.Tensor]) -> torch.Tensor:
        """CutMix a pair of (B, C, H, W), or return the first when there is no partner."""
        return pair[0] if self.box_mask is None else torch.lerp(pair[0], pair[1], self.box_mask)


@torch.no_grad()
def pseudo_label(teacher: nn.Module, views: UnlabeledViews) -> torch.Tensor:
    """What a network teaches about the mixed batch: logits averaged over both views, CutMix, argmax. (B, H, W)."""
    logits = [teacher(image).float() for image in views.plain]
    if views.fourier is not None:
        logits = [(plain + teacher(image)) / 2 for plain, image in zip(logits, views.fourier, strict=True)]
    return views.mix(logits).argmax(1)


def cross_pseudo_supervision(
    nets: Sequence[nn.Module], views: UnlabeledViews, mode: str, forward: Callable[[], Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_cacps (README, The method): each network learns the other's pseudo labels, weighed by the other's confidence.

    Returns:
        The loss, and the mean KL variance (0 in mode "plain").
    """
    # Teachers in train mode, as released: their BatchNorm statistics move.
    with forward():
        pseudo_labels = [pseudo_label(teacher, views) for teacher in nets]
    with forward():  # a context of its own: the teachers' bf16 copies of the weights carry no gradient
        plain = [student(views.mix(views.plain)).float() for student in nets]
        variance = [None, None]
        if mode != "plain":
            augmented = [student(views.mix(views.fourier)).float() for student in nets]
            variance = [kl_variance(p, a) for p, a in zip(plain, augmented, strict=True)]
    loss = sum(
        cross_pseudo_loss(plain[student], pseudo_labels[teacher], variance[teacher], mode)
        for student, teacher in ((1, 0), (0, 1))
    )
    return loss, torch.stack(variance).mean().detach() if mode != "plain" else torch.zeros_like(loss)


def training_step(
    nets: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    image: torch.Tensor,
    mask: torch.Tensor,
    views: UnlabeledViews | None,
    *,
    dice_classes: slice,
    cps_loss: str,
    cps_weight: float,
    forward: Callable[[], Any],
    share: float = 1.0,
) -> dict[str, torch.Tensor]:
    """The whole objective, L = L_s + beta L_cacps, and its gradient, added to the networks' parameters.

    Parts that share no graph are backpropagated one by one: the same gradient, without all activations at once.

    Args:
        nets: the two networks, in train mode.
        image, mask: labelled (B, 1, H, W) float32 and (B, H, W) int64.
        views: of the unlabelled batch; None while there is no pseudo supervision.
        dice_classes: the classes that the supervised loss sums.
        cps_weight: beta at this step.
        forward: makes the autocast context of the forward passes.
        share: what this batch's gradient counts, of a step that accumulates several.

    Returns:
        Detached scalars for the log; "loss" is the whole objective.
    """
    supervised = torch.zeros((), device=image.device)
    for net in nets:
        with forward():
            logits = net(image).float()
        part = dice_loss(logits.softmax(1), mask)[dice_classes].sum()
        (share * part).backward()
        supervised = supervised + part.detach()
    cps = variance = torch.zeros_like(supervised)
    if views is not None:
        cps, variance = cross_pseudo_supervision(nets, views, cps_loss, forward)
        (share * cps_weight * cps).backward()
        cps = cps.detach()
    return {"loss": supervised + cps_weight * cps, "supervised": supervised, "cps": cps, "variance": variance}


def checkpointed(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`net` with activation checkpointing: a forward keeps nothing but its input, the backward computes it again."""

    @contextmanager
    def frozen_statistics() -> Iterator[None]:
        """The second forward sees the batch that BatchNorm's running statistics have counted already."""
        norms = batch_norms([net])
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    return partial(checkpoint, net, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics()))


def batch_norms(nets: Sequence[nn.Module]) -> list[nn.Module]:
    """All BatchNorm layers of the networks."""
    return [m for net in nets for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


class Trainer:
    """The state of a run on its device: networks, optimisers, step, and what the log accumulates."""

    def __init__(
        self,
        cfg: Config,
        loaders: Loaders,
        build_network: Callable[..., nn.Module],
        process: Process,
        checkpoint: dict[str, Any] | None = None,
    ):
        """Begin anew, or where `checkpoint` was taken by `state`."""
        self.cfg, self.loaders, self.process, self.device = cfg, loaders, process, process.device
        device = process.device
        classes = loaders.dataset.class_names
        self.nets = []
        for i in range(2):
            torch.manual_seed(derive_seed(cfg.seed, 3, i))
            net = build_network(len(classes), pretrained="none" if checkpoint else cfg.pretrained)
            if process.world_size > 1 and device.type == "cuda":  # SyncBatchNorm refuses CPUs
                net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
            self.nets.append(net.to(device, memory_format=torch.channels_last).train())
        # Shapes repeat from step to step.
        torch.backends.cudnn.benchmark = device.type == "cuda"
        # What training calls; evaluation calls the networks themselves.
        self.students = self.nets
        if cfg.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            print("warning: --compile needs a C++ compiler (g++), and there is none: training without it")
        elif cfg.compile:
            self.students = [torch.compile(net) for net in self.nets]
        if cfg.checkpoint_activations:  # around the compiled networks: torch.compile cannot look into it
            self.students = [checkpointed(student) for student in self.students]
        self.optimizers = [
            torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
            for net in self.nets
        ]
        reference = torch.from_numpy(loaders.reference).to(device) if cfg.histogram_matching else None
        self.mean_reference = reference.mean(0) if cfg.histogram_matching else None
        self.augmentation = Augmentation.from_config(cfg, reference)
        self.generator = torch.Generator(device)
        norms = batch_norms(self.nets)
        self.statistics = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self.step = 0
        self.best = -1.0  # percent
        self.sums: dict[str, torch.Tensor] = {}  # since the last line of the log, on the device
        self.bad_steps = torch.zeros(2, device=device)  # non-finite steps: in a row, since the last line
        if checkpoint:
            self._load_state(checkpoint)

    def forward(self) -> Any:
        return autocast_context(self.device, self.cfg.precision)

    def cps_weight(self, step: int) -> float:
        """beta at a step, after warm-up and ramp."""
        epoch = step / self.loaders.steps_per_epoch
        if epoch < self.cfg.cps_warmup:
            return 0.0
        ramp = (epoch - self.cfg.cps_warmup) / self.cfg.cps_ramp if self.cfg.cps_ramp else 1.0
        return self.cfg.cps_weight * min(ramp, 1.0)

    def views(self, batch: dict[str, torch.Tensor]) -> UnlabeledViews:
        """Augment an unlabelled batch of B, or with CutMix 2 B, canvases."""
        image, quantiles = (batch[name].to(self.device, non_blocking=True) for name in ("image", "quantiles"))
        plain, fourier = self.augmentation.unlabeled(image, quantiles, self.generator, fourier=self.cfg.fourier_aug)
        parts = 2 if self.cfg.cutmix else 1
        box_mask = None
        if self.cfg.cutmix:
            box_mask = cutmix_mask(len(image) // 2, self.cfg.image_size, generator=self.generator)
        return UnlabeledViews(plain.chunk(parts), fourier.chunk(parts) if fourier is not None else None, box_mask)

    def train_step(self, batches: Sequence[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]) -> None:
        """One step of both networks on `cfg.accumulate` pairs of a labelled and an unlabelled batch.

        A step that is not finite changes nothing, which the device decides alone.
        """
        weight = self.cps_weight(self.step)
        statistics_before = torch.cat(self.statistics)
        parts = [self._batch(number, *batch, weight) for number, batch in enumerate(batches)]
        scalars = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        gradients = [p.grad for net in self.nets for p in net.parameters() if p.grad is not None]
        # One mean for all, the loss among them: so every process finds the same steps not finite.
        loss = scalars["loss"].clone()
        average([*gradients, *self.statistics, loss])
        finite = torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients))
        for optimizer in self.optimizers:
            optimizer.found_inf = (~finite).float()  # the fused step leaves everything as it is where this is 1
            optimizer.step()
            optimizer.zero_grad()
        unflatten(torch.where(finite, torch.cat(self.statistics), statistics_before), self.statistics)
        bad = (~finite).float()
        self.bad_steps = torch.stack([(self.bad_steps[0] + 1) * bad, self.bad_steps[1] + bad])
        counts = {"steps": 1, "cps_steps": weight > 0, "cps_weight": weight}
        scalars |= {name: torch.full_like(loss, count) for name, count in counts.items()}
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(finite, value, 0)
        self.step += 1

    def _batch(
        self, number: int, labeled: dict[str, torch.Tensor], unlabeled: dict[str, torch.Tensor], weight: float
    ) -> dict[str, torch.Tensor]:
        """Augment one of the step's batches and add its gradient; returns its scalars."""
        place = self.step * self.cfg.accumulate + number
        self.generator.manual_seed(derive_seed(self.cfg.seed, 4, place, self.process.rank))
        torch.manual_seed(derive_seed(self.cfg.seed, 5, place, self.process.rank))  # dropout
        image, mask, quantiles = (
            labeled[name].to(self.device, non_blocking=True) for name in ("image", "mask", "quantiles")
        )
        image, mask = self.augmentation.labeled(image, mask, quantiles, self.generator)
        return training_step(
            self.students,
            image,
            mask,
            self.views(unlabeled) if weight else None,
            dice_classes=slice(0 if self.cfg.dice_background else 1, None),
            cps_loss=self.cfg.cps_loss,
            cps_weight=weight,
            forward=self.forward,
            share=1 / self.cfg.accumulate,
        )

    def means(self) -> dict[str, float | None]:
        """Mean scalars over the finite steps since the last line of the log; of the pseudo supervision over its own."""
        average(list(self.sums.values()))
        sums = {name: float(total) for name, total in self.sums.items()}
        steps, cps_steps = max(sums.pop("steps"), 1), sums.pop("cps_steps")
        means = {name: sums[name] / steps for name in ("loss", "supervised")}
        means |= {name: sums[name] / max(cps_steps, 1) for name in ("cps", "cps_weight")}
        return means | {"variance": sums["variance"] / cps_steps if cps_steps else None}

    def validate(self) -> float:
        """Mean paper-protocol Dice (percent) on the labelled source images, without augmentation."""
        for net in self.nets:
            net.eval()
        scans = predict_scans(
            self.nets,
            self.loaders.val,
            self.loaders.data,
            size=self.cfg.image_size,
            reference=self.mean_reference,
            device=self.device,
            precision=self.cfg.precision,
        )
        # Each process predicts its share of the scans; in one order, so that sums do not depend on who did which.
        dice = mean_dice(sorted(gather([(s.patient, s.phase, s.slice_dice.tolist()) for s in scans])))
        for net in self.nets:
            net.train()
        return float(np.mean(list(dice.values())))

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs, as plain tensors and values: the same in every process."""
        average(list(self.sums.values()))
        return {
            "step": self.step,
            "best": self.best,
            "sums": self.sums,
            "bad_steps": self.bad_steps,
            "metadata": self.metadata(),
            "networks": [net.state_dict() for net in self.nets],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        if state["metadata"]["content_hash"] != self.loaders.data.info["content_hash"]:
            raise UserError(
                f"{self.loaders.data.root} holds other data than this run began with: "
                "give its --data-root, or begin anew with --restart"
            )
        self.step, self.best = state["step"], state["best"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.bad_steps = state["bad_steps"].to(self.device)
        for net, weights in zip(self.nets, state["networks"], strict=True):
            net.load_state_dict(weights)
        for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
            # The fused step reads memory in the order in which the parameter lies, and on CPUs does not check it.
            for parameter, values in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    values[name] = torch.empty_like(parameter).copy_(values[name])

    @torch.no_grad()
    def draw_samples(self, path: Path, batch: dict[str, torch.Tensor]) -> None:
        """Draw the views of a batch, the networks' pseudo labels on them and their confidence."""
        self.generator.manual_seed(derive_seed(self.cfg.seed, 6, self.step))
        half = len(batch["image"]) // (2 if self.cfg.cutmix else 1)
        count = min(4, half)
        chosen = [*range(count), *range(half, half + count)] if self.cfg.cutmix else list(range(max(count, 2)))
        views = self.views({name: value[chosen] for name, value in batch.items()})
        fourier = views.fourier or views.plain
        mixed = [views.mix(views.plain), views.mix(fourier)]
        for net in self.nets:
            net.eval()
        with self.forward():
            labels = [pseudo_label(net, views) for net in self.nets]
            logits = [[net(image).float() for image in mixed] for net in self.nets]
        for net in self.nets:
            net.train()
        box_mask = torch.zeros_like(mixed[0]) if views.box_mask is None else views.box_mask
        plot_training_samples(
            path,
            plain=_numpy(views.plain[0]),
            fourier=_numpy(fourier[0]),
            mixed=_numpy(mixed[0]),
            mask_box=_numpy(box_mask),
            pseudo_labels=np.stack([_numpy(label[:, None]) for label in labels]),
            confidence=np.stack([_numpy(torch.exp(-kl_variance(a, b))[:, None]) for a, b in logits]),
            class_names=self.loaders.dataset.class_names[1:],
        )

    def metadata(self) -> dict[str, Any]:
        """What inference needs beside the weights."""
        dataset = self.loaders.dataset
        return {
            "dataset": dataset.key,
            "class_names": list(dataset.class_names),
            "spacing_mm": dataset.spacing,
            "reference": None if self.mean_reference is None else self.mean_reference.tolist(),
            "config": asdict(self.cfg),
            "selection": SELECTION,
            "step": self.step,
            "cps_weight": self.cps_weight(self.step - 1),  # of the last step: 0 before the pseudo supervision began
            "content_hash": self.loaders.data.info["content_hash"],
            "phantom": self.loaders.data.info["phantom"],
            **provenance(),
        }


def fit(cfg: Config, loaders: Loaders, build_network: Callable[..., nn.Module], process: Process) -> None:
    """Train two networks by `cfg`, resuming the run of that name if there is one; the main process writes.

    Raises:
        UserError: the run was begun with other settings or data, is in use, or cannot be written.
        SystemExit: EXIT_INTERRUPTED, after a signal, with the state saved.
    """
    folder = Path(cfg.out_root) / cfg.run_name
    total = cfg.num_epoch * loaders.steps_per_epoch
    total = min(total, cfg.max_steps or total)
    settings = {**json.loads(json.dumps(asdict(cfg))), "processes": process.world_size}
    with ExitStack() as stack:
        with main_first(process):
            if process.is_main:
                stack.enter_context(folder_lock(folder))
                OutputFolder(folder).require_free(*RUN_FILES)
                if not cfg.restart:
                    check_settings(folder, settings)
        checkpoint = None if cfg.restart else load_checkpoint(folder)
        if checkpoint and checkpoint["step"] >= total:
            if process.is_main:
                done = checkpoint["step"]
                print(f"{folder}: this run is finished ({done} steps); --num-epoch or --max-steps extend it")
            return
        trainer = Trainer(cfg, loaders, build_network, process, checkpoint)
        del checkpoint
        if trainer.best >= 0 and not is_intact(folder / "best.safetensors"):
            trainer.best = -1.0
            if process.is_main:
                print(f"warning: {folder}/best.safetensors is missing or damaged; the next evaluation writes it anew")
        if process.is_main and trainer.step:
            print(f"{folder}: goes on from step {trainer.step} of {total}")
        # Weights and two moments, as last, as previous and as the file being written; and the best weights.
        weights = sum(p.numel() * p.element_size() for net in trainer.nets for p in net.parameters())
        with main_first(process):
            if process.is_main:
                require_space(folder, 10 * weights)
                begin_run(folder, cfg, settings, loaders.split._asdict())
        if process.is_main:
            images = cfg.batch_size * cfg.accumulate * process.world_size
            print(f"{folder}: steps of {images} labelled and {images * (1 + cfg.cutmix)} unlabelled images")
        logger = None
        if process.is_main:
            logger = stack.enter_context(Logger(folder, since=trainer.step, use_wandb=cfg.wandb, config=asdict(cfg)))
        with Interrupt() as interrupt:
            _train(trainer, folder, total, logger, interrupt)
    if process.is_main:
        print(f"{folder}: {trainer.step} steps, best source Dice {trainer.best:.2f} %")


def _train(trainer: Trainer, folder: Path, total: int, logger: Logger | None, interrupt: "Interrupt") -> None:
    cfg, loaders, process = trainer.cfg, trainer.loaders, trainer.process
    for loader in (loaders.labeled, loaders.unlabeled):
        loader.sampler.start, loader.sampler.stop = trainer.step * cfg.accumulate, total * cfg.accumulate
    progress = tqdm(
        total=total, initial=trainer.step, unit="step", desc="train", smoothing=0.1, disable=not process.is_main
    )
    recent: deque[list[int]] = deque(maxlen=MAX_BAD_STEPS)
    began = time.monotonic()
    pairs = zip(loaders.labeled, loaders.unlabeled, strict=True)
    while trainer.step < total:
        batches = list(islice(pairs, cfg.accumulate))
        trainer.train_step(batches)
        recent.append([row for pair in batches for batch in pair for row in batch["row"].tolist()])
        epoch_ends = trainer.step % loaders.steps_per_epoch == 0 or trainer.step == total
        at_sync = trainer.step % SYNC_EVERY == 0 or epoch_ends
        if at_sync:
            stop_if_diverged(trainer, recent, folder / "not_finite.txt")
            means = trainer.means()
            progress.set_postfix(loss=f"{means['loss']:.3f}", cps=f"{means['cps']:.3f}")
        progress.update()
        if epoch_ends:
            epoch = -(-trainer.step // loaders.steps_per_epoch)
            dice = trainer.validate()
            line = {"epoch": epoch, "step": trainer.step, **means, "lr": cfg.lr, "val_dice": dice}
            line |= {"skipped_steps": int(trainer.bad_steps[1]), "seconds": round(time.monotonic() - began, 1)}
            # Weights that no step of the epoch has changed are not worth keeping.
            better = dice > trainer.best and float(trainer.sums["steps"]) > 0
            trainer.best = dice if better else trainer.best
            trainer.sums, trainer.bad_steps[1] = {}, 0
            if process.is_main:
                if better:
                    save_networks(folder / "best.safetensors", trainer.nets, trainer.metadata())
                samples = OutputFolder(folder).claim(f"samples/epoch_{epoch:03d}.png")
                trainer.draw_samples(samples, batches[0][1])
                logger.log(line, {"samples": samples})
                plot_curves(logger.lines, folder / "curves.png", selected_epoch=_best_epoch(logger.lines))
                text = f"epoch {epoch}: loss {means['loss']:.4f}, source Dice {dice:.2f} % (best {trainer.best:.2f})"
                skipped = (
                    f"; {line['skipped_steps']} steps were not finite and skipped" if line["skipped_steps"] else ""
                )
                progress.write(text + skipped)
            began = time.monotonic()
        # Several processes agree on a stop where they wait for each other anyway.
        stop = any_process(bool(interrupt.received)) if at_sync or process.world_size == 1 else False
        if epoch_ends or stop or (cfg.save_every and trainer.step % cfg.save_every == 0):
            state = trainer.state()
            if process.is_main:
                save_checkpoint(folder, state)
        if stop and trainer.step < total:
            progress.close()
            if process.is_main:
                print(f"stopped by a signal at step {trainer.step}, saved; the same command goes on from there")
            sys.exit(EXIT_INTERRUPTED)
    progress.close()


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError where `folder` holds a run with other settings."""
    known = folder / "config.json"
    if not any((folder / name).exists() for name in ("last.pt", "previous.pt", "best.safetensors")):
        return
    try:
        began = read_json(known)
    except UserError as error:
        raise UserError(f"{error}: restore it, or begin anew with --restart") from error
    differing = {
        key: (began.get(key), settings.get(key))
        for key in {*began, *settings} - FREE_ON_RESUME
        if began.get(key) != settings.get(key)
    }
    if differing:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in sorted(differing.items())]
        raise UserError(
            f"{folder} holds a run with other settings:\n" + "\n".join(lines) + "\n"
            "Choose another --run-name, or begin anew with --restart"
        )


def begin_run(folder: Path, cfg: Config, settings: dict[str, Any], split: dict[str, list[str]]) -> None:
    """Make `folder` the run of these settings; with `restart`, what an earlier run of that name left is deleted."""
    if cfg.restart:
        for made in [folder, *(record.parent for record in folder.glob("results/*/" + RECORD))]:
            OutputFolder(made).remove_stale()
    outputs = OutputFolder(folder)
    for name in RUN_FILES:
        outputs.claim(name)
    write_json(folder / "config.json", settings)
    write_json(folder / "split.json", split)


def stop_if_diverged(trainer: Trainer, recent: Sequence[list[int]], path: Path) -> None:
    """Raise UserError after MAX_BAD_STEPS non-finite steps in a row, with the images of these steps named in `path`."""
    if trainer.bad_steps[0] < MAX_BAD_STEPS:
        return
    index = trainer.loaders.data.index
    rows = sorted(set(gather([row for rows in recent for row in rows])))
    names = [f"{index['patient'][r]} frame {index['frame'][r]} slice {index['slice'][r]}" for r in rows]
    if trainer.process.is_main:
        path.write_text("\n".join(names) + "\n")
    raise UserError(
        f"the loss was not finite in {MAX_BAD_STEPS} steps in a row, up to step {trainer.step}; the last checkpoint is "
        f"from before. Try a smaller --lr or --precision fp32. {path} names the {len(names)} images of these steps: "
        + ", ".join(names[:5] + ["..."] * (len(names) > 5))
    )


class Interrupt:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C while active; a second signal ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = ""

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        self.process = os.getpid()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if os.getpid() != self.process:  # a loader's worker, forked with this handler: the parent ends it
            return
        if self.received:
            os._exit(EXIT_INTERRUPTED)
        self.received = signal.Signals(number).name


def derive_seed(*key: int) -> int:
    """A seed for PyTorch from whole numbers that name what it is for."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _best_epoch(lines: Sequence[dict[str, Any]]) -> int:
    return max(lines, key=lambda line: line["val_dice"])["epoch"]


def _numpy(image: torch.Tensor) -> np.ndarray:
    """(N, 1, H, W) -> (N, H, W) on the CPU."""
    return image[:, 0].cpu().numpy()
