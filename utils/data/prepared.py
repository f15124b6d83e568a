"""Prepared data: opening the folder, and splitting its patients for one held-out domain."""

import csv
import hashlib
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
            demo = f"{dataset.download_help}\nOr try the demo: python {dataset.key}_train.py --demo"
            raise UserError(f"no data in {root.absolute()}: if they lie elsewhere, name them by --data-root\n{demo}")
        with naming(root, "is damaged", remedy=": prepare the data again"):
            info = json.loads((root / "dataset.json").read_text())
            if (info["dataset"], info["format"]) != (dataset.key, FORMAT_VERSION):
                kind = f"{info['dataset']} data of format {info['format']}"
                raise UserError(f"{root} holds {kind}, not {dataset.key} of format {FORMAT_VERSION}: prepare anew")
            text = (root / "index.csv").read_bytes()
            if info.pop("sha256") != description_digest(info, text):  # rows in another order are other images
                raise ValueError("dataset.json or index.csv was changed")
            rows = list(csv.DictReader(text.decode().splitlines()))
            index = {name: np.array([kind(row[name]) for row in rows]) for name, kind in INDEX_COLUMNS.items()}
            arrays = [np.load(root / f"{name}.npy", mmap_mode="r") for name in ("images", "masks", "quantiles")]
            if not len(rows) == len(arrays[0]) == len(arrays[2]) or index["mask"].max(initial=-1) >= len(arrays[1]):
                raise ValueError("index.csv and the arrays differ in length")
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
        """Return the patients by the checksums of their frames, which tell a scan under any name."""
        rows = [row for row in self.rows(patients) if self.index["checksum"][row]]
        return {str(self.index["checksum"][row]): str(self.index["patient"][row]) for row in rows}

    def truth_path(self, patient: str, phase: str) -> Path:
        """Return the path of a scan's mask in its own voxel grid."""
        return self.root / "truth" / f"{patient}_{phase}.nii.gz"


def voxel_checksum(slices: np.ndarray) -> str:
    """Return 16 hexadecimal digits that tell a frame (Z, X, Y) by its voxels; "" where all are equal."""
    voxels = np.ascontiguousarray(slices, np.float32)
    digest = hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()
    return digest[:16] if voxels.min() < voxels.max() else ""


def description_digest(info: dict[str, Any], index: bytes) -> str:
    """Return the SHA-256 of the content of dataset.json, without the digest itself, and of index.csv."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode() + index).hexdigest()


class Split(NamedTuple):
    """Patients by the part that they have in a run."""

    labeled: list[str]
    unlabeled: list[str]  # all source patients but those for validation alone
    validation: list[str]
    held_out: list[str]


def split_patients(data: PreparedData, dataset: DatasetInfo, cfg: Config) -> Split:
    """Split patients for one held-out domain, or none (NO_DOMAIN); raise UserError where that cannot be.

    In each group the first `labeled_count` patients with masks are labelled. With `val_patients`, that many of them
    per domain only select the checkpoint, else all do. Patients of the test domain are in `held_out` alone.
    """
    test_domain, kind = cfg.test_domain, dataset.domain_kind
    index, has_mask = data.index, {*data.index["patient"][data.index["mask"] >= 0]}
    patients = {p: (d, g) for p, d, g in zip(index["patient"], index["domain"], index["group"], strict=True)}
    domains = sorted({domain for domain, _ in patients.values()} & {*dataset.domains})
    held_out = [] if test_domain == NO_DOMAIN else data.patients_with_masks(test_domain)
    if not held_out and test_domain != NO_DOMAIN:
        raise UserError(f"test domain {test_domain!r}: {data.root} has no such {kind}, only {', '.join(domains)}")
    labeled, validation = [], []
    for domain in (d for d in domains if d != test_domain):
        chosen = []
        for group in sorted({patients[p] for p in has_mask if patients[p][0] == domain}):
            members = sorted(p for p in has_mask if patients[p] == group)
            count = dataset.labeled_count(len(members), cfg.ratio) if cfg.ratio < 1 else len(members)
            if count > len(members):
                few = f"asks for {count} labelled patients of group {group[1]}, of {len(members)} that there are"
                raise UserError(f"ratio {cfg.ratio} {few}: use a smaller --ratio, or --ratio 1 for all")
            chosen += members[:count]
        training = len(chosen) - cfg.val_patients
        if training < 1:
            raise UserError(f"{kind} {domain}: {len(chosen)} labelled, none is left to train on: see --val-patients")
        labeled += chosen[:training]
        validation += chosen[training:]
    own = {p for p, (domain, _) in patients.items() if domain not in domains}  # folders of the user's own
    source = {p for p, (domain, _) in patients.items() if domain != test_domain}
    unlabeled = source if cfg.use_extra_unlabeled else source & (has_mask | own)
    return Split(labeled, sorted(unlabeled - {*validation}), validation or labeled, held_out)


def quantile_curves(canvas: np.ndarray) -> np.ndarray:
    """Return each image's quantiles over the field of view: (N, C, C) float16 -> (N, QUANTILES) float32."""
    margin = (CANVAS_PX - FIELD_PX) // 2
    bits = canvas[:, margin:-margin, margin:-margin].reshape(len(canvas), -1).view(np.int16)
    # Non-negative float16 have the order of their bits, and 16-bit integers a radix sort: 8 times as fast.
    field = np.sort(bits, axis=1, kind="stable").view(np.float16)
    position = np.linspace(0, field.shape[1] - 1, QUANTILES)
    low = position.astype(int)
    lower, upper = (field[:, n].astype(np.float32) for n in (low, np.minimum(low + 1, field.shape[1] - 1)))
    return np.ascontiguousarray(lower + (upper - lower) * (position - low).astype(np.float32))
