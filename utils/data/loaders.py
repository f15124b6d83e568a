"""Batches of prepared data: what a step reads follows from (seed, step, process) alone."""

import os
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from config import Config
from utils.data.dataset import DatasetInfo
from utils.data.prepared import PreparedData, Split, split_patients
from utils.errors import UserError

Batch = dict[str, torch.Tensor]  # of a SliceDataset
Pairs = list[tuple[Batch, Batch | None]]  # labelled and unlabelled batches of a step
SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over batches
PREFETCH = 2  # batches that each worker reads ahead
STALL_S = 300  # seconds without a batch after which a worker counts as stalled


class SliceDataset(Dataset):
    """Slices of prepared data, by the batch: `dataset[[3, 1]]` -> image (B, 1, C, C) float16,
    mask (B, 1, C, C) uint8 (where `with_mask`), quantiles (B, 256), row (B,) of the index.
    """

    def __init__(self, data: PreparedData, rows: np.ndarray, *, with_mask: bool):
        self.data, self.rows, self.with_mask = data, rows, with_mask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[int] | slice) -> Batch:
        rows = self.rows[positions]
        batch = {"image": self.data.images[rows][:, None], "quantiles": self.data.quantiles[rows], "row": rows}
        if self.with_mask:
            batch["mask"] = self.data.masks[self.data.index["mask"][rows]][:, None]
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class BatchSampler:
    """Batches number `start` to `stop` of the run; iterating does not change the sampler."""

    def __init__(self, batch_of_number: Callable[[int], np.ndarray]):
        self.batch_of_number, self.start, self.stop = batch_of_number, 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.batch_of_number, range(self.start, self.stop))


def labeled_batches(count: int, cfg: Config, *, rank: int = 0) -> BatchSampler:
    """Return batches of labelled positions, drawn with replacement."""
    return BatchSampler(lambda n: np.random.default_rng([cfg.seed, 1, n, rank]).integers(count, size=cfg.batch_size))


def unlabeled_batches(count: int, cfg: Config, *, rank: int = 0, world_size: int = 1) -> BatchSampler:
    """Return batches of unlabelled positions: an epoch is a permutation, cut into whole steps.

    With CutMix a batch is u0 and its partners u1, the permutation rotated by a random distance: each
    image is used once in both, and never as its own partner.
    """
    size = cfg.batch_size
    batches = count // (size * world_size * cfg.accumulate) * cfg.accumulate  # in an epoch
    apart = min(size * world_size, count // 2)  # at least

    @lru_cache(maxsize=1)
    def epoch_order(epoch):
        rng = np.random.default_rng([cfg.seed, 2, epoch])
        order = rng.permutation(count)
        return (order, np.roll(order, rng.integers(apart, count - apart + 1))) if cfg.cutmix else (order,)

    def batch_of_number(number):
        epoch, position = divmod(number, batches)
        first = (position * world_size + rank) * size
        return np.concatenate([order[first : first + size] for order in epoch_order(epoch)])

    return BatchSampler(batch_of_number)


class Loaders(NamedTuple):
    """Batches that a run reads, and their data."""

    labeled: DataLoader
    unlabeled: DataLoader
    val: DataLoader  # one batch per scan
    data: PreparedData
    dataset: DatasetInfo
    split: Split
    reference: np.ndarray  # (P, 256) quantile curves of the first source domain
    steps_per_epoch: int
    total_steps: int  # of the whole training

    def training_batches(self, accumulate: int, first: int, last: int, *, unlabeled_from: int = 0) -> Iterator[Pairs]:
        """Yield what steps `first` to `last` read; no unlabelled images before `unlabeled_from`."""
        begin = max(first, unlabeled_from)
        for loader, start in ((self.labeled, first), (self.unlabeled, begin)):
            loader.sampler.start, loader.sampler.stop = start * accumulate, last * accumulate
        unlabeled = chain(repeat(None, (begin - first) * accumulate), self.unlabeled)
        pairs = zip(self.labeled, unlabeled, strict=True)
        for _ in range(first, last):
            yield list(islice(pairs, accumulate))


def build_loaders(cfg: Config, dataset: DatasetInfo, *, rank: int = 0, world_size: int = 1) -> Loaders:
    """Open the prepared data, split the patients, return the loaders of one process."""
    data = PreparedData.open(cfg.data_root, dataset)
    split = split_patients(data, dataset, cfg)
    labeled = SliceDataset(data, data.rows(split.labeled, with_mask=True), with_mask=True)
    unlabeled = SliceDataset(data, data.rows(split.unlabeled), with_mask=False)
    steps = len(unlabeled) // (cfg.batch_size * world_size * cfg.accumulate)
    if not steps:
        need = f"{cfg.batch_size} x {world_size} process(es) x --accumulate {cfg.accumulate}"
        raise UserError(f"{len(unlabeled)} unlabelled images, a step takes {need}: use a smaller --batch-size")
    for part, patients in (("labelled", split.labeled), ("validation", split.validation)):
        masks = data.index["mask"][data.rows(patients, with_mask=True)]
        if not any(data.masks[number].any() for number in masks):
            raise UserError(f"the masks of all {part} patients in {data.root} are empty: prepare anew")
    domain = data.index["domain"][unlabeled.rows]
    reference = data.quantiles[unlabeled.rows[domain == min({*domain} & {*dataset.domains})]]
    reference = reference[reference[:, 0] < reference[:, -1]]  # matched to an empty slice, all is black
    workers = min(cfg.workers, usable_cores())  # more only slow each other down
    parts = (labeled, unlabeled) + (unlabeled,) * cfg.cutmix
    pair_bytes = cfg.batch_size * sum(tensor.nbytes for part in parts for tensor in part[[0]].values())
    need = pair_bytes * (PREFETCH + 1) * workers * world_size  # one more is being used
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else need
    if need > free:  # a worker would wait for ever, or die of a bus error
        workers = 0
        if rank == 0:
            lack = f"{need / 1e6:.0f} MB of shared memory, {free / 1e6:.0f} MB are free"
            print(f"warning: no data workers: they need {lack} (docker run --shm-size gives more)")
    batches = unlabeled_batches(len(unlabeled), cfg, rank=rank, world_size=world_size)
    return Loaders(
        batch_loader(labeled, labeled_batches(len(labeled), cfg, rank=rank), workers),
        batch_loader(unlabeled, batches, workers),
        scan_loader(data, split.validation, rank=rank, world_size=world_size),
        data, dataset, split, reference, steps, min(cfg.num_epoch * steps, cfg.max_steps or sys.maxsize),
    )  # fmt: skip


class BatchLoader(DataLoader):
    """A DataLoader that reports every death of a worker as "DataLoader worker ..."."""

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except (ConnectionError, EOFError) as error:  # while it handed over a batch
            raise RuntimeError(f"DataLoader worker died: {error!r}") from error


def batch_loader(dataset: SliceDataset, batches: Iterable[np.ndarray], workers: int) -> DataLoader:
    """Return a loader of whole batches: the positions of each are an element of `batches`."""
    options = {"num_workers": workers, "timeout": STALL_S, "prefetch_factor": PREFETCH} if workers else {}
    options |= {"pin_memory": torch.cuda.is_available(), "worker_init_fn": ignore_signals}
    return BatchLoader(dataset, batch_size=None, sampler=batches, **options)


def ignore_signals(_worker: int) -> None:
    """Leave signals to the training, which saves its state and ends its workers."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def scan_loader(data: PreparedData, patients: list[str], *, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return a loader of a process's share of the scans with masks of `patients`, a batch each."""
    dataset = SliceDataset(data, data.rows(patients, with_mask=True), with_mask=True)
    scans = defaultdict(list)  # positions by patient and phase, in the order of the slices
    for position, row in enumerate(dataset.rows):
        scans[data.index["patient"][row], data.index["phase"][row]].append(position)
    return batch_loader(dataset, [np.array(scans[key]) for key in sorted(scans)][rank::world_size], 0)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
