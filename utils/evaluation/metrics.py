"""Metrics of a scan, and statistics over patients."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from skimage import measure

METRICS = {"dice": "Dice (%)", "hd95": "HD95 (mm)", "assd": "ASSD (mm)"}  # by keys in files
SCORES = ("exp(−V)", "agreement", "softmax maximum")


def structure_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Return "dice" (percent), "hd95", "assd" (mm) and "missed" (0 or 1) of bool masks (X, Y, Z).

    `spacing` is in mm. Two empty masks give {}; one empty is a miss: Dice 0, distances of the image diagonal.
    """
    voxels = np.count_nonzero(prediction), np.count_nonzero(truth)
    if not any(voxels):
        return {}
    if not all(voxels):
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        return {"dice": 0.0, "hd95": diagonal, "assd": diagonal, "missed": 1}
    # Imported here: every mistyped command would wait seconds for it.
    from monai.metrics.utils import get_edge_surface_distance

    [box] = ndimage.find_objects((prediction | truth).view(np.uint8))  # the rest changes no distance
    pair = [torch.from_numpy(np.ascontiguousarray(mask[box])) for mask in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # monai's notes on itself
        _, distances, _ = get_edge_surface_distance(*pair, spacing=spacing, symmetric=True)
    hd95 = float(max(torch.quantile(directed, 0.95) for directed in distances))
    dice = 200 * np.count_nonzero(prediction & truth) / sum(voxels)
    return {"dice": dice, "hd95": hd95, "assd": float(torch.cat(distances).mean()), "missed": 0}


def largest_components(labels: np.ndarray) -> np.ndarray:
    """Return labels (X, Y, Z) with each structure's largest component (26 neighbours)."""
    kept = np.zeros_like(labels)
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            components = measure.label(labels[box] == value)
            kept[box][components == np.bincount(components.ravel())[1:].argmax() + 1] = value
    return kept


def mean_std_interval(values: Sequence[float]) -> dict:
    """Return "mean", sample "std" and the mean's 95 % bootstrap interval "ci95"; None if unknown."""
    values = np.asarray(values, dtype=float)
    result = {"mean": float(values.mean()) if len(values) else None, "std": None, "ci95": None}
    if len(values) > 1:
        drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
        interval = np.percentile(values[drawn].mean(1), [2.5, 97.5]).tolist()
        result |= {"std": float(values.std(ddof=1)), "ci95": interval}
    return result


def pooled_dice(overlaps: np.ndarray, names: Sequence[str]) -> dict:
    """Return the Dice (percent) of sums over patients by structure, and their "mean"; None if all are empty.

    `overlaps` is (P, K, 2), a `structure_overlap` per patient. "ci95" has bootstrap intervals over patients.
    """
    drawn = np.random.default_rng(0).integers(len(overlaps), size=(2000, len(overlaps)))
    sums = np.concatenate([overlaps.sum(0)[None], overlaps[drawn].sum(1)])
    with np.errstate(invalid="ignore"):  # a structure that nobody has
        dice = 100 * sums[..., 0] / sums[..., 1]
    dice = np.column_stack([dice, dice.mean(1)])
    low_high, keys = np.percentile(dice[1:], [2.5, 97.5], axis=0).T.tolist(), (*names, "mean")
    return dict(zip(keys, dice[0].tolist(), strict=True)) | {"ci95": dict(zip(keys, low_high, strict=True))}


def two_level_interval(differences: Sequence[np.ndarray]) -> list[float]:
    """Return the 95 % bootstrap interval of a mean over seeds and patients, which are both drawn anew.

    Each array is (seeds, patients), of one domain. One fewer than there are is drawn, so that the mean's variance is
    not underestimated.
    """
    rng, total = np.random.default_rng(0), 0
    for values in differences:
        seeds, patients = (rng.integers(n, size=(2000, max(n - 1, 1))) for n in values.shape)
        total = total + values.shape[1] * values[seeds[:, :, None], patients[:, None]].mean((1, 2))
    return np.percentile(total / sum(values.shape[1] for values in differences), [2.5, 97.5]).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method."""
    order, count = np.argsort(p_values), len(p_values)
    steps = np.maximum.accumulate(np.sort(p_values) * (count - np.arange(count)))
    return np.minimum(steps, 1)[np.argsort(order)].tolist()


def agreement_limits(truth: Sequence[float], predicted: Sequence[float]) -> dict:
    """Compare predictions with truths as Bland and Altman do; pairs with a NaN are left out.

    Return "bias", mean absolute error "mae", their intervals, "sd" of differences, 95 % "limits",
    both means and the number "n" of pairs; what needs more pairs is None.
    """
    pairs = np.array([truth, predicted], dtype=float)
    truth, predicted = pairs[:, np.isfinite(pairs).all(0)]
    bias, sd, bias_ci95 = mean_std_interval(predicted - truth).values()
    mae, _, mae_ci95 = mean_std_interval(np.abs(predicted - truth)).values()
    limits = None if sd is None else [bias - 1.96 * sd, bias + 1.96 * sd]
    means = {"truth_mean": mean_std_interval(truth)["mean"], "predicted_mean": mean_std_interval(predicted)["mean"]}
    figures = {"n": len(truth), "bias": bias, "sd": sd, "limits": limits, "mae": mae}
    return figures | means | {"bias_ci95": bias_ci95, "mae_ci95": mae_ci95}
