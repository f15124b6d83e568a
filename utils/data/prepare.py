"""Conversion of raw scans to memory-mapped arrays: every file is checked, and all problems are reported at once."""

import csv
import hashlib
import math
import os
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from config import CANVAS_PX, FIELD_PX
from utils.data.dataset import Case, DatasetInfo
from utils.data.phantom import PHANTOM_NOTE
from utils.data.prepared import (
    FORMAT_VERSION,
    INDEX_COLUMNS,
    QUANTILES,
    description_digest,
    quantile_curves,
    voxel_checksum,
)
from utils.data.volume import (
    PlaneMap,
    Volume,
    frame_count,
    frame_slices,
    implausible,
    mask_in_grid,
    read_header,
    read_volume,
    whole_numbers,
    write_volume,
)
from utils.errors import UserError, naming
from utils.files import LOCK, folder_lock, write_json


class ScanReport(NamedTuple):
    """Result of one scan; the problems of the table and of file names stand in a report without a case."""

    errors: list[str]
    warnings: list[str]
    rows: list[dict[str, Any]]  # its part of index.csv
    outside: tuple[int, int] = (0, 0)  # labelled voxels outside the field of view, and all
    digest: bytes = b""  # SHA-256 of everything written


Reports = list[tuple[Case | None, ScanReport]]
Target = tuple[Path, int, int]  # folder of the arrays, first slice and first mask of a scan


def check_dataset(raw: Path, dataset: DatasetInfo, *, workers: int) -> bool:
    """Read every file of a raw data set and print every problem; return True if there is no error."""
    return _summarise(raw, dataset, _convert_scans(raw, dataset, workers=workers, out=None))


def prepare_dataset(raw: Path, out: Path, dataset: DatasetInfo, *, workers: int) -> None:
    """Check `raw` and convert it into the folder `out`, which appears only when it is complete.

    Raises:
        UserError: `out` exists, the disk is too small or read-only, or a file has an error (all are printed).
    """
    unfinished = out.with_name(out.name + ".partial")
    if unfinished.exists() and not (unfinished / LOCK).exists():
        raise UserError(f"{unfinished} is there and was not left by this program: move it, or choose another --out")
    with folder_lock(unfinished):
        try:
            if out.exists():  # asked under the lock: another process may have made it just now
                raise UserError(f"{out} exists already: remove it, or choose another --out")
            for left in unfinished.glob("*"):  # by a process that was killed
                if left.name != LOCK:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            reports = _convert_scans(raw, dataset, workers=workers, out=unfinished)
            if not _summarise(raw, dataset, reports):
                raise UserError(f"{raw} has the errors listed above: nothing was prepared")
            _write_index(unfinished, raw, dataset, reports)
            (unfinished / LOCK).unlink()
            unfinished.rename(out)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error})") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"prepared: {sum(len(report.rows) for _, report in reports)} slices, {size / 1e9:.2f} GB")


def _convert_scans(raw: Path, dataset: DatasetInfo, *, workers: int, out: Path | None) -> Reports:
    """Check every scan and, if `out` is given, convert it; each worker holds one scan in memory."""
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 process must do the work")
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder\n{dataset.download_help}")
    for field in sorted(
        fields(dataset), key=lambda field: field.name == "find_cases"
    ):  # asked here: a pool may wait for ever for what it cannot send
        remedy = ": define it as a function of a module"
        with naming(f"DatasetInfo.{field.name}", "cannot be sent to the worker processes", remedy=remedy):
            pickle.dumps(getattr(dataset, field.name))
    cases, errors, warnings = dataset.find_cases(raw)
    targets = _allocate(cases, dataset, out) if out and not errors else None
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process alone: it ends the workers
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore_interrupt) as pool:
        results = pool.map(convert_scan, cases, repeat(dataset), targets or repeat(None))
        progress = tqdm(results, total=len(cases), unit="scan", desc="prepare" if out else "check")
        try:
            return [(None, ScanReport(errors, warnings, [])), *zip(cases, progress, strict=True)]
        except BrokenProcessPool as error:
            raise UserError("a worker process died, most likely for lack of memory: use fewer --workers") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _frames(case: Case, count: int) -> Sequence[int]:
    """Return the frames to convert: all, or of a labelled scan of the user's own those with a mask."""
    return sorted(case.phases.values()) if case.own and case.phases else range(count)


def _allocate(cases: list[Case], dataset: DatasetInfo, out: Path) -> list[Target] | None:
    """Create the arrays for all slices that the headers promise; return None if a header is damaged."""
    targets, slices, masks = [], 0, 0
    for case in cases:
        targets.append((out, slices, masks))
        try:
            _, shape = read_header(case.image)
        except UserError:
            return None  # the scan's own check will say why
        slices += shape[2] * len(_frames(case, math.prod(shape[3:])))
        masks += shape[2] * len(case.phases)
    need = slices * (CANVAS_PX**2 * 2 + QUANTILES * 4) + masks * CANVAS_PX**2
    free = shutil.disk_usage(out).free
    if need > 0.98 * free:
        raise UserError(f"{out.parent}: the prepared data take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    open_memmap(out / "images.npy", "w+", np.float16, (slices, CANVAS_PX, CANVAS_PX))
    open_memmap(out / "masks.npy", "w+", np.uint8, (masks, CANVAS_PX, CANVAS_PX))
    open_memmap(out / "quantiles.npy", "w+", np.float32, (slices, QUANTILES))
    for path in out.glob("*.npy"):
        if hasattr(os, "posix_fallocate"):  # Linux: take the space now; a disk that fills up later kills a memory map
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return targets


def convert_scan(case: Case, dataset: DatasetInfo, target: Target | None) -> ScanReport:
    """Check the files of one scan and, if `target` is given, convert it."""
    errors: list[str] = []
    volumes: list[Volume] = []
    for path in (case.image, *case.masks):
        try:
            volumes.append(read_volume(path))
        except UserError as error:
            errors.append(str(error))
    if errors:
        return ScanReport(errors, [], [])
    image, *masks = volumes
    warnings = [f"{case.image}: {image.warning}"] if image.warning else []
    errors = [f"{case.image}: {reason}" for reason in implausible(image)]
    for number, path in enumerate(case.masks):
        try:
            masks[number] = mask_in_grid(_labels(masks[number], dataset), image)
            warnings += [f"{path}: {masks[number].warning}"] if masks[number].warning else []
        except UserError as error:
            errors.append(f"{path}: {error}")
    for phase, frame in case.phases.items():
        if frame >= frame_count(image):
            errors.append(f"{case.image}: {phase} is frame {frame}, but the file holds 0..{frame_count(image) - 1}")
    if errors:
        return ScanReport(errors, warnings, [])
    truth = {}
    for phase, frame in case.phases.items():
        raters = [frame_slices(mask, frame) for mask in masks]
        truth[phase] = dataset.consensus(raters) if dataset.consensus else raters[0]
        if dataset.label_warning and (text := dataset.label_warning(truth[phase])):
            warnings.append(f"{case.masks[0]}: {phase}: {text}")
    empty = [phase for phase, label in truth.items() if not label.any()]
    drawn = [frame for frame in range(frame_count(masks[0])) if frame_slices(masks[0], frame).any()] if empty else []
    if set(drawn) - set(case.phases.values()):
        named = ", ".join(f"{phase} {frame}" for phase, frame in case.phases.items())
        errors = [f"{case.masks[0]}: labels in frames {drawn}, but by the table they are {named} (counted from 0)"]
        return ScanReport(errors, warnings, [])
    warnings += [f"{case.masks[0]}: no label in {phase}" for phase in empty]
    plane = PlaneMap(image.array.shape[:2], image.zooms[:2], CANVAS_PX, dataset.spacing)
    outside = total = 0
    if truth:
        labels = np.stack(list(truth.values()))
        structures = (labels > 0) & (labels < len(dataset.class_names))
        total = np.count_nonzero(structures)
        outside = np.count_nonzero(structures & ~replace(plane, size=FIELD_PX).inside())
    if outside > 0.01 * total:
        share = f"{100 * outside / total:.1f} % of its labelled voxels"
        warnings.append(f"{case.image}: {share} lie outside the network's field of view")
    rows, digest = _convert(case, dataset, image, truth, plane, target) if target else ([], b"")
    return ScanReport(errors, warnings, rows, (outside, total), digest)


def _labels(mask: Volume, dataset: DatasetInfo) -> Volume:
    """Return a mask with labels of the data set, uint8; raise UserError, which names no file, for other values."""
    mask = whole_numbers(mask)
    label_of = dataset.label_values or {label: label for label in range(dataset.num_raw_labels)}
    labels, drawn = np.zeros(mask.array.shape, np.uint8), mask.array != 0
    values, position = np.unique(mask.array[drawn], return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in label_of]:
        named = ", ".join(map(str, label_of))
        raise UserError(f"labels {unknown[:5]} beside {named}; of your own scans, --labels VALUE=STRUCTURE names them")
    labels[drawn] = np.array([label_of[value] for value in values], np.uint8)[position]
    return mask._replace(array=labels)


def _convert(
    case: Case, dataset: DatasetInfo, image: Volume, truth: dict[str, np.ndarray], plane: PlaneMap, target: Target
) -> tuple[list[dict[str, Any]], bytes]:
    """Write the slices and masks of one checked scan; return its part of index.csv and the SHA-256 of all."""
    out, row, mask_row = target
    images, masks, quantiles = (np.load(out / f"{n}.npy", mmap_mode="r+") for n in ("images", "masks", "quantiles"))
    phases = {frame: phase for phase, frame in case.phases.items()}
    depth, index, digest = image.array.shape[2], [], hashlib.sha256()
    for frame in _frames(case, frame_count(image)):
        canvas = plane.to_canvas(dataset.normalize(frame_slices(image, frame).astype(np.float32))).astype(np.float16)
        images[row : row + depth] = canvas
        quantiles[row : row + depth] = quantile_curves(canvas)
        digest.update(canvas.tobytes())
        checksum = voxel_checksum(frame_slices(image, frame))
        phase = phases.get(frame, "")
        if phase:
            label = plane.to_canvas(truth[phase] * (truth[phase] < len(dataset.class_names)))  # the others: background
            masks[mask_row : mask_row + depth] = label
            digest.update(label.tobytes() + truth[phase].tobytes())
            path = out / "truth" / f"{case.patient}_{phase}.nii.gz"
            write_volume(path, np.ascontiguousarray(np.moveaxis(truth[phase], 0, 2)), like=image)
        for z in range(depth):
            mask = mask_row + z if phase else -1
            values = (case.patient, case.domain, case.group, phase, frame, z, mask)
            values += (*plane.shape, *image.zooms, checksum)
            index.append(dict(zip(INDEX_COLUMNS, values, strict=True)))
        row, mask_row = row + depth, mask_row + depth * bool(phase)
    digest.update(repr(index).encode() + image.affine.tobytes())
    return index, digest.digest()


def _write_index(out: Path, raw: Path, dataset: DatasetInfo, reports: Reports) -> None:
    """Write index.csv and dataset.json."""
    rows = [row for _, report in reports for row in report.rows]
    with open(out / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, INDEX_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    info = {
        "format": FORMAT_VERSION,
        "dataset": dataset.key,
        "source": str(raw),
        "phantom": any((folder / PHANTOM_NOTE).exists() for folder in (raw, raw.absolute().parent)),  # or OpenDataset
        "spacing_mm": dataset.spacing,
        "canvas_px": CANVAS_PX,
        "field_px": FIELD_PX,
        "class_names": dataset.class_names,
        "content_hash": hashlib.sha256(b"".join(report.digest for _, report in reports)).hexdigest(),
    }
    info["sha256"] = description_digest(info, (out / "index.csv").read_bytes())
    write_json(out / "dataset.json", info)


def _summarise(raw: Path, dataset: DatasetInfo, reports: Reports) -> bool:
    """Print every problem and the counts; return True if there is no error."""
    errors = [text for _, report in reports for text in report.errors]
    warnings = [text for _, report in reports for text in report.warnings]
    for kind, texts in (("error", errors), ("warning", warnings)):
        for text in texts:
            print(f"{kind}: {text}")
    by_domain = Counter(case.domain for case, _ in reports if case)
    labeled = Counter(case.domain for case, _ in reports if case and case.masks)
    counts = ", ".join(f"{d}: {by_domain[d]} ({labeled[d]} with masks)" for d in sorted(by_domain))
    outside, voxels = (sum(report.outside[i] for _, report in reports) for i in (0, 1))
    print(f"{raw}: scans by {dataset.domain_kind}: {counts or 'none'}")
    if voxels:
        print(f"{100 * outside / voxels:.2f} % of the labelled voxels lie outside the network's field of view")
    print(f"{len(errors)} errors, {len(warnings)} warnings")
    return not errors
