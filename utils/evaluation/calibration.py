"""Calibration of the ensemble, and whether a score knows the errors: the score is high where the risk is low."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from utils.evaluation.predict import ScanPrediction, mean_dice
from utils.evaluation.tables import Cell, Table

BINS = 15
SCORES = ("exp(−V)", "agreement", "softmax maximum")


def ranked_risk(score: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """Return (N,) risks from the highest score to the lowest; equal scores share their mean risk."""
    _, group, counts = np.unique(-score, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, risk) / counts, counts)


def ranked_risks(scores: Mapping[str, np.ndarray], risk: np.ndarray) -> dict[str, np.ndarray]:
    """Return `ranked_risk` by score, and its limits: the best possible order, and the mean of all random ones."""
    limits = {"best possible": np.sort(risk), "random": np.full(len(risk), risk.mean())}
    return {name: ranked_risk(score, risk) for name, score in scores.items()} | limits


def coverage_curve(ranked: np.ndarray) -> np.ndarray:
    """Return (N,) mean risks of the 1, 2, ..., N cases of the highest score; their mean is the area AURC."""
    return ranked.cumsum() / np.arange(1, len(ranked) + 1)


def auroc(ranked: np.ndarray) -> float | None:
    """Return the probability that a right case scores higher than a wrong one, ties counted half.

    Args:
        ranked: result of `ranked_risk`, the risk being 1 for wrong and 0 for right. Without both of them: None.
    """
    right = 1 - ranked
    pairs = ranked.sum() * right.sum()
    return float((ranked * (right.cumsum() - right / 2)).sum() / pairs) if pairs else None


class Reliability:
    """Running sums of calibration error and Brier score: no pixel is held after it was added."""

    def __init__(self) -> None:
        self.sums, self.squares = np.zeros((3, BINS)), 0.0  # number, confidence and right pixels by bin of confidence

    def add(self, probability: torch.Tensor, truth: torch.Tensor) -> None:
        """Add N pixels: softmax (N, K), integer labels (N,)."""
        confidence, label = probability.double().max(1)
        number = (confidence * BINS).long().clamp_max(BINS - 1).numpy()
        weights = (torch.ones_like(confidence), confidence, (label == truth).double())
        self.sums += [np.bincount(number, weight.numpy(), BINS) for weight in weights]
        # sum_k (p_k - y_k)^2, y one-hot
        true = probability.gather(1, truth[:, None]).double().sum()
        self.squares += float(probability.double().square().sum() - 2 * true + len(truth))

    def summary(self) -> dict[str, float | None]:
        """Return the expected calibration error "ece" (percent) and the "brier" score over all classes, in [0, 2]."""
        count, confidence, right = self.sums
        if not count.sum():
            return {"ece": None, "brier": None}
        gap = np.abs(confidence - right).sum() / count.sum()
        return {"ece": 100 * float(gap), "brier": self.squares / float(count.sum())}


class Trust:
    """What an evaluation says of the ensemble's confidence, gathered scan by scan."""

    def __init__(self) -> None:
        self.reliability = {"field of view": Reliability(), "foreground": Reliability()}
        self.slices: dict[str, list[tuple[str, str, list[float]]]] = {name: [] for name in ("risk", *SCORES)}

    def add(self, scan: ScanPrediction) -> None:
        """Add a scan that was predicted with its confidence, on the network's grid."""
        truth, probability = scan.truth.long().cpu(), scan.probability.float().cpu()
        maximum, label = probability.max(1)
        pixels = {"field of view": torch.ones_like(truth, dtype=torch.bool), "foreground": (label > 0) | (truth > 0)}
        for name, chosen in pixels.items():
            self.reliability[name].add(probability.movedim(1, -1)[chosen], truth[chosen])
        maps = dict(zip(SCORES, (scan.confidence.float().cpu(), scan.agreement.float().cpu(), maximum), strict=True))
        # Of the structures that were found; of the whole slice where there is none.
        found = [area if area.any() else torch.ones_like(area) for area in label > 0]
        self.slices["risk"].append((scan.patient, scan.phase, (1 - scan.slice_dice).tolist()))
        for name, values in maps.items():
            means = [float(of[area].mean()) for of, area in zip(values, found, strict=True)]
            self.slices[name].append((scan.patient, scan.phase, means))

    def curves(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the risk-coverage curves (100 - Dice, percent) of slices and patients: by score, best and random."""
        patients = {name: np.array(list(mean_dice(scans).values())) for name, scans in self.slices.items()}
        slices = {name: 100 * np.concatenate([of[2] for of in scans]) for name, scans in self.slices.items()}
        found = {}
        for kind, values in (("slices", slices), ("patients", patients)):
            risk = values.pop("risk")
            found[kind] = {name: coverage_curve(ranked) for name, ranked in ranked_risks(values, risk).items()}
        return found

    def summary(self) -> dict[str, Any]:
        """Return "calibration" by pixels and "risk": areas under the risk-coverage curves, in points of Dice."""
        areas = {
            kind: {"number": len(of["random"])} | {name: float(curve.mean()) for name, curve in of.items()}
            for kind, of in self.curves().items()
        }
        return {"calibration": {name: of.summary() for name, of in self.reliability.items()}, "risk": areas}


def trust_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables of summary.json's "calibration" and "risk"."""
    rows: Sequence[list[Any]] = [
        [name, Cell(of["ece"]), "–" if of["brier"] is None else f"{of['brier']:.4f}"]
        for name, of in summary["calibration"].items()
    ]
    note = (
        f"Of the ensemble's softmax on the network's grid. Expected calibration error of its maximum, {BINS} bins of "
        "equal width; Brier score, summed over the classes (0 to 2). Foreground: structures in truth or prediction; "
        "the background, which is easy, makes most of the field of view."
    )
    tables = [Table("Calibration", note, ["pixels", "ECE (%)", "Brier score"], rows)]
    orders = (*SCORES, "random", "best possible")
    rows = [[kind, of["number"], *(Cell(of[name]) for name in orders)] for kind, of in summary["risk"].items()]
    note = (
        "Area under the risk-coverage curve: the mean of 100 − paper Dice over all shares of cases kept, those of the "
        "highest score first; lower is better. A slice's score is the mean over the structures found in it."
    )
    return [*tables, Table("Risk when cases are kept by a score", note, ["cases", "number", *orders], rows)]
