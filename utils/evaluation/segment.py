"""Segmenting new scans: NIfTI in, label maps in their own grids out."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from config import CANVAS_PX, pixel_mm
from utils.data.dataset import DatasetInfo
from utils.data.prepared import quantile_curves
from utils.data.user_scans import scan_name
from utils.data.volume import PlaneMap, Volume, frame_count, frame_slices, implausible, read_volume, write_volume
from utils.errors import UserError, memory_errors
from utils.evaluation.metrics import largest_components
from utils.evaluation.predict import Predictor
from utils.evaluation.runs import TrainedRun
from utils.files import OutputFolder, Table, atomic_write, file_stem, nifti_files, read_table, require_writable

NOTE = "SemiDG-Seg: for research use, not for clinical decisions"
MAPS = {"seg": np.uint8, "confidence": np.float32, "agreement": np.float32}  # as files are called
Center = tuple[float, float] | Literal["auto"] | None


def segment_files(
    run: TrainedRun, dataset: DatasetInfo, inputs: Sequence[Path], output: Path, *,
    overwrite=False, volumes=False, confidence=False, center: Center = None, keep_largest=False,
    batch_size=8,
) -> None:  # fmt: skip
    """Segment files, and NIfTI files of folders, into OUTPUT/STEM_seg.nii.gz; measures into quality.csv.

    `confidence` adds STEM_confidence.nii.gz and STEM_agreement.nii.gz, `volumes` adds volumes.csv.
    Without `overwrite`, only scans that lack a map or lines in a table are done. UserError for wrong
    inputs or outputs, and in the end for the files that failed.
    """
    scans, outputs, kinds = _scans(inputs), OutputFolder(output), MAPS if confidence else ["seg"]
    names = {stem: [f"{stem}_{kind}.nii.gz" for kind in kinds] for stem in scans}
    tables = ["quality.csv", "volumes.csv"] if volumes else ["quality.csv"]
    outputs.require_free(*tables, *chain(*names.values()))
    require_writable(output, "--output")
    made_by = f"{run.folder.resolve().name}/{run.checkpoint}"
    done = {stem for stem in scans if all((output / name).exists() for name in names[stem])}
    for rows in (_read_lines(output / table).rows for table in tables):
        done &= {row["scan"] for row in rows}
        others = sorted({row["scan"] for row in rows if row["scan"] in scans and row["run"] != made_by})
        if others and not overwrite:
            remedy = "choose another --output, or --overwrite"
            raise UserError(f"{output}: another run has segmented {', '.join(others[:5])}: {remedy}")
    if done and not overwrite:
        print(f"{len(done)} of {len(scans)} scans are done already; --overwrite does them anew")
        scans = {stem: path for stem, path in scans.items() if stem not in done}
    problems, options = [], {"confidence": confidence, "center": center}
    options |= {"keep_largest": keep_largest, "batch_size": batch_size}
    for stem, path in tqdm(scans.items(), unit="scan", desc="segment"):
        try:
            with memory_errors(path, f", or a smaller --batch-size (now {batch_size})"):
                volume = _read_scan(path)
                if center == "auto":
                    tqdm.write(f"{path}:")
                maps, quality = segment_volume(volume, run.predictor, dataset, **options)
                for name, array in zip(names[stem], maps.values(), strict=True):
                    if overwrite or not (output / name).exists():
                        write_volume(outputs.claim(name), array, like=volume, description=NOTE)
                key = {"scan": stem, "run": made_by}
                _write_lines(outputs.claim("quality.csv"), key, quality)
                if volumes:  # of the map that is there, which the user may have corrected
                    segmented = read_volume(output / names[stem][0]).array
                    figures, remark = clinical_figures(volume, segmented, dataset)
                    _write_lines(outputs.claim("volumes.csv"), key, [figures])
                    if remark:
                        tqdm.write(f"warning: {path}: {remark}")
        except UserError as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    print(f"scans segmented into {output}: {len(scans) - len(problems)}. {NOTE}.")
    if problems:
        raise UserError(f"{len(problems)} of {len(scans)} scans failed:\n  " + "\n  ".join(problems))


def _scans(inputs: Sequence[Path]) -> dict[str, Path]:
    scans: dict[str, Path] = {}
    for path in nifti_files(inputs):
        stem = file_stem(path)
        if path not in inputs and scan_name(path).kind:
            print(f"left out as a label map, by its name: {path}")
        elif stem in scans:
            raise UserError(f"several inputs would be {stem}_seg.nii.gz: use another --output for one")
        else:
            scans[stem] = path
    if not scans:
        raise UserError(f"no NIfTI file in {', '.join(map(str, inputs))}: name the subfolders, these are not searched")
    return scans


def _read_lines(path: Path) -> Table:
    return read_table(path) if path.exists() else Table([], [])


def _write_lines(path: Path, key: dict[str, str], lines: Sequence[dict]) -> None:
    """Write a scan's lines in place of its earlier ones; the user's columns stay."""
    table, lines = _read_lines(path), [key | line for line in lines]
    header = {name.casefold(): name for name in [*table.columns, *lines[0]]}
    rows = [row for row in table.rows if row["scan"] != key["scan"]]
    rows += [{name.casefold(): value for name, value in line.items()} for line in lines]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, header).writerows([header, *rows])


def _read_scan(path: Path) -> Volume:
    volume = read_volume(path)
    if reasons := implausible(volume):
        raise UserError("; ".join(reasons))
    if volume.warning:
        tqdm.write(f"warning: {path}: {volume.warning}")
    return volume


def segment_volume(
    volume: Volume, predictor: Predictor, dataset: DatasetInfo, *, confidence=False,
    center: Center = None, keep_largest=False, batch_size=8,
) -> tuple[dict[str, np.ndarray], list[dict]]:  # fmt: skip
    """Segment all frames of a 3D or 4D volume, slices on the third axis.

    `center` is a voxel of a slice, "auto" the one that the networks find, None the middle. Return by
    name MAPS of the volume's shape, 0 outside the field of view, and all frames' `structure_quality`.
    """
    shape, frames, cfg = volume.array.shape, frame_count(volume), predictor.config
    size, pixel = cfg.image_size, pixel_mm(dataset.spacing, cfg.image_size, cfg.field)
    if confidence and shape[2] < 2:
        raise UserError("--confidence compares with another slice: leave it out for one")
    plane = PlaneMap(shape[:2], volume.zooms[:2], CANVAS_PX, dataset.spacing)
    predict = partial(_predict_slices, dataset=dataset, batch_size=batch_size)
    if center == "auto":
        center = _locate(volume, plane, partial(predict, predictor=predictor._replace(tta=False)), cfg.field)
    if center and not all(0 <= c < n for c, n in zip(center, plane.shape, strict=True)):
        raise UserError(f"--center {center} is outside the image of {plane.shape} voxels")
    plane = replace(plane, center=center)
    grid, voxel_ml = replace(plane, size=size, spacing=pixel), pixel**2 * volume.zooms[2] / 1000
    quality, kinds = [], MAPS if confidence else ["seg"]
    maps = {kind: np.empty((frames, shape[2], *shape[:2]), MAPS[kind]) for kind in kinds}
    for frame in range(frames):
        seen = {kind: np.empty((shape[2], size, size), MAPS[kind]) for kind in {*maps, "agreement"}}
        slices = frame_slices(volume, frame)
        for z, predicted in enumerate(predict(slices, plane, predictor, confidence=confidence)):
            for name, array in seen.items():
                array[z] = predicted[name].argmax(0) if name == "seg" else predicted[name]
            for name, array in maps.items():
                native = grid.to_native(predicted[name])
                array[frame, z] = native.argmax(0) if name == "seg" else native
        if keep_largest:
            maps["seg"][frame] = largest_components(maps["seg"][frame])
        for row in structure_quality(seen.pop("seg"), seen, dataset.class_names, voxel_ml):
            quality.append({"frame": frame} | row)
    maps = {name: array.transpose(2, 3, 1, 0).reshape(shape) for name, array in maps.items()}
    return maps, quality


def _predict_slices(slices, plane, predictor, dataset, batch_size, confidence=False) -> Iterator[dict]:
    """Yield softmax "seg" (K, size, size) and other maps (size, size) of each slice (X, Y)."""
    # Slice by slice: a whole scan takes gigabytes.
    normalized = (dataset.normalize(image[None].astype(np.float32)) for image in slices)
    canvas = np.concatenate([plane.to_canvas(image).astype(np.float16) for image in normalized])
    # A new scan has no partners from other scanners.
    partners = np.roll(canvas, len(canvas) // 2, 0)
    for first in range(0, len(canvas), batch_size):
        images, others = (part[first : first + batch_size, None] for part in (canvas, partners))
        arrays = images, quantile_curves(images[:, 0]), *([others] if confidence else [])
        batch = [torch.from_numpy(array).to(predictor.device) for array in arrays]
        maps = {name: values.cpu().numpy() for name, values in predictor.maps(*batch)[1].items()}
        maps["seg"] = maps.pop("probability")
        for n in range(len(images)):
            yield {name: values[n] for name, values in maps.items()}


def _locate(volume: Volume, plane: PlaneMap, predict, field: int) -> tuple[float, float] | None:
    """Return and print the voxel of the organ's centre in a slice; None if nothing is found.

    In overlapping windows of the first frame, as many as the scan has slices, the networks look for
    the connected region with the most foreground.
    """
    shape, zooms = np.array(plane.shape), np.array(plane.zooms)
    reach = (shape * zooms / plane.spacing - field).clip(0)  # px that the field of view can move
    moves = [np.linspace(-n / 2, n / 2, 1 + math.ceil(n / (2 * field / 3))) for n in reach]
    windows = [(shape - 1) / 2 + np.array(move) * plane.spacing / zooms for move in product(*moves)]
    slices = frame_slices(volume, 0)
    depth = min(max(frame_count(volume) * len(slices) // len(windows), 1), len(slices))
    chosen = slices[((np.arange(depth) + 0.5) * len(slices) / depth).astype(int)]
    most, center = 0.0, None
    for window in windows:
        predicted = predict(chosen, replace(plane, center=tuple(window)))
        foreground = np.stack([1 - maps["seg"][0] for maps in predicted])
        heat = (foreground * (foreground > 0.5)).sum(0)
        regions, count = ndimage.label(heat)
        sums = ndimage.sum(heat, regions, range(1, count + 1))
        if count and sums.max() > most:
            most, size = sums.max(), len(heat)
            place = np.array(ndimage.center_of_mass(heat, regions, 1 + sums.argmax()))
            voxel = window + (place - (size - 1) / 2) * pixel_mm(plane.spacing, size, field) / zooms
            center = tuple(voxel.clip(0, shape - 1).round(1).tolist())
    tqdm.write(f"center: {center or 'of the image, as the networks find nothing'}")
    return center


def structure_quality(
    labels: np.ndarray, certainty: dict[str, np.ndarray], class_names: Sequence[str], voxel_ml: float
) -> list[dict]:
    """Measure every structure in predicted labels (Z, H, W) on the network's grid.

    Return volume_ml; the mean of each map of `certainty` (Z, H, W); components (26 neighbours), their
    number; gaps, the share of slices between first and last that lack it.
    """
    rows = []
    for label, name in enumerate(class_names[1:], start=1):
        mask = labels == label
        slices = np.flatnonzero(mask.any((1, 2)))
        row = {"structure": name, "volume_ml": float(mask.sum() * voxel_ml)}
        for key, values in certainty.items():
            row[key] = float(values[mask].mean()) if len(slices) else None
        row["components"] = int(ndimage.label(mask, np.ones((3, 3, 3)))[1])
        row["gaps"] = 1 - len(slices) / (np.ptp(slices) + 1) if len(slices) else 0.0
        rows.append(row)
    return rows


def clinical_figures(volume: Volume, labels: np.ndarray, dataset: DatasetInfo) -> tuple[dict, str]:
    """Return clinical quantities by name, None with fewer than two usable frames, and a remark.

    ED and ES are the frames, not constant, in which the LV is largest and smallest; below a tenth of
    the largest it counts as not found.
    """
    names, frames = dataset.class_names[1:], frame_count(volume)
    labels = labels.reshape(*labels.shape[:3], frames)
    voxels = {name: (labels == value).sum((0, 1, 2)) for value, name in enumerate(names, start=1)}
    ml = {name: count * math.prod(volume.zooms) / 1000 for name, count in voxels.items()}
    lv, remarks = ml[names[0]], []
    usable = [t for t in range(frames) if lv[t] > lv.max() / 10 and np.ptp(frame_slices(volume, t))]
    if left_out := ", ".join(str(t) for t in range(frames) if t not in usable):
        remarks.append(f"frames {left_out} (from 0), blank or without {names[0]}, are left out")
    phases = {"ED": max(usable, key=lv.item, default=0), "ES": min(usable, key=lv.item, default=0)}
    volumes = {(phase, name): float(ml[name][t]) for phase, t in phases.items() for name in names}
    quantities = dataset.clinical(volumes).items()
    row = phases | {f"{name} ({unit})": value for name, (value, unit) in quantities}
    if len(usable) < 2:
        row = dict.fromkeys(row)
        remarks.append("fewer than two frames are left: no clinical figures")
    return row, "; ".join(remarks)
