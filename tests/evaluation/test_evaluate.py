"""Evaluation of trained runs: the protocol, the files it writes, and what it refuses."""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import MMS, TinyNetwork, load, run_python, train
from torch import nn

from utils.data.loaders import build_loaders, scan_loader
from utils.data.prepared import PreparedData
from utils.errors import UserError
from utils.evaluation.evaluate import SLICES_DRAWN, case_drawing, evaluate_run, to_native
from utils.evaluation.predict import Predictor, mean_dice, predict_scans
from utils.evaluation.runs import open_data, patients_to_evaluate
from utils.run.checkpoint import read_metadata, save_networks


@pytest.fixture
def trained(mms_config):
    return train(mms_config, max_steps=2)


def evaluate(run, checkpoint="best", out=None, **options):
    trained = load(run, checkpoint)
    data, _, title = open_data(trained, None, MMS)
    options |= {"domain": trained.config.test_domain, "title": title}
    return evaluate_run(trained, MMS, data, out or run / "results/D", **options)


def triples(scans):
    return [(scan.patient, scan.phase, scan.slice_dice.tolist()) for scan in scans]


class Oracle(nn.Module):
    """Predicts the masks it is given, whatever it sees."""

    def __init__(self, masks):
        super().__init__()
        self.device_of, self.masks = nn.Parameter(torch.zeros(1)), iter(masks)

    def forward(self, image):
        return 20.0 * nn.functional.one_hot(torch.from_numpy(next(self.masks).astype(np.int64)), 4).movedim(-1, 1)


def test_perfect_prediction_scores_perfectly_and_patients_average_over_slices(mms_config):
    """Truth on the canvas, through the whole evaluation, is 100 by the paper and nearly so in native space."""
    loaders = build_loaders(mms_config, MMS)
    data, index = loaders.data, loaders.data.index
    loader = scan_loader(data, loaders.split.held_out)
    masks = [data.masks[index["mask"][loader.dataset.rows[batch]]][:, 6:-6, 6:-6] for batch in loader.sampler]
    config = replace(mms_config, image_size=288)
    scans = list(predict_scans(Predictor([Oracle(masks), Oracle(masks)], None, config, nullcontext), loader, data))
    assert len(scans) == 8
    dice = mean_dice(triples(scans))
    assert set(dice) == set(loaders.split.held_out) and min(dice.values()) > 99.999
    for scan in scans:
        assert scan.agreement.min() == 1
        labels, truth, rows = to_native(scan, data, MMS.class_names)
        assert labels.shape == truth.array.shape
        assert labels.shape[:2] == (index["rows"][scan.rows[0]], index["columns"][scan.rows[0]])
        for row in rows:
            assert row["dice"] > 95 and row["hd95"] < 1.6 and row["missed"] == row["outside_field"] == 0 < row["voxels"]
        drawing = case_drawing(scan, truth)
        assert len(drawing["slices"]) <= SLICES_DRAWN and drawing["slices"][-1] == len(scan.rows) - 1
        assert (drawing["truth"] == drawing["prediction"]).all() and drawing["truth"].max() == 3
        assert drawing["image"].size < 200**2 * SLICES_DRAWN  # of every scan it stays in memory
    # Patients' means against plain NumPy, at an image size that must be brought to the grid first.
    nets, expected, pooled = [TinyNetwork(4).eval() for _ in range(2)], {}, np.zeros((3, 2))
    scans = list(predict_scans(Predictor(nets, None, mms_config, nullcontext), loader, data))
    for scan in scans:
        softmax = nn.functional.interpolate(scan.probability, size=288, mode="bilinear").numpy()
        grid, labels = softmax > 0.5, softmax.argmax(1)
        masks = data.masks[index["mask"][scan.rows]][:, 6:-6, 6:-6]
        pooled += [
            [2 * ((labels == c) & (masks == c)).sum(), (labels == c).sum() + (masks == c).sum()] for c in (1, 2, 3)
        ]
        for slice_, mask in zip(grid, masks, strict=True):
            truth = np.stack([mask == c for c in (1, 2, 3)])
            dice = (2 * (slice_[1:] & truth).sum() + 1e-4) / (slice_[1:].sum() + truth.sum() + 1e-4)
            expected.setdefault(scan.patient, []).append(100 * dice)
    for patient, dice in mean_dice(triples(scans)).items():
        assert dice == pytest.approx(np.mean(expected[patient]), abs=1e-3)
    assert (sum(scan.overlap for scan in scans) == pooled).all() and pooled[:, 1].all()


def test_evaluation_writes_everything_and_agrees_with_itself(trained, mms_root, capsys):
    summary = evaluate(trained, save_predictions=True)
    folder = trained / "results/D"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["patients"] == 4 and summary["test_domain"] == "D" and "never looked at" in summary["selection"]
    assert summary["phantom"] and "Phantom data" in (folder / "summary.md").read_text()
    [line] = [line for line in capsys.readouterr().out.splitlines() if "paper Dice" in line]
    assert line.startswith(f"{trained}: M&Ms, held-out vendor D: ") and "of 4 patients; " in line and "MYO " in line
    assert f"{summary['paper_protocol']['mean']:.2f} ± " in line
    with open(folder / "per_case.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    paper = {row["patient"]: float(row["paper_dice"]) for row in rows}
    assert len(rows) == 4 * 2 * 3 and summary["paper_dice"] == pytest.approx(paper)
    assert summary["paper_protocol"]["mean"] == pytest.approx(np.mean(list(paper.values())))
    assert summary["paper_protocol"]["std"] == pytest.approx(np.std(list(paper.values()), ddof=1))
    pooled = dict(summary["pooled"])
    assert pooled.pop("ci95")["mean"][0] <= pooled.pop("mean") == pytest.approx(np.mean([*pooled.values()]))
    assert summary["warnings"][-1:] == ["4 patients: an interval over fewer than 6 says little"]
    assert summary["labeled"] == "A 2, B 4, C 2"
    for name, metrics in summary["volumetric"].items():
        own = [row for row in rows if row["structure"] == name and row["dice"]]
        values = [[float(row["dice"]) for row in own if row["patient"] == p] for p in paper]
        assert metrics["dice"] == pytest.approx(np.mean([np.mean(v) for v in values if v]))
        assert metrics["missed"] == sum(int(row["missed"]) for row in own) and metrics["scans"] == 8
    # The predictions are where their truth is, and give the Dice of the table.
    data = PreparedData.open(mms_root, MMS)
    for row in rows:
        prediction = nib.load(folder / f"predictions/{row['patient']}_{row['phase']}.nii.gz")
        truth = nib.load(data.truth_path(row["patient"], row["phase"]))
        assert prediction.shape == truth.shape and (prediction.affine == truth.affine).all()
        label = ["LV", "MYO", "RV"].index(row["structure"]) + 1
        p, t = np.asarray(prediction.dataobj) == label, np.asarray(truth.dataobj) == label
        if row["dice"]:
            assert float(row["dice"]) == pytest.approx(200 * (p & t).sum() / (p.sum() + t.sum()))
    assert {path.name.split("_")[0] for path in (folder / "overlays").glob("*.png")} == {"worst", "median", "best"}
    # The clinical quantities come from the volumes.
    muscle = [row for row in rows if (row["phase"], row["structure"]) == ("ED", "MYO")]
    mass = [1.05 * (float(row["predicted_ml"]) - float(row["truth_ml"])) for row in muscle]
    assert summary["clinical"]["MYO mass"]["bias"] == pytest.approx(np.mean(mass))
    assert summary["clinical"]["MYO mass"]["sd"] == pytest.approx(np.std(mass, ddof=1))
    # Deterministic, of the last checkpoint the same, as it has the same weights here; what is not made again goes.
    again = evaluate(trained, checkpoint="last")
    assert again["checkpoint"] == "last, step 2" and again["paper_protocol"] == summary["paper_protocol"]
    assert (folder / "report.html").is_file() and not (folder / "predictions").exists()


def test_kept_epochs_are_evaluated(mms_config, tmp_path):
    run = train(mms_config, num_epoch=2, max_steps=None, batch_size=16, keep_epochs=9)
    last, kept = (evaluate(run, name, tmp_path / name) for name in ("last", "epochs/epoch_002"))
    assert kept["paper_dice"] == last["paper_dice"] and kept["checkpoint"].startswith("epochs/epoch_002, step ")
    assert kept["selection"] == "none, a kept epoch"
    problem = r"epoch_007\.safetensors: no such file; --keep-epochs .*: epochs/epoch_001, epochs/epoch_002"
    with pytest.raises(UserError, match=problem):
        load(run, "epochs/epoch_007")


def test_unfinished_training_is_named(trained):
    known = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(known | {"max_steps": None, "num_epoch": 9}))
    remark = "(training not finished: epoch 1 of 9)"
    assert evaluate(trained)["checkpoint"] == f"best, step 2 {remark}"
    assert remark in (trained / "results/D/summary.md").read_text()
    (trained / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is missing or damaged"):
        evaluate(trained)
    (trained / "log.jsonl").unlink()  # weights without a log: nothing is known
    assert "not finished" not in evaluate(trained)["checkpoint"]


def test_patients_that_the_training_has_seen_are_refused(trained, mms_config):
    """By their names or, under whatever name, by the voxels of a scan; who has seen only others is not."""
    run, loaders = load(trained), build_loaders(mms_config, MMS)
    data = loaders.data
    patients = patients_to_evaluate(run, data, "D")
    [(checksum, patient), *_] = data.checksums(patients).items()
    for seen, pair in (({"0" * 16: patient}, f"{patient} is {patient}"), ({checksum: "P7"}, f"{patient} is P7")):
        known = run._replace(metadata=run.metadata | {"seen": run.metadata["seen"] | seen})
        with pytest.raises(UserError, match=f"has seen 1 of the patients of .*: {pair} of the training"):
            patients_to_evaluate(known, data, "D")
    assert {*run.metadata["seen"].values()} == {*loaders.split.unlabeled}


def test_missing_and_foreign_runs_are_refused(trained, tmp_path):
    metadata, path = read_metadata(trained / "best.safetensors"), tmp_path / "best.safetensors"

    def refused(problem, folder=tmp_path, checkpoint="best", nets=None, **changes):
        if nets:
            save_networks(path, nets, metadata | changes)
        with pytest.raises(UserError, match=problem):
            load(folder, checkpoint)

    refused("no such run", tmp_path / "nowhere")
    refused("no such file; the run has not ended its first epoch")
    refused("no such file; the run has saved no state", checkpoint="last")
    nets = [TinyNetwork(4), TinyNetwork(4)]
    refused(r"use inference_scgm\.py", nets=nets, dataset="scgm")
    for change in ({"cps_loss": "threshold"}, {"new_setting": 1}):
        config = metadata["config"] | change
        refused(r"best\.safetensors: .*; use the code that trained it", nets=nets, config=config)
    refused("not of this project", nets=[nn.Linear(1, 1), nn.Linear(1, 1)])
    path.write_bytes(b"\x08" * 100)
    refused("damaged")


def infer(run, before="", **options):
    """The inference command with a small network, in a process of its own."""
    code = (
        "import torch, helpers; from utils.evaluation import commands\n"
        f"{before}\n"
        "commands.run_inference(helpers.MMS, helpers.TinyNetwork)"
    )
    return run_python("-c", code, "--run", run, "--device", "cpu", **options)


def test_faults_of_an_evaluation_are_named(trained, tmp_path):
    """A full memory; and the data elsewhere, seen from another directory."""
    full = "def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory')\ncommands.evaluate_run = full"
    done = infer(trained, full)
    assert done.returncode == 1 and f"error: {trained}: out of memory: try --device cpu" in done.stderr
    metadata = read_metadata(trained / "best.safetensors")
    metadata["config"]["data_root"] = "data/mms"
    save_networks(trained / "best.safetensors", [TinyNetwork(4), TinyNetwork(4)], metadata)
    done = infer(trained, cwd=tmp_path)
    expected = f"data/mms, which is not there (seen from {tmp_path}): name their folder by --data-root"
    assert done.returncode == 1 and expected in done.stderr
    assert "ub.edu" not in done.stderr  # nobody needs to register


def test_output_that_is_not_utf_8_loses_no_work(trained):
    """An evaluation prints a ±."""
    done = infer(trained, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "±" in (trained / "results/D/summary.md").read_text(encoding="utf-8")
