"""Calibration, ranks and risk-coverage curves against slow answers, hand-computed cases and known limits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from utils.evaluation.calibration import (
    BINS,
    Reliability,
    Trust,
    auroc,
    coverage_curve,
    ranked_risk,
    ranked_risks,
    trust_tables,
)


def pixels(seed, count=400, classes=4):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 2, (count, classes)).astype(np.float32))
    return logits.softmax(1), torch.from_numpy(rng.integers(classes, size=count))


def slow_calibration(probability, truth):
    """As Guo et al. (2017) and Brier (1950) write it, pixel by pixel."""
    bins = [[] for _ in range(BINS)]
    brier = 0.0
    for p, y in zip(probability.double().numpy(), truth.numpy(), strict=True):
        bins[min(int(p.max() * BINS), BINS - 1)].append((p.max(), p.argmax() == y))
        brier += sum((p[k] - (k == y)) ** 2 for k in range(len(p)))
    gaps = [len(b) * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins if b]
    return 100 * sum(gaps) / len(truth), brier / len(truth)


def test_calibration_is_that_of_a_slow_version_whatever_the_parts():
    parts = [pixels(0), pixels(1, count=7), pixels(2, count=1000)]
    running = Reliability()
    for part in parts:
        running.add(*part)
    ece, brier = slow_calibration(*(torch.cat(column) for column in zip(*parts, strict=True)))
    assert running.summary() == {"ece": pytest.approx(ece, abs=1e-9), "brier": pytest.approx(brier, abs=1e-6)}


def test_calibration_of_known_cases():
    perfect, overconfident, hand = Reliability(), Reliability(), Reliability()
    labels = torch.tensor([0, 1, 1, 0])
    perfect.add(torch.nn.functional.one_hot(labels, 2).float(), labels)
    assert perfect.summary() == {"ece": 0, "brier": 0}
    overconfident.add(torch.nn.functional.one_hot(1 - labels, 2).float(), labels)
    assert overconfident.summary() == {"ece": 100, "brier": 2}
    # 0.8 twice, right once: a gap of 0.3; 0.6 twice, right twice: a gap of 0.4.
    hand.add(torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]]), torch.tensor([0, 1, 0, 0]))
    assert hand.summary() == {"ece": pytest.approx(35), "brier": pytest.approx((0.08 + 1.28 + 0.32 + 0.32) / 4)}
    assert Reliability().summary() == {"ece": None, "brier": None}


def test_calibration_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    running, (probability, truth) = Reliability(), pixels(3)
    running.add(probability, truth)
    error = torchmetrics.multiclass_calibration_error(probability, truth, 4, n_bins=BINS, norm="l1")
    assert running.summary()["ece"] == pytest.approx(100 * float(error), abs=1e-3)


def test_auroc_is_that_of_pairs_and_of_the_rank_sum_test():
    rng = np.random.default_rng(0)
    score, wrong = rng.integers(6, size=60) / 6, rng.random(60) < 0.4
    found = auroc(ranked_risk(score, wrong))
    assert found == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in score[~wrong] for b in score[wrong]]))
    u = mannwhitneyu(score[~wrong], score[wrong]).statistic
    assert found == pytest.approx(u / (wrong.sum() * (~wrong).sum()))
    for other, expected in ((~wrong, 1), (wrong, 0), (np.ones(60), 0.5)):
        assert auroc(ranked_risk(np.asarray(other, float), wrong)) == pytest.approx(expected)
    assert auroc(ranked_risk(score, np.zeros(60))) is None
    assert auroc(ranked_risk(score, np.ones(60))) is None


def test_risk_coverage_by_hand_and_between_its_limits():
    # By 3, 2, 1: risks 0, then the tied 1 and 0 (each 0.5), then 1.
    ranked = ranked_risk(np.array([2, 3, 2, 1.0]), np.array([1, 0, 0, 1.0]))
    assert ranked.tolist() == [0, 0.5, 0.5, 1]
    assert coverage_curve(ranked) == pytest.approx([0, 1 / 4, 1 / 3, 1 / 2])
    rng = np.random.default_rng(0)
    risk = rng.random(30)
    found = ranked_risks({"oracle": -risk, "blind": np.zeros(30), "noise": rng.random(30), "worst": risk}, risk)
    assert found["oracle"] == pytest.approx(found["best possible"]) and found["blind"] == pytest.approx(found["random"])
    orders = [np.cumsum(rng.permutation(risk)) / np.arange(1, 31) for _ in range(4000)]
    assert coverage_curve(found["random"]) == pytest.approx(np.mean(orders, 0), abs=0.02)
    areas = [coverage_curve(found[name]).mean() for name in ("oracle", "noise", "worst")]
    assert areas == sorted(areas)
    assert areas[0] == pytest.approx(np.mean([np.sort(risk)[:n].mean() for n in range(1, 31)]))


def test_trust_gathers_scans_slices_and_patients():
    """Two patients of a slice each: one predicted perfectly and surely, one all wrong and unsure."""
    truth = torch.zeros(60, 60, dtype=torch.long)
    truth[20:40, 20:40] = 1
    trust = Trust()
    for patient, sure, dice in (("a", 1.0, 1.0), ("b", 0.6, 0.25)):
        label = truth if patient == "a" else 1 - truth
        probability = torch.where(torch.nn.functional.one_hot(label, 2).bool(), sure, 1 - sure).movedim(-1, 0)[None]
        agreement = torch.where(label > 0, sure, 0.0)[None]
        scan = {"patient": patient, "phase": "ED", "truth": truth[None], "confidence": 1 - agreement}
        maps = {"probability": probability, "agreement": agreement, "slice_dice": np.array([dice])}
        trust.add(SimpleNamespace(**scan, **maps))
    summary = trust.summary()
    for kind in ("slices", "patients"):  # kept first is the right one: risks 0, then (0 + 75) / 2
        areas = {name: pytest.approx(37.5 / 2) for name in ("agreement", "softmax maximum", "best possible")}
        areas["exp(−V)"] = pytest.approx((75 + 37.5) / 2)  # surest where all is wrong: 75, then (75 + 0) / 2
        assert summary["risk"][kind] == {"number": 2, "random": pytest.approx(37.5), **areas}
    assert summary["calibration"]["field of view"]["ece"] == pytest.approx(30, abs=1e-4)  # 0 and 60 points
    titles = [table.title for table in trust_tables(summary)]
    assert titles == ["Calibration", "Risk when cases are kept by a score"]
