"""Methods compared patient by patient, each with the first: differences in the paper's Dice, intervals and tests."""

from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import wilcoxon

from utils.evaluation.domains import Runs
from utils.evaluation.statistics import holm, mean_std_interval
from utils.evaluation.tables import Cell, Table

FEW_PATIENTS = 6  # with fewer, no signed-rank test reaches p < 0.05
HEADER = ["", "patients", "difference [95 % CI]", "p", "p (Holm)"]


class Difference(NamedTuple):
    """A method against the reference in one domain, or in "all" of them."""

    method: str
    domain: str
    values: list[float]  # by patient, method - reference, in points of Dice


def compare_methods(methods: dict[str, Runs]) -> tuple[Table, list[Difference]]:
    """Compare every method with the first, on the patients and in the domains that both have.

    Args:
        methods: summaries by row, held-out domain and seed.

    Returns:
        A table with a row per method and domain, whose footnotes are warnings; and the differences behind its rows.
    """
    reference, *others = methods
    differences, warnings = [], []
    for method in others:
        pooled: list[float] = []
        for domain, runs in methods[method].items():
            base = methods[reference][domain]
            if not (runs and base):
                continue
            ours, theirs = _patient_dice(runs), _patient_dice(base)
            values = [ours[patient] - theirs[patient] for patient in ours.keys() & theirs.keys()]
            differences.append(Difference(method, domain, sorted(values)))
            pooled += values
            left_out = len(ours.keys() ^ theirs.keys())
            if left_out:
                warnings.append(f"{method}, {domain}: {left_out} patients are not in both and left out.")
            seeds, other_seeds = ([run["seed"] for run in found] for found in (runs, base))
            if seeds != other_seeds:
                warnings.append(f"{method}, {domain}: its seeds are {seeds}, those of {reference} {other_seeds}.")
        differences.append(Difference(method, "all", sorted(pooled)))
    few = [f"{d.method}, {d.domain}" for d in differences if len(d.values) < FEW_PATIENTS]
    if few:
        warnings.append(f"Fewer than {FEW_PATIENTS} patients, too few for p < 0.05: {'; '.join(few)}.")
    raw = np.array([wilcoxon(d.values).pvalue if any(d.values) else 1.0 for d in differences])
    domains, adjusted = np.array([d.domain for d in differences]), np.empty(len(differences))
    for domain in {*domains}:
        adjusted[domains == domain] = holm(raw[domains == domain])
    rows: list[list[Any]] = []
    for d, *p_values in zip(differences, raw, adjusted, strict=True):
        spread = mean_std_interval(d.values)
        cell = Cell(spread["mean"], ci95=spread["ci95"])
        rows.append([f"{d.method}, {d.domain}", len(d.values), cell, *(f"{p:.3g}" for p in p_values)])
    note = (
        f"Reference: {reference}. Mean difference from it in points of the paper's Dice (positive: better than the "
        "reference), paired by patient, whose Dice is the mean over a method's seeds; 95 % bootstrap interval over "
        "patients; two-sided Wilcoxon signed-rank p, and by Holm for the number of methods compared. The patients "
        "vary, not the trainings: another seed may give another difference. All: the patients of all domains."
    )
    rules = [i for i, d in enumerate(differences) if i and d.method != differences[i - 1].method]
    return Table("Comparison", note, HEADER, rows, [f"Warning: {text}" for text in warnings], rules), differences


def _patient_dice(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the Dice of every patient, averaged over the seeds; of the patients that every seed has."""
    patients = set.intersection(*(set(run["paper_dice"]) for run in runs))
    return {patient: fmean(run["paper_dice"][patient] for run in runs) for patient in patients}
