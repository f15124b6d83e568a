"""Prepared data: opening it, splitting it by patient, and loading batches of it.

Data sets have no randomness of their own. What a training step reads follows from (seed, step, process) alone, so
that a run resumes at any step with the very images the uninterrupted run would see.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError

FORMAT_VERSION = 2
INDEX_COLUMNS = {  # of index.csv: one row per slice, in the order of images.npy
    "patient": str,
    "domain": str,
    "group": str,  # patients are counted by group when labelled ones are chosen
    "phase": str,  # of a labelled frame; empty elsewhere
    "frame": int,
    "slice": int,
    "mask": int,  # row in masks.npy, -1 where there is none
    "rows": int,  # px of the native grid
    "columns": int,
    "row_mm": float,
    "column_mm": float,
}


INFO = ("dataset", "spacing_mm", "content_hash", "phantom")  # what dataset.json must say


class Case(NamedTuple):
    """One scan as found among the raw files."""

    patient: str
    domain: str
    group: str
    image: Path
    masks: tuple[Path, ...]  # one per rater; empty for a scan without truth
    phases: dict[str, int]  # labelled frames by name; empty for a scan without truth


class RawScan(NamedTuple):
    """What looking through a raw data set gives: its scans and everything wrong with their files and tables."""

    cases: list[Case]
    errors: list[str]
    warnings: list[str]


def missing_or_outside(path: Path, raw: Path) -> str:
    """What forbids to read a file of the raw data set `raw`; empty where nothing does."""
    if not path.is_file():
        return f"{path}: missing"
    return "" if path.resolve().is_relative_to(raw.resolve()) else f"{path}: a link that leads out of {raw}"


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """All that tells one data set from another."""

    name: str  # as in text: "M&Ms"
    key: str  # as in paths: "mms"
    domain_word: str  # what a domain is: "vendor", "site"
    domains: tuple[str, ...]
    class_names: tuple[str, ...]  # by label value; the first is the background
    ndim: int  # of a raw image: 3, or 4 with frames
    label_values: int  # of a raw mask: 0 .. label_values - 1; those beyond class_names count as background
    spacing: float  # mm per px of the canvas
    find_cases: Callable[[Path], RawScan]
    normalize: Callable[[np.ndarray], np.ndarray]  # slices (Z, X, Y) float32 -> float32 in [0, 1]
    labeled_count: Callable[[int, float], int]  # (patients with masks in a group, ratio) -> labelled ones
    write_phantom: Callable[..., None]
    demo_phantom: dict[str, int]  # its size in the demo
    preview: dict[str, Any]  # what it shows by default, as config.py sets it: fourier_ratio, histogram_matching
    how_to_get: str  # where the data are had and how they are prepared
    consensus: Callable[[list[np.ndarray]], np.ndarray] = itemgetter(0)  # raters' maps (Z, X, Y) uint8 -> one map
    clinical: Callable[[dict], dict] | None = None  # ml by (phase, structure) -> (value, unit) by name


@dataclass(frozen=True)
class PreparedData:
    """A folder that `prepare` has written; the arrays are memory maps."""

    root: Path
    info: dict[str, Any]
    index: dict[str, np.ndarray]
    images: np.ndarray  # (N, C, C) float16
    masks: np.ndarray  # (M, C, C) uint8
    quantiles: np.ndarray  # (N, 256) float32

    @classmethod
    def open(cls, root: str | Path, facts: DatasetFacts) -> "PreparedData":
        """Open `root`; raises UserError when it is missing, of another data set or of another format."""
        root = Path(root)
        if not (root / "dataset.json").is_file():
            demo = f"Or try the demo, which needs no data: python {facts.key}_train.py --demo"
            raise UserError(f"no prepared {facts.name} data in the folder {root}\n{facts.how_to_get}\n{demo}")
        try:
            info = json.loads((root / "dataset.json").read_text())
            if info["dataset"] != facts.key:
                raise UserError(
                    f"{root} holds {info['dataset']} data: use the {info['dataset']} scripts, or name {facts.key} data"
                )
            if info["format"] != FORMAT_VERSION:
                raise UserError(
                    f"{root} is of format {info['format']}, expected {FORMAT_VERSION}: remove it, and prepare the "
                    f"data again with {facts.key}_dataloader.py (a demo makes its own anew)"
                )
            text = (root / "index.csv").read_bytes()
            if hashlib.sha256(text).hexdigest() != info["index_sha256"]:  # rows in another order are other images
                raise ValueError("index.csv was changed")
            rows = list(csv.DictReader(io.StringIO(text.decode(), newline="")))
            info = {name: info[name] for name in INFO}
            index = {name: np.array([kind(row[name]) for row in rows]) for name, kind in INDEX_COLUMNS.items()}
            arrays = [np.load(root / f"{name}.npy", mmap_mode="r") for name in ("images", "masks", "quantiles")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{root} is damaged ({error!r}): prepare the data again") from error
        if not len(rows) == len(arrays[0]) == len(arrays[2]) or index["mask"].max(initial=-1) >= len(arrays[1]):
            raise UserError(f"{root} is damaged (index.csv and the arrays differ in length): prepare the data again")
        return cls(root, info, index, *arrays)

    def rows(self, patients: list[str], *, with_mask: bool = False) -> np.ndarray:
        """Index rows of all slices (or all slices with a mask) of `patients`."""
        chosen = np.isin(self.index["patient"], patients)
        return np.flatnonzero(chosen & (self.index["mask"] >= 0) if with_mask else chosen)

    def patients_with_masks(self, domain: str) -> list[str]:
        """Patients of a domain that can be evaluated."""
        index = self.index
        return sorted({str(p) for p in index["patient"][(index["domain"] == domain) & (index["mask"] >= 0)]})

    def truth_path(self, patient: str, phase: str) -> Path:
        """The labelled mask of a scan in its own grid."""
        return self.root / "truth" / f"{patient}_{phase}.nii.gz"


class Split(NamedTuple):
    """Patients by their part in a run."""

    labeled: list[str]
    unlabeled: list[str]
    validation: list[str]
    held_out: list[str]


def split_patients(
    data: PreparedData,
    facts: DatasetFacts,
    *,
    test_domain: str,
    ratio: float,
    val_patients: int = 0,
    use_extra_unlabeled: bool = False,
) -> Split:
    """Split patients for one held-out domain (README, The method).

    In each group the first `labeled_count` patients with masks, by code, are labelled. All source patients serve
    without their labels. With `val_patients`, that many labelled patients per domain only select the checkpoint;
    else the labelled patients do. No patient of the test domain is anywhere but in `held_out`.
    """
    has_mask = set(data.index["patient"][data.index["mask"] >= 0])
    places = zip(data.index["domain"], data.index["group"], strict=True)
    patients = dict(zip(data.index["patient"], places, strict=True))
    domains = sorted({domain for domain, _ in patients.values()})
    if test_domain not in domains:
        raise UserError(
            f"test domain {test_domain!r}: {data.root} has no such {facts.domain_word}, only {', '.join(domains)}"
        )
    held_out = data.patients_with_masks(test_domain)
    labeled, validation = [], []
    for domain in (d for d in domains if d != test_domain):
        chosen = []
        for group in sorted({g for d, g in patients.values() if d == domain}):
            members = sorted(p for p in has_mask if patients[p] == (domain, group))
            count = facts.labeled_count(len(members), ratio)
            if members and count > len(members):
                raise UserError(
                    f"ratio {ratio} asks for {count} labelled patients of group {group}, {data.root} has "
                    f"{len(members)}: hold that {facts.domain_word} out, use a smaller --ratio or more data"
                )
            chosen += members[:count] if members else []
        if not chosen or len(chosen) <= val_patients:
            raise UserError(
                f"{facts.domain_word} {domain}: {len(chosen)} patients are labelled in {data.root}, of {len(has_mask)} "
                f"with masks in all; {val_patients} of them for validation: none is left to train on"
            )
        labeled += chosen[: len(chosen) - val_patients]
        validation += chosen[len(chosen) - val_patients :]
    if not held_out:
        raise UserError(f"{facts.domain_word} {test_domain}: no patient with masks in {data.root} to evaluate on")
    unlabeled = sorted(
        p
        for p, (domain, _) in patients.items()
        if domain != test_domain and p not in validation and (p in has_mask or use_extra_unlabeled)
    )
    return Split(labeled, unlabeled, validation or labeled, held_out)


class SliceDataset(Dataset):
    """Slices of prepared data, fetched by the batch: `dataset[[3, 1]]` -> dict of tensors.

    image (B, 1, C, C) float16, mask (B, 1, C, C) uint8 (where `with_mask`), quantiles (B, 256), row (B,): index row.
    """

    def __init__(self, data: PreparedData, rows: np.ndarray, *, with_mask: bool):
        self.data, self.rows, self.with_mask = data, rows, with_mask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        rows = self.rows[positions]
        batch = {
            "image": self.data.images[rows][:, None],
            "quantiles": self.data.quantiles[rows],
            "row": rows,
        }
        if self.with_mask:
            batch["mask"] = self.data.masks[self.data.index["mask"][rows]][:, None]
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class BatchSampler:
    """Yields the batches from number `start` to `stop` of the whole run; iterating never changes the sampler."""

    def __init__(self, batch_of_number: Callable[[int], np.ndarray]):
        self.batch_of_number, self.start, self.stop = batch_of_number, 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.batch_of_number, range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start


def labeled_batches(count: int, *, batch_size: int, seed: int, rank: int = 0) -> BatchSampler:
    """Labelled positions, drawn with replacement."""
    return BatchSampler(lambda number: np.random.default_rng([seed, 1, number, rank]).integers(count, size=batch_size))


def unlabeled_batches(
    count: int, *, batch_size: int, pairs: bool, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1
) -> BatchSampler:
    """Unlabelled positions: an epoch is a permutation of all images, cut into steps of whole batches.

    With `pairs` a batch holds 2 x batch_size positions: u0 and its CutMix partners u1, the same permutation rotated
    by a random distance. So every image is used once in each, and never as its own partner; nor is any image twice
    in a batch, over all processes, where there are images enough for that.
    """
    batches = count // (batch_size * world * accumulate) * accumulate  # an epoch
    apart = min(batch_size * world, count // 2)  # the least distance

    @lru_cache(maxsize=1)
    def epoch_order(epoch: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([seed, 2, epoch])
        order = rng.permutation(count)
        return (order, np.roll(order, rng.integers(apart, count - apart + 1))) if pairs else (order,)

    def batch_of_number(number: int) -> np.ndarray:
        epoch, position = divmod(number, batches)
        first = (position * world + rank) * batch_size
        return np.concatenate([order[first : first + batch_size] for order in epoch_order(epoch)])

    return BatchSampler(batch_of_number)


def scan_batches(data: PreparedData, rows: np.ndarray) -> list[np.ndarray]:
    """Positions in `rows` by scan: one batch per patient and phase, slices in order."""
    scans: dict[tuple[str, str], list[int]] = {}
    for position, row in enumerate(rows):
        scans.setdefault((data.index["patient"][row], data.index["phase"][row]), []).append(position)
    by_slice = data.index["slice"][rows]
    return [np.array(sorted(scans[key], key=by_slice.__getitem__)) for key in sorted(scans)]


class Loaders(NamedTuple):
    """What a run reads."""

    labeled: DataLoader
    unlabeled: DataLoader
    val: DataLoader  # one batch per scan, as test
    test: DataLoader
    data: PreparedData
    facts: DatasetFacts
    split: Split
    reference: np.ndarray  # (P, 256) quantile curves of the first source domain
    steps_per_epoch: int


def build_loaders(cfg: Any, facts: DatasetFacts, *, rank: int = 0, world: int = 1) -> Loaders:
    """Open the prepared data of `cfg.data_root` and select what the run described by `cfg` reads."""
    data = PreparedData.open(cfg.data_root, facts)
    split = split_patients(
        data,
        facts,
        test_domain=cfg.test_domain,
        ratio=cfg.ratio,
        val_patients=cfg.val_patients,
        use_extra_unlabeled=cfg.use_extra_unlabeled,
    )
    unlabeled_rows = data.rows(split.unlabeled)
    steps = len(unlabeled_rows) // (cfg.batch_size * world * cfg.accumulate)
    if not steps:
        raise UserError(
            f"{len(unlabeled_rows)} unlabelled images in {data.root} are fewer than one step takes: batches of "
            f"{cfg.batch_size} x {world} process(es) x --accumulate {cfg.accumulate}. Use a smaller --batch-size"
        )
    first_domain = min(data.index["domain"][unlabeled_rows])
    labeled = SliceDataset(data, data.rows(split.labeled, with_mask=True), with_mask=True)
    unlabeled = SliceDataset(data, unlabeled_rows, with_mask=False)
    val = SliceDataset(data, data.rows(split.validation, with_mask=True), with_mask=True)
    test = SliceDataset(data, data.rows(split.held_out, with_mask=True), with_mask=True)
    labeled_sampler = labeled_batches(len(labeled), batch_size=cfg.batch_size, seed=cfg.seed, rank=rank)
    unlabeled_sampler = unlabeled_batches(
        len(unlabeled),
        batch_size=cfg.batch_size,
        pairs=cfg.cutmix,
        seed=cfg.seed,
        rank=rank,
        world=world,
        accumulate=cfg.accumulate,
    )
    return Loaders(
        batch_loader(labeled, labeled_sampler, cfg.workers),
        batch_loader(unlabeled, unlabeled_sampler, cfg.workers),
        batch_loader(val, scan_batches(data, val.rows)[rank::world], 0),
        batch_loader(test, scan_batches(data, test.rows)[rank::world], 0),
        data,
        facts,
        split,
        data.quantiles[unlabeled_rows[data.index["domain"][unlabeled_rows] == first_domain]],
        steps,
    )


def batch_loader(dataset: SliceDataset, batches: Any, workers: int) -> DataLoader:
    """A loader of whole batches: `batches` yields the positions of each."""
    workers = min(workers, os.cpu_count() or 1)  # more only slow each other down, and PyTorch warns of them
    # sampler= (not batch_sampler=) with batch_size=None hands the positions to the dataset as one request.
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
