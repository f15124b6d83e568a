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
from utils.files import read_table

FORMAT_VERSION = 6
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
ARRAYS = ("images", "masks", "quantiles")
NO_DOMAIN = "none"  # as the held-out domain: all are trained on


@dataclass(frozen=True)
class PreparedData:
    """Prepared data of a folder that `prepare` has written; the arrays are memory maps."""

    root: Path
    info: dict[str, Any]
    index: dict[str, np.ndarray]
    images: np.ndarray  # (N, C, C) float16
    masks: np.ndarray  # (M, C, C) uint8
    quantiles: np.ndarray  # (N, 256) float32

    @classmethod
    def open(cls, root: str | Path, dataset: DatasetInfo) -> "PreparedData":
        """Open a folder; UserError if it is missing, damaged, or of another data set or format."""
        root = Path(root)
        if not (root / "dataset.json").is_file():
            demo = f"{dataset.download_help}\nOr try the demo: python {dataset.key}_train.py --demo"
            raise UserError(f"no data in {root.absolute()}: name it by --data-root\n{demo}")
        with naming(root, "is damaged", remedy=": prepare the data again"):
            info = json.loads((root / "dataset.json").read_text())
            if (info["dataset"], info["format"]) != (dataset.key, FORMAT_VERSION):
                kind = f"{info['dataset']} data of format {info['format']}"
                raise UserError(f"{root} holds {kind}, not {dataset.key} {FORMAT_VERSION}: prepare anew")
            text = (root / "index.csv").read_bytes()
            if info.pop("sha256") != description_digest(info, text):
                raise ValueError("dataset.json or index.csv was changed")
            rows = list(csv.DictReader(text.decode().splitlines()))
            index = {n: np.array([kind(row[n]) for row in rows]) for n, kind in INDEX_COLUMNS.items()}
            images, masks, quantiles = (np.load(root / f"{n}.npy", mmap_mode="r") for n in ARRAYS)
            if not len(rows) == len(images) == len(quantiles) or index["mask"].max(initial=-1) >= len(masks):
                raise ValueError("index.csv and the arrays differ in length")
        return cls(root, info, index, images, masks, quantiles)

    @property
    def name(self) -> str:
        """The folder's name, marked where it holds phantoms: pictures and reports bear it."""
        return self.root.resolve().name + (" (phantom data)" if self.info["phantom"] else "")

    def rows(self, patients: list[str], *, with_mask: bool = False) -> np.ndarray:
        """Return the index rows of the slices of `patients`: all, or those with a mask."""
        chosen = np.isin(self.index["patient"], patients)
        return np.flatnonzero(chosen & (self.index["mask"] >= 0) if with_mask else chosen)

    def patients_with_masks(self, domain: str) -> list[str]:
        """Return the patients of a domain, or of all for NO_DOMAIN, that can be evaluated."""
        chosen = (self.index["domain"] == domain) | (domain == NO_DOMAIN)
        return np.unique(self.index["patient"][chosen & (self.index["mask"] >= 0)]).tolist()

    def checksums(self, patients: list[str]) -> dict[str, str]:
        """Return patients by the checksums of their frames, which tell a scan under any name."""
        checksums, names = (self.index[name][self.rows(patients)] for name in ("checksum", "patient"))
        return {str(key): str(name) for key, name in zip(checksums, names, strict=True) if key}

    def truth_path(self, patient: str, phase: str) -> Path:
        """Return the path of a scan's mask in its own voxel grid."""
        return self.root / "truth" / f"{patient}_{phase}.nii.gz"


def voxel_checksum(slices: np.ndarray) -> str:
    """Return 16 hexadecimal digits that tell a frame by its voxels; "" where all are equal."""
    voxels = np.ascontiguousarray(slices, np.float32)
    digest = hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()
    return digest[:16] if voxels.min() < voxels.max() else ""


def description_digest(info: dict[str, Any], index: bytes) -> str:
    """Return the SHA-256 of dataset.json, less the digest itself, and of index.csv."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode() + index).hexdigest()


class Split(NamedTuple):
    """Patients by the part that they have in a run."""

    labeled: list[str]
    unlabeled: list[str]  # all source patients but those for validation alone
    validation: list[str]
    held_out: list[str]


def split_patients(data: PreparedData, dataset: DatasetInfo, cfg: Config) -> Split:
    """Split patients for one held-out domain, or none (NO_DOMAIN); UserError where that cannot be.

    In each group the first `labeled_count` patients with masks are labelled, or those that the file
    `labeled_patients` names. `val_patients` of them per domain only select the checkpoint; where
    that is 0, all of them select it.
    """
    test_domain, kind = cfg.test_domain, dataset.domain_kind
    has_mask = data.patients_with_masks(NO_DOMAIN)
    facts = zip(*(data.index[name].tolist() for name in ("patient", "domain", "group")), strict=True)
    group_of = {patient: (domain, group) for patient, domain, group in facts}
    domains = sorted({domain for domain, _ in group_of.values()} & {*dataset.domains})
    held_out = [] if test_domain == NO_DOMAIN else data.patients_with_masks(test_domain)
    if not held_out and test_domain != NO_DOMAIN:
        raise UserError(f"{data.root} has no {kind} {test_domain}, only {', '.join(domains)}")
    named = _named_patients(cfg, group_of, has_mask) if cfg.labeled_patients else None
    labeled, validation = [], []
    for domain in (d for d in domains if d != test_domain):
        chosen = sorted((p for p in named or () if group_of[p][0] == domain), key=lambda p: (group_of[p], p))
        for group in sorted({group_of[p] for p in has_mask if named is None and group_of[p][0] == domain}):
            members = [p for p in has_mask if group_of[p] == group]
            count = dataset.labeled_count(len(members), cfg.ratio)
            if count > len(members) and cfg.ratio < 1:
                few = f"group {group[1]} has {len(members)} patients with masks, not {count}"
                least = dataset.labeled_count(len(members), 1e-6)
                smaller = "" if least > len(members) else ", or a smaller one"
                raise UserError(f"ratio {cfg.ratio}: {few}: use --ratio 1 for all{smaller}")
            chosen += members[:count]
        training = len(chosen) - cfg.val_patients
        if training < 1 and (chosen or named is None):
            raise UserError(f"{kind} {domain}: none is left to train on: see --val-patients")
        labeled += chosen[:training]
        validation += chosen[training:]
    own = {p for p, (domain, _) in group_of.items() if domain not in domains}  # the user's folders
    source = {p for p, (domain, _) in group_of.items() if domain != test_domain}
    unlabeled = source if cfg.use_extra_unlabeled else source & {*has_mask, *own}
    return Split(labeled, sorted(unlabeled - {*validation}), validation or labeled, held_out)


def _named_patients(cfg: Config, group_of: dict[str, tuple[str, str]], has_mask: list[str]) -> set[str]:
    """Return the patients in a file's first column; UserError for those that cannot be labelled."""
    columns, rows = read_table(Path(cfg.labeled_patients))
    codes = [row[columns[0].casefold()] for row in rows] if columns else []
    codes += [column for column in columns[:1] if column in group_of]  # a file without a header
    problems = {code: "unknown" for code in codes if code not in group_of}
    problems |= {p: "without masks" for p in codes if p in group_of and p not in has_mask}
    problems |= {p: "held out" for p in codes if group_of.get(p, "")[:1] == (cfg.test_domain,)}
    if problems or not codes:
        texts = ", ".join(f"{code} is {problem}" for code, problem in problems.items()) or "it names no patient"
        raise UserError(f"--labeled-patients {cfg.labeled_patients}: {texts}")
    return {*codes}


def quantile_curves(canvas: np.ndarray) -> np.ndarray:
    """Return quantiles over the field of view: (N, C, C) float16 -> (N, QUANTILES) float32."""
    margin = (CANVAS_PX - FIELD_PX) // 2
    bits = canvas[:, margin:-margin, margin:-margin].reshape(len(canvas), -1).view(np.int16)
    # Non-negative float16 have the order of their bits; the radix sort of int16 is 8 times as fast.
    field = np.sort(bits, axis=1, kind="stable").view(np.float16)
    position = np.linspace(0, field.shape[1] - 1, QUANTILES)
    lower, upper = (field[:, bound(position).astype(int)].astype(np.float32) for bound in (np.floor, np.ceil))
    return np.ascontiguousarray(lower + (upper - lower) * (position % 1).astype(np.float32))
