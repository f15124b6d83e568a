"""Whatever stands in a file, the answer is a result or a clear error (FUZZ_EXAMPLES=5000 tries more than 60)."""

import csv
import gzip
import io
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mms_dataloader
from utils.data.prepare import convert_scan
from utils.data.volume import Volume, read_header, read_volume
from utils.errors import UserError
from utils.run.checkpoint import load_checkpoint, save_checkpoint

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=5000,  # ms: nothing here may hang
    suppress_health_check=list(HealthCheck),
)

# Edits of a file: (where, as a share of its length; the new byte), and a cut.
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)
header_edits = st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6)
cuts = st.none() | st.floats(0, 1)


def edited(content, changes, cut=None):
    content = bytearray(content)
    for where, value in changes:
        content[where if isinstance(where, int) else min(int(where * len(content)), len(content) - 1)] = value
    return bytes(content if cut is None else content[: int(cut * len(content))])


def nifti(shape=(6, 5, 3, 2), seed=0):
    array = np.random.default_rng(seed).integers(0, 4, shape).astype(np.int16)
    return nib.Nifti1Image(array, np.diag([4.5, 4.5, 8, 1])).to_bytes()


def clear(call, *arguments):
    """The result of a call, or the UserError it raised; anything else fails the test."""
    try:
        return call(*arguments)
    except UserError as error:
        assert str(error) and "Traceback" not in str(error)
        return error


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "inner"


@fuzz
@given(changes=header_edits, packed=st.booleans(), later=edits, cut=cuts)
def test_damaged_nifti(place, changes, packed, later, cut):
    place.mkdir(exist_ok=True)
    content = edited(nifti(), changes)
    path = place / ("x.nii.gz" if packed else "x.nii")
    path.write_bytes(edited(gzip.compress(content, 1) if packed else content, later, cut))
    volume = clear(read_volume, path)
    if isinstance(volume, Volume):
        assert np.isfinite(volume.array.astype(np.float64)).all() and min(volume.zooms) > 0
        assert volume.array.ndim in (3, 4) and 0 not in volume.array.shape
    clear(read_header, path)


@fuzz
@given(image=header_edits, mask=header_edits)
def test_damaged_scan_in_prepare(place, image, mask):
    folder = place / "case"
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in (("i.nii", image), ("m.nii", mask)):
        (folder / name).write_bytes(edited(nifti(), changes))
    cases = mms_dataloader.Case("P", "A", "A", folder / "i.nii", (folder / "m.nii",), {"ED": 0, "ES": 1})
    before = sorted(place.rglob("*"))
    report = convert_scan(cases, mms_dataloader.DATASET, None)
    outside, labeled = report.outside
    assert report.errors or 0 <= outside <= labeled <= 2 * read_volume(folder / "i.nii").array[..., 0].size
    assert sorted(place.rglob("*")) == before


cells = st.text(max_size=12) | st.sampled_from(["A0S9V9", "A", "B", "1", "0", "../../x", "/etc", "", "NaN", "1.0"])
tables = st.lists(st.lists(cells, max_size=9), max_size=6)
headers = st.permutations(["", "External code", "VendorName", "Vendor", "Centre", "ED", "ES"])


@fuzz
@given(header=headers, rows=tables, changes=edits, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_info_tables(place, header, rows, changes, encoding):
    raw = place / "raw"
    (raw / "OpenDataset/Testing/A0S9V9").mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    content = text.getvalue().encode(encoding, "surrogatepass")
    (raw / "M&Ms Dataset Information.csv").write_bytes(edited(content, changes))
    cases, _, _ = mms_dataloader.find_cases(raw)
    assert all(case.image.is_relative_to(raw) and ".." not in case.image.parts for case in cases)


@fuzz
@given(changes=edits, cut=cuts)
def test_damaged_checkpoints(place, changes, cut):
    folder = place / "run"
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, {"step": 1, "weights": torch.arange(50.0)})
    (folder / "previous.pt").unlink(missing_ok=True)
    (folder / "last.pt").write_bytes(edited((folder / "last.pt").read_bytes(), changes, cut))
    state = clear(load_checkpoint, folder)
    if isinstance(state, dict):  # never a changed value: the file is as it was, or refused
        assert state["step"] == 1 and torch.equal(state["weights"], torch.arange(50.0))
    assert {path.name for path in folder.iterdir()} == {"last.pt"}
