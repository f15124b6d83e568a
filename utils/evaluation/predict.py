"""Prediction of both networks together, in training and inference."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config import FIELD_PX, Config
from utils.data.prepared import PreparedData
from utils.method.augment import canvas_to_view, match_histogram, repeatable_fourier_view
from utils.method.losses import kl_variance

Autocast = Callable  # without arguments; makes the context of forward passes


@torch.inference_mode()
def predict(nets: Sequence[nn.Module], image: Tensor, *, autocast: Autocast, tta=False) -> tuple[Tensor, Tensor]:
    """Return the networks' mean softmax (B, K, H, W) and agreement exp(-KL(first || second)) (B, H, W)."""
    softmax = []
    for turns, flip in product(range(4), (False, True)) if tta else [(0, False)]:
        view = torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))
        with autocast():
            logits = torch.stack([net(view) for net in nets])  # (2, B, K, H, W)
        back = torch.rot90(logits.float().softmax(2), -turns, (-2, -1))
        softmax.append(back.flip(-1) if flip else back)
    first, second = sum(softmax) / len(softmax)
    divergence = (first * (first.clamp_min(1e-12) / second.clamp_min(1e-12)).log()).sum(1)
    return (first + second) / 2, torch.exp(-divergence.clamp_min(0))


class Predictor(NamedTuple):
    """Both networks of a run and what they predict with."""

    nets: Sequence[nn.Module]
    reference: Tensor | None  # (256,) mean quantile curve that histograms are matched to
    config: Config
    autocast: Autocast
    tta: bool = False  # average over flips and rotations

    @property
    def device(self) -> torch.device:
        return next(self.nets[0].parameters()).device

    def crop(self, canvas: Tensor) -> Tensor:
        """Return the field of view (B, 1, s, s) of canvases of images (B, 1, C, C)."""
        return canvas_to_view(canvas, self.config.image_size, field=self.config.field)

    def view(self, canvas: Tensor, quantiles: Tensor) -> Tensor:
        """Return the networks' input (B, 1, s, s); arguments as in `maps`."""
        view = self.crop(canvas)
        return view if self.reference is None else match_histogram(view, quantiles, self.reference[None])

    def maps(self, canvas: Tensor, quantiles: Tensor, partners=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict canvases (B, 1, C, C), whose quantile curves are (B, 256).

        Return the view (B, 1, s, s), and "probability" and "agreement" as `predict` does; with partners,
        canvases whose amplitude makes Fourier views, also "confidence" exp(-V) (B, s, s).
        """
        view = self.view(canvas, quantiles)
        probability, agreement = predict(self.nets, view, autocast=self.autocast, tta=self.tta)
        maps = {"probability": probability, "agreement": agreement}
        if partners is not None:
            plain = predict(self.nets, view, autocast=self.autocast)[0] if self.tta else probability
            other = repeatable_fourier_view(view, self.crop(partners), self.config)
            fourier, _ = predict(self.nets, other, autocast=self.autocast)
            logits = [p.clamp_min(1e-12).log() for p in (plain, fourier)]
            maps["confidence"] = torch.exp(-kl_variance(*logits))
        return view, maps


class ScanPrediction(NamedTuple):
    """One scan as the networks see it: S slices."""

    patient: str
    phase: str
    rows: np.ndarray  # (S,) of the index
    image: Tensor  # (S, s, s) input
    probability: Tensor  # (S, K, s, s) mean softmax of the networks
    agreement: Tensor  # (S, s, s) in [0, 1]
    truth: Tensor  # (S, s, s) labels
    slice_dice: np.ndarray  # (S,) paper protocol, in [0, 1], at FIELD_PX
    overlap: np.ndarray  # (K - 1, 2) as `structure_overlap`, of all slices, at FIELD_PX
    confidence: Tensor | None = None  # (S, s, s) exp(-V), in [0, 1], where wanted


def predict_scans(
    predictor: Predictor, loader: DataLoader, data: PreparedData, confidence=False
) -> Iterator[ScanPrediction]:
    """Predict scans, each a batch of the loader; a slice's partner is half the scan away."""
    for batch in loader:
        canvas, curve, mask = (batch[name].to(predictor.device) for name in ("image", "quantiles", "mask"))
        partners = canvas.roll(len(canvas) // 2, 0) if confidence else None
        view, maps = predictor.maps(canvas, curve, partners)
        field = predictor.config.field
        on_grid = F.interpolate(maps["probability"], size=field, mode="bilinear")
        on_grid = F.pad(on_grid, [(FIELD_PX - field) // 2] * 4)  # nothing is found outside
        labels = canvas_to_view(mask, FIELD_PX)[:, 0]
        dice, overlap = (score(on_grid, labels).cpu().numpy() for score in (paper_dice, structure_overlap))
        classes = maps["probability"].shape[1]
        truth = canvas_to_view(mask, view.shape[-1], field=field, num_classes=classes)[:, 0]
        rows = batch["row"].numpy()
        patient, phase = (str(data.index[name][rows[0]]) for name in ("patient", "phase"))
        yield ScanPrediction(patient, phase, rows, view[:, 0], truth=truth, slice_dice=dice, overlap=overlap, **maps)


def paper_dice(probability: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the paper's Dice of slices, (B,) in [0, 1]: structures pooled, softmax above 0.5.

    `probability` is (B, K, H, W), class 0 the background; `labels` (B, H, W). Two empty ones give 1.
    """
    predicted = probability[:, 1:] > 0.5
    classes = torch.arange(1, probability.shape[1], device=labels.device)[:, None, None]
    truth = labels[:, None] == classes
    dims = (1, 2, 3)
    return (2 * (predicted & truth).sum(dims) + 1e-4) / (predicted.sum(dims) + truth.sum(dims) + 1e-4)


def structure_overlap(probability: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return twice the intersection and both sizes of each structure (argmax), summed over slices: (K - 1, 2)."""
    classes = torch.arange(1, probability.shape[1], device=labels.device)[:, None, None, None]
    predicted, truth = probability.argmax(1) == classes, labels == classes  # (K - 1, B, H, W)
    sums = 2 * (predicted & truth).sum((1, 2, 3)), predicted.sum((1, 2, 3)) + truth.sum((1, 2, 3))
    return torch.stack(sums, 1)


def mean_dice(scans: Iterable[tuple[str, str, Sequence[float]]]) -> dict[str, float]:
    """Return patients' means (percent) over their slices, of (patient, phase, values in [0, 1])."""
    slices: dict[str, list[float]] = defaultdict(list)
    for patient, _, dice in scans:
        slices[patient] += dice
    return {patient: 100 * float(np.mean(dice)) for patient, dice in slices.items()}
