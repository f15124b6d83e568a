"""Prepared data: opening the folder, and splitting its patients for one held-out domain."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import CANVAS_PX, FIELD_PX, Config
from utils.data.dataset import DatasetInfo
from utils.errors import UserError, naming

FORMAT_VERSION = 5
QUANTILES = 256  # points of a slice's quantile curve
INDEX_COLUMNS = {  # of index.csv: one row per slice, in the order of images.npy
    "patient": str,
    "domain": str,
    "group": str,  # patients are counted by group when labelled ones are chosen
    "phase": str,  # of a labelled frame; empty elsewhere
    "frame": int,
    "slice": int,
    "mask": int,  # row in masks.npy, -1 where there is none
    "rows": int,  # voxels of the scan's first two axes
    "columns": int,
    "row_mm": float,
    "column_mm": float,
    "slice_mm": float,
    "checksum": str,  # of the frame's voxels, as they were read; empty for a blank frame
}

NO_DOMAIN = "none"  # as the held-out domain: all are trained on
INFO = ("dataset", "spacing_mm", "content_hash", "phantom")  # what dataset.json must say


@dataclass(frozen=True)
class PreparedData:
    """Prepared data, as `prepare` has written them into a folder; the arrays are memory maps."""

    root: Path
    info: dict[str, Any]
    index: dict[str, np.ndarray]
    images: np.ndarray  # (N, C, C) float16
    masks: np.ndarray  # (M, C, C) uint8
    quantiles: np.ndarray  # (N, 256) float32

    @classmethod
    def open(cls, root: str | Path, dataset: DatasetInfo) -> "PreparedData":
        """Open the folder `root`; raise UserError if it is missing, damaged, or of another data set or format."""
        root = Path(root)
        if not (root / "dataset.json").is_file():
            place = "" if root.is_absolute() else f" of {Path.cwd()}: if they lie elsewhere, name them by --data-root"
            demo = (
                f"{dataset.download_help}\nOr try the demo, which needs no data: python {dataset.key}_train.py --demo"
            )
            raise UserError(f"no prepared {dataset.name} data in the folder {root}{place}\n{demo}")
        with naming(root, "is damaged", remedy=": prepare the data again"):
            info = json.loads((root / "dataset.json").read_text())
            if info["dataset"] != dataset.key:
                raise UserError(f"{root} holds {info['dataset']} data: use its scripts, or name {dataset.key} data")
            if info["format"] != FORMAT_VERSION:
                raise UserError(f"{root}: format {info['format']}, not {FORMAT_VERSION}: remove it, prepare it again")
            text = (root / "index.csv").read_bytes()
            if info.pop("sha256") != description_digest(info, text):  # rows in another order are other images
                raise ValueError("dataset.json or index.csv was changed")
            rows = list(csv.DictReader(io.StringIO(text.decode(), newline="")))
            info = {name: info[name] for name in INFO}
            index = {name: np.array([kind(row[name]) for row in rows]) for name, kind in INDEX_COLUMNS.items()}
            arrays = [np.load(root / f"{name}.npy", mmap_mode="r") for name in ("images", "masks", "quantiles")]
        if not len(rows) == len(arrays[0]) == len(arrays[2]) or index["mask"].max(initial=-1) >= len(arrays[1]):
            raise UserError(f"{root} is damaged (index.csv and the arrays differ in length): prepare the data again")
        return cls(root, info, index, *arrays)

    @property
    def name(self) -> str:
        """The folder's name, marked where it holds phantoms: pictures and reports bear it."""
        return self.root.resolve().name + (" (phantom data)" if self.info["phantom"] else "")

    def rows(self, patients: list[str], *, with_mask: bool = False) -> np.ndarray:
        """Return the index rows of all slices (or all slices with a mask) of `patients`."""
        chosen = np.isin(self.index["patient"], patients)
        return np.flatnonzero(chosen & (self.index["mask"] >= 0) if with_mask else chosen)

    def patients_with_masks(self, domain: str) -> list[str]:
        """Return the patients of a domain, or of all for NO_DOMAIN, that can be evaluated."""
        chosen = (self.index["domain"] == domain) | (domain == NO_DOMAIN)
        return sorted({str(patient) for patient in self.index["patient"][chosen & (self.index["mask"] >= 0)]})

    def checksums(self, patients: list[str]) -> dict[str, str]:
        """Return the patients by the checksums of their frames' voxels: they tell a scan under any name."""
        rows = [row for row in self.rows(patients) if self.index["checksum"][row]]
        return {str(self.index["checksum"][row]): str(self.index["patient"][row]) for row in rows}

    def truth_path(self, patient: str, phase: str) -> Path:
        """Return the path of a scan's mask in its own voxel grid."""
        return self.root / "truth" / f"{patient}_{phase}.nii.gz"


def voxel_checksum(slices: np.ndarray) -> str:
    """Return 16 hexadecimal digits that tell a frame (Z, X, Y) by its voxels; empty where all are equal."""
    voxels = np.ascontiguousarray(slices, np.float32)
    if voxels.min() == voxels.max():
        return ""
    return hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()[:16]


def description_digest(info: dict[str, Any], index: bytes) -> str:
    """Return the SHA-256 of the content of dataset.json, without the digest itself, and of index.csv."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode() + index).hexdigest()


class Split(NamedTuple):
    """Patients by the part that they have in a run."""

    labeled: list[str]
    unlabeled: list[str]
    validation: list[str]
    held_out: list[str]


def split_patients(data: PreparedData, dataset: DatasetInfo, cfg: Config) -> Split:
    """Split patients for one held-out domain.

    In each group the first `labeled_count` patients with masks, by code, are labelled. All source patients are used
    without their labels. With `val_patients`, that many labelled patients per domain only select the checkpoint;
    else the labelled patients do. Patients of the test domain are in `held_out` and nowhere else; NO_DOMAIN has none.
    """
    test_domain, ratio, val_patients = cfg.test_domain, cfg.ratio, cfg.val_patients
    has_mask = set(data.index["patient"][data.index["mask"] >= 0])
    membership = zip(data.index["domain"], data.index["group"], strict=True)
    patients = dict(zip(data.index["patient"], membership, strict=True))
    # The domains beside those of the data set are folders of the user's own, without masks.
    domains = sorted({domain for domain, _ in patients.values()} & {*dataset.domains})
    if test_domain not in (*domains, NO_DOMAIN):
        raise UserError(
            f"test domain {test_domain!r}: {data.root} has no such {dataset.domain_kind}, only {', '.join(domains)}, "
            f"or {NO_DOMAIN} to train on all"
        )
    held_out = [] if test_domain == NO_DOMAIN else data.patients_with_masks(test_domain)
    labeled, validation = [], []
    for domain in (d for d in domains if d != test_domain):
        chosen = []
        for group in sorted({g for d, g in patients.values() if d == domain}):
            members = sorted(p for p in has_mask if patients[p] == (domain, group))
            count = dataset.labeled_count(len(members), ratio) if ratio < 1 else len(members)
            if members and count > len(members):
                raise UserError(
                    f"ratio {ratio} asks for {count} labelled patients of group {group}, {data.root} has "
                    f"{len(members)}: hold that {dataset.domain_kind} out, use a smaller --ratio or more data"
                )
            chosen += members[:count]
        training = len(chosen) - val_patients
        if training < 1:
            raise UserError(
                f"{dataset.domain_kind} {domain}: {len(chosen)} patients are labelled in {data.root}, of "
                f"{len(has_mask)} with masks in all; {val_patients} of them for validation: none is left to train on"
            )
        labeled += chosen[:training]
        validation += chosen[training:]
    if not held_out and test_domain != NO_DOMAIN:
        raise UserError(f"{dataset.domain_kind} {test_domain}: no patient with masks in {data.root} to evaluate on")
    own = {p for p, (domain, _) in patients.items() if domain not in domains}
    source = {p for p, (domain, _) in patients.items() if domain != test_domain}
    unlabeled = source if cfg.use_extra_unlabeled else source & (has_mask | own)
    return Split(labeled, sorted(unlabeled - {*validation}), validation or labeled, held_out)


def quantile_curves(canvas: np.ndarray) -> np.ndarray:
    """Return each image's quantiles over the field of view: (N, C, C) float16 >= 0 -> (N, QUANTILES) float32."""
    margin = (CANVAS_PX - FIELD_PX) // 2
    bits = canvas[:, margin:-margin, margin:-margin].reshape(len(canvas), -1).view(np.int16)
    # Non-negative float16 have the order of their bits, and 16-bit integers a radix sort: 8 times as fast.
    field = np.sort(bits, axis=1, kind="stable").view(np.float16)
    position = np.linspace(0, field.shape[1] - 1, QUANTILES)
    low = position.astype(int)
    high = np.minimum(low + 1, field.shape[1] - 1)
    lower, upper = field[:, low].astype(np.float32), field[:, high].astype(np.float32)
    return np.ascontiguousarray(lower + (upper - lower) * (position - low).astype(np.float32))
