"""Metrics of a scan: the paper's Dice on the network's grid, overlap and distances in the scan's own grid."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from skimage import measure

METRICS = {"dice": "Dice (%)", "hd95": "HD95 (mm)", "assd": "ASSD (mm)"}  # of a structure, by their keys in files


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
    """Return Dice (percent), HD95 and ASSD (mm) of one structure in its native grid.

    Args:
        prediction, truth: (X, Y, Z) bool.
        spacing: mm per voxel.

    Returns:
        dict with dice, hd95, assd and missed (0 or 1); None when both are empty. When one of the two is empty, the
        structure is missed: its Dice is 0 and both distances are the image diagonal in mm.
    """
    # Imported here: it takes seconds, which training and every mistyped command would wait for.
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    if not prediction.any() and not truth.any():
        return None
    if not prediction.any() or not truth.any():
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        return {"dice": 0.0, "hd95": diagonal, "assd": diagonal, "missed": 1}
    dice = 200 * np.count_nonzero(prediction & truth) / (np.count_nonzero(prediction) + np.count_nonzero(truth))
    pair = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
    spacing = [float(s) for s in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # monai's notes on the backend it takes for the edges
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        assd = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
    return {"dice": float(dice), "hd95": float(hd95), "assd": float(assd), "missed": 0}


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
