"""Measures without a truth, against values made by hand, SciPy and a label map whose defects are known."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from scipy import ndimage, stats
from test_segment import Brightness, phantom, segmenter, write
from utils.evaluation.results import evaluate_run
from utils.evaluation.tools import write_label_names

import mms_dataloader
import scgm_dataloader
from mms_dataloader import cardiac_metrics
from utils.data.loaders import build_loaders
from utils.device import Process
from utils.engine import fit
from utils.evaluation.quality import flag_quality, outside_ranges, structure_quality, value_ranges
from utils.evaluation.runs import load_run, open_data
from utils.evaluation.segment import segment_files
from utils.files import OutputFolder
from utils.plots import STRUCTURE_COLOURS
from utils.run.checkpoint import read_metadata

MMS = mms_dataloader.DATASET


def test_measures_of_known_defects():
    rng = np.random.default_rng(0)
    labels = np.zeros((6, 20, 20), np.uint8)
    labels[0:2, 2:6, 2:6] = 1  # breaks off in slices 2 and 3
    labels[4:6, 2:6, 2:6] = 1
    labels[1, 15, 15] = 2
    agreement = rng.random(labels.shape).astype(np.float32)
    first, second, third = structure_quality(labels, {"agreement": agreement}, MMS.class_names, 0.5)
    assert (first["structure"], first["volume_ml"], first["components"]) == ("LV", 32.0, 2)
    assert first["components"] == ndimage.label(labels == 1, np.ones((3, 3, 3)))[1]
    assert first["gaps"] == pytest.approx(2 / 6) and second["gaps"] == 0
    assert first["agreement"] == pytest.approx(agreement[labels == 1].mean(), rel=1e-6)
    assert third == {"structure": "RV", "volume_ml": 0.0, "components": 0, "gaps": 0.0}


def test_a_value_outside_the_range_is_flagged():
    rows = [
        {"structure": "LV", "volume_ml": ml, "agreement": a, "components": 1, "gaps": 0.0}
        for ml, a in ((50.0, 0.9), (120.0, 0.99))
    ]
    ranges = json.loads(json.dumps(value_ranges(rows)))  # as beside the weights
    assert ranges["LV"]["volume_ml"] == [50, 120] and ranges["LV"]["agreement"] == [0.9, 0.99]
    assert [outside_ranges(row, ranges) for row in rows] == ["", ""]
    assert outside_ranges(rows[0] | {"volume_ml": 121.0, "gaps": 0.1}, ranges) == "volume_ml gaps"
    assert outside_ranges(rows[0] | {"confidence": 0.1}, ranges) == ""  # of which the run knows no range
    assert outside_ranges({"structure": "LV", "volume_ml": 0.0, "components": 0, "gaps": 0.0}, ranges) == "empty"


def test_how_well_the_flag_finds_bad_cases():
    ranges = {"LV": {"agreement": (0.8, 1)}}
    agreement = {"a": 0.95, "b": 0.9, "c": 0.7, "d": 0.6, "e": 0.85}
    dice = {"a": 90.0, "b": 60.0, "c": 50.0, "d": 80.0, "e": 85.0}
    rows = [{"patient": p, "structure": "LV", "volume_ml": 9.0, "agreement": a} for p, a in agreement.items()]
    found = flag_quality(rows, dice, ranges)
    # Bad: b, c; flagged: c, d.
    assert (found["bad"], found["flagged"], found["sensitivity"]) == (2, 2, 50)
    assert found["specificity"] == pytest.approx(100 * 2 / 3)
    assert found["spearman"] == pytest.approx(stats.spearmanr([*agreement.values()], [*dice.values()])[0])
    alone = flag_quality(rows[:1], {"a": 90.0}, ranges)
    assert alone["sensitivity"] is None and alone["specificity"] == 100 and alone["spearman"] is None


def test_a_run_keeps_the_ranges_of_its_source_scans(mms_config, build_tiny, tmp_path, capsys):
    cfg = replace(mms_config, max_steps=2)
    fit(cfg, build_loaders(cfg, MMS), build_tiny, Process(torch.device("cpu")))
    run = load_run(Path(cfg.out_root) / "run", "best", MMS, build_tiny, torch.device("cpu"))
    ranges = read_metadata(run.folder / "best.safetensors")["quality"]
    assert set(ranges) <= {"LV", "MYO", "RV"} and ranges
    options = {"save_predictions": True, "precision": "fp32", "tta": False, "keep_largest": False}
    facts = {"data": open_data(run, None, MMS)[0], "domain": "D", "title": "D"}
    summary = evaluate_run(run, MMS, out=tmp_path / "out", **facts, **options)
    assert summary["quality"]["bad"] == 4  # after two steps, everything is
    assert "Quality without truth" in (tmp_path / "out/summary.md").read_text()
    assert "Quality without truth" in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/predictions/labels.txt").exists()


def test_new_scans_come_with_their_quality(tmp_path, capsys):
    """Volumes against those of the rings themselves; a core that is too wide lies outside the range, and is named."""
    zooms = (1.4, 1.5, 8)
    whole = phantom((220, 210, 4, 2), zooms)
    wide = np.where(whole == 2, 3, whole).astype(np.uint8)
    for name, labels in (("whole", whole), ("wide", wide)):
        write(tmp_path / f"{name}.nii.gz", labels, np.diag([*zooms, 1]))
    ranges = {"RV": {"volume_ml": [30, 60], "agreement": [0.9, 1], "components": [1, 1], "gaps": [0, 0]}}
    segmenting = segmenter(Brightness())
    segmenting = replace(segmenting, run=segmenting.run._replace(metadata={"quality": ranges}))
    out = tmp_path / "out"
    segment_files(segmenting, [tmp_path / "whole.nii.gz"], out)
    segment_files(segmenting, [tmp_path / "wide.nii.gz"], out)
    rows = list(csv.DictReader((out / "quality.csv").open()))
    assert [(row["scan"], row["frame"]) for row in rows[::3]] == [(n, f) for n in ("whole", "wide") for f in "01"]
    core = rows[2]
    assert core["structure"] == "RV" and core["outside_range"] == "" and core["confidence"] == ""
    assert float(core["volume_ml"]) == pytest.approx((whole[..., 0] == 3).sum() * 1.4 * 1.5 * 8 / 1000, rel=0.05)
    assert float(core["agreement"]) == pytest.approx(1) and core["components"] == "1"
    assert rows[8]["outside_range"] == "volume_ml"
    assert "1 of them have values outside the range" in capsys.readouterr().out


def test_clinical_quantities_of_a_new_scan(tmp_path):
    """ED and ES are the largest and the smallest LV; the figures are those of the label map that was written."""
    zooms, scales = (1.5, 1.5, 8), (0.8, 1.2, 1.0, 0.7)
    x = (np.arange(200) - 99.5) * 1.5
    radius = np.hypot(x[:, None], x[None])
    frames = [np.select([radius < 20, radius < 35, radius < 60 * s], [3, 2, 1]) for s in scales]
    cine = np.stack([np.stack(frames, -1)] * 3, 2).astype(np.uint8)
    write(tmp_path / "cine.nii.gz", cine, np.diag([*zooms, 1]))
    segment_files(segmenter(Brightness()), [tmp_path / "cine.nii.gz"], tmp_path / "out", volumes=True)
    (row,) = csv.DictReader((tmp_path / "out/volumes.csv").open())
    assert (row["ED"], row["ES"]) == ("1", "3")
    seg = np.asarray(nib.load(tmp_path / "out/cine_seg.nii.gz").dataobj)
    ml = {
        (phase, name): (seg[..., frame] == label).sum() * 1.5 * 1.5 * 8 / 1000
        for phase, frame in (("ED", 1), ("ES", 3))
        for label, name in enumerate(MMS.class_names)
    }
    for name, (value, unit) in cardiac_metrics(ml).items():
        assert float(row[f"{name} ({unit})"]) == pytest.approx(value)


def test_names_and_colours_for_viewers(tmp_path):
    write_label_names(OutputFolder(tmp_path), MMS.class_names)
    slicer = [line.split() for line in (tmp_path / "labels.ctbl").read_text().splitlines()]
    assert slicer[0] == ["0", "background", "0", "0", "0", "0"]
    snap = [line.split(maxsplit=7) for line in (tmp_path / "labels.txt").read_text().splitlines()]
    for label, name in enumerate(MMS.class_names[1:], start=1):
        rgb = [str(round(255 * part)) for part in to_rgb(STRUCTURE_COLOURS[label - 1])]
        assert slicer[label] == [str(label), name, *rgb, "255"]
        assert snap[label] == [str(label), *rgb, "1", "1", "1", f'"{name}"']
    (tmp_path / "scgm").mkdir()
    write_label_names(OutputFolder(tmp_path / "scgm"), scgm_dataloader.DATASET.class_names)
    assert len((tmp_path / "scgm/labels.ctbl").read_text().splitlines()) == 2
