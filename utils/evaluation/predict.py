"""Ensemble prediction and evaluation, used by training and inference alike."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from config import FIELD_PX, Config, pixel_mm
from utils.data.prepared import PreparedData
from utils.data.volume import PlaneMap, Volume, read_volume
from utils.device import autocast_context
from utils.evaluation.metrics import largest_components, paper_dice, plane_metrics, structure_metrics
from utils.method.augment import canvas_to_view, match_histogram, repeatable_fourier_view
from utils.method.losses import kl_variance


class Member(NamedTuple):
    """What a run predicts with."""

    nets: Sequence[nn.Module]  # both networks, in eval mode
    reference: torch.Tensor | None  # (256,) mean quantile curve that histograms are matched to
    config: Config


class ScanPrediction(NamedTuple):
    """One scan (patient and phase) as the networks see it: S slices."""

    patient: str
    phase: str
    rows: np.ndarray  # (S,) of the index
    image: torch.Tensor  # (S, size, size) input
    probability: torch.Tensor  # (S, K, size, size) mean softmax of the networks
    agreement: torch.Tensor  # (S, size, size) exp(-KL) between the networks, in [0, 1]
    confidence: torch.Tensor | None  # (S, size, size) exp(-V), in [0, 1], where wanted
    truth: torch.Tensor  # (S, size, size) labels
    slice_dice: np.ndarray  # (S,) paper protocol, on the FIELD_PX


def prepare_view(
    canvas: torch.Tensor, quantiles: torch.Tensor, *, size: int, reference: torch.Tensor | None
) -> torch.Tensor:
    """Return the network's input without augmentation: (B, 1, C, C) canvases -> (B, 1, size, size).

    Args:
        quantiles: (B, 256) curve of each canvas.
        reference: (256,) mean quantile curve that histograms are matched to, or None.
    """
    view = canvas_to_view(canvas, size)
    return view if reference is None else match_histogram(view, quantiles, reference[None])


@torch.inference_mode()
def predict(
    nets: Sequence[nn.Module], image: torch.Tensor, *, precision: str, tta: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict with both networks (in eval mode); with `tta`, the mean over the 8 flips and right-angle rotations.

    Returns:
        (B, K, H, W) mean softmax and (B, H, W) agreement of the networks, exp(-KL(first || second)).
    """

    def softmax(turns: int, flip: bool) -> torch.Tensor:
        view = torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))
        with autocast_context(image.device, precision):
            logits = torch.stack([net(view) for net in nets])  # (2, B, K, H, W)
        back = torch.rot90(logits.float().softmax(2), -turns, (-2, -1))
        return back.flip(-1) if flip else back

    views = [(turns, flip) for turns in range(4) for flip in (False, True)] if tta else [(0, False)]
    first, second = sum(softmax(*view) for view in views) / len(views)
    divergence = (first * (first.clamp_min(1e-12) / second.clamp_min(1e-12)).log()).sum(1)
    return (first + second) / 2, torch.exp(-divergence.clamp_min(0))


def confidence_map(
    member: Member, view: torch.Tensor, plain: torch.Tensor, partner: torch.Tensor, *, precision: str
) -> torch.Tensor:
    """Return exp(-V), (B, H, W), V the KL variance between the predictions of a view and of its Fourier view.

    Args:
        view, partner: (B, 1, H, W), the second giving the Fourier view its amplitude.
        plain: (B, K, H, W) softmax of the view.
    """
    fourier, _ = predict(member.nets, repeatable_fourier_view(view, partner, member.config), precision=precision)
    return torch.exp(-kl_variance(*(probability.clamp_min(1e-12).log() for probability in (plain, fourier))))


def predict_mean(
    members: Sequence[Member], canvas: torch.Tensor, quantiles: torch.Tensor, *, size: int, precision: str, tta: bool,
    partners: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:  # fmt: skip
    """Predict canvases by the mean of several runs.

    Args:
        canvas: (B, 1, C, C), with `quantiles` (B, 256).
        partners: other canvases, whose amplitude makes the Fourier views of "confidence"; None: without it.

    Returns:
        Every member's view, and by name the means over the members of "probability" and "agreement", as `predict` gives
        them, and of "confidence", as `confidence_map`.
    """
    views = [prepare_view(canvas, quantiles, size=size, reference=member.reference) for member in members]
    maps = defaultdict(list)
    for member, view in zip(members, views, strict=True):
        probability, agreement = predict(member.nets, view, precision=precision, tta=tta)
        maps["probability"].append(probability)
        maps["agreement"].append(agreement)
        if partners is not None:
            plain = predict(member.nets, view, precision=precision)[0] if tta else probability
            other = canvas_to_view(partners, size)
            maps["confidence"].append(confidence_map(member, view, plain, other, precision=precision))
    return views, {name: sum(of) / len(members) for name, of in maps.items()}


def predict_scans(
    members: Sequence[Member], loader: DataLoader, data: PreparedData, *, device: torch.device, precision: str,
    tta: bool = False, confidence: bool = False,
) -> Iterator[ScanPrediction]:  # fmt: skip
    """Predict every scan of a loader that yields one scan per batch, by the mean of several runs.

    With `confidence`, which takes one more pass (with `tta` two), a slice's partner is the one half the scan away.
    """
    size = members[0].config.image_size
    for batch in loader:
        canvas, quantiles, mask = (batch[name].to(device) for name in ("image", "quantiles", "mask"))
        partners = canvas.roll(len(canvas) // 2, 0) if confidence else None
        how = {"size": size, "precision": precision, "tta": tta, "partners": partners}
        views, maps = predict_mean(members, canvas, quantiles, **how)
        probability = maps["probability"]
        # Images of every size are scored on the same grid.
        on_grid = F.interpolate(probability, size=FIELD_PX, mode="bilinear") if size != FIELD_PX else probability
        dice = paper_dice(on_grid, canvas_to_view(mask, FIELD_PX)[:, 0])
        truth = canvas_to_view(mask, size)[:, 0]
        rows = batch["row"].numpy()
        patient, phase = data.index["patient"][rows[0]], data.index["phase"][rows[0]]
        seen = views[0][:, 0], probability, maps["agreement"], maps.get("confidence"), truth
        yield ScanPrediction(str(patient), str(phase), rows, *seen, dice.cpu().numpy())


def mean_dice(scans: Iterable[tuple[str, str, Sequence[float]]]) -> dict[str, float]:
    """Return the paper's Dice (percent) by patient: the mean over the slices of all the patient's scans.

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
    """Map a prediction back to its scan's grid: bilinear softmax, argmax, largest components on request."""
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
    """Return metrics and volumes (ml) of every structure of one scan; one empty on both sides has no metrics."""
    rows = []
    for label, name in enumerate(class_names[1:], start=1):
        pair, zooms = (native.labels == label, native.truth == label), native.grid.zooms
        metrics = (structure_metrics(*pair, zooms) or {}) | (plane_metrics(*pair, zooms) or {})
        ml = float(np.prod(zooms)) / 1000  # of a voxel
        volumes = {"predicted_ml": np.count_nonzero(pair[0]) * ml, "truth_ml": np.count_nonzero(pair[1]) * ml}
        rows.append({"patient": scan.patient, "phase": scan.phase, "structure": name, **metrics, **volumes})
    return rows
