"""What once went wrong without a word, each provoked through the real inference command."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import TinyNetwork, tiny_trainer, train

import mms_dataloader
import scgm_dataloader
from utils.data.prepare import prepare_dataset
from utils.data.user_scans import labeled, scan_name, with_unlabeled
from utils.errors import UserError
from utils.evaluation.commands import run_inference

MMS, SCGM = mms_dataloader.DATASET, scgm_dataloader.DATASET
IN_MASK = ["--labels", "200=LV", "500=MYO", "600=RV"]


@pytest.fixture
def infer(mms_config, monkeypatch, capsys):
    """Train for a step, and return what runs the inference command: its words, or the error it exits with."""
    cfg = replace(mms_config, max_steps=1)
    train(cfg)

    def run(*flags, folder=cfg.folder):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["x", "--device", "cpu", "--run", *map(str, [folder, *flags])])
        error = ""
        try:
            run_inference(MMS, TinyNetwork)
        except SystemExit as stop:
            error = str(stop.code)
        return capsys.readouterr().out + error

    run.folder, run.split = cfg.folder, json.loads((cfg.folder / "split.json").read_text())
    return run


def frames(raw, patient):
    """Return image and mask of a raw patient's labelled frames, in the order of their LV, the largest first."""
    image, mask = (nib.load(next(raw.rglob(f"{patient}_sa{end}.nii.gz"))) for end in ("", "_gt"))
    labels = np.asarray(mask.dataobj)
    labeled = sorted(np.flatnonzero(labels.any((0, 1, 2))), key=lambda t: -np.count_nonzero(labels[..., t] == 1))
    return image, np.asarray(image.dataobj)[..., labeled], labels[..., labeled]


def save(path, array, like):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, like.affine), path)


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_scan_of_the_training_is_refused_under_any_name(infer, mms_raw, tmp_path, kind, renamed):
    patient = infer.split[kind][-1]
    like, images, masks = frames(mms_raw, patient)
    name = "case1" if renamed else patient
    save(tmp_path / "in" / name / f"{name}_sa.nii.gz", images, like)
    save(tmp_path / "in" / name / f"{name}_sa_gt.nii.gz", masks, like)
    said = infer("--input", tmp_path / "in", "--truth", tmp_path / "in", "--output", tmp_path / "out")
    assert "has seen 1 of the patients" in said and f"{name} is {patient} of the training" in said


def test_phases_in_files_of_their_own_are_one_patient(infer, mms_raw, tmp_path):
    """nnU-Net's ACDC, without Info.cfg and with any values in the masks: ED and ES by the size of the LV, said."""
    for number, patient in enumerate(infer.split["held_out"][:2], start=1):
        like, images, masks = frames(mms_raw, patient)
        for position, frame in enumerate(("frame01", "frame12")):
            name = f"patient{number:03d}_{frame}"
            save(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", images[..., position], like)
            values = np.array([0, 200, 500, 600], np.int16)[masks[..., position]]
            save(tmp_path / "labelsTr" / f"{name}.nii.gz", values, like)
    pair = ["--input", tmp_path / "imagesTr", "--truth", tmp_path / "labelsTr", "--output", tmp_path / "out"]
    assert "--labels" in infer(*pair)  # the remedy is the flag that works
    said = infer(*pair, *IN_MASK)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["patients"] == 2 and summary["labels"] == IN_MASK[1:] and summary["clinical"]["LV EDV"]["n"] == 2
    assert "2 patients" in said and "200=LV" in (tmp_path / "out/summary.md").read_text()
    cases = list(csv.DictReader((tmp_path / "out/per_case.csv").read_text().splitlines()))
    ml = {(case["patient"], case["phase"]): float(case["truth_ml"]) for case in cases if case["structure"] == "LV"}
    assert all(ml[patient, "ED"] > ml[patient, "ES"] for patient in ("patient001", "patient002"))


def test_exchanged_phases_are_warned_of(infer, mms_raw, tmp_path):
    like, images, masks = frames(mms_raw, infer.split["held_out"][0])
    for phase, position in (("ED", 1), ("ES", 0)):
        save(tmp_path / "in" / f"P001-1-{phase}.nii.gz", images[..., position], like)
        save(tmp_path / "in" / f"P001-1-{phase}-label.nii.gz", masks[..., position], like)
    said = infer("--input", tmp_path / "in", "--truth", tmp_path / "in", "--output", tmp_path / "out")
    assert "P001-1: the true LV is larger at ES than at ED" in said
    assert "larger at ES" in (tmp_path / "out/report.html").read_text()


def test_our_own_map_is_never_the_truth(infer, mms_raw, tmp_path):
    like, images, masks = frames(mms_raw, infer.split["held_out"][0])
    save(tmp_path / "in/case1.nii.gz", images[..., 0], like)
    save(tmp_path / "in/case1_mask.nii.gz", masks[..., 0], like)
    pair = ["--input", tmp_path / "in", "--truth", tmp_path / "in", "--output"]
    infer(*pair, tmp_path / "before")
    infer("--input", tmp_path / "in/case1.nii.gz", "--output", tmp_path / "in")
    assert (tmp_path / "in/case1_seg.nii.gz").exists()
    infer(*pair, tmp_path / "after")
    assert (tmp_path / "before/per_case.csv").read_bytes() == (tmp_path / "after/per_case.csv").read_bytes()


@pytest.mark.parametrize("place", ["--out", "--output"])
def test_a_folder_that_cannot_be_written_is_said_before_the_work(infer, mms_raw, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    scan = next(mms_raw.rglob("*_sa.nii.gz"))
    flags = {"--out": [], "--output": ["--input", scan]}[place]
    said = infer(*flags, place, tmp_path / "file/out")
    assert "cannot be written" in said and place in said


def test_names_with_signs_of_mathematics(infer):
    strange = infer.folder.parent / "cost$1_vs_$2^<x>"
    shutil.copytree(infer.folder, strange)
    assert "paper Dice" in infer(folder=strange) and (strange / "results/D/report.html").stat().st_size > 20_000


def test_run_names_what_is_there(infer):
    said = infer(folder=infer.folder.parent)
    assert f"{infer.folder.parent} is no run but holds runs: run" in said


@pytest.mark.parametrize(("full", "least", "fraction"), [(100, 40, 60), (100, 0, np.nan), (0, 0, np.nan)])
def test_a_ventricle_that_is_not_found_has_no_ejection_fraction(full, least, fraction):
    ml = {(phase, name): 1.0 for phase in ("ED", "ES") for name in ("LV", "MYO", "RV")}
    quantities = mms_dataloader.cardiac_metrics(ml | {("ED", "RV"): full, ("ES", "RV"): least})
    np.testing.assert_allclose(quantities["RV EF"][0], fraction)


def found(folder, dataset, *names):
    """Pair empty files, images and masks in one folder: (patient and phases, mask) of each case, and the warnings."""
    for name in names:
        save(folder / f"{name}.nii.gz", np.ones((4, 4, 2), np.uint8), nib.Nifti1Image(np.zeros((1, 1, 1)), np.eye(4)))
    cases, errors, warnings = labeled([folder], [folder], (), dataset).find_cases(folder)
    assert errors == []
    return {f"{c.patient} {' '.join(c.phases)}": c.masks[0].name.split(".")[0] for c in cases}, " ".join(warnings)


def test_names_tell_what_a_file_is(tmp_path):
    """The manual mask, of the right structure; no long axis; the phase before what a tool has appended."""
    cord = "sub-1_T2w", "sub-1_T2w_gmseg", "sub-1_T2w_gmseg-manual", "sub-1_T2w_label-SC_seg"
    pairs, warnings = found(tmp_path / "cord", SCGM, *cord)
    assert pairs == {"sub-1_T2w scan": "sub-1_T2w_gmseg-manual"} and "label-SC_seg.nii.gz: left out" in warnings
    pairs, warnings = found(tmp_path / "seg", SCGM, "sub-1_T2w", "sub-1_T2w_seg")
    assert "masks that end in 'seg' are taken for GM" in warnings
    phases = [f"{name}{end}" for name in ("001_SA_ED", "001_ES_sa", "001_LA_ED") for end in ("", "_gt")]
    pairs, warnings = found(tmp_path / "heart", MMS, *phases)
    assert pairs == {"001 ED": "001_SA_ED_gt", "001 ES": "001_ES_sa_gt"} and "001_LA_ED.nii.gz: left out" in warnings
    assert [scan_name(Path(f"P1-ED{end}"))[:2] for end in ("_trans", "_sa")] == [("P1", "ED")] * 2
    assert all(scan_name(Path(f"a_{kind}")).kind for kind in ("segmentation", "Labelmap", "trans_seg"))


@pytest.mark.parametrize("fault", ["label map", "both", "held out"])
def test_unlabeled_scans_that_are_none(mms_raw, tmp_path, mms_config, capsys, fault):
    """Label maps without a name that says so, files of both endings, and scans of the held-out domain."""
    like, images, masks = frames(mms_raw, next(mms_raw.glob("OpenDataset/Testing/*")).name)
    save(tmp_path / "ours/scan.nii.gz", masks if fault == "label map" else images, like)
    raw = shutil.copytree(mms_raw, tmp_path / "raw")
    if fault == "both":
        image = next(raw.rglob("*_sa.nii.gz"))
        save(image.with_suffix(""), images, like)
    message = "training scans, too: .*scan" if fault == "held out" else "has the errors listed above"
    with pytest.raises(UserError, match=message):
        prepare_dataset(raw, tmp_path / "data", with_unlabeled([tmp_path / "ours"], MMS), workers=1)
        for domain in "ABCD":  # that of the scan among them
            cfg = replace(mms_config, data_root=str(tmp_path / "data"), test_domain=domain)
            tiny_trainer(cfg)
    said = {"label map": "hold only [0, 1, 2, 3]: is it a label map?", "both": "_sa.nii, too: remove one"}
    assert said.get(fault, "") in capsys.readouterr().out


def test_a_finished_run_without_its_state_is_not_overwritten(infer, mms_config):
    (infer.folder / "last.pt").unlink()
    with pytest.raises(UserError, match=r"a finished run without last\.pt: use another --run-name"):
        train(mms_config, max_steps=1)


def test_volumes_are_those_of_the_corrected_map(infer, mms_raw, tmp_path):
    like, images, masks = frames(mms_raw, infer.split["held_out"][0])
    save(tmp_path / "scan.nii.gz", images, like)
    segment = ["--input", tmp_path / "scan.nii.gz", "--output", tmp_path / "out"]
    infer(*segment)
    save(tmp_path / "out/scan_seg.nii.gz", masks, like)
    infer(*segment, "--volumes")
    [row] = csv.DictReader((tmp_path / "out/volumes.csv").read_text().splitlines())
    expected = np.count_nonzero(masks[..., 0] == 1) * np.prod(like.header.get_zooms()[:3]) / 1000
    assert float(row["LV EDV (ml)"]) == pytest.approx(expected, rel=1e-5)
