"""The open cord data: a small tree in their layout, as a folder and as the zip file to download."""

import io
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import nibabel as nib
import numpy as np
import pytest

import scgm_dataloader
from utils.data import open_data
from utils.data.open_data import write_open_data
from utils.errors import UserError

AFFINE = np.array([[-0.5, 0, 0, 40], [0, 0.5, 0, -30], [0, 0, 5, 7], [0, 0, 0, 1.0]])
CORD = (150, 90)  # voxel, far from the centre of 240 x 240


def write_bids(root):
    """Scans whose grey matter is brightest, at CORD; run 2 lies 10 voxels further along the first axis."""
    for session in ("sub-9418", "sub-9584", "sub-10062Ses1"):
        for run, shift in ((1, 0), (2, 10)):
            x, y = np.indices((240, 240))
            distance = np.hypot(x - CORD[0] - shift, y - CORD[1])
            grey, cord = (np.repeat((distance < radius)[..., None], 3, 2) for radius in (5, 12))
            affine = AFFINE.copy()
            affine[0, 3] -= AFFINE[0, 0] * shift
            image = (100 + 100 * cord + 100 * grey).astype(np.int16)
            stem = f"{session}_run-{run}_T2starw"
            files = {root / session / "anat" / f"{stem}.nii.gz": image}
            if run == 1:
                labels = root / "derivatives" / "labels" / session / "anat"
                files |= {labels / f"{stem}_gmseg-manual.nii.gz": grey.astype(float),
                          labels / f"{stem}_seg-manual.nii.gz": cord.astype(float)}  # fmt: skip
            for path, array in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, affine), path)
    return root


def zipped(folder):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("gm-challenge-data-master/README.md", "data")
        archive.writestr("../../outside.nii.gz", "evil")
        archive.writestr("gm-challenge-data-master/../../sub-9418/outside.nii.gz", "evil")
        for path in folder.rglob("*.nii.gz"):
            archive.write(path, f"gm-challenge-data-master/{path.relative_to(folder)}")
    return content.getvalue()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The folder of an HTTP server, whose data.zip is what the command downloads."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(open_data, "URL", f"http://127.0.0.1:{server.server_port}/data.zip")
        yield tmp_path
        server.shutdown()


def test_sessions_become_subjects_around_their_cord(tmp_path):
    raw = tmp_path / "raw"
    write_open_data(raw, source=write_bids(tmp_path / "bids"))
    found = scgm_dataloader.find_cases(raw)
    assert not found.errors
    assert {(case.patient, case.domain, len(case.masks)) for case in found.cases} == {
        *((f"site{site}-sc01", site, 4) for site in "123"), *((f"site{site}-sc11", site, 0) for site in "123")
    }  # fmt: skip
    assert "CC0" in (raw / "OPEN_DATA.txt").read_text()
    for case in found.cases:
        image = nib.load(case.image)
        array = np.asanyarray(image.dataobj)
        assert max(array.shape[:2]) * 0.5 <= 81
        cord = np.argwhere(array > 150).mean(0)
        beside = np.abs(cord[:2] - (np.array(array.shape[:2]) - 1) / 2) * 0.5
        assert (beside <= open_data.OFFSET_MM + 0.5).all()
        # The cut moves no voxel: the cord stays where the original affine puts it.
        assert np.allclose(image.affine @ [*cord, 1], AFFINE @ [*CORD, 1, 1], atol=1e-3)
        for mask in case.masks:
            label = np.asanyarray(nib.load(mask).dataobj)
            assert np.array_equal(label, np.select([array == 300, array == 200], [1, 2]))
            assert np.allclose(nib.load(mask).affine, image.affine)


def test_download_leaves_the_data_or_names_the_way_out_and_leaves_nothing(tmp_path, served):
    archive = served / "data.zip"
    whole, raw = zipped(write_bids(tmp_path / "bids")), tmp_path / "folder" / "raw"
    for content in (None, b"<html>too many requests</html>", whole[:-1000]):
        if content:
            archive.write_bytes(content)
        with pytest.raises(UserError, match=r"data\.zip cannot be fetched and unpacked .*--from"):
            write_open_data(raw)
        assert not list(raw.parent.iterdir())
    archive.write_bytes(whole)
    write_open_data(raw)
    assert len(list((raw / "train").glob("*image.nii.gz"))) == 3
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]  # neither the archive nor "outside"
    assert not list(tmp_path.rglob("outside*"))


def test_bad_copies_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    pointers = write_bids(tmp_path / "pointers")
    (pointers / "sub-9584/anat/sub-9584_run-1_T2starw.nii.gz").write_text("/annex/objects/SHA256E-s12--34.nii.gz")
    for source, text in (
        ("empty", "no session of the data set"),
        ("bad.zip", "bad.zip cannot be fetched and unpacked"),
        ("absent", "no session of the data set"),
        ("pointers", "sub-9584_run-1_T2starw.nii.gz: only a pointer"),
    ):
        with pytest.raises(UserError, match=text):
            write_open_data(tmp_path / "raw", source=tmp_path / source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.zip", "empty", "pointers"]
    with pytest.raises(UserError, match="exists already"):
        write_open_data(tmp_path / "empty", source=tmp_path / "pointers")
