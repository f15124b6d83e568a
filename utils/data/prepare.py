"""Conversion of raw scans to memory-mapped arrays: every file is checked, every problem reported."""

import csv
import hashlib
import math
import os
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from config import CANVAS_PX, FIELD_PX
from utils.data import prepared, volume
from utils.data.dataset import Case, DatasetInfo
from utils.data.open_data import OPEN_NOTE
from utils.data.phantom import PHANTOM_NOTE
from utils.data.volume import frame_slices
from utils.errors import UserError, naming
from utils.files import LOCK, folder_lock, require_space, write_json


class ScanReport(NamedTuple):
    """Result of one scan, or the problems of the table and of file names."""

    errors: list[str]
    warnings: list[str]
    outside: tuple[int, int] = (0, 0)  # labelled voxels outside the field of view, and all
    rows: Sequence[tuple] = ()  # its part of index.csv
    digest: bytes = b""  # SHA-256 of everything written


Target = tuple[Path, int, int]  # folder of the arrays, a scan's first slice and first mask


def check_dataset(raw: Path, dataset: DatasetInfo, *, workers: int) -> bool:
    """Read every file of a raw data set and print every problem; return True if there is none."""
    return _summarise(raw, dataset, *_check_all(raw, dataset, workers, None))


def prepare_dataset(raw: Path, out: Path, dataset: DatasetInfo, *, workers: int) -> None:
    """Check `raw` and convert it into the folder `out`, which appears only when it is complete.

    Raises UserError if `out` exists, the disk is too small, or a file has an error.
    """
    unfinished = out.with_name(out.name + ".partial")
    if unfinished.exists() and not (unfinished / LOCK).exists():
        raise UserError(f"{unfinished} was not left by this program: move it, or choose another --out")
    with folder_lock(unfinished):
        try:
            if out.exists():
                raise UserError(f"{out} exists already: remove it, or choose another --out")
            shutil.rmtree(unfinished / "truth", ignore_errors=True)
            cases, reports = _check_all(raw, dataset, workers, unfinished)
            if not _summarise(raw, dataset, cases, reports):
                raise UserError(f"{raw} has the errors listed above")
            rows = [row for report in reports for row in report.rows]
            with open(unfinished / "index.csv", "w", newline="") as file:
                csv.writer(file).writerows([prepared.INDEX_COLUMNS, *rows])
            paths = [raw / "any", *(case.image for case in cases)]
            folders = {folder for path in paths for folder in path.absolute().parents}
            notes = {"phantom": PHANTOM_NOTE, "open_data": OPEN_NOTE}
            info = {
                "format": prepared.FORMAT_VERSION,
                "dataset": dataset.key,
                **{key: any((folder / note).exists() for folder in folders) for key, note in notes.items()},
                "spacing_mm": dataset.spacing,
                "content_hash": hashlib.sha256(b"".join(report.digest for report in reports)).hexdigest(),
            }
            info["sha256"] = prepared.description_digest(info, (unfinished / "index.csv").read_bytes())
            write_json(unfinished / "dataset.json", info)
            (unfinished / LOCK).unlink()
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    print(f"prepared: {len(rows)} slices")


def _check_all(raw: Path, dataset: DatasetInfo, workers: int, out: Path | None) -> tuple[list[Case], list[ScanReport]]:
    """Check every scan and, if `out` is given, convert it; each worker holds one scan in memory."""
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder\n{dataset.download_help}")
    for name, value in reversed(vars(dataset).items()):  # a pool may wait for ever to send them
        with naming(f"DatasetInfo.{name}", "cannot be sent to workers", remedy=": define it in a module"):
            pickle.dumps(value)
    cases, errors, warnings = dataset.find_cases(raw)
    targets = _allocate(cases, out) if out and not errors else None
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process: it ends them
    with ProcessPoolExecutor(max(1, workers), initializer=signal.signal, initargs=ignore) as pool:
        results = pool.map(convert_scan, cases, repeat(dataset), targets or repeat(None))
        progress = tqdm(results, total=len(cases), unit="scan", desc="prepare" if out else "check")
        try:
            return cases, [ScanReport(errors, warnings), *progress]
        except BrokenExecutor as error:
            raise UserError("a worker died, often for lack of memory: use fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _frames(case: Case, count: int) -> Sequence[int]:
    return sorted(case.phases.values()) if case.own and case.phases else range(count)


def _allocate(cases: list[Case], out: Path) -> list[Target]:
    """Create the arrays for all slices that the headers promise."""
    targets, slices, masks = [], 0, 0
    for case in cases:
        targets.append((out, slices, masks))
        with suppress(UserError):  # the scan's own check will say why
            _, shape = volume.read_header(case.image)
            slices += shape[2] * len(_frames(case, math.prod(shape[3:])))
            masks += shape[2] * len(case.phases)
    kinds, square = (np.float16, np.uint8, np.float32), (CANVAS_PX, CANVAS_PX)
    shapes = (slices, *square), (masks, *square), (slices, prepared.QUANTILES)
    need = sum(map(lambda kind, shape: kind().nbytes * math.prod(shape), kinds, shapes))
    require_space(out.parent, need, "the prepared data")
    for name, kind, shape in zip(prepared.ARRAYS, kinds, shapes, strict=True):
        open_memmap(out / f"{name}.npy", "w+", kind, shape)
        if hasattr(os, "posix_fallocate"):  # take the space now: a full disk kills a memory map
            with open(out / f"{name}.npy", "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return targets


def convert_scan(case: Case, dataset: DatasetInfo, target: Target | None) -> ScanReport:
    """Check the files of one scan and, if `target` is given, convert it."""
    errors, volumes = [], []
    for path in (case.image, *case.masks):
        try:
            volumes.append(volume.read_volume(path))
        except UserError as error:
            errors.append(str(error))
    if errors:
        return ScanReport(errors, [])
    image, *masks = volumes
    warnings = [f"{case.image}: {image.warning}"] if image.warning else []
    errors = [f"{case.image}: {reason}" for reason in volume.implausible(image)]
    for number, path in enumerate(case.masks):
        try:
            masks[number] = volume.mask_in_grid(_labels(masks[number], dataset), image)
            warnings += [f"{path}: {masks[number].warning}"] if masks[number].warning else []
        except UserError as error:
            errors.append(f"{path}: {error}")
    last = volume.frame_count(image) - 1
    if late := {phase: frame for phase, frame in case.phases.items() if frame > last}:
        errors.append(f"{case.image}: {late} in the table, but the file holds frames 0..{last}")
    if errors:
        return ScanReport(errors, warnings)
    merge = dataset.consensus or (lambda raters: raters[0])
    truth = {name: merge([frame_slices(mask, n) for mask in masks]) for name, n in case.phases.items()}
    empty = [phase for phase, label in truth.items() if not label.any()]
    drawn = [frame for frame in range(last + 1) if masks and frame_slices(masks[0], frame).any()]
    texts = [f"no label in {phase}" for phase in empty]
    if {*drawn} - {*case.phases.values()}:
        texts.append(f"labels in frames {drawn}, in the table (from 0) {case.phases}")
        if empty:
            return ScanReport([f"{case.masks[0]}: {texts[-1]}"], warnings)
    texts += dataset.label_warnings(truth) if dataset.label_warnings else []
    warnings += [f"{case.masks[0]}: {text}" for text in texts]
    plane = volume.PlaneMap(image.array.shape[:2], image.zooms[:2], FIELD_PX, dataset.spacing)
    structures = [(label > 0) & (label < len(dataset.class_names)) for label in truth.values()]
    total = sum(np.count_nonzero(labels) for labels in structures)
    outside = sum(np.count_nonzero(labels & ~plane.inside()) for labels in structures)
    if outside > 0.01 * total:
        warnings.append(f"{case.image}: {100 * outside / total:.1f} % of its labels lie outside the field of view")
    written = _convert(case, dataset, image, truth, target) if target else ()
    return ScanReport(errors, warnings, (outside, total), *written)


def _labels(mask: volume.Volume, dataset: DatasetInfo) -> volume.Volume:
    """Return a mask with the data set's labels, uint8; UserError, which names no file, for others."""
    mask = volume.whole_numbers(mask)
    label_of = dataset.label_values or {label: label for label in range(dataset.num_raw_labels)}
    labels, drawn = np.zeros(mask.array.shape, np.uint8), mask.array != 0
    values, position = np.unique(mask.array[drawn], return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in label_of]:
        named = ", ".join(map(str, label_of))
        raise UserError(f"labels {unknown[:5]} beside {named}; for your own scans see --labels VALUE=STRUCTURE")
    labels[drawn] = np.array([label_of[value] for value in values], np.uint8)[position]
    return mask._replace(array=labels)


def _convert(case: Case, dataset: DatasetInfo, image: volume.Volume, truth: dict, target: Target) -> tuple[list, bytes]:
    """Write slices and masks of a checked scan; return its part of index.csv and a SHA-256 of all."""
    plane = volume.PlaneMap(image.array.shape[:2], image.zooms[:2], CANVAS_PX, dataset.spacing)
    out, row, mask_row = target
    images, masks, curves = (np.load(out / f"{name}.npy", mmap_mode="r+") for name in prepared.ARRAYS)
    phases = {frame: phase for phase, frame in case.phases.items()}
    depth, index, digest = image.array.shape[2], [], hashlib.sha256()
    for frame in _frames(case, volume.frame_count(image)):
        slices, phase = frame_slices(image, frame), phases.get(frame, "")
        canvas = plane.to_canvas(dataset.normalize(slices.astype(np.float32))).astype(np.float16)
        images[row : row + depth] = canvas
        curves[row : row + depth] = prepared.quantile_curves(canvas)
        row += depth
        digest.update(canvas.tobytes())
        key, facts = (*case[:3], phase, frame), (*plane.shape, *image.zooms, prepared.voxel_checksum(slices))
        index += [(*key, z, mask_row + z if phase else -1, *facts) for z in range(depth)]
        if phase:
            label = plane.to_canvas(truth[phase] * (truth[phase] < len(dataset.class_names)))
            masks[mask_row : mask_row + depth] = label
            mask_row += depth
            digest.update(label.tobytes() + truth[phase].tobytes())
            path = out / "truth" / f"{case.patient}_{phase}.nii.gz"
            volume.write_volume(path, np.moveaxis(truth[phase], 0, 2), like=image)
    digest.update(repr(index).encode() + image.affine.tobytes())
    return index, digest.digest()


def _summarise(raw: Path, dataset: DatasetInfo, cases: list[Case], reports: list[ScanReport]) -> bool:
    """Print every problem and the counts; return True if there is no error."""
    errors = [f"error: {text}" for report in reports for text in report.errors]
    warnings = [f"warning: {text}" for report in reports for text in report.warnings]
    scans, labeled = (Counter(case.domain for case in part) for part in (cases, [c for c in cases if c.masks]))
    counts = ", ".join(f"{d}: {scans[d]} ({labeled[d]} with masks)" for d in sorted(scans))
    print(*errors, *warnings, f"{raw}: scans by {dataset.domain_kind}: {counts or 'none'}", sep="\n")
    outside, total = np.sum([report.outside for report in reports], axis=0)
    if total:
        print(f"{100 * outside / total:.2f} % of the labelled voxels lie outside the field of view")
    print(f"{len(errors)} errors, {len(warnings)} warnings")
    return not errors
