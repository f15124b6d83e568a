"""Metrics of a scan, on the network's grid and in the scan's own; statistics over patients."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from skimage import measure

# Metrics of a structure, by their keys in files.
VOLUMETRIC = {"dice": "Dice (%)", "hd95": "HD95 (mm)", "assd": "ASSD (mm)"}
IN_PLANE = {"hd95_2d": "in-plane HD95 (mm)", "assd_2d": "in-plane ASSD (mm)"}
METRICS = VOLUMETRIC | IN_PLANE
MISSED_SLICES = (
    "A slice that has the structure on one side only is counted as missed and has no in-plane "
    "distance; where every slice is missed, it is the plane's diagonal."
)


def paper_dice(probability: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the paper's Dice of slices: all structures pooled, mean softmax above 0.5.

    Args:
        probability: (B, K, H, W), class 0 is the background.
        labels: (B, H, W) integer.

    Returns:
        (B,) in [0, 1]; 1 where truth and prediction are both empty (eps 1e-4 in numerator and
        denominator).
    """
    predicted = probability[:, 1:] > 0.5
    classes = torch.arange(1, probability.shape[1], device=labels.device)[:, None, None]
    truth = labels[:, None] == classes
    dims = (1, 2, 3)
    return (2 * (predicted & truth).sum(dims) + 1e-4) / (predicted.sum(dims) + truth.sum(dims) + 1e-4)


def structure_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float] | None:
    """Return Dice (percent), HD95 and ASSD (mm) of one structure in its native grid.

    Args:
        prediction, truth: (X, Y, Z) bool.
        spacing: mm per voxel.

    Returns:
        dict with dice, hd95, assd and missed (0 or 1); None when both are empty. When one of the
        two is empty, the structure is missed: its Dice is 0 and both distances are the image
        diagonal in mm.
    """
    if not prediction.any() and not truth.any():
        return None
    if not prediction.any() or not truth.any():
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        return {"dice": 0.0, "hd95": diagonal, "assd": diagonal, "missed": 1}
    dice = 200 * np.count_nonzero(prediction & truth) / (np.count_nonzero(prediction) + np.count_nonzero(truth))
    hd95, assd = surface_distances(prediction, truth, spacing)
    return {"dice": float(dice), "hd95": hd95, "assd": assd, "missed": 0}


def plane_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float] | None:
    """Return HD95 and ASSD (mm) of one structure's contours in the slices' planes.

    Args:
        prediction, truth: (X, Y, Z) bool.
        spacing: mm per voxel.

    Returns:
        dict with hd95_2d, assd_2d, slices (that have the structure in either) and missed_slices
        (that have it in only one); None when both are empty. A missed slice has no distance of its
        own, as the plane's diagonal would drown those of all others: it is counted. Where every
        slice is missed, both distances are the diagonal.
    """
    in_prediction, in_truth = prediction.any((0, 1)), truth.any((0, 1))
    in_both, slices = np.flatnonzero(in_prediction & in_truth), int((in_prediction | in_truth).sum())
    if not slices:
        return None
    distances = [surface_distances(prediction[..., z], truth[..., z], spacing[:2]) for z in in_both]
    diagonal = float(np.linalg.norm(np.multiply(truth.shape[:2], spacing[:2])))
    hd95, assd = np.mean(distances, axis=0).tolist() if distances else (diagonal, diagonal)
    return {"hd95_2d": hd95, "assd_2d": assd, "slices": slices, "missed_slices": slices - len(in_both)}


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """Return HD95 and ASSD in mm of two bool masks, neither of them empty, of 2 or 3 dimensions."""
    # Imported here: it takes seconds, which training and every mistyped command would wait for.
    from monai.metrics.utils import get_edge_surface_distance

    [box] = ndimage.find_objects((prediction | truth).view(np.uint8))  # the rest costs time, and changes no distance
    pair = [torch.from_numpy(np.ascontiguousarray(mask[box])) for mask in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # monai's notes on itself
        _, distances, _ = get_edge_surface_distance(*pair, spacing=[float(s) for s in spacing], symmetric=True)
    hd95 = max(torch.quantile(directed, 0.95) for directed in distances)
    return float(hd95), float(torch.cat(distances).mean())


def largest_components(labels: np.ndarray) -> np.ndarray:
    """Return labels (X, Y, Z) with each structure's largest component (26 neighbours) only."""
    kept = np.zeros_like(labels)
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            components = measure.label(labels[box] == value)
            kept[box][components == np.bincount(components.ravel())[1:].argmax() + 1] = value
    return kept


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """Return the "mean" and the sample standard deviation "std"; None for what there is not."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)) if len(values) else None, "std": std}


def bootstrap_interval(values: Sequence[float], *, repeats: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean; None below 2 values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(repeats, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def mean_std_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return `mean_and_std`, and the `bootstrap_interval` as "ci95"."""
    return mean_and_std(values) | {"ci95": bootstrap_interval(values)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several tests adjusted for their number by Holm's step-down method."""
    order, count = np.argsort(p_values), len(p_values)
    steps = np.maximum.accumulate(np.sort(p_values) * (count - np.arange(count)))
    return np.minimum(steps, 1)[np.argsort(order)].tolist()


def agreement_limits(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """Compare predictions with their truths as Bland and Altman do.

    Returns:
        Bias and mean absolute error "mae" with their bootstrap intervals, standard deviation "sd"
        of the differences, 95 % "limits", both means and the number "n" of pairs. Pairs with a NaN
        are left out; a value that needs more pairs than there are is None.
    """
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    known = np.isfinite(truth) & np.isfinite(predicted)
    truth, predicted = truth[known], predicted[known]
    difference, error = mean_std_interval(predicted - truth), mean_std_interval(np.abs(predicted - truth))
    bias, sd = difference["mean"], difference["std"]
    limits = None if sd is None else [bias - 1.96 * sd, bias + 1.96 * sd]
    means = {
        f"{name}_mean": mean_and_std(values)["mean"] for name, values in (("truth", truth), ("predicted", predicted))
    }
    intervals = {"bias_ci95": difference["ci95"], "mae_ci95": error["ci95"]}
    return {"bias": bias, "sd": sd, "limits": limits, "mae": error["mean"], "n": len(truth)} | means | intervals
