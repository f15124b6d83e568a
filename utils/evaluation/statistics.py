"""Statistics over patients: mean with bootstrap interval, and the agreement of predicted with true quantities."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def mean_std_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, the sample standard deviation "std" and the interval "ci95"; None for what there is not."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    mean = float(np.mean(values)) if len(values) else None
    return {"mean": mean, "std": std, "ci95": bootstrap_interval(values)}


def bootstrap_interval(values: Sequence[float], *, repeats: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean over patients; None for fewer than 2 values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(repeats, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several tests adjusted for their number by Holm's step-down method."""
    order, count = np.argsort(p_values), len(p_values)
    steps = np.maximum.accumulate(np.sort(p_values) * (count - np.arange(count)))
    return np.minimum(steps, 1)[np.argsort(order)].tolist()


def agreement_limits(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """Compare predictions with their truths as Bland and Altman do.

    Returns:
        Bias and mean absolute error "mae" with their bootstrap intervals, standard deviation "sd" of the differences,
        95 % "limits", both means and the number "n" of pairs. Pairs with a NaN are left out; a value that needs more
        pairs than there are is None.
    """
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    known = np.isfinite(truth) & np.isfinite(predicted)
    truth, predicted = truth[known], predicted[known]
    difference, error = mean_std_interval(predicted - truth), mean_std_interval(np.abs(predicted - truth))
    bias, sd = difference["mean"], difference["std"]
    return {
        "bias": bias,
        "bias_ci95": difference["ci95"],
        "sd": sd,
        "limits": None if sd is None else [bias - 1.96 * sd, bias + 1.96 * sd],
        "mae": error["mean"],
        "mae_ci95": error["ci95"],
        "truth_mean": mean_std_interval(truth)["mean"],
        "predicted_mean": mean_std_interval(predicted)["mean"],
        "n": len(truth),
    }
