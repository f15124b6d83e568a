"""The state of a run on its device, and one training step of it.

Everything random in a step follows from (seed, step): sampling, augmentation, CutMix and dropout. A checkpoint
therefore needs no generator states, and a run that was stopped anywhere continues bit for bit on a CPU.
"""

import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import Config
from utils.data.loaders import Loaders
from utils.device import Process, autocast_context, average, gather, unflatten
from utils.errors import UserError
from utils.evaluation.predict import Predictor, mean_dice, predict_scans
from utils.method.augment import Augmentation, cutmix_mask
from utils.method.losses import kl_variance
from utils.method.objective import UnlabeledViews, pseudo_label, training_step
from utils.plots import plot_training_samples
from utils.run.checkpoint import run_metadata
from utils.run.folder import load_initial

MAX_BAD_STEPS = 10  # non-finite steps in a row before training gives up
SELECTION = "highest ensemble Dice (paper protocol) on {images}; the target domain is never looked at"

Batch = dict[str, torch.Tensor]
BuildNetwork = Callable[..., nn.Module]
State = dict[str, Any]  # of a run, as its checkpoints hold it
Sums = dict[str, torch.Tensor]  # by name
COUNTERS = ("epoch_sums", "point_sums", "bad_steps")  # tensors for the next lines of the log


class Trainer:
    """The state of a run on its device: networks, optimiser, step, and what the log adds up."""

    def __init__(
        self, cfg: Config, loaders: Loaders, build_network: BuildNetwork, process: Process, state: State | None = None
    ):
        """Begin anew, or where the method `state` was called."""
        self.cfg, self.loaders, self.process, self.device = cfg, loaders, process, process.device
        self.autocast = partial(autocast_context, self.device, cfg.precision)
        self.nets = []
        for i in range(2):
            torch.manual_seed(derive_seed(cfg.seed, 3, i))
            pretrained = "none" if state or cfg.init_from else cfg.pretrained
            net = build_network(len(loaders.dataset.class_names), pretrained=pretrained)
            if process.world_size > 1 and self.device.type == "cuda":  # SyncBatchNorm refuses CPUs
                net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
            self.nets.append(net.to(self.device, memory_format=torch.channels_last).train())
        split = loaders.split
        index, rows = loaders.data.index, loaders.labeled.dataset.rows
        self.labeled = dict(zip(index["patient"][rows].tolist(), index["domain"][rows].tolist(), strict=True))
        # Patients whose images the networks learn or have learnt from, by checksum of a frame.
        self.seen = loaders.data.checksums([*split.labeled, *split.unlabeled, *split.validation])
        held_out = loaders.data.checksums(split.held_out)
        if known := sorted({f"{held_out[key]} is {self.seen[key]}" for key in held_out.keys() & self.seen.keys()}):
            raise UserError(f"{loaders.data.root}: held-out scans are training scans, too: {', '.join(known[:5])}")
        if cfg.init_from and not state:
            self.seen |= load_initial(Path(cfg.init_from), self.nets, loaders.dataset, held_out)
        torch.backends.cudnn.benchmark = self.device.type == "cuda"  # shapes repeat from step to step
        # A training step calls these; evaluation calls the networks themselves.
        self.step_nets = self.nets
        if cfg.compile and not shutil.which(os.environ.get("CXX", "g++")):
            process.say("warning: --compile needs a C++ compiler (g++), and there is none: training without it")
        elif cfg.compile:
            self.step_nets = [torch.compile(net) for net in self.nets]
        if cfg.checkpoint_activations:  # torch.compile cannot look into it
            self.step_nets = [checkpointed(net) for net in self.step_nets]
        self.parameters = [parameter for net in self.nets for parameter in net.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        reference = torch.from_numpy(loaders.reference).to(self.device) if cfg.histogram_matching else None
        self.mean_reference = None if reference is None else reference.mean(0)
        self.augmentation = Augmentation(cfg, reference, len(loaders.dataset.class_names))
        self.generator = torch.Generator(self.device)
        self.statistics = [s for norm in batch_norms(self.nets) for s in (norm.running_mean, norm.running_var)]
        self.step = 0
        self.best = -1.0  # percent
        self.epoch_sums: Sums = {}  # of the scalars since the last line of the log, on the device
        self.point_sums: Sums = {}  # the same since the last point of the curves
        zero = torch.zeros((), device=self.device)
        self.bad_steps = {"in_row": zero, "in_epoch": zero}  # counts of steps that were not finite
        self.recent_rows: deque[list[int]] = deque(maxlen=MAX_BAD_STEPS)  # of the index
        self.stop_asked = zero  # above 0 where any process was to stop after this step
        self.epoch_began = time.monotonic()
        self.validated = f"{'validation' if cfg.val_patients else 'training'} images (labelled, source)"
        if state:
            self._load_state(state)

    @property
    def epoch(self) -> int:
        """The number of the epoch that the last step belongs to, from 1."""
        return math.ceil(self.step / self.loaders.steps_per_epoch)

    def start_epoch(self) -> None:
        """Forget what the log has counted of the last epoch."""
        self.epoch_sums, self.epoch_began = {}, time.monotonic()
        self.bad_steps["in_epoch"] = torch.zeros_like(self.bad_steps["in_epoch"])

    def cps_weight(self, step: int) -> float:
        """Return beta at a step, after warm-up and ramp."""
        epoch = step / self.loaders.steps_per_epoch
        if epoch < self.cfg.cps_warmup:
            return 0.0
        ramp = (epoch - self.cfg.cps_warmup) / self.cfg.cps_ramp if self.cfg.cps_ramp else 1.0
        return self.cfg.cps_weight * min(ramp, 1.0)

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        return self.cfg.lr * (1 - step / self.loaders.total_steps) ** self.cfg.lr_power

    def labeled_views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a labelled batch: image (B, 1, size, size) float32, mask (B, size, size) int64."""
        return self.augmentation.labeled(*self._on_device(batch, "image", "mask", "quantiles"), self.generator)

    def unlabeled_views(self, batch: Batch) -> UnlabeledViews:
        """Augment an unlabelled batch of B, or with CutMix 2 B, canvases."""
        image, quantiles = self._on_device(batch, "image", "quantiles")
        plain, fourier = self.augmentation.unlabeled(image, quantiles, self.generator)
        parts, box_mask = 1, None
        if self.cfg.cutmix:
            parts, box_mask = 2, cutmix_mask(len(image) // 2, self.cfg.image_size, generator=self.generator)
        student = self.augmentation.changed(plain, self.generator)
        pairs = [None if view is None else view.chunk(parts) for view in (plain, fourier, student)]
        return UnlabeledViews(*pairs, box_mask)

    def _on_device(self, batch: Batch, *names: str) -> list[torch.Tensor]:
        return [batch[name].to(self.device, non_blocking=True) for name in names]

    def first_cps_step(self, total: int) -> int:
        """Return the first step from now on that has pseudo supervision; `total` where none has."""
        return next(filter(self.cps_weight, range(self.step, total)), total)

    def train_step(self, batches: Sequence[tuple[Batch, Batch | None]], *, stop: bool = False) -> None:
        """Take one step of both networks, with a micro-step per pair of a labelled and an unlabelled batch.

        A step that is not finite changes nothing, which the device decides alone. `stop`: this process was asked to
        stop, which `stop_asked` then tells all of them.
        """
        cfg, rank, weight = self.cfg, self.process.rank, self.cps_weight(self.step)
        self.recent_rows.append([row for pair in batches for batch in pair if batch for row in batch["row"].tolist()])
        statistics_before = torch.cat(self.statistics)
        micro_steps = []
        for number, (labeled, unlabeled) in enumerate(batches, start=self.step * cfg.accumulate):
            self.generator.manual_seed(derive_seed(cfg.seed, 4, number, rank))
            torch.manual_seed(derive_seed(cfg.seed, 5, number, rank))  # dropout
            image, mask = self.labeled_views(labeled)
            views = self.unlabeled_views(unlabeled) if weight else None
            scalars = training_step(
                *(self.step_nets, image, mask, views),
                dice_classes=slice(0 if cfg.dice_background else 1, None),
                cps_loss=cfg.cps_loss,
                cps_weight=weight,
                autocast=self.autocast,
                loss_scale=1 / cfg.accumulate,
                cfg=cfg,
            )
            micro_steps.append(scalars)
        scalars = {name: torch.stack([part[name] for part in micro_steps]).mean() for name in micro_steps[0]}
        finite = self._update(scalars["loss"], statistics_before, stop)
        counts = {"steps": 1, "cps_steps": weight > 0, "cps_weight": weight}
        scalars |= {name: torch.full_like(scalars["loss"], count) for name, count in counts.items()}
        for name, value in scalars.items():
            counted = torch.where(finite, value, 0)
            for sums in (self.epoch_sums, self.point_sums):
                sums[name] = sums.get(name, 0) + counted
        self.step += 1

    def _update(self, loss: torch.Tensor, statistics_before: torch.Tensor, stop: bool) -> torch.Tensor:
        """Step by the processes' mean gradient if it and the loss are finite; return whether they are."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # One mean for all, the loss among them: so every process finds the same steps not finite.
        loss, self.stop_asked = loss.clone(), torch.full_like(loss, stop)
        average([*gradients, *self.statistics, loss, self.stop_asked])
        finite = torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.step)
        self.optimizer.found_inf = (~finite).float()  # the fused step changes nothing where it is 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        unflatten(torch.where(finite, torch.cat(self.statistics), statistics_before), self.statistics)
        bad = (~finite).float()
        in_row, in_epoch = self.bad_steps.values()
        self.bad_steps = {"in_row": (in_row + 1) * bad, "in_epoch": in_epoch + bad}
        return finite

    def mean_scalars(self, totals: Sums) -> dict[str, float | None]:
        """Return means of `epoch_sums` or `point_sums` over finite steps; of CPS over its own."""
        values = [total.clone() for total in totals.values()]
        average(values)
        sums = dict(zip(totals, map(float, values), strict=True))
        steps, cps_steps = max(sums.pop("steps"), 1), sums.pop("cps_steps")
        means = {name: sums[name] / steps for name in ("loss", "supervised")}
        means |= {name: sums[name] / max(cps_steps, 1) for name in ("cps", "cps_weight")}
        return means | {"variance": sums["variance"] / cps_steps if cps_steps else None}

    @contextmanager
    def evaluating(self) -> Iterator[Predictor]:
        """Keep the networks in eval mode, and yield what predicts with them."""
        for net in self.nets:
            net.eval()
        try:
            yield Predictor(self.nets, self.mean_reference, self.cfg, self.autocast)
        finally:  # a picture that fails does not end the training
            for net in self.nets:
                net.train()

    def validate(self) -> float:
        """Return the mean paper Dice (percent) on the labelled source images."""
        with self.evaluating() as predictor:
            scans = predict_scans(predictor, self.loaders.val, self.loaders.data)
            # Each process predicts its share; sorted, so that sums do not depend on who did which.
            slice_dice = gather([(scan.patient, scan.phase, scan.slice_dice.tolist()) for scan in scans])
        return float(np.mean(list(mean_dice(sorted(slice_dice)).values())))

    @torch.no_grad()
    def draw_samples(self, path: Path, title: str) -> None:
        """Draw views of the last step's unlabelled batch, pseudo labels and confidence."""
        loader = self.loaders.unlabeled
        positions = loader.sampler.batch_of_number((self.step - 1) * self.cfg.accumulate)
        parts = np.split(positions, 2) if self.cfg.cutmix else [positions]
        self.generator.manual_seed(derive_seed(self.cfg.seed, 6, self.step))
        views = self.unlabeled_views(loader.dataset[np.concatenate([part[:4] for part in parts])])
        fourier = views.fourier or views.plain
        mixed = [views.mix(views.student), views.mix(fourier)]
        with self.evaluating(), self.autocast():
            labels = [pseudo_label(net, views)[0] for net in self.nets]
            variances = [kl_variance(*(net(image).float() for image in mixed)) for net in self.nets]
        box_mask = torch.zeros_like(mixed[0]) if views.box_mask is None else views.box_mask
        images = {"plain": views.plain[0], "fourier": fourier[0], "mixed": mixed[0], "mask_box": box_mask}
        maps = {name: image[:, 0] for name, image in images.items()}
        maps |= {"pseudo_labels": torch.stack(labels), "confidence": torch.exp(-torch.stack(variances))}
        arrays = {name: values.cpu().numpy() for name, values in maps.items()}
        plot_training_samples(path, **arrays, class_names=self.loaders.dataset.class_names[1:], title=title)

    def state(self) -> State:
        """Return all that resuming needs, as plain tensors and values, alike in every process."""
        average([*self.epoch_sums.values(), *self.point_sums.values()])
        return {
            "step": self.step,
            "best": self.best,
            **{name: getattr(self, name) for name in COUNTERS},
            "metadata": self.metadata(),
            "networks": [net.state_dict() for net in self.nets],
            "optimizer": self.optimizer.state_dict(),
        }

    def _load_state(self, state: State) -> None:
        if state["metadata"]["content_hash"] != self.loaders.data.info["content_hash"]:
            raise UserError(f"{self.loaders.data.root} holds other data than this run began with: give the --data-root "
                            "of these, or begin anew with --restart")  # fmt: skip
        if state["metadata"]["labeled"] != self.labeled:
            names = f"--labeled-patients {self.cfg.labeled_patients}"
            raise UserError(f"{names}: this run began with other patients; begin anew with --restart")
        self.step, self.best = state["step"], state["best"]
        self.seen = state["metadata"]["seen"]
        for name in COUNTERS:
            setattr(self, name, {key: value.to(self.device) for key, value in state[name].items()})
        for net, weights in zip(self.nets, state["networks"], strict=True):
            net.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        # The fused step reads memory as the parameter lies, and on CPUs does not check that.
        for parameter, values in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                values[name] = torch.empty_like(parameter).copy_(values[name])

    def metadata(self) -> dict[str, Any]:
        """Return what inference needs beside the weights."""
        return run_metadata(
            *(self.loaders.dataset, asdict(self.cfg), self.mean_reference, self.loaders.data.info),
            selection=SELECTION.format(images=self.validated),
            step=self.step,
            cps_weight=self.cps_weight(self.step - 1),
            seen=self.seen,
            labeled=self.labeled,
        )


def checkpointed(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `net` with activation checkpointing: a forward keeps its input alone."""

    @contextmanager
    def frozen_statistics() -> Iterator[None]:
        """Keep BatchNorm's running statistics, which have counted this batch already."""
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
    """Return all BatchNorm layers of the networks."""
    return [m for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]


def derive_seed(*key: int) -> int:
    """Return a seed for PyTorch from whole numbers that name its use."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
