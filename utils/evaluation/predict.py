"""Ensemble prediction of both networks, used by training and inference alike."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from config import FIELD_PX, Config, pixel_mm
from utils.data.prepared import PreparedData
from utils.data.volume import PlaneMap, Volume, read_volume
from utils.evaluation.metrics import largest_components, paper_dice, plane_metrics, structure_metrics
from utils.method.augment import canvas_to_view, match_histogram, repeatable_fourier_view
from utils.method.losses import kl_variance

Autocast = Callable[[], AbstractContextManager]  # makes the context of forward passes


@torch.inference_mode()
def predict(
    nets: Sequence[nn.Module], image: torch.Tensor, *, autocast: Autocast, tta: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict with both networks in eval mode; with `tta` over 8 flips and rotations.

    Returns:
        (B, K, H, W) mean softmax and (B, H, W) agreement of the networks, exp(-KL(first ||
        second)).
    """

    def softmax(turns: int, flip: bool) -> torch.Tensor:
        view = torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))
        with autocast():
            logits = torch.stack([net(view) for net in nets])  # (2, B, K, H, W)
        back = torch.rot90(logits.float().softmax(2), -turns, (-2, -1))
        return back.flip(-1) if flip else back

    views = [(turns, flip) for turns in range(4) for flip in (False, True)] if tta else [(0, False)]
    first, second = sum(softmax(*view) for view in views) / len(views)
    divergence = (first * (first.clamp_min(1e-12) / second.clamp_min(1e-12)).log()).sum(1)
    return (first + second) / 2, torch.exp(-divergence.clamp_min(0))


class Predictor(NamedTuple):
    """Both networks of a run, in eval mode, and what they predict with."""

    nets: Sequence[nn.Module]
    reference: torch.Tensor | None  # (256,) mean quantile curve that histograms are matched to
    config: Config
    autocast: Autocast
    tta: bool = False  # average over flips and rotations, in 8 times the time

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.nets[0].parameters()).device

    def view(self, canvas: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
        """Return the networks' input, not augmented: canvases (B, 1, C, C) -> (B, 1, s, s).

        Args:
            quantiles: (B, 256) curve of each canvas.
        """
        view = canvas_to_view(canvas, self.config.image_size)
        return view if self.reference is None else match_histogram(view, quantiles, self.reference[None])

    def maps(
        self, canvas: torch.Tensor, quantiles: torch.Tensor, partners: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Predict canvases (B, 1, C, C), whose quantile curves are (B, 256).

        Args:
            partners: other canvases, whose amplitude makes the Fourier views of "confidence"; None:
                without it.

        Returns:
            The view (B, 1, s, s), and by name "probability" (B, K, s, s) and "agreement" (B, s, s),
            as `predict` gives them, and "confidence" (B, s, s): exp(-V), V the KL variance between
            plain and Fourier view.
        """
        view = self.view(canvas, quantiles)
        probability, agreement = predict(self.nets, view, autocast=self.autocast, tta=self.tta)
        maps = {"probability": probability, "agreement": agreement}
        if partners is not None:
            plain = predict(self.nets, view, autocast=self.autocast)[0] if self.tta else probability
            other = canvas_to_view(partners, self.config.image_size)
            fourier, _ = predict(self.nets, repeatable_fourier_view(view, other, self.config), autocast=self.autocast)
            maps["confidence"] = torch.exp(-kl_variance(*(p.clamp_min(1e-12).log() for p in (plain, fourier))))
        return view, maps


class ScanPrediction(NamedTuple):
    """One scan (patient and phase) as the networks see it: S slices."""

    patient: str
    phase: str
    rows: np.ndarray  # (S,) of the index
    image: torch.Tensor  # (S, s, s) input
    probability: torch.Tensor  # (S, K, s, s) mean softmax of the networks
    agreement: torch.Tensor  # (S, s, s) exp(-KL) between the networks, in [0, 1]
    confidence: torch.Tensor | None  # (S, s, s) exp(-V), in [0, 1], where wanted
    truth: torch.Tensor  # (S, s, s) labels
    slice_dice: np.ndarray  # (S,) paper protocol, in [0, 1], at FIELD_PX


def predict_scans(
    predictor: Predictor, loader: DataLoader, data: PreparedData, confidence: bool = False
) -> Iterator[ScanPrediction]:
    """Predict every scan of a loader that yields one scan per batch.

    With `confidence`, which takes one more pass (with `tta` two), a slice's partner is the one half
    the scan away.
    """
    for batch in loader:
        canvas, quantiles, mask = (batch[name].to(predictor.device) for name in ("image", "quantiles", "mask"))
        partners = canvas.roll(len(canvas) // 2, 0) if confidence else None
        view, maps = predictor.maps(canvas, quantiles, partners)
        probability, size = maps["probability"], view.shape[-1]
        # Images of every size are scored on the same grid.
        on_grid = F.interpolate(probability, size=FIELD_PX, mode="bilinear") if size != FIELD_PX else probability
        dice = paper_dice(on_grid, canvas_to_view(mask, FIELD_PX)[:, 0])
        truth = canvas_to_view(mask, size)[:, 0]
        rows = batch["row"].numpy()
        patient, phase = str(data.index["patient"][rows[0]]), str(data.index["phase"][rows[0]])
        seen = view[:, 0], probability, maps["agreement"], maps.get("confidence"), truth
        yield ScanPrediction(patient, phase, rows, *seen, dice.cpu().numpy())


def mean_dice(scans: Iterable[tuple[str, str, Sequence[float]]]) -> dict[str, float]:
    """Return the paper's Dice (percent) by patient: the mean over all slices of its scans.

    Args:
        scans: patient, phase and Dice of the slices, in [0, 1], of each.
    """
    slices: dict[str, list[float]] = defaultdict(list)
    for patient, _, dice in scans:
        slices[patient] += dice
    return {patient: 100 * float(np.mean(dice)) for patient, dice in slices.items()}


class NativeScan(NamedTuple):
    """A prediction in the scan's own grid, beside its truth."""

    labels: np.ndarray  # (X, Y, Z) uint8
    truth: np.ndarray  # (X, Y, Z) uint8
    grid: Volume  # the truth's file: affine, voxel size
    outside: tuple[int, int]  # labelled voxels outside the field of view, and all


def to_native(scan: ScanPrediction, data: PreparedData, *, keep_largest: bool = False) -> NativeScan:
    """Map a prediction to its scan's grid: bilinear softmax, argmax, largest components."""
    classes, size = scan.probability.shape[1:3]
    truth = read_volume(data.truth_path(scan.patient, scan.phase), 3)
    plane = PlaneMap(truth.array.shape[:2], truth.zooms[:2], size, pixel_mm(data.info["spacing_mm"], size))
    labels = np.empty(truth.array.shape, np.uint8)
    for z, probability in enumerate(scan.probability.float().cpu().numpy()):  # all slices at once would take gigabytes
        labels[..., z] = plane.to_native(probability).argmax(0)  # outside the field of view: background
    known = np.where(truth.array < classes, truth.array, 0)
    outside = np.count_nonzero(known[~plane.inside()]), np.count_nonzero(known)
    return NativeScan(largest_components(labels) if keep_largest else labels, known, truth, outside)


def volumetric_rows(scan: ScanPrediction, native: NativeScan, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return metrics and volumes (ml) of a scan's structures; empty on both sides has none."""
    rows = []
    for label, name in enumerate(class_names[1:], start=1):
        pair, zooms = (native.labels == label, native.truth == label), native.grid.zooms
        metrics = (structure_metrics(*pair, zooms) or {}) | (plane_metrics(*pair, zooms) or {})
        ml = float(np.prod(zooms)) / 1000  # of a voxel
        volumes = {"predicted_ml": np.count_nonzero(pair[0]) * ml, "truth_ml": np.count_nonzero(pair[1]) * ml}
        rows.append({"patient": scan.patient, "phase": scan.phase, "structure": name, **metrics, **volumes})
    return rows
