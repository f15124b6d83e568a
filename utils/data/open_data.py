"""Real cord scans (CC0) in the raw SCGM layout."""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.conf import Positional

from utils.data.volume import mask_in_grid, read_volume, save_scan, whole_numbers
from utils.errors import UserError, naming

URL = "https://github.com/sct-pipeline/gm-challenge-data/archive/refs/heads/master.zip"
# Sessions by site of the raw layout: a held-out site is another scanner.
SESSIONS = {
    "1": ("sub-9418", "sub-9604"),  # Philips, 3 T
    "2": ("sub-9584", "sub-9669"),  # Siemens, 3 T, voxels of 0.4 to 0.5 mm
    "3": ("sub-10062Ses1", "sub-10062Ses2", "sub-9709Ses1", "sub-9709Ses2"),  # Siemens, 1.5 and 3 T
    "4": ("sub-9605", "sub-9611Ses1", "sub-9611Ses2", "sub-9611Ses3", "sub-20210728"),  # 7 T
}
OPEN_NOTE = "OPEN_DATA.txt"  # marks the raw folder: its scans are not the challenge's
SIDE_MM = 80  # of the cut images
OFFSET_MM = 5  # the cord lies up to so far from their centre, as in the challenge's images
SOURCE = f"""Spinal cord grey matter imaging challenge 2018, acquisition data, CC0 1.0, from {URL}
A session is a subject; run 1 lies in train, where it has masks, run 2 in test. Cut around the cord.
The one manual mask stands for all four raters: 1 grey matter, 2 the rest of the cord.
"""


def write_open_data(
    raw: Positional[Path], /, *, source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
) -> None:
    """Download real cord scans of several sites (CC0, 29 MB) into the raw SCGM layout.

    Args:
        raw: folder to write; must not be there.
        source: folder or zip file with a copy of the data, or of a part, instead of the download.
    """
    from torchvision.datasets.utils import download_url, extract_archive  # slow to import

    if raw.exists():
        raise UserError(f"{raw} exists already: remove it, or choose another folder")
    raw.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{raw.name}_", dir=raw.parent) as folder:
        new, tree, archive = (Path(folder) / name for name in ("raw", "bids", "data.zip"))
        with naming(source or URL, "cannot be fetched and unpacked", remedy=": try again, or name a copy by --from"):
            if not source:
                download_url(URL, folder, archive.name)
            if not source or source.is_file():
                extract_archive(source or archive, tree)
        files = {path.name: path for path in (tree if tree.exists() else source).rglob("sub-*") if path.is_file()}
        counts = dict.fromkeys(SESSIONS, 0)
        for site, sessions in SESSIONS.items():
            for number, session in enumerate(sessions, start=1):
                counts[site] += _write_session(files, session, f"site{site}-sc", number, new)
        if not any(counts.values()):
            raise UserError(f"{source or URL}: no session of the data set, such as sub-9418, in it")
        (new / OPEN_NOTE).write_text(SOURCE)
        new.rename(raw)
    print(f"{raw}: sessions by site: {', '.join(f'{site}: {count}' for site, count in counts.items())}")


def _write_session(files: dict[str, Path], session: str, prefix: str, number: int, raw: Path) -> bool:
    """Write both runs of a session; return False where it is not in this copy."""
    scan = f"{session}_run-{{}}_T2starw{{}}.nii.gz".format
    if scan(1, "") not in files:
        return False
    runs = [files[name] for name in (scan(1, ""), scan(2, "")) if name in files]
    masks = [files[name] for kind in ("gmseg", "seg") if (name := scan(1, f"_{kind}-manual")) in files]
    for path in (*runs, *masks):
        if path.stat().st_size < 1000:
            raise UserError(f"{path}: only a pointer of git-annex or git-lfs: get the file itself")
    rng, volumes = np.random.default_rng([0, *session.encode()]), [read_volume(path, 3) for path in runs]
    first = volumes[0]
    middle = first.affine @ [*(np.array(first.array.shape) - 1) / 2, 1]  # mm
    if labeled := len(masks) == 2:
        grey, cord = (mask_in_grid(whole_numbers(read_volume(mask, 3)), first).array > 0 for mask in masks)
        middle = first.affine @ [*np.argwhere(cord).mean(0), 1]
        label = np.where(grey, 1, np.where(cord, 2, 0)).astype(np.uint8)
    for run, volume in enumerate(volumes):
        shape, zooms = np.array(volume.array.shape[:2]), np.array(volume.zooms[:2])
        center = (np.linalg.inv(volume.affine) @ middle)[:2] + rng.uniform(-OFFSET_MM, OFFSET_MM, 2) / zooms
        half = np.minimum(SIDE_MM / 2 / zooms, np.minimum(center, shape - 1 - center)).astype(int)
        start, affine = np.rint(center).astype(int) - half, volume.affine.copy()
        affine[:3, 3] += affine[:3, :2] @ start
        window = tuple(slice(a, a + 2 * n + 1) for a, n in zip(start, half, strict=True))
        part, name = "train" if labeled and run == 0 else "test", f"{prefix}{number + 10 * run:02d}"
        save_scan(raw / part / f"{name}-image.nii.gz", volume.array[window], affine)
        for rater in range(1, 5) if part == "train" else ():
            save_scan(raw / part / f"{name}-mask-r{rater}.nii.gz", label[window], affine)
    return True
