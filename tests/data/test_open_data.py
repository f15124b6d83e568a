"""The open cord data: a small tree in their layout, served as a zip file on the loopback address."""

import http.server
import io
import shutil
import subprocess
import sys
import threading
import zipfile

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT

import scgm_dataloader
from utils.data import open_data
from utils.data.open_data import download, write_open_data
from utils.errors import UserError

AFFINE = np.array([[-0.5, 0, 0, 40], [0, 0.5, 0, -30], [0, 0, 5, 7], [0, 0, 0, 1.0]])
CORD = (150, 90)  # voxel, far from the centre of 240 x 240


def write_bids(root, sessions=("sub-9418", "sub-9584", "sub-10062Ses1")):
    """Scans whose grey matter is brightest, at CORD; run 2 lies 10 voxels further along the first axis."""
    for session in sessions:
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
def server():
    """An HTTP server of one file, whose `content` and whether it knows ranges a test sets."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.headers["Range"])
            first = int(self.headers["Range"].split("=")[1].rstrip("-")) if self.server.ranges else 0
            self.send_response(206 if first else 200)
            body = self.server.content[first:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.server.sent])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.content, found.ranges, found.asked, found.sent = b"", False, [], None
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def address(server):
    return f"http://127.0.0.1:{server.server_port}/data.zip"


def test_sessions_become_subjects_around_their_cord(tmp_path):
    raw = tmp_path / "raw"
    write_open_data(raw, source=write_bids(tmp_path / "bids"))
    found = scgm_dataloader.find_cases(raw)
    assert not found.errors
    assert {(case.patient, case.domain, len(case.masks)) for case in found.cases} == {
        *((f"site{site}-sc01", site, 4) for site in "123"), *((f"site{site}-sc11", site, 0) for site in "123")
    }  # fmt: skip
    assert "CC0" in (raw / "SOURCE.txt").read_text()
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
    places = [nib.load(case.image).shape for case in found.cases]
    write_open_data(tmp_path / "again", source=tmp_path / "bids")
    again = scgm_dataloader.find_cases(tmp_path / "again").cases
    assert places == [nib.load(case.image).shape for case in again]  # seeded


def test_the_archive_is_downloaded_and_only_its_sessions_are_written(tmp_path, server, monkeypatch):
    server.content = zipped(write_bids(tmp_path / "bids"))
    monkeypatch.setattr(open_data, "URL", address(server))
    raw = tmp_path / "folder" / "raw"
    write_open_data(raw)
    assert len(list((raw / "train").glob("*image.nii.gz"))) == 3
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]  # neither the archive nor "outside"
    assert not list(tmp_path.rglob("outside*"))


def test_a_zip_of_ones_own_copy(tmp_path):
    """Without the folder that GitHub makes around the files."""
    bids = write_bids(tmp_path / "bids", sessions=("sub-9418",))
    shutil.make_archive(str(tmp_path / "copy"), "zip", bids)
    write_open_data(tmp_path / "raw", source=tmp_path / "copy.zip")
    assert len(list((tmp_path / "raw" / "train").glob("site1-sc01-*"))) == 5


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_or_begins_anew(tmp_path, server, ranges):
    server.content, server.ranges = zipped(write_bids(tmp_path / "bids")), ranges
    path = tmp_path / "archive.zip"
    server.sent = 1000
    with pytest.raises(UserError, match=r"1000 bytes came, which are no whole zip file .*try again"):
        download(address(server), path)
    server.sent = None
    assert download(address(server), path).read_bytes() == server.content
    assert server.asked == ["bytes=0-", "bytes=1000-"]


def test_a_page_instead_of_an_archive_is_named_and_not_kept(tmp_path, server):
    server.content = b"<html>too many requests</html>"
    with pytest.raises(UserError, match="30 bytes came"):
        download(address(server), tmp_path / "archive.zip")
    assert not (tmp_path / "archive.zip").exists()


def test_without_a_network_the_error_names_the_way_out(tmp_path, server):
    url = address(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be downloaded .*--from"):
        download(url, tmp_path / "archive.zip")


def test_bad_copies_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    pointers = write_bids(tmp_path / "pointers")
    (pointers / "sub-9584/anat/sub-9584_run-1_T2starw.nii.gz").write_text("/annex/objects/SHA256E-s12--34.nii.gz")
    for source, text in (
        ("empty", "no session of the data set"),
        ("bad.zip", "no whole zip file"),
        ("absent", "no such folder or zip file"),
        ("pointers", "sub-9584_run-1_T2starw.nii.gz: only a pointer"),
    ):
        with pytest.raises(UserError, match=text):
            write_open_data(tmp_path / "raw", source=tmp_path / source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.zip", "empty", "pointers"]
    with pytest.raises(UserError, match="exists already"):
        write_open_data(tmp_path / "empty", source=tmp_path / "pointers")


def test_the_command_is_that_of_the_script(tmp_path):
    command = [
        sys.executable,
        ROOT / "scgm_dataloader.py",
        "open-data",
        tmp_path / "raw",
        "--from",
        tmp_path / "absent",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no such folder or zip file" in done.stderr and "Traceback" not in done.stderr
