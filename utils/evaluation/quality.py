"""Quality of a prediction without its truth: its shape, the networks' agreement, and the values on the run's scans."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.stats import spearmanr

from config import pixel_mm
from utils.data.prepared import PreparedData
from utils.evaluation.predict import ScanPrediction

MEASURES = ("volume_ml", "agreement", "confidence", "components", "gaps")
BAD_DICE = 70  # percent of a patient by the paper's protocol, below which a case counts as bad

Ranges = dict[str, dict[str, tuple[float, float]]]  # lowest and highest value by structure and measure


def structure_quality(
    labels: np.ndarray, certainty: Mapping[str, np.ndarray], class_names: Sequence[str], voxel_ml: float
) -> list[dict[str, Any]]:
    """Return the measures of every structure of one scan, on the network's grid.

    Args:
        labels: (Z, H, W) predicted.
        certainty: maps (Z, H, W) in [0, 1] by name, "agreement" and maybe "confidence".

    Returns:
        volume_ml; the mean of each map inside the structure, absent where the structure is; components, the number of
        connected ones (26 neighbours); gaps, the share of the slices between its first and last that lack it.
    """
    rows = []
    for label, name in enumerate(class_names[1:], start=1):
        mask = labels == label
        slices = np.flatnonzero(mask.any((1, 2)))
        row = {"structure": name, "volume_ml": float(mask.sum() * voxel_ml)}
        row |= {key: float(values[mask].mean()) for key, values in certainty.items() if len(slices)}
        row["components"] = int(ndimage.label(mask, np.ones((3, 3, 3)))[1])
        row["gaps"] = float(1 - len(slices) / (slices[-1] - slices[0] + 1)) if len(slices) else 0.0
        rows.append(row)
    return rows


def scan_quality(scan: ScanPrediction, data: PreparedData, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return `structure_quality` of a scan of prepared data."""
    labels, agreement = scan.probability.argmax(1).cpu().numpy(), scan.agreement.float().cpu().numpy()
    voxel_ml = (
        pixel_mm(data.info["spacing_mm"], scan.image.shape[-1]) ** 2 * data.index["slice_mm"][scan.rows[0]] / 1000
    )
    return structure_quality(labels, {"agreement": agreement}, class_names, voxel_ml)


def value_ranges(rows: Iterable[Mapping[str, Any]]) -> Ranges:
    """Return the lowest and highest value of every measure that `structure_quality` gave for many scans."""
    ranges: Ranges = {}
    for row in rows:
        of = ranges.setdefault(row["structure"], {})
        for key in (key for key in MEASURES if key in row):
            low, high = of.get(key, (row[key], row[key]))
            of[key] = (min(low, row[key]), max(high, row[key]))
    return ranges


def outside_ranges(row: Mapping[str, Any], ranges: Ranges | None) -> str:
    """Return the measures of a row that lie outside the ranges; "empty" for no voxel, "unknown" without ranges."""
    if not ranges:
        return "unknown"
    if not row["volume_ml"]:
        return "empty"
    of = ranges.get(row["structure"], {})
    return " ".join(key for key in MEASURES if key in row and key in of and not of[key][0] <= row[key] <= of[key][1])


def flag_quality(rows: Sequence[Mapping[str, Any]], dice: Mapping[str, float], ranges: Ranges) -> dict[str, Any]:
    """Return how well the flag finds patients with a Dice below BAD_DICE; None for what there is not.

    Args:
        rows: `structure_quality` of all scans, with their "patient".
        dice: percent by patient.
    """
    flagged = {row["patient"] for row in rows if outside_ranges(row, ranges)}
    bad = {patient for patient, value in dice.items() if value < BAD_DICE}
    agreement = []
    for patient in dice:
        found = [row["agreement"] for row in rows if row["patient"] == patient and "agreement" in row]
        agreement.append(np.mean(found or [0]))
    known = len(set(agreement)) > 1 and len(set(dice.values())) > 1
    good = dice.keys() - bad
    return {
        "bad": len(bad),
        "flagged": len(flagged),
        "sensitivity": 100 * len(bad & flagged) / len(bad) if bad else None,
        "specificity": 100 * len(good - flagged) / len(good) if good else None,
        "spearman": float(spearmanr(agreement, list(dice.values())).statistic) if known else None,
    }
