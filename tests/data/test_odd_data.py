"""Raw data as people have them: turned masks, rounded labels, odd geometry, links, other names."""

import shutil
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT

import config
import mms_dataloader
import scgm_dataloader
from utils.data.commands import run_data_command
from utils.data.loaders import build_loaders
from utils.data.prepare import check_dataset, prepare_dataset
from utils.data.prepared import PreparedData
from utils.data.volume import mask_in_grid, read_volume
from utils.errors import UserError

MMS, SCGM = mms_dataloader.DATASET, scgm_dataloader.DATASET


@pytest.fixture
def raw(mms_raw, tmp_path):
    shutil.copytree(mms_raw, tmp_path / "raw")
    return tmp_path / "raw"


def scans_of(raw):
    masks = sorted(path for path in raw.rglob("*_sa_gt.nii.gz") if "Unlabeled" not in path.parts)
    return [(path.with_name(path.name.replace("_gt", "")), path) for path in masks]


def rewrite(path, change=lambda array: array, affine=None):
    image = nib.load(path)
    array = change(np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)


def turn(path, axes):
    """Store a file in another orientation, its affine changed alike: nothing moves in the patient."""
    image = nib.load(path)
    start = nib.io_orientation(image.affine)
    ornt = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(ornt), path)


def prepared(raw, out, dataset):
    prepare_dataset(raw, out, dataset, workers=1)
    data = PreparedData.open(out, dataset)
    truth = {path.name: nib.load(path) for path in sorted((out / "truth").iterdir())}
    return data, truth


@pytest.mark.parametrize("axes", ["LPI", "PLS", "SAR"])
def test_turned_masks_are_prepared_as_if_they_were_not(raw, tmp_path, capsys, axes):
    expected, truth = prepared(raw, tmp_path / "straight", MMS)
    for _, mask in scans_of(raw):
        turn(mask, axes)
    capsys.readouterr()
    data, turned_truth = prepared(raw, tmp_path / "turned", MMS)
    assert (data.masks == expected.masks).all() and data.info["content_hash"] == expected.info["content_hash"]
    assert all((turned_truth[name].affine == truth[name].affine).all() for name in truth)
    assert all((turned_truth[name].get_fdata() == truth[name].get_fdata()).all() for name in truth)
    assert f"orientation {axes} against" in capsys.readouterr().out


def test_masks_that_lie_elsewhere_are_refused_with_both_orientations(raw, capsys):
    (image, moved), (_, rotated), (_, near), (_, lost), (unknown, _) = scans_of(raw)[:5]
    affine, zooms = nib.load(image).affine, nib.load(image).header.get_zooms()
    rewrite(moved, affine=affine @ nib.affines.from_matvec(np.eye(3), [0.6, 0, 0]))  # voxels
    turned = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.4))
    rewrite(rotated, affine=nib.load(rotated).affine @ turned)
    rewrite(near, affine=nib.load(near).affine @ nib.affines.from_matvec(np.eye(3), [0.4, 0, 0]))
    rewrite(lost, affine=np.eye(4))
    rewrite(unknown, affine=np.diag([-1, -1, 1, 1]))
    assert not check_dataset(raw, MMS, workers=1)
    out = capsys.readouterr().out
    codes = "".join(nib.aff2axcodes(affine))
    assert f"error: {moved}: orientation {codes} against {codes}, corners {0.6 * zooms[0]:.2g} mm apart" in out
    assert f"error: {rotated}: orientation " in out
    assert f"warning: {near}: its affine differs from the image's" in out
    assert f"warning: {lost}: the affine of mask or image is lost" in out
    assert out.count("the affine of mask or image is lost") == 2


def test_mask_in_grid_near_45_degrees(tmp_path):
    """Rounding must not exchange axes whose names are ambiguous."""
    array = np.random.default_rng(0).integers(0, 4, (6, 7, 5)).astype(np.uint8)
    for angle in (np.pi / 4 - 1e-7, np.pi / 4 + 1e-7):
        affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(angle) @ np.diag([1.5, 1.5, 8]), [-90, 40, 12])
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{angle > np.pi / 4}.nii")
    mask, image = (read_volume(tmp_path / f"{name}.nii") for name in (True, False))
    assert (mask_in_grid(mask, image).array == array).all()


def test_labels_with_rounding_noise_are_rounded(raw, tmp_path, capsys):
    expected, _ = prepared(raw, tmp_path / "exact", MMS)
    rng = np.random.default_rng(0)
    for number, (_, mask) in enumerate(scans_of(raw)):
        image = nib.load(mask)
        noisy = np.asarray(image.dataobj) + rng.uniform(-9e-4, 9e-4, image.shape) * (number % 2)
        noisy = np.where(np.asarray(image.dataobj) == 1, 0.9999999998, noisy)
        made = nib.Nifti1Image(noisy, image.affine)
        made.header.set_data_dtype(np.int16 if number % 2 == 0 else np.float32)
        nib.save(made, mask)
    assert read_volume(scans_of(raw)[0][1]).array.dtype.kind == "f"  # scaled by the header
    assert (prepared(raw, tmp_path / "noisy", MMS)[0].masks == expected.masks).all()
    capsys.readouterr()
    rewrite(scans_of(raw)[3][1], lambda array: np.where(array > 2.5, 2.5, array))
    assert not check_dataset(raw, MMS, workers=1)
    assert f"error: {scans_of(raw)[3][1]}: the value 2.5 is no label: resample the mask" in capsys.readouterr().out


def test_implausible_scans_are_named_per_patient(raw, capsys):
    scans = [image for image, _ in scans_of(raw)[:6]]

    def exchange(number, axes, affine):
        for path in scans_of(raw)[number]:
            nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj).transpose(axes), affine), path)

    for number, scale in enumerate((0.05, 10)):
        for path in scans_of(raw)[number]:
            rewrite(path, affine=nib.load(path).affine * [scale, scale, 1, 1])
    exchange(2, (2, 0, 1, 3), nib.load(scans[2]).affine[:, [2, 0, 1, 3]])  # slices on the first axis
    exchange(3, (0, 1, 3, 2), np.diag([1.3, 1.3, 30, 1]))  # time on the third, in ms
    rewrite(scans[4], lambda array: array * 0 + 7)
    rewrite(scans[5], lambda array: -1 - np.abs(array))
    assert not check_dataset(raw, MMS, workers=1)
    out = capsys.readouterr().out
    for number, text in enumerate(["the slices measure"] * 2 + ["voxels of "] * 2 + ["all voxels lie in "] * 2):
        assert f"error: {scans[number]}: {text}" in out


def test_labels_outside_the_field_of_view_are_said_per_patient(raw, capsys):
    images = scans_of(raw)
    assert check_dataset(raw, MMS, workers=1)
    assert "of its labels" not in capsys.readouterr().out
    for path in images[0]:  # the organ moves to the border of a large matrix
        rewrite(path, lambda array: np.pad(array, [(300, 0), (0, 0), (0, 0), (0, 0)]))
    assert check_dataset(raw, MMS, workers=1)
    assert f"warning: {images[0][0]}: 100.0 % of its labels lie outside" in capsys.readouterr().out


def test_unpacked_files_and_dot_files(raw, scgm_raw, tmp_path):
    shutil.copytree(scgm_raw, tmp_path / "scgm")
    image = tmp_path / "scgm/train/site1-sc01-image.nii.gz"
    for path in (*scans_of(raw)[0], image):
        nib.save(nib.load(path), path.with_suffix(""))
        path.unlink()
    for path in (*raw.rglob("*.nii.gz"), image, raw / "table.csv"):
        path.with_name(f"._{path.name}").write_bytes(b"resource fork")
        (path.parent / ".DS_Store").touch()
    assert check_dataset(raw, MMS, workers=1) and len(mms_dataloader.find_cases(raw).cases) == 17
    assert check_dataset(tmp_path / "scgm", SCGM, workers=1)


def test_data_set_linked_as_a_whole(raw, scgm_raw, tmp_path):
    shutil.move(raw / "OpenDataset", tmp_path / "shared")
    (raw / "OpenDataset").symlink_to(tmp_path / "shared")
    cases, errors, _ = mms_dataloader.find_cases(raw)
    assert errors == [] and len(cases) == 17
    shutil.move(cases[0].image, tmp_path / "elsewhere.nii.gz")
    cases[0].image.symlink_to(tmp_path / "elsewhere.nii.gz")
    (error,) = mms_dataloader.find_cases(raw).errors
    assert "a link that leads out of" in error and "put a copy of the file in its place" in error
    (tmp_path / "scgm").symlink_to(scgm_raw)
    assert scgm_dataloader.find_cases(tmp_path / "scgm").errors == []


def test_open_dataset_from_inside(raw, tmp_path):
    """`check .` finds the table beside the folder, and a phantom stays one."""
    inside = raw / "OpenDataset"
    command = [sys.executable, ROOT / "mms_dataloader.py", "check", "."]
    done = subprocess.run(command, cwd=inside, capture_output=True, text=True)
    assert done.returncode == 0 and "0 errors, 0 warnings" in done.stdout
    prepare_dataset(inside, tmp_path / "out", MMS, workers=1)
    assert PreparedData.open(tmp_path / "out", MMS).info["phantom"]


def test_data_without_any_label(raw, mms_config, monkeypatch, tmp_path):
    for _, mask in scans_of(raw):
        rewrite(mask, np.zeros_like)
    prepare_dataset(raw, tmp_path / "empty", MMS, workers=2)
    monkeypatch.setattr("sys.argv", ["x", "preview", "--data", f"{tmp_path}/empty", "--out", f"{tmp_path}/preview.png"])
    with pytest.raises(SystemExit, match=r"no slice in .* has a label"):
        run_data_command(MMS, config.MMS)
    with pytest.raises(UserError, match=r"the masks of all labelled patients in .* are empty"):
        build_loaders(replace(mms_config, data_root=str(tmp_path / "empty")), MMS)


def test_prepared_data_named_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no data in {tmp_path}/data/mms: .*--data-root\nM&Ms is free"):
        PreparedData.open("data/mms", MMS)
    with pytest.raises(UserError, match="no data in /nowhere: "):
        PreparedData.open("/nowhere", MMS)
