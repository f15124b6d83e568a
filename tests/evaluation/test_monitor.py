"""The monitor of the pseudo labels: what it measures, and that it leaves the training as it is."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from utils.evaluation.results import evaluate_run

import mms_dataloader
from config import MMS_DEMO
from utils.data.loaders import SliceDataset, build_loaders
from utils.data.prepared import PreparedData, Split
from utils.device import Process, autocast_context
from utils.engine import fit
from utils.errors import UserError
from utils.evaluation import monitor
from utils.evaluation.runs import load_run, open_data
from utils.method.augment import canvas_to_view

MMS = mms_dataloader.DATASET
CPU = torch.device("cpu")


def trained(cfg, build_tiny):
    """Lines of the log, without wall-clock and monitor; the checkpoints, without the settings' own words."""
    fit(cfg, build_loaders(cfg, MMS), build_tiny, Process(CPU))
    folder = Path(cfg.out_root) / cfg.run_name
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line.pop("pseudo_labels", None) for line in lines]
    for line in lines:
        line.pop("seconds")
    state = torch.load(folder / "last.pt", weights_only=True)
    del state["metadata"]["config"]
    best = load_run(folder, "best", MMS, build_tiny, CPU)
    return lines, found, state, [net.state_dict() for net in best.nets], best.metadata["step"]


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def test_training_is_the_same_bit_for_bit_and_never_sees_the_hidden_masks(mms_config, mms_root, build_tiny, tmp_path):
    without = trained(replace(mms_config, run_name="without"), build_tiny)
    watched = replace(mms_config, monitor_pseudo_labels=True, run_name="watched")
    with_monitor = trained(watched, build_tiny)
    # The same data, but other masks where patients are not labelled.
    other = tmp_path / "other"
    shutil.copytree(mms_root, other)
    loaders = build_loaders(watched, MMS)
    hidden = loaders.data.rows(sorted(set(loaders.split.unlabeled) - set(loaders.split.labeled)), with_mask=True)
    masks = np.load(other / "masks.npy")
    masks[loaders.data.index["mask"][hidden]] = 3
    np.save(other / "masks.npy", masks)
    scrambled = trained(replace(watched, data_root=str(other), run_name="scrambled"), build_tiny)
    for run in (with_monitor, scrambled):
        assert_same(without[0], run[0])
        assert_same(without[2:], run[2:])
    assert without[1] == [None] * len(without[0])
    assert all(with_monitor[1])
    assert with_monitor[1][-1]["dice"] != scrambled[1][-1]["dice"]  # it does see them
    folder = Path(watched.out_root) / "watched"
    assert (folder / with_monitor[1][-1]["picture"]).stat().st_size > 10_000
    options = {"save_predictions": False, "precision": "fp32", "tta": False, "keep_largest": False}
    run = load_run(folder, "last", MMS, build_tiny, CPU)
    facts = {"data": open_data(run, None, MMS)[0], "domain": "D", "title": "D"}
    summary = evaluate_run(run, MMS, out=tmp_path / "results", **facts, **options)
    assert summary["pseudo_labels"] == with_monitor[1][-1] | {"epoch": len(with_monitor[1])}
    assert summary["risk"]["slices"]["best possible"] <= summary["risk"]["slices"]["agreement"] + 1e-9
    page = (tmp_path / "results/report.html").read_text()
    assert "hidden masks of at most 64 slices" in page and "risk-coverage curves" in page


def test_sample_is_hidden_and_spread_over_the_source_domains():
    """40 slices of each patient, the last 10 without masks: A and B have hidden ones, C has none, D is held out."""
    patients = {"a1": "A", "a2": "A", "a3": "A", "b1": "B", "b2": "B", "c1": "C", "d1": "D"}
    names = np.repeat(list(patients), 40)
    mask = np.where(np.arange(len(names)) % 40 < 30, np.arange(len(names)), -1)
    index = {"patient": names, "domain": np.array([patients[name] for name in names]), "mask": mask}
    data = PreparedData(Path("somewhere"), {}, index, *[None] * 3)
    split = Split(["a1", "b1", "c1"], ["a1", "a2", "a3", "b1", "b2", "c1"], ["a1", "b1", "c1"], ["d1"])
    rows = monitor.hidden_rows(data, split)
    assert set(index["patient"][rows]) == {"a2", "a3", "b2"} and (mask[rows] >= 0).all()
    assert np.unique(index["domain"][rows], return_counts=True)[1].tolist() == [32, 30]
    assert len(set(rows.tolist())) == len(rows)
    assert rows.tolist() == monitor.hidden_rows(data, split).tolist()
    with pytest.raises(UserError, match="label fewer by --ratio"):
        monitor.hidden_rows(data, split._replace(labeled=split.unlabeled))


class Known(nn.Module):
    """Gives the logits it was made with, batch after batch, for the plain and then for the Fourier view."""

    def __init__(self, *views):
        super().__init__()
        self.logits = iter(torch.cat(views))

    def forward(self, image):
        return torch.stack([next(self.logits) for _ in image])


def test_figures_of_known_predictions(tmp_path):
    """Right everywhere but in the upper half of the truth's structures; there, and only there, the views disagree."""
    cfg = replace(MMS_DEMO, image_size=32)
    rng = np.random.default_rng(0)
    images, masks = rng.random((8, 300, 300)).astype(np.float16), np.zeros((8, 300, 300), np.uint8)
    for number, mask in enumerate(masks):
        mask[90 : 170 + 9 * number, 100:200], mask[120:160, 120:160] = 2, 1
    index = {"patient": np.repeat(["a", "b"], 4), "domain": np.repeat(["A", "B"], 4), "mask": np.arange(8)}
    data = PreparedData(Path("somewhere"), {}, index, images, masks, np.zeros((8, 256), np.float32))
    split = Split(["c"], ["a", "b"], ["c"], ["d"])
    rows = monitor.hidden_rows(data, split)
    mask = SliceDataset(data, rows, with_mask=True)[list(range(len(rows)))]["mask"]
    truth = canvas_to_view(mask, 32)[:, 0].long()
    wrong = (truth > 0) & (torch.arange(32)[:, None] < 16)
    label = torch.where(wrong, 0, truth)
    plain = 6.0 * nn.functional.one_hot(label, 4).movedim(-1, 1)
    fourier = torch.where(wrong[:, None], 0.5 * plain, plain)
    figures = monitor.monitor_pseudo_labels(
        tmp_path / "samples/picture.png", [Known(plain, fourier) for _ in range(2)], data, split, cfg,
        reference=None, device=CPU, autocast=partial(autocast_context, CPU, "fp32"), title="known",
    )  # fmt: skip
    assert figures["error"] == pytest.approx(100 * float(wrong.float().mean()))
    confidence = figures["scores"]["exp(−V)"]
    assert confidence["auroc"] == confidence["auroc_foreground"] == 1
    assert figures["scores"]["agreement"]["auroc"] == pytest.approx(0.5)  # the networks agree everywhere
    assert confidence["kept"][-1] == pytest.approx(100 - figures["error"]) and confidence["kept_error"][-1] == 0
    dice = (2 * (label > 0).sum((1, 2)) + 1e-4) / ((label > 0).sum((1, 2)) + (truth > 0).sum((1, 2)) + 1e-4)
    domain = data.index["domain"][rows]
    assert figures["dice"] == {
        d: pytest.approx(100 * float(dice[domain == d].mean()), abs=1e-3) for d in np.unique(domain)
    }
    json.dumps(figures)
