"""Raw data: what is wrong is named, all at once; what is right comes out on the canvas where it should."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from helpers import MMS, ROOT, run_python, start_python, train, write_table
from scipy.ndimage import map_coordinates

import config
import mms_dataloader
import scgm_dataloader
from utils.data.commands import run_data_command
from utils.data.loaders import build_loaders
from utils.data.prepare import check_dataset, prepare_dataset
from utils.data.prepared import PreparedData
from utils.data.user_scans import with_unlabeled
from utils.data.volume import mask_in_grid, read_volume
from utils.errors import UserError

SCGM = scgm_dataloader.DATASET


def folder_of(raw, number, part="*/*"):
    folders = [path for path in (raw / "OpenDataset").glob(part) if path.name not in ("Labeled", "Unlabeled")]
    return sorted(folders)[number]


@pytest.fixture
def raw(mms_raw, tmp_path):
    return shutil.copytree(mms_raw, tmp_path / "raw")


def table_of(raw):
    return next(raw.glob("*.csv"))


def scans_of(raw):
    masks = sorted(path for path in raw.rglob("*_sa_gt.nii.gz") if "Unlabeled" not in path.parts)
    return [(path.with_name(path.name.replace("_gt", "")), path) for path in masks]


def prepared(raw, out, dataset=MMS):
    prepare_dataset(raw, out, dataset, workers=2)
    return PreparedData.open(out, dataset)


def rewrite(path, change=lambda array: array, affine=None):
    image = nib.load(path)
    affine = image.affine if affine is None else affine
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), affine), path)


def test_prepared_images_equal_an_independent_resampling(mms_raw, mms_root):
    data = PreparedData.open(mms_root, MMS)
    for row in np.random.default_rng(0).choice(np.flatnonzero(data.index["mask"] >= 0), 5, replace=False):
        patient, frame, number = (data.index[name][row] for name in ("patient", "frame", "slice"))
        path = next(mms_raw.rglob(f"{patient}_sa.nii.gz"))
        image = nib.load(path)
        plane = np.asarray(image.dataobj)[:, :, number, frame].astype(float)
        low, high = np.percentile(plane, [0.5, 99.5])
        plane = (np.clip(plane, low, high) - low) / (high - low)
        raw_mask = nib.load(str(path).replace("_sa", "_sa_gt"))
        mask, zooms = np.asarray(raw_mask.dataobj)[:, :, number, frame], image.header.get_zooms()
        truth = nib.load(data.truth_path(patient, data.index["phase"][row]))
        assert (np.asarray(truth.dataobj) == np.asarray(raw_mask.dataobj)[..., frame]).all()
        assert (truth.affine == raw_mask.affine).all() and truth.header.get_zooms() == zooms[:3]
        axes = [(np.arange(300) - 149.5) * 1.1 / zooms[axis] + (plane.shape[axis] - 1) / 2 for axis in (0, 1)]
        grid = np.meshgrid(*axes, indexing="ij")
        inside = np.all([(g >= 0) & (g <= n - 1) for g, n in zip(grid, plane.shape, strict=True)], axis=0)
        expected = map_coordinates(plane, grid, order=1)
        assert np.abs(data.images[row] - expected)[inside].max() < 2e-3  # float16
        nearest = map_coordinates(mask, np.round(grid).astype(int), order=0) * inside
        assert (data.masks[data.index["mask"][row]] == nearest)[inside].mean() > 0.999  # ties may round either way
        field = data.images[row][6:-6, 6:-6].astype(np.float32)
        assert np.allclose(data.quantiles[row], np.quantile(field, np.linspace(0, 1, 256)), atol=1e-6)


def test_content_hash_covers_table_truth_and_geometry(raw, tmp_path):
    def content_hash(name):
        return prepared(raw, tmp_path / name).info["content_hash"]

    for part in ("Training", "Validation"):  # fewer are enough
        shutil.rmtree(raw / "OpenDataset" / part)
    table, hashes = table_of(raw), [content_hash("as it is")]
    rows, mask = table.read_text(), scans_of(raw)[0][1]
    patient = next(line for line in rows.splitlines() if mask.parent.name in line)
    cells = patient.split(",")
    cells[5], cells[6] = cells[6], cells[5]
    table.write_text(rows.replace(patient, ",".join(cells)))
    hashes.append(content_hash("ED and ES exchanged"))
    rewrite(mask, lambda labels: np.where(labels == 3, 0, labels))
    hashes.append(content_hash("fewer labels"))
    for path in scans_of(raw)[0]:
        rewrite(path, affine=nib.affines.from_matvec(np.eye(3), [5, 0, 0]) @ nib.load(path).affine)
    hashes.append(content_hash("moved"))
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (20, 10), (61, 83)])
def test_normalisation_clips_at_the_percentiles_of_numpy_to_the_bit(shape):
    slices = (1000 * np.random.default_rng(0).random((3, *shape))).astype(np.float32)
    slices[2] = slices[2].round(-2)  # many equal values
    low, high = np.percentile(slices, [0.5, 99.5], axis=(1, 2), keepdims=True).astype(np.float32)
    expected = (slices.clip(low, high) - low) / np.where(high > low, high - low, 1)
    assert np.array_equal(mms_dataloader.normalize(slices), expected)
    slices[0], slices[1] = 7, 0
    for normalize in (mms_dataloader.normalize, scgm_dataloader.normalize):
        result = normalize(slices)
        assert result.min() >= 0 and result.max() <= 1 and result[1].max() == 0
    assert mms_dataloader.normalize(slices)[0].max() == 0


def test_every_problem_is_named_in_one_pass(raw, capsys):
    """One fault of each kind, in as many patients."""
    folders = [folder_of(raw, i) for i in range(8)] + [folder_of(raw, i, "Training/Labeled/*") for i in range(2)]
    codes = [folder.name for folder in folders]

    def image(i, kind="_sa"):
        return folders[i] / f"{codes[i]}{kind}.nii.gz"

    image(0).write_bytes(image(0).read_bytes()[:-2000])  # truncated
    image(1, "_sa_gt").unlink()
    rewrite(image(2, "_sa_gt"), lambda labels: labels[:-1])  # another shape
    rewrite(image(3), lambda voxels: voxels[..., 0])  # 3D
    rewrite(image(4), lambda voxels: np.where(np.arange(voxels.size).reshape(voxels.shape) == 9, np.nan, voxels))
    rewrite(image(5, "_sa_gt"), lambda labels: np.where(labels == 3, 7, labels))
    shutil.copytree(folders[6], raw / "OpenDataset/Training/Unlabeled" / codes[6])  # there twice
    shutil.copytree(folders[7], folders[7].with_name("Z9Z9Z9"))  # not in the table
    lines = [line.split(",") for line in table_of(raw).read_text().splitlines()]
    rows = {row[1]: row for row in lines}
    rows[codes[8]][3], rows[codes[9]][6] = "X", "99"  # vendor, ES
    image(8).write_bytes(image(8).read_bytes()[:-2000])
    lines.append(["99", "../../evil", "Siemens", "A", "1", "0", "1"])
    lines.append(next(line for line in lines[1:] if line[1] not in codes))  # a patient in the table twice
    lines.append(["100", "Q1Q1Q1", "Siemens", "Z", "1", "0", "1"])  # not on disk
    table_of(raw).write_text("\n".join(map(",".join, lines)))

    assert not check_dataset(raw, MMS, workers=2)
    out = capsys.readouterr().out
    for expected in (
        f"error: {image(0)} cannot be read whole",
        f"error: {image(1, '_sa_gt')}: missing",
        f"error: {image(2, '_sa_gt')}: shape",
        f"error: {image(3, '_sa_gt')}: shape",
        f"error: {image(4)}: 1 voxels are NaN",
        f"error: {image(5, '_sa_gt')}: labels [7] beside 0, 1, 2, 3;",
        f"error: patient {codes[6]} is there 2 times",
        "error: " + str(folders[7].with_name("Z9Z9Z9")) + ": patient Z9Z9Z9 is not in the info table",
        f"patient {codes[8]!r} has the unknown vendor 'X', not one of A, B, C, D",
        f"error: {image(8)} cannot be read whole",  # of that very patient
        f"error: {image(9)}: {{'ES': 99}} in the table, but the file holds frames 0..1",
        "'../../evil' is left out",
        "is in the table twice",
        "warning: ",
        "are not on disk: ",
    ):
        assert expected in out
    assert out.count(f"error: {image(1, '_sa_gt')}") == 1
    assert "unknown vendor 'Z'" not in out  # of a patient who is not on disk
    with pytest.raises(UserError, match="has the errors listed above"):
        prepare_dataset(raw, raw.parent / "out", MMS, workers=2)
    assert sorted(path.name for path in raw.parent.iterdir()) == ["raw"]


def test_changed_description_is_refused(mms_root, tmp_path):
    """Whichever byte of dataset.json; a spacing; rows in another order, which are other images; another format."""
    changed_said = r"prepared is damaged .*dataset\.json or index\.csv was changed"
    root = shutil.copytree(mms_root, tmp_path / "prepared")
    content, (header, *rows) = (root / "dataset.json").read_bytes(), (root / "index.csv").read_text().splitlines()
    for n in (n for n in range(0, len(content), 7) if not content[n : n + 1].isspace()):
        (root / "dataset.json").write_bytes(content[:n] + bytes([content[n] ^ 1]) + content[n + 1 :])
        with pytest.raises(UserError):
            PreparedData.open(root, MMS)
    for before, after, said in ((b'"spacing_mm": 1.1', b'"spacing_mm": 1.3', changed_said),
                                (b'"format": 6', b'"format": 5', "format 5, not mms 6")):  # fmt: skip
        (root / "dataset.json").write_bytes(content.replace(before, after))
        with pytest.raises(UserError, match=said):
            PreparedData.open(root, MMS)
    (root / "dataset.json").write_bytes(content)
    (root / "index.csv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    with pytest.raises(UserError, match=changed_said):
        PreparedData.open(root, MMS)


def test_disk_that_is_too_small_or_read_only_is_named_before_the_work(mms_raw, small_disk):
    with pytest.raises(UserError, match=r"the prepared data take 0\.\d GB, only 0\.0 GB are free"):
        prepare_dataset(mms_raw, small_disk / "out", MMS, workers=2)
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"out\.partial cannot be written \(Read-only"):
        prepare_dataset(mms_raw, small_disk / "out", MMS, workers=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_prepare_leaves_nothing_that_looks_ready(mms_raw, tmp_path, number):
    started = start_python(ROOT / "mms_dataloader.py", "prepare", mms_raw, "--out", tmp_path / "out")
    while not (tmp_path / "out.partial/truth").exists():  # at work
        assert started.poll() is None and not (tmp_path / "out").exists()
        time.sleep(0.01)
    os.killpg(started.pid, number)
    said = started.communicate(timeout=60)[0]
    assert started.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    assert number == signal.SIGKILL or ("stopped by Ctrl-C" in said and not list(tmp_path.iterdir()))
    prepare_dataset(mms_raw, tmp_path / "out", MMS, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_extreme_slices_are_prepared_and_trained_on(raw, tmp_path, mms_config):
    """Constant and empty slices, 512 px and 24 px matrices: valid input all the way through a training."""
    constant, large, small = (folder_of(raw, number, "Training/Labeled/*") for number in range(3))
    rng = np.random.default_rng(0)
    shapes = {constant: None, large: (512, 512), small: (24, 21)}
    for folder, plane in shapes.items():
        scan, mask = (folder / f"{folder.name}_{kind}.nii.gz" for kind in ("sa", "sa_gt"))
        array = np.asarray(nib.load(scan).dataobj)
        if plane is None:
            array[:, :, 0], array[:, :, 1] = 700, 0
            rewrite(scan, lambda _, array=array: array)
        else:
            shape = (*plane, *array.shape[2:])
            rewrite(scan, lambda _, shape=shape: rng.integers(0, 900, shape).astype(np.int16))
            rewrite(mask, lambda _, shape=shape: rng.integers(0, 4, shape).astype(np.uint8))
    data = prepared(raw, tmp_path / "out")
    assert np.isfinite(data.images).all() and np.isfinite(data.quantiles).all()
    rows = {folder: np.flatnonzero(data.index["patient"] == folder.name) for folder in shapes}
    assert data.images[rows[constant]].reshape(len(rows[constant]), -1).max(1).tolist().count(0) == 4  # 2 frames
    assert (data.images[rows[large]] > 0).mean() > 0.9 and (data.images[rows[small]] > 0).mean() < 0.05
    run = train(mms_config, data_root=str(tmp_path / "out"), cps_warmup=0, cps_ramp=0)
    line = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert line["skipped_steps"] == 0 and np.isfinite(line["loss"])


def test_consensus_of_four_raters_by_hand(scgm_root):
    # GM by 4, 3, 2 (a tie) of the raters; cord by 4, 3, 2; GM by 2 and WM by 2; nobody
    raters = [np.array([*row], int) for row in ("11122210", "11122210", "11022020", "10020020")]
    assert scgm_dataloader.majority(raters).tolist() == [1, 1, 0, 2, 2, 0, 2, 0]
    data = PreparedData.open(scgm_root, SCGM)
    assert {*data.index["patient"]} - {*data.patients_with_masks("none")} == {f"site{n}-sc11" for n in range(1, 5)}
    assert set(np.unique(data.masks)) == {0, 1}  # WM is background


def test_scgm_faults_are_named_all_at_once(scgm_raw, tmp_path, capsys):
    raw = shutil.copytree(scgm_raw, tmp_path / "raw")
    train = raw / "train"
    (train / "site1-sc01-mask-r3.nii.gz").unlink()
    rewrite(train / "site2-sc01-mask-r1.nii.gz", lambda labels: labels[:-1])
    for rater in range(1, 5):
        (train / f"site3-sc02-mask-r{rater}.nii.gz").unlink()
    shutil.copy(train / "site4-sc01-image.nii.gz", train / "site9-sc01-image.nii.gz")
    (train / "site4-sc01-image.nii.gz").unlink()
    shutil.copy(train / "site4-sc02-mask-r1.nii.gz", train / "site4-sc02-mask-r5.nii.gz")
    assert not check_dataset(raw, SCGM, workers=2)
    out = capsys.readouterr().out
    assert "site4-sc02-mask-r5.nii.gz: not a name like" in out
    for expected in (
        f"{train}/site1-sc01-mask-r3.nii.gz: missing",
        f"{train}/site2-sc01-mask-r1.nii.gz: shape",
        f"{train}/site3-sc02-mask-r4.nii.gz: missing",
        f"{train}/site9-sc01-image.nii.gz: not a name like",
        f"{train}/site4-sc01-mask-r2.nii.gz: a mask without its image",
    ):
        assert f"error: {expected}" in out
    shutil.rmtree(train)
    assert "no images with masks like train/" in scgm_dataloader.find_cases(raw).errors[-1]


@pytest.mark.parametrize("phases", [("0", "0"), ("", ""), ("nan", "nan"), ("-1", "x")])
def test_phases_matter_only_where_there_are_masks(raw, phases):
    labeled, unlabeled = folder_of(raw, 0).name, folder_of(raw, 0, "Training/Unlabeled/*").name
    lines = [line.split(",") for line in table_of(raw).read_text().splitlines()]

    def errors(code):
        changed = [[*row[:5], *phases, *row[7:]] if row[1] == code else row for row in lines]
        table_of(raw).write_text("\n".join(map(",".join, changed)))
        return mms_dataloader.find_cases(raw).errors

    assert errors(unlabeled) == []
    (error,) = errors(labeled)
    assert f"'{labeled}'" in error and "needs ED and ES in the info table" in error


@pytest.mark.parametrize("kind", ["xlsx", "utf-16", "cp1252"])
def test_info_table_as_spreadsheets_write_it(raw, kind):
    """In OpenDataset, columns reversed, capitals, whole numbers as floats; what lacks a column is none."""
    expected, table = mms_dataloader.find_cases(raw), table_of(raw)
    header, *rows = (line.split(",") for line in table.read_text().splitlines())
    rows = [[*row[:3], f" {row[3].lower()} ", *(f"{cell}.0" for cell in row[4:]), "", "Ödem"] for row in rows]
    lines = [line[::-1] for line in ([f" {name.upper()}  " for name in (*header, "Age", "Pathology")], *rows)]
    table.unlink()
    (error,) = mms_dataloader.find_cases(raw).errors  # and nothing about every patient that is not in it
    assert "expected one info table" in error
    if kind == "xlsx":
        lines = [[float(cell) if cell.replace(".0", "").isdigit() else cell for cell in line] for line in lines]
        write_table(raw / "OpenDataset/Information.xlsx", lines)
    else:
        write_table(raw / "OpenDataset/Information.csv", lines, encoding=kind, delimiter=";")
    assert mms_dataloader.find_cases(raw) == expected
    assert mms_dataloader.find_cases(raw / "OpenDataset").cases == expected.cases
    assert not any("nformation" in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))


def test_description_that_workers_cannot_get_is_named(mms_raw, tmp_path):
    unsendable = replace(MMS, normalize=lambda slices: slices), with_unlabeled([], replace(MMS, clinical=lambda _: {}))
    for dataset, name in zip(unsendable, ("normalize", "clinical"), strict=True):
        with pytest.raises(UserError, match=rf"DatasetInfo\.{name} cannot be sent to workers"):
            check_dataset(mms_raw, dataset, workers=2)


def test_a_scan_is_known_by_its_voxels(mms_root, raw, tmp_path):
    """Under another name, as another type, frame by frame; blank frames are nobody's."""
    data = PreparedData.open(mms_root, MMS)
    patient = data.patients_with_masks("A")[0]
    image = nib.load(next(raw.rglob(f"{patient}_sa.nii.gz")))
    frame = np.asarray(image.dataobj)[..., 1].astype(np.float64)
    (tmp_path / "own").mkdir()
    nib.save(nib.Nifti1Image(np.stack([frame, 0 * frame], -1), image.affine), tmp_path / "own/other_0000.nii.gz")
    again = prepared(raw, tmp_path / "out", with_unlabeled([tmp_path / "own"], MMS))
    known, (checksum, *more) = data.checksums([patient]), again.checksums(["other"])
    assert len(known) == 2 and known[checksum] == patient and not more


# --- raw data as people have them


def turn(path, axes):
    """Store a file in another orientation, its affine changed alike: nothing moves in the patient."""
    image = nib.load(path)
    start = nib.io_orientation(image.affine)
    ornt = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(ornt), path)


@pytest.mark.parametrize("axes", ["LPI", "PLS", "SAR"])
def test_turned_masks_are_prepared_as_if_they_were_not(raw, tmp_path, capsys, axes):
    expected = prepared(raw, tmp_path / "straight")
    for _, mask in scans_of(raw):
        turn(mask, axes)
    capsys.readouterr()
    data = prepared(raw, tmp_path / "turned")
    assert (data.masks == expected.masks).all() and data.info["content_hash"] == expected.info["content_hash"]
    for path in (tmp_path / "straight/truth").iterdir():
        truth, turned = nib.load(path), nib.load(tmp_path / "turned/truth" / path.name)
        assert (turned.affine == truth.affine).all() and (turned.get_fdata() == truth.get_fdata()).all()
    out = capsys.readouterr().out
    assert f"orientation {axes} against" in out and f"0 errors, {out.count('warning: ')} warnings" in out


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
    expected = prepared(raw, tmp_path / "exact")
    rng = np.random.default_rng(0)
    for number, (_, mask) in enumerate(scans_of(raw)):
        image = nib.load(mask)
        noisy = np.asarray(image.dataobj) + rng.uniform(-9e-4, 9e-4, image.shape) * (number % 2)
        noisy = np.where(np.asarray(image.dataobj) == 1, 0.9999999998, noisy)
        made = nib.Nifti1Image(noisy, image.affine)
        made.header.set_data_dtype(np.int16 if number % 2 == 0 else np.float32)
        nib.save(made, mask)
    assert read_volume(scans_of(raw)[0][1]).array.dtype.kind == "f"  # scaled by the header
    assert (prepared(raw, tmp_path / "noisy").masks == expected.masks).all()
    capsys.readouterr()
    rewrite(scans_of(raw)[3][1], lambda array: np.where(array > 2.5, 2.5, array))
    assert not check_dataset(raw, MMS, workers=1)
    assert f"error: {scans_of(raw)[3][1]}: the value 2.5 is no label: resample by nearest" in capsys.readouterr().out


def test_implausible_scans_and_phases_are_named_per_patient(raw, capsys):
    scans = [image for image, _ in scans_of(raw)[:7]]

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
    for path in scans_of(raw)[6]:  # the organ moves to the border of a large matrix
        rewrite(path, lambda array: np.pad(array, [(300, 0), (0, 0), (0, 0), (0, 0)]))
    (_, exchanged), (image, late) = scans_of(raw)[7:9]
    rewrite(exchanged, lambda labels: labels[..., ::-1])
    rewrite(late, lambda labels: np.concatenate([0 * labels, labels], 3))  # as if the table counted from 1: no truth
    rewrite(image, lambda voxels: np.concatenate([voxels, voxels], 3))
    assert not check_dataset(raw, MMS, workers=1)
    out = capsys.readouterr().out
    assert re.findall("warning: (.*): [0-9.]+ % of its labels lie outside", out) == [str(scans[6])]
    for number, text in enumerate(["the slices measure"] * 2 + ["voxels of "] * 2 + ["all voxels lie in "] * 2):
        assert f"error: {scans[number]}: {text}" in out
    assert f"warning: {exchanged}: LV is larger at ES than at ED: are ED and ES exchanged?" in out
    assert f"error: {late}: labels in frames [2, 3], in the table (from 0) " in out
    rewrite(late, lambda labels: np.concatenate([labels[..., 2:]] * 2, 3))  # right, and in other frames, too
    check_dataset(raw, MMS, workers=1)
    assert f"warning: {late}: labels in frames [0, 1, 2, 3], in the table" in capsys.readouterr().out


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


def test_data_set_from_inside_or_linked_as_a_whole(raw, scgm_raw, tmp_path):
    """`check .` finds the table beside the folder, and a phantom stays one."""
    done = run_python(ROOT / "mms_dataloader.py", "check", ".", cwd=raw / "OpenDataset")
    assert done.returncode == 0 and "0 errors, 0 warnings" in done.stdout
    assert prepared(raw / "OpenDataset", tmp_path / "out").info["phantom"]
    shutil.move(raw / "OpenDataset", tmp_path / "shared")
    (raw / "OpenDataset").symlink_to(tmp_path / "shared")
    cases, errors, _ = mms_dataloader.find_cases(raw)
    assert errors == [] and len(cases) == 17
    shutil.move(cases[0].image, tmp_path / "elsewhere.nii.gz")
    cases[0].image.symlink_to(tmp_path / "elsewhere.nii.gz")
    (error,) = mms_dataloader.find_cases(raw).errors
    assert "a link that leads out of" in error and "put a copy in its place" in error
    (tmp_path / "scgm").symlink_to(scgm_raw)
    assert scgm_dataloader.find_cases(tmp_path / "scgm").errors == []


def test_data_without_any_label(raw, mms_config, monkeypatch, tmp_path):
    for _, mask in scans_of(raw):
        rewrite(mask, np.zeros_like)
    prepare_dataset(raw, tmp_path / "empty", MMS, workers=2)
    monkeypatch.setattr("sys.argv", ["x", "preview", "--data", f"{tmp_path}/empty", "--out", f"{tmp_path}/preview.png"])
    with pytest.raises(SystemExit, match=r"no slice in .* has a label"):
        run_data_command(MMS, config.MMS)
    with pytest.raises(UserError, match=r"the masks of all labelled patients in .* are empty"):
        build_loaders(replace(mms_config, data_root=str(tmp_path / "empty")), MMS)
