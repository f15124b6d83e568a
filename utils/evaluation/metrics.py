"""Evaluation figures: the paper's Dice and the volumetric figures in native space (README, Evaluation)."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from skimage import measure


def paper_dice(probability: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Paper protocol: per slice, one Dice pooled over all structures of the thresholded ensemble softmax.

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
    """Dice (percent), HD95 and ASSD (mm) of one structure in its native grid.

    Args:
        prediction, truth: (X, Y, Z) bool.
        spacing: mm per voxel.

    Returns:
        dict with dice, hd95, assd, missed; None when both are empty (excluded). When one of the two is empty it is
        a miss: Dice 0 and both distances the image diagonal in mm.
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
    """Keep the largest connected component (26-neighbourhood) of every structure of a label map (X, Y, Z)."""
    kept = np.zeros_like(labels)
    for value in np.unique(labels[labels > 0]):
        components = measure.label(labels == value)
        kept[components == np.bincount(components.ravel())[1:].argmax() + 1] = value
    return kept


def cardiac_figures(volumes: Mapping[tuple[str, str], float]) -> dict[str, tuple[float, str]]:
    """Clinical figures of a heart.

    Args:
        volumes: ml by (phase "ED" or "ES", structure "LV", "MYO" or "RV").

    Returns:
        (value, unit) by name: end-diastolic and end-systolic volumes, ejection fractions (NaN for an empty
        ventricle), and the myocardial mass at ED, by a density of 1.05 g/ml.
    """
    figures = {}
    for ventricle in ("LV", "RV"):
        diastolic, systolic = volumes["ED", ventricle], volumes["ES", ventricle]
        figures[f"{ventricle} EDV"] = (diastolic, "ml")
        figures[f"{ventricle} ESV"] = (systolic, "ml")
        figures[f"{ventricle} EF"] = (100 * (1 - systolic / diastolic) if diastolic else float("nan"), "%")
    return figures | {"MYO mass": (1.05 * volumes["ED", "MYO"], "g")}


def agreement_limits(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """Bland-Altman figures of prediction against truth: bias, SD of the differences, 95 % limits, mean error.

    Bias and mean error with their 95 % bootstrap intervals. Pairs with a NaN are left out; a figure that needs more
    pairs than there are is None.
    """
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    known = np.isfinite(truth) & np.isfinite(predicted)
    truth, predicted = truth[known], predicted[known]
    difference = predicted - truth
    if not len(difference):
        names = ("bias", "bias_ci95", "sd", "limits", "mae", "mae_ci95", "truth_mean", "predicted_mean")
        return dict.fromkeys(names) | {"n": 0}
    bias, sd = float(difference.mean()), float(difference.std(ddof=1)) if len(difference) > 1 else None
    return {
        "bias": bias,
        "bias_ci95": bootstrap_interval(difference),
        "sd": sd,
        "limits": None if sd is None else [bias - 1.96 * sd, bias + 1.96 * sd],
        "mae": float(np.abs(difference).mean()),
        "mae_ci95": bootstrap_interval(np.abs(difference)),
        "truth_mean": float(truth.mean()),
        "predicted_mean": float(predicted.mean()),
        "n": len(difference),
    }


def bootstrap_interval(values: Sequence[float], *, repeats: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean over patients; None for fewer than 2 values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(repeats, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)
