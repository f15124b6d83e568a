"""Calibration, risk-coverage curves and the pseudo labels' monitor against slow answers and known limits."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MMS, load, train
from scipy.stats import mannwhitneyu
from torch import nn
from torch.utils._pytree import tree_leaves

from config import MMS_DEMO
from utils.data.loaders import SliceDataset, build_loaders
from utils.data.prepared import PreparedData, Split
from utils.errors import UserError
from utils.evaluation.confidence import (
    BINS,
    Uncertainty,
    auroc,
    calibration_error,
    calibration_sums,
    hidden_rows,
    monitor_pseudo_labels,
    risk_areas,
)  # fmt: skip
from utils.evaluation.predict import Predictor, ScanPrediction
from utils.method.augment import canvas_to_view


def slow_calibration(probability, truth):
    """The expected calibration error as Guo et al. (2017) write it, pixel by pixel."""
    bins = [[] for _ in range(BINS)]
    for p, y in zip(probability.double().numpy(), truth.numpy(), strict=True):
        bins[min(int(p.max() * BINS), BINS - 1)].append((p.max(), p.argmax() == y))
    gaps = [len(b) * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins if b]
    return 100 * sum(gaps) / len(truth)


def test_calibration_is_that_of_a_slow_version_and_of_known_cases():
    rng = np.random.default_rng(0)
    probability = torch.from_numpy(rng.normal(0, 2, (1407, 4)).astype(np.float32)).softmax(1)
    truth, sizes = torch.from_numpy(rng.integers(4, size=1407)), [400, 7, 1000]
    running = sum(map(calibration_sums, probability.split(sizes), truth.split(sizes)))
    assert calibration_error(running) == pytest.approx(slow_calibration(probability, truth), abs=1e-9)
    # 0.8 twice, right once: a gap of 0.3; 0.6 twice, right twice: a gap of 0.4.
    by_hand = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]])
    perfect, overconfident = torch.eye(2)[[0, 1, 0, 0]], torch.eye(2)[[1, 0, 1, 1]]
    for probability, ece in ((perfect, 0), (overconfident, 100), (by_hand, 35)):
        assert calibration_error(calibration_sums(probability, torch.tensor([0, 1, 0, 0]))) == pytest.approx(ece)
    assert calibration_error(np.zeros((3, BINS))) is None


def test_auroc_is_that_of_the_rank_sum_test_and_risk_lies_between_its_limits():
    rng = np.random.default_rng(0)
    score, wrong = rng.integers(6, size=60) / 6, rng.random(60) < 0.4
    u = mannwhitneyu(score[~wrong], score[wrong]).statistic
    assert auroc(score, wrong) == pytest.approx(u / (wrong.sum() * (~wrong).sum()))
    for other, expected in ((~wrong, 1), (wrong, 0), (np.ones(60), 0.5)):
        assert auroc(np.asarray(other, float), wrong) == pytest.approx(expected)
    assert auroc(score, np.zeros(60)) is auroc(score, np.ones(60)) is auroc(*np.zeros((2, 0))) is None
    # Risk by scores 3, 2, 1: risks 0, then the tied 1 and 0 (each 0.5), then 1.
    areas = risk_areas({"score": np.array([2, 3, 2, 1.0])}, np.array([1, 0, 0, 1.0]))
    assert areas["score"] == pytest.approx(np.mean([0, 1 / 4, 1 / 3, 1 / 2]))
    risk = rng.random(30)
    areas = risk_areas({"oracle": -risk, "noise": rng.random(30), "worst": risk, "blind": np.zeros(30)}, risk)
    best = np.mean([np.sort(risk)[:n].mean() for n in range(1, 31)])
    assert areas["oracle"] == areas["best possible"] == pytest.approx(best)
    orders = [np.cumsum(rng.permutation(risk)) / np.arange(1, 31) for _ in range(4000)]
    assert areas["blind"] == pytest.approx(areas["random"]) == pytest.approx(np.mean(orders), abs=0.02)
    assert areas["oracle"] < areas["noise"] < areas["worst"]


def test_uncertainty_gathers_slices_and_patients():
    """Two patients of a slice each: one predicted perfectly and surely, one all wrong and unsure."""
    truth = torch.zeros(1, 60, 60, dtype=torch.long)
    truth[:, 20:40, 20:40] = 1
    uncertainty = Uncertainty()
    for patient, sure, dice, label in (("a", 1.0, 1.0, truth), ("b", 0.6, 0.25, 1 - truth)):
        probability = torch.where(nn.functional.one_hot(label, 2).bool(), sure, 1 - sure).movedim(-1, 1)
        agreement = torch.where(label > 0, sure, 0.0)
        scan = ScanPrediction(
            patient, "ED", None, None, probability, agreement, truth, np.array([dice]), None, 1 - agreement
        )
        uncertainty.add(scan)
    summary = uncertainty.summary()
    for kind in ("slices", "patients"):  # kept first is the right one: risks 0, then (0 + 75) / 2
        areas = {name: pytest.approx(37.5 / 2) for name in ("agreement", "softmax maximum", "best possible")}
        areas["exp(−V)"] = pytest.approx((75 + 37.5) / 2)  # surest where all is wrong: 75, then (75 + 0) / 2
        assert summary["risk"][kind] == {"number": 2, "random": pytest.approx(37.5), **areas}
    assert summary["calibration"]["field of view"]["ece"] == pytest.approx(30, abs=1e-4)  # 0 and 60 points


def trained(cfg, **changes):
    """What must be the same bit for bit, and the monitor's figures by epoch."""
    folder = train(cfg, **changes)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figures = [line.pop("pseudo_labels", None) for line in lines]
    state = torch.load(folder / "last.pt", weights_only=True)
    del state["metadata"]["config"]
    best = load(folder)
    nets = [net.state_dict() for net in best.predictor.nets]
    return tree_leaves([[{**line, "seconds": 0} for line in lines], state, nets, best.metadata["step"]]), figures


def test_training_is_the_same_bit_for_bit_and_never_sees_the_hidden_masks(mms_config, mms_root, tmp_path):
    without, nothing = trained(mms_config, run_name="without")
    watched = replace(mms_config, monitor_pseudo_labels=True, run_name="watched")
    with_monitor, figures = trained(watched)
    # The same data, but other masks where patients are not labelled.
    other = tmp_path / "other"
    shutil.copytree(mms_root, other)
    loaders = build_loaders(watched, MMS)
    hidden = loaders.data.rows(sorted(set(loaders.split.unlabeled) - set(loaders.split.labeled)), with_mask=True)
    masks = np.load(other / "masks.npy")
    masks[loaders.data.index["mask"][hidden]] = 3
    np.save(other / "masks.npy", masks)
    scrambled, other_figures = trained(watched, data_root=str(other), run_name="scrambled")
    for leaves in (with_monitor, scrambled):
        for one, same in zip(without, leaves, strict=True):
            assert torch.equal(one, same) if isinstance(one, torch.Tensor) else one == same
    assert not any(nothing) and all(figures)
    assert figures[-1]["dice"] != other_figures[-1]["dice"]  # it does see them


def test_sample_is_hidden_and_spread_over_the_source_domains():
    """40 slices of each patient, the last 10 without masks: A and B have hidden ones, C has none, D is held out."""
    patients = {"a1": "A", "a2": "A", "a3": "A", "b1": "B", "b2": "B", "c1": "C", "d1": "D"}
    names = np.repeat(list(patients), 40)
    mask = np.where(np.arange(len(names)) % 40 < 30, np.arange(len(names)), -1)
    index = {"patient": names, "domain": np.array([patients[name] for name in names]), "mask": mask}
    data = PreparedData(Path("somewhere"), {}, index, *[None] * 3)
    split = Split(["a1", "b1", "c1"], ["a1", "a2", "a3", "b1", "b2", "c1"], ["a1", "b1", "c1"], ["d1"])
    rows = hidden_rows(data, split)
    assert set(index["patient"][rows]) == {"a2", "a3", "b2"} and (mask[rows] >= 0).all()
    assert np.unique(index["domain"][rows], return_counts=True)[1].tolist() == [32, 30]
    assert len(set(rows.tolist())) == len(rows)
    assert rows.tolist() == hidden_rows(data, split).tolist()
    with pytest.raises(UserError, match="label fewer by --ratio"):
        hidden_rows(data, split._replace(labeled=split.unlabeled))


class Known(nn.Module):
    """Gives the logits it was made with, batch after batch, for the plain and then for the Fourier view."""

    def __init__(self, *views):
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(1))
        self.logits = iter(torch.cat(views))

    def forward(self, image):
        return torch.stack([next(self.logits) for _ in image])


def test_figures_of_known_predictions():
    """Right everywhere but in the upper half of the truth's structures; there, and only there, the views disagree."""
    cfg = replace(MMS_DEMO, image_size=32, field=288)
    rng = np.random.default_rng(0)
    images, masks = rng.random((8, 300, 300)).astype(np.float16), np.zeros((8, 300, 300), np.uint8)
    for number, mask in enumerate(masks):
        mask[90 : 170 + 9 * number, 100:200], mask[120:160, 120:160] = 2, 1
    index = {"patient": np.repeat(["a", "b"], 4), "domain": np.repeat(["A", "B"], 4), "mask": np.arange(8)}
    data = PreparedData(Path("somewhere"), {}, index, images, masks, np.zeros((8, 256), np.float32))
    split = Split(["c"], ["a", "b"], ["c"], ["d"])
    rows = hidden_rows(data, split)
    mask = SliceDataset(data, rows, with_mask=True)[list(range(len(rows)))]["mask"]
    truth = canvas_to_view(mask, 32)[:, 0].long()
    wrong = (truth > 0) & (torch.arange(32)[:, None] < 16)
    label = torch.where(wrong, 0, truth)
    plain = 6.0 * nn.functional.one_hot(label, 4).movedim(-1, 1)
    fourier = torch.where(wrong[:, None], 0.5 * plain, plain)
    predictor = Predictor([Known(plain, fourier) for _ in range(2)], None, cfg, nullcontext)
    figures = monitor_pseudo_labels(predictor, data, split)
    assert figures["error"] == pytest.approx(100 * float(wrong.float().mean()))
    confidence = figures["scores"]["exp(−V)"]
    assert confidence["auroc"] == confidence["auroc_foreground"] == 1
    assert figures["scores"]["agreement"]["auroc"] == pytest.approx(0.5)  # the networks agree everywhere
    dice = (2 * (label > 0).sum((1, 2)) + 1e-4) / ((label > 0).sum((1, 2)) + (truth > 0).sum((1, 2)) + 1e-4)
    domain = data.index["domain"][rows]
    expected = {d: 100 * float(dice[domain == d].mean()) for d in np.unique(domain)}
    assert figures["dice"] == pytest.approx(expected, abs=1e-3)
    json.dumps(figures)
