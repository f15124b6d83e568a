"""Metrics of a scan: the paper's Dice on the network's grid, overlap and distances in the scan's own grid."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from skimage import measure

METRICS = {  # of a structure, by their keys in files
    "dice": "Dice (%)",
    "hd95": "HD95 (mm)",
    "assd": "ASSD (mm)",
    "hd95_2d": "in-plane HD95 (mm)",
    "assd_2d": "in-plane ASSD (mm)",
}


def paper_dice(probability: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the paper's Dice: one per slice, pooled over all structures of the thresholded ensemble softmax.

    Args:
        probability: (B, K, H, W), class 0 is the background.
        labels: (B, H, W) integer.

    Returns:
        (B,) in [0, 1]; 1 where truth and prediction are both empty (eps 1e-4 in numerator and denominator).
    """
    predicted = probability[:, 1:] > 0.5
    classes = torch.arange(1, probability.shape[1], device=labels.device)[:, None, None]
    truth = labels[:, None] == classes
    dims = (1, 2, 3)
    return (2 * (predicted & truth).sum(dims) + 1e-4) / (predicted.sum(dims) + truth.sum(dims) + 1e-4)


def structure_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float] | None:
    """Return Dice (percent), and HD95 and ASSD (mm) in space and in the plane, of one structure in its native grid.

    In space, the outer faces of the first and last slice are surface, too. In the plane (hd95_2d, assd_2d), contours
    are compared slice by slice; the mean is over the slices that have the structure in truth or prediction.

    Args:
        prediction, truth: (X, Y, Z) bool.
        spacing: mm per voxel.

    Returns:
        dict with the keys of METRICS and missed (0 or 1); None when both are empty. When one of the two is empty, the
        structure is missed: its Dice is 0 and its distances are the image diagonal in mm. A slice where one of the two
        is empty counts the diagonal of the slice.
    """
    if not prediction.any() and not truth.any():
        return None
    if not prediction.any() or not truth.any():
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        in_plane = float(np.linalg.norm(np.multiply(truth.shape, spacing)[:2]))
        return {"dice": 0.0, "hd95": diagonal, "assd": diagonal, "hd95_2d": in_plane, "assd_2d": in_plane, "missed": 1}
    dice = 200 * np.count_nonzero(prediction & truth) / (np.count_nonzero(prediction) + np.count_nonzero(truth))
    # Slices with both, as a batch of images, cut to where the structure is; the others count the diagonal.
    prediction, truth = (np.moveaxis(mask, 2, 0) for mask in (prediction, truth))  # (Z, X, Y)
    has_prediction, has_truth = prediction.any((1, 2)), truth.any((1, 2))
    one_sided = np.count_nonzero(has_prediction != has_truth)
    both = has_prediction & has_truth
    diagonal = float(np.linalg.norm(np.multiply(truth.shape[1:], spacing[:2])))
    window = (slice(None), *(_around((prediction | truth).any((0, other))) for other in (2, 1)))
    in_plane = {"hd95": np.zeros(0), "assd": np.zeros(0)}
    if both.any():
        in_plane = _distances(prediction[window][both][:, None], truth[window][both][:, None], spacing[:2])
    of_slices = {f"{name}_2d": [*found, *[diagonal] * one_sided] for name, found in in_plane.items()}
    window = (_around((prediction | truth).any((1, 2))), *window[1:])
    in_space = _distances(prediction[window][None, None], truth[window][None, None], [spacing[2], *spacing[:2]])
    return {
        "dice": float(dice),
        **{name: float(value[0]) for name, value in in_space.items()},
        **{name: float(np.mean(found)) for name, found in of_slices.items()},
        "missed": 0,
    }


def _around(present: np.ndarray) -> slice:
    """Return the part of an axis that holds every True, and one more on either side."""
    found = np.flatnonzero(present)
    return slice(max(found[0] - 1, 0), found[-1] + 2)


def _distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, np.ndarray]:
    """Return HD95 and ASSD (mm) of masks (B, 1, ...), none of them empty: (B,) each."""
    # Imported here: it takes seconds, which training and every mistyped command would wait for.
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    pair = [torch.from_numpy(np.ascontiguousarray(mask)) for mask in (prediction, truth)]
    options = {"include_background": True, "spacing": [float(s) for s in spacing]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # monai's notes on the backend it takes for the edges
        hd95 = compute_hausdorff_distance(*pair, percentile=95, **options)
        assd = compute_average_surface_distance(*pair, symmetric=True, **options)
    return {"hd95": hd95[:, 0].numpy(), "assd": assd[:, 0].numpy()}


def largest_components(labels: np.ndarray) -> np.ndarray:
    """Return a label map (X, Y, Z) with the largest connected component (26 neighbours) of every structure."""
    kept = np.zeros_like(labels)
    for value in np.unique(labels[labels > 0]):
        components = measure.label(labels == value)
        kept[components == np.bincount(components.ravel())[1:].argmax() + 1] = value
    return kept


def cardiac_metrics(volumes: Mapping[tuple[str, str], float]) -> dict[str, tuple[float, str]]:
    """Return the clinical quantities of a heart.

    Args:
        volumes: ml by (phase "ED" or "ES", structure "LV", "MYO" or "RV").

    Returns:
        (value, unit) by name: end-diastolic and end-systolic volumes, ejection fractions (NaN for an empty
        ventricle), and the myocardial mass at ED, by a density of 1.05 g/ml.
    """
    quantities = {}
    for ventricle in ("LV", "RV"):
        diastolic, systolic = volumes["ED", ventricle], volumes["ES", ventricle]
        quantities[f"{ventricle} EDV"] = (diastolic, "ml")
        quantities[f"{ventricle} ESV"] = (systolic, "ml")
        quantities[f"{ventricle} EF"] = (100 * (1 - systolic / diastolic) if diastolic else float("nan"), "%")
    return quantities | {"MYO mass": (1.05 * volumes["ED", "MYO"], "g")}
