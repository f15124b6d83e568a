"""Segmenting new scans: NIfTI in, label maps in the scans' own grid out."""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from config import CANVAS_PX, FIELD_PX, pixel_mm
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
QUALITY_COLUMNS = ("scan", "frame", "structure", "volume_ml", "agreement", "confidence", "components", "gaps")
Center = tuple[float, float] | Literal["auto"] | None


def segment_files(
    run: TrainedRun, dataset: DatasetInfo, inputs: Sequence[Path], output: Path, *, overwrite: bool = False,
    volumes: bool = False, confidence: bool = False, center: Center = None, keep_largest: bool = False,
    batch_size: int = 8,
) -> None:  # fmt: skip
    """Segment files, and all NIfTI files of folders, into OUTPUT/STEM_seg.nii.gz, with their measures in quality.csv.

    With `confidence` also STEM_confidence.nii.gz (exp(-V), V the KL variance between plain and Fourier view) and
    STEM_agreement.nii.gz (exp(-KL) between the two networks); with `volumes` also volumes.csv.

    Without `overwrite`, nothing that is there is replaced: the same command goes on after an interruption, with the
    scans that lack a map or lines in a table. A file that cannot be read does not stop the others.

    Raises:
        UserError: no input, two inputs of one name, an output that cannot be written, or maps there that this program
            did not make; after all others, the files that failed.
    """
    stems, outputs = _output_stems(inputs), OutputFolder(output)
    kinds = list(MAPS) if confidence else ["seg"]
    names = {stem: [f"{stem}_{kind}.nii.gz" for kind in kinds] for stem in stems.values()}
    tables = ["quality.csv", "volumes.csv"] if volumes else ["quality.csv"]
    outputs.require_free(*tables, *chain(*names.values()))
    require_writable(output, "--output")
    done = set.intersection(*({row["scan"] for row in _read_lines(output / table).rows} for table in tables))
    done = {stem for stem in done & names.keys() if all((output / name).exists() for name in names[stem])}
    if done and not overwrite:
        print(f"{len(done)} of {len(stems)} scans are done already; --overwrite does them anew")
        stems = {path: stem for path, stem in stems.items() if stem not in done}
    if not stems:
        return
    options = {"confidence": confidence, "center": center, "keep_largest": keep_largest, "batch_size": batch_size}
    problems = []
    for path, stem in tqdm(stems.items(), unit="scan", desc="segment"):
        try:
            with memory_errors(path, f", or a smaller --batch-size (now {batch_size})"):
                volume = _read_scan(path)
                if center == "auto":
                    tqdm.write(f"{path}:")
                maps, quality = segment_volume(volume, run.predictor, dataset, **options)
                for name, array in zip(names[stem], maps.values(), strict=True):
                    if overwrite or not (output / name).exists():
                        write_volume(outputs.claim(name), array, like=volume, description=NOTE)
                _write_lines(outputs.claim("quality.csv"), stem, quality, QUALITY_COLUMNS)
                if volumes:
                    figures, remark = clinical_figures(volume, maps["seg"], dataset)
                    _write_lines(outputs.claim("volumes.csv"), stem, [figures], ("scan", *figures))
                    if remark:
                        tqdm.write(f"warning: {path}: {remark}")
        except UserError as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    count = len(stems) - len(problems)
    print(f"{count} scan{'s' * (count != 1)} in {output}. {NOTE}.")
    if problems:
        raise UserError(f"{len(problems)} of {len(stems)} scans failed:\n  " + "\n  ".join(problems))


def _output_stems(inputs: Sequence[Path]) -> dict[Path, str]:
    """Return the outputs' names by input, without endings; UserError for none, or one twice."""
    stems = {}
    for path in nifti_files(inputs):
        if path not in inputs and scan_name(path).kind:
            print(f"left out as a label map, by its name: {path}")
        else:
            stems[path] = file_stem(path)
    if not stems:
        raise UserError(f"no .nii or .nii.gz scan in {', '.join(map(str, inputs))} (folders in it are not searched)")
    stem, count = Counter(stems.values()).most_common(1)[0]
    if count > 1:
        raise UserError(f"several inputs would be written as {stem}_seg.nii.gz: segment them into other folders")
    return stems


def _read_lines(path: Path) -> Table:
    """Read a table of scans, empty where there is none; UserError where it does not name them."""
    table = read_table(path) if path.exists() else Table([], [])
    if table.rows and "scan" not in table.rows[0]:
        raise UserError(f"{path} has no column scan: name it again, or move the file away")
    return table


def _write_lines(path: Path, scan: str, lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a scan's lines in place of its earlier ones; other scans, and the user's columns, stay."""
    table = _read_lines(path)
    header = {name.casefold(): name for name in [*table.columns, *columns]}
    rows = [row for row in table.rows if row["scan"] != scan]
    rows += [{name.casefold(): value for name, value in {"scan": scan, **line}.items()} for line in lines]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, header).writerows([header, *rows])


def _read_scan(path: Path) -> Volume:
    """Read a scan, slices on the third axis; UserError for one that cannot be read or is not plausible."""
    volume = read_volume(path)
    axis = int(np.argmax(volume.zooms))
    if axis != 2 and volume.zooms[axis] > 1.05 * sorted(volume.zooms)[1]:
        voxels = f"voxels of {np.round(volume.zooms, 2).tolist()} mm"
        raise UserError(
            f"by its {voxels} the slices lie on axis {axis + 1}, not 3: exchange the axes (nibabel: as_reoriented)"
        )
    if reasons := implausible(volume, any_thickness=True):
        raise UserError("; ".join(reasons))
    if volume.warning:
        tqdm.write(f"warning: {path}: {volume.warning}")
    return volume


def segment_volume(
    volume: Volume, predictor: Predictor, dataset: DatasetInfo, *, confidence: bool = False, center: Center = None,
    keep_largest: bool = False, batch_size: int = 8,
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:  # fmt: skip
    """Segment all frames of a 3D or 4D volume, slices on the third axis.

    Args:
        center: voxel of the organ's centre in a slice; "auto": as the networks find it; None: the image's.

    Returns:
        Maps of its shape: "seg", labels as uint8; with `confidence` also "confidence", exp(-V), and "agreement" of the
        networks, float32, 0 outside the field of view. And `structure_quality` of every frame before `keep_largest`.
    """
    shape, frames, size = volume.array.shape, frame_count(volume), predictor.config.image_size
    if confidence and shape[2] < 2:
        raise UserError("--confidence compares with another slice: leave it out for a single one")
    plane = PlaneMap(shape[:2], volume.zooms[:2], CANVAS_PX, dataset.spacing)
    if center == "auto":
        predict = partial(_predict_slices, predictor._replace(tta=False), batch_size=batch_size)
        center = _locate(volume, plane, dataset, predict)
    if center and not all(0 <= c < n for c, n in zip(center, plane.shape, strict=True)):
        raise UserError(f"--center {center} lies outside the image of {plane.shape} voxels")
    plane, pixel = replace(plane, center=center), pixel_mm(dataset.spacing, size)
    grid = replace(plane, size=size, spacing=pixel)
    names = list(MAPS) if confidence else ["seg"]
    maps = {name: np.empty((frames, shape[2], *shape[:2]), MAPS[name]) for name in names}
    quality = []
    for frame in range(frames):
        canvas = _canvases(frame_slices(volume, frame), plane, dataset)
        seen = {name: np.empty((len(canvas), size, size), MAPS[name]) for name in {*maps, "agreement"}}
        # Slice by slice: a whole scan at its own resolution, with all classes, would take gigabytes.
        for z, predicted in enumerate(_predict_slices(predictor, canvas, batch_size, confidence)):
            for name, array in seen.items():
                array[z] = predicted[name].argmax(0) if name == "seg" else predicted[name]
            for name, array in maps.items():
                native = grid.to_native(predicted[name])
                array[frame, z] = native.argmax(0) if name == "seg" else native
        if keep_largest:
            maps["seg"][frame] = largest_components(maps["seg"][frame])
        voxel_ml = pixel**2 * volume.zooms[2] / 1000
        rows = structure_quality(seen.pop("seg"), seen, dataset.class_names, voxel_ml)
        quality += [{"frame": frame, **row} for row in rows]
    return {name: array.transpose(2, 3, 1, 0).reshape(shape) for name, array in maps.items()}, quality


def _canvases(slices: np.ndarray, plane: PlaneMap, dataset: DatasetInfo) -> np.ndarray:
    normalized = (dataset.normalize(image[None].astype(np.float32)) for image in slices)
    return np.concatenate([plane.to_canvas(image).astype(np.float16) for image in normalized])


def _predict_slices(
    predictor: Predictor, canvas: np.ndarray, batch_size: int, confidence: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the softmax "seg" (K, size, size) and the other maps (size, size) of each canvas."""
    # A new scan has no partners from other scanners: half the scan away lies another amplitude.
    partners = np.roll(range(len(canvas)), len(canvas) // 2)
    for first in range(0, len(canvas), batch_size):
        images, others = canvas[first : first + batch_size], canvas[partners[first : first + batch_size]]
        arrays = images[:, None], quantile_curves(images), *([others[:, None]] if confidence else [])
        batch = [torch.from_numpy(array).to(predictor.device) for array in arrays]
        maps = {name: values.cpu().numpy() for name, values in predictor.maps(*batch)[1].items()}
        maps["seg"] = maps.pop("probability")
        yield from (dict(zip(maps, values, strict=True)) for values in zip(*maps.values(), strict=True))


def _locate(
    volume: Volume, plane: PlaneMap, dataset: DatasetInfo, predict: Callable[[np.ndarray], Iterable[dict]]
) -> tuple[float, float] | None:
    """Return and print the voxel of the organ's centre in a slice; None where the networks find nothing.

    They look at fields of view all over the first frame, which overlap by a third, in as many slices as the whole scan
    has. The centre is that of the connected region with the most foreground, summed over the slices.
    """
    shape, zooms = np.array(plane.shape), np.array(plane.zooms)
    reach = (shape * zooms / plane.spacing - FIELD_PX).clip(0)  # px that the field of view can move
    moves = [np.linspace(-n / 2, n / 2, 1 + math.ceil(n / (2 * FIELD_PX / 3))) for n in reach]
    windows = [(shape - 1) / 2 + np.array(move) * plane.spacing / zooms for move in product(*moves)]
    slices = frame_slices(volume, 0)
    depth = min(max(frame_count(volume) * len(slices) // len(windows), 1), len(slices))
    chosen = slices[((np.arange(depth) + 0.5) * len(slices) / depth).astype(int)]
    most, center = 0.0, None
    for window in windows:
        canvases = _canvases(chosen, replace(plane, center=tuple(window)), dataset)
        foreground = np.stack([1 - maps["seg"][0] for maps in predict(canvases)])
        heat = (foreground * (foreground > 0.5)).sum(0)
        regions, count = ndimage.label(heat)
        sums = ndimage.sum(heat, regions, range(1, count + 1))
        if count and sums.max() > most:
            most, size = sums.max(), len(heat)
            place = np.array(ndimage.center_of_mass(heat, regions, 1 + sums.argmax())) - (size - 1) / 2
            center = (window + place * pixel_mm(plane.spacing, size) / zooms).clip(0, shape - 1).tolist()
    if not center:
        tqdm.write("center: the networks find nothing, so the image's centre is taken")
        return None
    tqdm.write(f"center: {center[0]:.1f} {center[1]:.1f}")
    return tuple(center)


def structure_quality(
    labels: np.ndarray, certainty: Mapping[str, np.ndarray], class_names: Sequence[str], voxel_ml: float
) -> list[dict[str, Any]]:
    """Return the measures of every structure in predicted labels (Z, H, W) on the network's grid.

    They are volume_ml; the mean inside the structure of each map of `certainty` (Z, H, W); components, the number of
    connected ones (26 neighbours); gaps, the share of the slices between its first and last that lack it.
    """
    rows = []
    for label, name in enumerate(class_names[1:], start=1):
        mask = labels == label
        slices = np.flatnonzero(mask.any((1, 2)))
        row = {"structure": name, "volume_ml": float(mask.sum() * voxel_ml)}
        row |= {key: float(values[mask].mean()) for key, values in certainty.items() if len(slices)}
        row["components"] = int(ndimage.label(mask, np.ones((3, 3, 3)))[1])
        row["gaps"] = float(1 - len(slices) / (slices[-1] - slices[0] + 1)) if len(slices) else 0.0
        rows.append(row)
    return rows


def clinical_figures(volume: Volume, labels: np.ndarray, dataset: DatasetInfo) -> tuple[dict[str, Any], str]:
    """Return the clinical quantities of a scan by name, or None for each, and a remark on why.

    ED and ES are the frames in which the first structure, the left ventricle, is largest and
    smallest. A constant frame, or one without it, is neither; fewer than two others leave none.
    """
    names, frames, voxel_ml = dataset.class_names[1:], frame_count(volume), math.prod(volume.zooms) / 1000
    labels = labels.reshape(*labels.shape[:3], frames)
    ml = {name: (labels == value).sum((0, 1, 2)) * voxel_ml for value, name in enumerate(names, start=1)}
    lv, remarks = ml[names[0]], []
    usable = [t for t in range(frames) if lv[t] and np.ptp(frame_slices(volume, t))]
    if left_out := ", ".join(str(t) for t in range(frames) if t not in usable):
        remarks.append(f"frames {left_out} (from 0) are blank or without {names[0]}: left out")
    phases = {"ED": max(usable, key=lv.item, default=0), "ES": min(usable, key=lv.item, default=0)}
    volumes = {(phase, name): float(ml[name][t]) for phase, t in phases.items() for name in names}
    row = phases | {f"{name} ({unit})": value for name, (value, unit) in dataset.clinical(volumes).items()}
    if len(usable) < 2:
        remarks.append("fewer than two frames are left, so there are no clinical figures")
        row = dict.fromkeys(row)
    return row, "; ".join(remarks)
