"""Scans of one's own: pairs of every layout, labels, and unlabelled folders."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import TinyNetwork

import mms_dataloader
import scgm_dataloader
from config import MMS as MMS_CONFIG
from utils.data.prepare import prepare_dataset, process_case
from utils.data.prepared import PreparedData, split_patients
from utils.data.user_scans import labeled, with_unlabeled
from utils.errors import UserError
from utils.evaluation.commands import run_inference
from utils.run.checkpoint import run_metadata, save_networks

MMS, SCGM = mms_dataloader.DATASET, scgm_dataloader.DATASET


def write(path, array, zooms=(1.5, 1.5, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*zooms, 1])), path)
    return path


def touch(folder, *names, shape=(4, 4, 2)):
    for name in names:
        write(folder / name, np.ones(shape, np.uint8))


def heart():
    """A ring of myocardium (2) around the LV (1), the RV (3) beside it: (40, 40, 2)."""
    x, y = np.mgrid[:40, :40]
    distance = np.hypot(x - 20, y - 20)
    labels = np.where(distance < 5, 1, np.where(distance < 8, 2, np.where(np.hypot(x - 31, y - 20) < 4, 3, 0)))
    return np.stack([labels, labels], -1).astype(np.uint8)


def scan(*, frames=None, seed=0):
    shape = (40, 40, 2, *([frames] if frames else []))
    return np.random.default_rng(seed).integers(1, 999, shape).astype(np.int16)


def find(images, masks=(), labels=(), dataset=MMS):
    return labeled(images, masks, labels, dataset).find_cases(Path())


def pairs(found):
    assert found.errors == []
    return [(c.patient, c.image.name, [mask.name for mask in c.masks], c.phases) for c in found.cases]


@pytest.mark.parametrize("layout", ["one folder", "two folders"])
def test_nnunet(tmp_path, layout):
    images, masks = (tmp_path, tmp_path) if layout == "one folder" else (tmp_path / "imagesTs", tmp_path / "labelsTs")
    touch(images, "heart_001_0000.nii.gz", "heart_002_0000.nii.gz", "._heart_001_0000.nii.gz")
    touch(masks, "heart_001.nii.gz", "heart_002.nii.gz")
    expected = [(f"heart_00{n}", f"heart_00{n}_0000.nii.gz", [f"heart_00{n}.nii.gz"], {"scan": 0}) for n in (1, 2)]
    assert pairs(find([images], [masks])) == expected
    if layout == "two folders":  # the whole data set's folder as --input
        assert pairs(find([tmp_path], [masks])) == expected


def test_mms_folders_of_patients(tmp_path):
    touch(tmp_path / "A1", "A1_sa.nii.gz", "A1_sa_gt.nii.gz")
    assert pairs(find([tmp_path], [tmp_path])) == [("A1_sa", "A1_sa.nii.gz", ["A1_sa_gt.nii.gz"], {"scan": 0})]


def test_patient_folders_with_image_and_mask(tmp_path):
    for name in ("p1", "p2"):
        touch(tmp_path / name, "image.nii.gz", "mask.nii.gz")
    assert pairs(find([tmp_path], [tmp_path])) == [
        (name, "image.nii.gz", ["mask.nii.gz"], {"scan": 0}) for name in ("p1", "p2")
    ]


def test_acdc(tmp_path):
    folder, kinds = tmp_path / "patient001", ("", "_gt")
    touch(folder, *(f"patient001_frame{n}{kind}.nii.gz" for n in ("01", "12") for kind in kinds))
    touch(folder, "patient001_4d.nii.gz", shape=(4, 4, 2, 3))
    (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\n")
    ed, es = pairs(find([tmp_path], [tmp_path]))
    assert ed == ("patient001", "patient001_frame01.nii.gz", ["patient001_frame01_gt.nii.gz"], {"ED": 0})
    assert es == ("patient001", "patient001_frame12.nii.gz", ["patient001_frame12_gt.nii.gz"], {"ES": 0})
    (folder / "Info.cfg").unlink()  # nothing says which is which, and nothing guesses
    assert [case[-1] for case in pairs(find([tmp_path], [tmp_path]))] == [{"frame01": 0}, {"frame12": 0}]


def test_bids_derivatives(tmp_path):
    name = "sub-01_run-1_T2starw"
    touch(tmp_path / "sub-01/anat", f"{name}.nii.gz")
    truth = tmp_path / "derivatives/labels/sub-01/anat"
    touch(truth, f"{name}_gmseg-manual.nii.gz", f"{name}_seg-manual.nii.gz")
    expected = [(name, f"{name}.nii.gz", [f"{name}_gmseg-manual.nii.gz"], {"scan": 0})]
    for masks in (tmp_path / "derivatives", tmp_path):
        assert pairs(find([tmp_path], [masks], dataset=SCGM)) == expected


@pytest.mark.parametrize("ending", ["dseg", "mask", "gt", "label"])
def test_single_endings(tmp_path, ending):
    touch(tmp_path, "sub-01_T2starw.nii.gz", f"sub-01_T2starw_{ending}.nii.gz")
    assert pairs(find([tmp_path], [tmp_path])) == [
        ("sub-01_T2starw", "sub-01_T2starw.nii.gz", [f"sub-01_T2starw_{ending}.nii.gz"], {"scan": 0})
    ]


def test_scgm_raters(tmp_path):
    masks = [f"site1-sc01-mask-r{n}.nii.gz" for n in (1, 2, 3, 4)]
    touch(tmp_path, "site1-sc01-image.nii.gz", *masks)
    assert pairs(find([tmp_path], [tmp_path], dataset=SCGM)) == [
        ("site1-sc01", "site1-sc01-image.nii.gz", masks, {"scan": 0})
    ]


def test_csv_names_patient_phase_and_group(tmp_path):
    touch(tmp_path, "a/one.nii.gz", "a/two.nii.gz", "b/x.nii.gz", "b/y.nii.gz")
    table = tmp_path / "cases.csv"
    lines = ["image,truth,patient,phase,group", "a/one.nii.gz,b/x.nii.gz,p,ED,3T", "a/two.nii.gz,b/y.nii.gz,p,ES,3T"]
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    found = find([table])
    assert pairs(found) == [
        ("p", "one.nii.gz", ["x.nii.gz"], {"ED": 0}), ("p", "two.nii.gz", ["y.nii.gz"], {"ES": 0})
    ]  # fmt: skip
    assert {case.group for case in found.cases} == {"3T"}
    table.write_text("\n".join([*lines, "a/lost.nii.gz,b/lost.nii.gz,q,ED,3T"]))
    assert [error.split("line 4: ")[1].split("/")[-2:] for error in find([table]).errors] == [
        ["a", "lost.nii.gz: no such file"], ["b", "lost.nii.gz: no such file"]
    ]  # fmt: skip


def test_4d_truth_with_masks_in_some_frames(tmp_path):
    array = np.zeros((40, 40, 2, 6), np.uint8)
    array[..., 1] = heart()
    array[..., 4] = np.where(heart() == 1, 2, heart())
    array[18:22, 18:22, :, 4] = 1
    write(tmp_path / "x_gt.nii.gz", array)
    write(tmp_path / "x.nii.gz", scan(frames=6))
    found = find([tmp_path], [tmp_path])
    assert pairs(found)[0][-1] == {"ED": 1, "ES": 4} and "larger and the smaller LV" in found.warnings[0]
    array[..., 0] = heart()
    write(tmp_path / "x_gt.nii.gz", array)
    assert pairs(find([tmp_path], [tmp_path]))[0][-1] == {"frame00": 0, "frame01": 1, "frame04": 4}


def test_labels_map_values_and_exchanged_ventricles_are_doubted(tmp_path):
    acdc = np.array([0, 3, 2, 1], np.uint8)[heart()]
    write(tmp_path / "x.nii.gz", scan())
    write(tmp_path / "x_gt.nii.gz", acdc)

    def report(*labels):
        own = labeled([tmp_path], [tmp_path], labels, MMS)
        return process_case(own.find_cases(Path()).cases[0], own, None)

    assert report("1=RV", "2=MYO", "3=LV").warnings == []
    assert "LV and RV exchanged" in report().warnings[0]
    [error] = report("1=RV", "2=MYO").errors
    assert "x_gt.nii.gz" in error and "[3]" in error and "VALUE=background" in error
    assert report("1=background", "2=MYO", "3=LV").errors == []
    for wrong in (["1=Heart"], ["x=LV"], ["0=LV"], ["1=LV", "1=RV"]):
        with pytest.raises(UserError, match="--labels"):
            labeled([tmp_path], [tmp_path], wrong, MMS)


def test_everything_unpaired_is_named_at_once(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c_gt.nii.gz", "d_gt.nii.gz", "e.nii.gz", "e_gt.nii.gz")
    errors = find([tmp_path], [tmp_path]).errors
    assert len(errors) == 4
    assert all(any(f"/{name}.nii.gz: " in error for error in errors) for name in ("a", "b", "c_gt", "d_gt"))


@pytest.fixture
def hospital(tmp_path):
    """Small scans of four vendors in the raw layout, and a folder of scans of another scanner."""
    raw, lines = tmp_path / "raw", ["External code,Vendor,Centre,ED,ES"]
    for number, vendor in enumerate("AABBCCDD"):
        name = f"P{number}"
        folder = raw / "OpenDataset/Training/Labeled" / name
        write(folder / f"{name}_sa.nii.gz", scan(frames=2, seed=number))
        write(folder / f"{name}_sa_gt.nii.gz", np.stack([heart(), heart()], -1))
        lines.append(f"{name},{vendor},1,0,1")
    (raw / "table.csv").write_text("\n".join(lines))
    write(tmp_path / "AAA/x.nii.gz", scan(seed=7))
    write(tmp_path / "AAA/y.nii.gz", scan(frames=3, seed=8))
    write(tmp_path / "AAA/x_seg.nii.gz", heart())
    write(tmp_path / "AAA/.hidden.nii.gz", heart())
    return tmp_path


def test_unlabeled_folder_is_a_domain_of_every_training(hospital, capsys):
    prepare_dataset(hospital / "raw", hospital / "data", with_unlabeled([hospital / "AAA"], MMS), workers=1)
    assert "AAA: 2 (0 with masks)" in capsys.readouterr().out
    data = PreparedData.open(hospital / "data", MMS)
    own = data.index["domain"] == "AAA"
    assert Counter(data.index["patient"][own].tolist()) == {"x": 2, "y": 6}  # slices of all frames
    assert (data.index["mask"][own] == -1).all()
    for domain in "AC":
        cfg = replace(MMS_CONFIG, test_domain=domain, ratio=0.01, use_extra_unlabeled=False)
        split = split_patients(data, MMS, cfg)
        assert {"x", "y"} <= set(split.unlabeled)
        assert not {"x", "y"} & {*split.labeled, *split.validation, *split.held_out}
    with pytest.raises(UserError, match="no such vendor, only A, B, C, D"):
        split_patients(data, MMS, replace(MMS_CONFIG, test_domain="AAA", ratio=0.01))


def test_scans_of_ones_own_change_the_content_hash(hospital):
    for name, folders in (("with", ["AAA"]), ("without", [])):
        dataset = with_unlabeled([hospital / folder for folder in folders], MMS)
        prepare_dataset(hospital / "raw", hospital / name, dataset, workers=1)
    with_own, without = (PreparedData.open(hospital / name, MMS) for name in ("with", "without"))
    assert with_own.info["content_hash"] != without.info["content_hash"]
    known = len(without.images)
    assert np.array_equal(with_own.images[:known], without.images)
    assert np.array_equal(with_own.masks, without.masks)


def test_wrong_unlabeled_folders_are_all_named_and_nothing_is_written(hospital, capsys):
    (hospital / "empty").mkdir()
    write(hospital / "A/P0.nii.gz", scan())  # a vendor's name, and a patient's
    folders = [hospital / "empty", hospital / "A", hospital / "AAA", hospital / "AAA"]
    with pytest.raises(UserError, match="nothing was prepared"):
        prepare_dataset(hospital / "raw", hospital / "data", with_unlabeled(folders, MMS), workers=1)
    text = capsys.readouterr().out
    for said in ("empty: no .nii", "there is a vendor A already", "a patient P0 already", "there is a vendor AAA alre"):
        assert said in text
    assert not (hospital / "data").exists() and not (hospital / "data.partial").exists()


def test_public_acdc_layout_gives_the_figures_of_prepare_to_the_last_digit(
    mms_raw, mms_root, tmp_path, monkeypatch, capsys
):
    """Vendor D of the phantom as ACDC: 3D frames, labels in the reverse order, Info.cfg."""
    reverse = np.array([0, 3, 2, 1], np.uint8)
    for case in (case for case in mms_dataloader.find_cases(mms_raw).cases if case.domain == "D"):
        folder = tmp_path / "acdc" / case.patient
        folder.mkdir(parents=True)
        image, mask = nib.load(case.image), nib.load(case.masks[0])
        nib.save(image, folder / f"{case.patient}_4d.nii.gz")
        for frame in case.phases.values():
            name = f"{case.patient}_frame{frame + 1:02d}"
            frames = {name: np.asanyarray(image.dataobj), f"{name}_gt": reverse[np.asanyarray(mask.dataobj)]}
            for file, array in frames.items():
                header = image.header.copy()
                header.set_data_shape(array.shape[:3])
                header.set_data_dtype(array.dtype)
                nib.save(nib.Nifti1Image(array[..., frame], None, header), folder / f"{file}.nii.gz")
        phases = "".join(f"{phase}: {frame + 1}\n" for phase, frame in case.phases.items())
        (folder / "Info.cfg").write_text(f"{phases}Group: NOR\nNbFrame: 30\n")
    settings = vars(replace(MMS_CONFIG, data_root=str(mms_root), image_size=32))
    content = PreparedData.open(mms_root, MMS).info
    metadata = run_metadata(MMS, settings, None, content, selection="none", step=1, cps_weight=3.0)
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    save_networks(tmp_path / "run" / "best.safetensors", [TinyNetwork(4), TinyNetwork(4)], metadata)

    def inference(*arguments):
        monkeypatch.setattr("sys.argv", ["x", "--run", str(tmp_path / "run"), "--device", "cpu", *map(str, arguments)])
        run_inference(MMS, TinyNetwork)

    own = ["--input", tmp_path / "acdc", "--truth", tmp_path / "acdc", "--labels", "1=RV", "2=MYO", "3=LV"]
    inference("--out", tmp_path / "held_out")
    inference(*own, "--output", tmp_path / "own")
    held_out, found = (tmp_path / name for name in ("held_out", "own"))
    assert (found / "per_case.csv").read_text() == (held_out / "per_case.csv").read_text()
    expected, summary = (json.loads((folder / "summary.json").read_text()) for folder in (held_out, found))
    for key in ("paper_protocol", "volumetric", "clinical", "paper_dice", "calibration", "risk"):
        assert summary[key] == expected[key], key
    assert (found / "report.html").exists() and len(list((found / "overlays").iterdir())) >= 2
    bad = tmp_path / "acdc" / "alone_frame01.nii.gz"
    bad.write_bytes(b"no image")
    with pytest.raises(SystemExit, match="nothing was prepared"):
        inference(*own, "--output", tmp_path / "refused")
    assert "alone_frame01.nii.gz: no mask of that name" in capsys.readouterr().out
    assert not (tmp_path / "refused").exists()


def test_bad_labelled_scans_are_all_named_and_nothing_is_prepared(tmp_path, capsys):
    own = tmp_path / "own"
    write(own / "a_0000.nii.gz", scan())
    write(own / "a.nii.gz", heart()[:30])  # another shape
    write(own / "b_0000.nii.gz", scan())
    write(own / "b.nii.gz", heart() + 6)  # values that the data set does not have
    write(own / "c_0000.nii.gz", scan())
    write(own / "c.nii.gz", heart())
    (own / "c_0000.nii.gz").write_bytes(b"no image")
    dataset = labeled([own], [own], [], MMS)
    with pytest.raises(UserError, match="has the errors listed above: nothing was prepared"):
        prepare_dataset(own, tmp_path / "out", dataset, workers=1)
    said = capsys.readouterr().out
    assert "a.nii.gz: shape (30, 40, 2)" in said and "differs from the image's (40, 40, 2)" in said
    assert "b.nii.gz: labels [6, 7, 8, 9] outside 0..3" in said and "--labels" in said
    assert "c_0000.nii.gz: not a NIfTI file" in said
    assert not (tmp_path / "out").exists() and "Traceback" not in said
    (tmp_path / "empty").mkdir()
    assert "no .nii or .nii.gz scan in" in find([tmp_path / "empty"], [tmp_path / "empty"]).errors[0]
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        find([tmp_path / "nowhere"], [tmp_path / "empty"])
