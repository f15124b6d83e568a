"""Scans of one's own: pairs of every layout, labels, and unlabelled folders."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import MMS, TinyNetwork, train, write_table

import mms_dataloader
import scgm_dataloader
from config import MMS as MMS_CONFIG
from utils.data.prepare import convert_scan, prepare_dataset
from utils.data.prepared import PreparedData, split_patients
from utils.data.user_scans import labeled, scan_name, with_unlabeled
from utils.errors import UserError
from utils.evaluation.commands import run_inference

SCGM = scgm_dataloader.DATASET


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 8, 1])), path)


def touch(folder, *names, shape=(4, 4, 2), label=1):
    for name in names:
        write(folder / f"{name}.nii.gz", np.full(shape, label, np.uint8))


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
    """(patient and phase, image, masks) of every case; files by their folder and stem."""
    assert found.errors == []
    names = lambda path: f"{path.parent.name}/{path.name.removesuffix('.nii.gz')}"  # noqa: E731
    return [(f"{c.patient} {' '.join(c.phases)}", names(c.image), *map(names, c.masks)) for c in found.cases]


LAYOUTS = {  # files; --input and --truth; what they are paired to
    "nnU-Net": (
        ["i/h_1_0000", "i/h_1_0001", "i/._h_1_0000", "m/h_1"], "i", "m", [("h_1 scan", "i/h_1_0000", "m/h_1")]),
    "nnU-Net, all of it": (["i/h_0000", "m/h"], "", "m", [("h scan", "i/h_0000", "m/h")]),
    "nnU-Net in one folder": (["x/h_0000", "x/h"], "x", "x", [("h scan", "x/h_0000", "x/h")]),
    "nnU-Net, numbered patients": (
        ["i/image_0001_0000", "m/image_0001"], "i", "m", [("image_0001 scan", "i/image_0001_0000", "m/image_0001")]),
    "numbers that are no channels": (
        ["i/image_0000", "i/image_0001", "m/image_0000", "m/image_0001"], "i", "m",
        [("image_0000 scan", "i/image_0000", "m/image_0000"), ("image_0001 scan", "i/image_0001", "m/image_0001")]),
    "M&Ms": (["A1/A1_sa", "A1/A1_sa_gt"], "", "", [("A1 scan", "A1/A1_sa", "A1/A1_sa_gt")]),
    "M&Ms-2": (
        ["1/001_SA_ED", "1/001_SA_ED_gt", "1/001_SA_ES", "1/001_SA_ES_gt", "1/001_SA_CINE"], "", "",
        [("001 ED", "1/001_SA_ED", "1/001_SA_ED_gt"), ("001 ES", "1/001_SA_ES", "1/001_SA_ES_gt")]),
    "CMRxMotion": (
        ["P001-1/P001-1-ED", "P001-1/P001-1-ED-label", "P001-1/P001-1-es", "P001-1/P001-1-es-label"], "", "",
        [("P001-1 ED", "P001-1/P001-1-ED", "P001-1/P001-1-ED-label"),
         ("P001-1 ES", "P001-1/P001-1-es", "P001-1/P001-1-es-label")]),
    "folders of patients": (
        [f"{p}/{f}" for p in ("p1", "p2") for f in ("image", "mask")], "", "",
        [("p1 scan", "p1/image", "p1/mask"), ("p2 scan", "p2/image", "p2/mask")]),
    "folders of phases": (
        [f"{p}/ED{f}" for p in ("p1", "p2") for f in ("", "_label")], "", "",
        [("p1 ED", "p1/ED", "p1/ED_label"), ("p2 ED", "p2/ED", "p2/ED_label")]),
    "mirrored trees": (
        [f"{k}/{p}" for p in ("p1/sa/ED", "p2/sa/ED", "p2/sa/ES") for k in ("i", "m")], "i", "m",
        [(f"{p}_sa {phase}", f"sa/{phase}", f"sa/{phase}") for p, phase in (("p1", "ED"), ("p2", "ED"), ("p2", "ES"))]),
    "BIDS": (
        ["sub-1/anat/sub-1_T2w", "d/sub-1/anat/sub-1_T2w_seg-manual", "d/sub-1/anat/sub-1_T2w_gmseg-manual"], "", "d",
        [("sub-1_T2w scan", "anat/sub-1_T2w", "anat/sub-1_T2w_gmseg-manual")]),
    "raters": (
        ["t/site1-sc01-image", "t/site1-sc01-mask-r1", "t/site1-sc01-mask-r2"], "", "",
        [("site1-sc01 scan", "t/site1-sc01-image", "t/site1-sc01-mask-r1", "t/site1-sc01-mask-r2")]),
    **{ending: ([f"x/s_T2w_{ending}", "x/s_T2w"], "", "", [("s_T2w scan", "x/s_T2w", f"x/s_T2w_{ending}")])
       for ending in ("dseg", "mask", "gt", "gm_seg", "label-GM_mask")},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    files, images, masks, expected = LAYOUTS[name]
    touch(tmp_path, *files)
    assert (
        pairs(
            find([tmp_path / images], [tmp_path / masks], dataset=SCGM if name in ("raters", "label-GM_mask") else MMS)
        )
        == expected
    )


@pytest.mark.parametrize("names", ["{}_frame{}_0000", "{}_frame{}"])
def test_frames_of_acdc_are_phases_of_one_patient(tmp_path, names):
    """By Info.cfg, or without it, as nnU-Net has it, by the size of the LV (3, as --labels says)."""
    images, masks = ("imagesTs", "labelsTs") if "0000" in names else ("patient001", "patient001")
    for frame, label in (("01", 1), ("12", 3)):
        touch(tmp_path / images, names.format("patient001", frame))
        kind = "" if "0000" in names else "_gt"
        touch(tmp_path / masks, f"patient001_frame{frame}{kind}", label=label)
    if images == masks:
        touch(tmp_path / images, "patient001_4d", shape=(4, 4, 2, 3))
    labels = ["1=RV", "2=MYO", "3=LV"]
    found = find([tmp_path / images], [tmp_path / masks], labels)
    assert [case[0] for case in pairs(found)] == ["patient001 ES", "patient001 ED"]
    assert "ED and ES have the larger and the smaller LV" in found.warnings[-1]
    (tmp_path / images / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\n")
    found = find([tmp_path / images], [tmp_path / masks], labels)
    assert [case[0] for case in pairs(found)] == ["patient001 ED", "patient001 ES"]
    assert not any("larger" in text for text in found.warnings)


def test_all_readers_name_a_scan_alike():
    for name, identity in {
        "A1_sa": ("A1", ""), "A1_sa_gt": ("A1", ""), "site1-sc01-image": ("site1-sc01", ""), "x_0000": ("x", ""),
        "site1-sc01-mask-r3": ("site1-sc01", ""), "patient001_frame01_0000": ("patient001", "frame01"),
        "patient001_frame1_gt": ("patient001", "frame01"), "P001-1-ED-label": ("P001-1", "ED"),
        "001_SA_es_gt": ("001", "ES"), "RED": ("RED", ""), "ED": ("folder", "ED"), "image": ("folder", ""),
    }.items():  # fmt: skip
        assert scan_name(Path("folder") / f"{name}.nii.gz")[:2] == identity, name


@pytest.mark.parametrize("kind", ["csv", "semicolons", "utf-16", "blanks", "xlsx"])
def test_table_of_pairs_as_people_edit_it(tmp_path, kind):
    """Another case, a column of remarks, empty last rows; its patient and phase go before what a name says."""
    touch(tmp_path, "a/p_frame01", "a/two", "b/x", "b/y")
    lines = [["Image", "Truth", "patient", "phase", "group", "remark"],
             ["a/p_frame01.nii.gz", "b/x.nii.gz", "p", "ed", "3T", "a, b"],
             ["a/two.nii.gz", "b/y.nii.gz", "p", "ES", "3T", ""], [""] * 6, []]  # fmt: skip
    lines = [[f" {cell} " for cell in line] for line in lines] if kind == "blanks" else lines
    table = tmp_path / f"cases.{'xlsx' if kind == 'xlsx' else 'csv'}"
    encoding = "utf-16" if kind == "utf-16" else "utf-8-sig"
    write_table(table, lines, encoding, delimiter=";" if kind == "semicolons" else ",")
    found = find([table])
    assert pairs(found) == [("p ED", "a/p_frame01", "b/x"), ("p ES", "a/two", "b/y")]
    (tmp_path / "b/x.nii.gz").unlink()
    (error,) = find([table]).errors
    assert error == f"{table}: {tmp_path / 'b/x.nii.gz'}: no such file"
    (tmp_path / "c.csv").write_text("scan,mask\n")
    with pytest.raises(UserError, match="its columns are scan, mask; expected image, truth"):
        find([tmp_path / "c.csv"])


def test_one_kind_of_mask_and_one_rater(tmp_path):
    touch(tmp_path, "s1", "s1_gmseg-manual", "s1_seg-manual", "s2", "s2_seg-manual")
    (error,) = find([tmp_path], [tmp_path], dataset=SCGM).errors
    assert "s2.nii.gz: no mask of that name and of kind 'gmseg-manual'" in error
    touch(tmp_path / "r", "x", "x_mask-r1", "x_mask-r2")
    (error,) = find([tmp_path / "r"], [tmp_path / "r"]).errors
    assert "x.nii.gz: several masks, name one in a table: " in error and "x_mask-r2.nii.gz" in error


def test_4d_truth_with_masks_in_some_frames(tmp_path):
    array = np.zeros((40, 40, 2, 6), np.uint8)
    array[..., 1] = heart()
    array[..., 4] = np.where(heart() == 1, 2, heart())
    array[18:22, 18:22, :, 4] = 1
    write(tmp_path / "x_gt.nii.gz", array)
    write(tmp_path / "x.nii.gz", scan(frames=6))
    found = find([tmp_path], [tmp_path])
    assert pairs(found)[0][0] == "x ED ES" and found.cases[0].phases == {"ED": 1, "ES": 4}
    assert "larger and the smaller LV" in found.warnings[0]
    array[..., 0] = heart()
    write(tmp_path / "x_gt.nii.gz", array)
    assert pairs(find([tmp_path], [tmp_path]))[0][0] == "x frame00 frame01 frame04"


def test_labels_map_any_values_and_exchanged_ventricles_are_warned_of(tmp_path):
    """ACDC's order, and MS-CMRSeg's values; a trailing axis of 1 on one side is dropped."""
    write(tmp_path / "x.nii.gz", scan(frames=1))

    def report(values, *labels):
        write(tmp_path / "x_gt.nii.gz", np.array(values, np.uint16)[heart()])
        own = labeled([tmp_path], [tmp_path], labels, MMS)
        return convert_scan(own.find_cases(Path()).cases[0], own, None)

    assert report([0, 3, 2, 1], "1=RV", "2=MYO", "3=LV")[:2] == ([], [])
    assert report([0, 500, 200, 600], "500=LV", "200=MYO", "600=RV")[:2] == ([], [])
    assert "LV and RV exchanged" in report([0, 3, 2, 1]).warnings[0]
    [error] = report([0, 3, 2, 1], "1=RV", "2=MYO").errors
    assert "x_gt.nii.gz" in error and "[3]" in error and "--labels VALUE=STRUCTURE" in error
    assert report([0, 3, 2, 1], "1=background", "2=MYO", "3=LV").errors == []
    for wrong in (["1=Heart"], ["x=LV"], ["0=LV"], ["1=LV", "1=RV"]):
        with pytest.raises(UserError, match="--labels"):
            labeled([tmp_path], [tmp_path], wrong, MMS)


def test_everything_unpaired_is_named_at_once(tmp_path):
    touch(tmp_path, "a", "b", "c_gt", "d_gt", "e", "e_gt")
    errors = find([tmp_path], [tmp_path]).errors
    assert len(errors) == 4
    assert all(any(f"/{name}.nii.gz: " in error for error in errors) for name in ("a", "b", "c_gt", "d_gt"))
    touch(tmp_path / "far", *(f"{p}/{f}" for p in ("p1", "p2") for f in ("ED", "ES")), "p2/ES_gt")
    errors = "\n".join(find([tmp_path / "far"], [tmp_path / "far"]).errors)
    assert errors.count("no mask of that name") == 3 and "p2/ES.nii.gz" not in errors  # never another patient's mask


def test_unlabeled_folder_is_a_domain_of_every_training(mms_raw, tmp_path, capsys):
    write(tmp_path / "AAA/x.nii.gz", scan(seed=7))
    write(tmp_path / "AAA/y.nii.gz", scan(frames=3, seed=8))
    touch(tmp_path / "AAA", "x_seg", ".hidden")
    prepare_dataset(mms_raw, tmp_path / "data", with_unlabeled([tmp_path / "AAA"], MMS), workers=2)
    assert "AAA: 2 (0 with masks)" in capsys.readouterr().out
    data = PreparedData.open(tmp_path / "data", MMS)
    own = data.index["domain"] == "AAA"
    assert Counter(data.index["patient"][own].tolist()) == {"x": 2, "y": 6}  # slices of all frames
    assert (data.index["mask"][own] == -1).all()
    for domain in "AC":
        split = split_patients(data, MMS, replace(MMS_CONFIG, test_domain=domain, ratio=0.01))
        assert {"x", "y"} <= set(split.unlabeled)
        assert not {"x", "y"} & {*split.labeled, *split.validation, *split.held_out}
    with pytest.raises(UserError, match="has no vendor AAA, only A, B, C, D"):
        split_patients(data, MMS, replace(MMS_CONFIG, test_domain="AAA"))
    # Wrong folders are all named, and nothing is written.
    (tmp_path / "empty").mkdir()
    known = data.patients_with_masks("A")[0]
    touch(tmp_path / "A", known)  # a vendor's name, and a patient's
    folders = [tmp_path / name for name in ("empty", "A", "AAA", "AAA")]
    with pytest.raises(UserError, match="has the errors listed above"):
        prepare_dataset(mms_raw, tmp_path / "refused", with_unlabeled(folders, MMS), workers=2)
    text = capsys.readouterr().out
    for said in ("empty: no .nii", "a vendor A already", f"a patient {known} already", "a vendor AAA already"):
        assert said in text
    assert not list(tmp_path.glob("refused*"))


def test_public_acdc_layout_gives_the_figures_of_prepare_to_the_last_digit(
    mms_raw, mms_config, tmp_path, monkeypatch, capsys
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
    run = train(mms_config, max_steps=1)

    def inference(*arguments):
        monkeypatch.setattr("sys.argv", ["x", "--device", "cpu", "--run", str(run), *map(str, arguments)])
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
    # Of several runs, one in their own folders, beside a table.
    other = train(mms_config, max_steps=1, run_name="other", seed=1)
    inference(str(other), *own, "--label", "a", "b", "--output", tmp_path / "both")
    assert (tmp_path / "both" / run.name / "per_case.csv").read_text() == (found / "per_case.csv").read_text()
    assert (tmp_path / "both/other/report.html").exists()
    assert str(round(summary["paper_protocol"]["mean"], 2)) in (tmp_path / "both/own_scans.md").read_text()
    assert "| b, acdc | 4 |" in (tmp_path / "both/comparison.md").read_text()
    with pytest.raises(SystemExit, match="runs of different names"):
        inference(str(tmp_path / "elsewhere" / run.name), *own, "--output", tmp_path / "refused")
    bad = tmp_path / "acdc" / "alone_frame01.nii.gz"
    bad.write_bytes(b"no image")
    with pytest.raises(SystemExit, match="has the errors listed above"):
        inference(*own, "--output", tmp_path / "refused")
    assert "alone_frame01.nii.gz: no mask of that name" in capsys.readouterr().out
    assert not (tmp_path / "refused").exists()


def test_bad_labelled_scans_are_all_named_and_nothing_is_prepared(tmp_path, capsys):
    bad = {"a": heart()[:30], "b": heart() + 6, "c": heart()}  # another shape, values without a name, no image
    for name, mask in bad.items():
        write(tmp_path / f"own/{name}_0000.nii.gz", scan())
        write(tmp_path / f"own/{name}.nii.gz", mask)
    (tmp_path / "own/c_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="has the errors listed above"):
        prepare_dataset(tmp_path / "own", tmp_path / "out", labeled([tmp_path], [tmp_path], [], MMS), workers=1)
    printed = capsys.readouterr().out
    for text in ("a.nii.gz: shape (30, 40, 2)", "b.nii.gz: labels [6, 7, 8, 9] beside 0, 1, 2, 3; for your own scans",
                 "c_0000.nii.gz: not a NIfTI file"):  # fmt: skip
        assert text in printed
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert "no .nii or .nii.gz scan in" in find([tmp_path / "empty"], [tmp_path / "empty"]).errors[0]
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        find([tmp_path / "nowhere"], [tmp_path / "empty"])
