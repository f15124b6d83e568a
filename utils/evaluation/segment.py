"""Segmenting new scans: NIfTI in, label maps in the scans' own grid out."""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from config import CANVAS_PX, pixel_mm
from utils.data.dataset import DatasetInfo
from utils.data.prepared import quantile_curves
from utils.data.user_scans import is_map
from utils.data.volume import PlaneMap, Volume, frame_count, frame_slices, implausible, read_volume, write_volume
from utils.errors import UserError, memory_errors
from utils.evaluation.locate import locate
from utils.evaluation.metrics import largest_components
from utils.evaluation.predict import Predictor
from utils.evaluation.runs import TrainedRun
from utils.files import OutputFolder, Table, atomic_write, file_stem, nifti_files, read_table, require_writable
from utils.plots import write_label_names

NOTE = "SemiDG-Seg: for research use, not for clinical decisions"
MAPS = {"seg": np.uint8, "confidence": np.float32, "agreement": np.float32}  # as files are called
QUALITY_COLUMNS = ("scan", "frame", "structure", "volume_ml", "agreement", "confidence", "components", "gaps")
Center = tuple[float, float] | Literal["auto"] | None


def segment_files(
    run: TrainedRun, dataset: DatasetInfo, inputs: Sequence[Path], output: Path, *, overwrite: bool = False,
    volumes: bool = False, confidence: bool = False, center: Center = None, keep_largest: bool = False,
    batch_size: int = 8,
) -> None:  # fmt: skip
    """Segment files, and all NIfTI files of folders, into OUTPUT/STEM_seg.nii.gz.

    With `confidence` also STEM_confidence.nii.gz (exp(-V), V the KL variance between plain and
    Fourier view) and STEM_agreement.nii.gz (exp(-KL) between the two networks). Beside them
    quality.csv, with `volumes` volumes.csv, and the structures' names and colours for viewers.

    Without `overwrite`, nothing that is there is replaced: the same command goes on after an
    interruption, for the scans that lack a map or lines in a table. A map's header tells by a
    checksum which run and settings made it. A file that cannot be read does not stop the others.

    Raises:
        UserError: no input, two inputs of one name, an output that cannot be written, maps that this
            program did not make, or made with another run or other settings; after all others, the
            files that failed.
    """
    stems, outputs = _output_stems(inputs), OutputFolder(output)
    kinds = list(MAPS) if confidence else ["seg"]
    names = {stem: [f"{stem}_{kind}.nii.gz" for kind in kinds] for stem in stems.values()}
    settings = run.checkpoint, run.metadata, run.predictor.tta, keep_largest, center
    note = f"{NOTE} [{sha256(repr(settings).encode()).hexdigest()[:8]}]"
    tables = ["quality.csv", "volumes.csv"] if volumes else ["quality.csv"]
    outputs.require_free(*tables, "labels.txt", "labels.ctbl", *chain(*names.values()))
    require_writable(output, "--output")
    _require_note([output / name for name in chain(*names.values())], note, overwrite)
    listed = [{row["scan"] for row in _read_lines(output / table).rows} for table in tables]
    done = {s for s in names.keys() & set.intersection(*listed) if all((output / n).exists() for n in names[s])}
    if done and not overwrite:
        print(f"{len(done)} of {len(stems)} scans are done already; --overwrite does them anew")
        stems = {path: stem for path, stem in stems.items() if stem not in done}
    if not stems:
        return
    write_label_names(outputs, dataset.class_names)
    options = {"confidence": confidence, "center": center, "keep_largest": keep_largest, "batch_size": batch_size}
    problems, slices, began = [], 0, monotonic()
    for path, stem in tqdm(stems.items(), unit="scan", desc="segment"):
        try:
            with memory_errors(path, f", or a smaller --batch-size (now {batch_size})"):
                volume = _read_scan(path)
                if center == "auto":
                    tqdm.write(f"{path}:")
                maps, quality = segment_volume(volume, run.predictor, dataset, **options)
                for name, array in zip(names[stem], maps.values(), strict=True):
                    if overwrite or not (output / name).exists():
                        write_volume(outputs.claim(name), array, like=volume, description=note)
                _write_lines(outputs.claim("quality.csv"), stem, quality, QUALITY_COLUMNS)
                if volumes:
                    figures, remark = clinical_figures(volume, maps["seg"], dataset)
                    _write_lines(outputs.claim("volumes.csv"), stem, [figures], ("scan", *figures))
                    if remark:
                        tqdm.write(f"warning: {path}: {remark}")
            slices += frame_count(volume) * volume.array.shape[2]
        except UserError as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    count, speed = len(stems) - len(problems), slices / (monotonic() - began)
    print(f"{count} scan{'s' * (count != 1)} in {output}: {speed:.1f} slices/s. {NOTE}.")
    if problems:
        raise UserError(f"{len(problems)} of {len(stems)} scans failed:\n  " + "\n  ".join(problems))


def _output_stems(inputs: Sequence[Path]) -> dict[Path, str]:
    """Return the outputs' names by input, without endings; UserError for none, or one twice."""
    files = nifti_files(inputs)
    stems = {path: file_stem(path) for path in files if path in inputs or not is_map(path)}
    for path in files:
        if path not in stems:
            print(f"left out as a label map, by its name: {path}")
    if not stems:
        names = ", ".join(map(str, inputs))
        raise UserError(f"no .nii or .nii.gz scan in {names} (folders in it are not searched)")
    stem, count = Counter(stems.values()).most_common(1)[0]
    if count > 1:
        raise UserError(f"several inputs would be written as {stem}_seg.nii.gz: segment them into other folders")
    return stems


def _require_note(maps: Sequence[Path], note: str, overwrite: bool) -> None:
    """Raise UserError for a map that, by its header, is not to be replaced or of other work."""
    for path in filter(Path.exists, maps):
        made_with = ""
        with suppress(Exception):  # nibabel raises a dozen kinds for what is no NIfTI
            made_with = nib.load(path).header["descrip"].item().decode()
        if overwrite and not made_with.startswith(NOTE):
            raise UserError(f"{path} was made or changed by another program: move it away")
        if not overwrite and made_with.startswith(NOTE) and made_with != note:
            raise UserError(
                f"{path} was made with another run or other settings: --overwrite replaces it, or "
                "choose another --output"
            )


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
    """Read a scan, slices on the third axis; print what is doubtful about it.

    Raises:
        UserError: it cannot be read, or is no plausible scan.
    """
    volume = read_volume(path)
    zooms = np.round(volume.zooms, 2).tolist()
    axis = int(np.argmax(volume.zooms))
    if axis != 2 and volume.zooms[axis] > 1.05 * sorted(volume.zooms)[1]:
        exchanged = [[2, 1], [1, 1], [0, 1]] if axis == 0 else [[0, 1], [2, 1], [1, 1]]
        raise UserError(
            f"with voxels of {zooms} mm its slices seem to lie on axis {axis + 1}, not 3: exchange "
            f"the axes, for example by nibabel.load(OLD).as_reoriented({exchanged}).to_filename(NEW)"
        )
    if reasons := implausible(volume, any_thickness=True):
        raise UserError("; ".join(reasons))
    if volume.warning:
        tqdm.write(f"warning: {path}: {volume.warning}")
    values = np.unique(volume.array[::4, ::4, ::2])
    if len(values) <= 10 and (values == np.rint(values)).all():
        listed = ", ".join(f"{value:g}" for value in values)
        tqdm.write(f"warning: {path}: it holds only the values {listed}: is it a label map?")
    return volume


def segment_volume(
    volume: Volume, predictor: Predictor, dataset: DatasetInfo, *, confidence: bool = False, center: Center = None,
    keep_largest: bool = False, batch_size: int = 8,
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:  # fmt: skip
    """Segment all frames of a 3D or 4D volume, slices on the third axis.

    Args:
        center: voxel of the organ's centre along a slice's axes; "auto": as the networks find it;
            None: the image's.

    Returns:
        Maps of its shape by name: "seg", labels as uint8; where wanted also "confidence", exp(-V),
        and "agreement" of the networks, both float32 and 0 outside the field of view. And
        `structure_quality` of every frame, on the network's grid, before `keep_largest`.
    """
    shape, frames, size = volume.array.shape, frame_count(volume), predictor.config.image_size
    plane = PlaneMap(shape[:2], volume.zooms[:2], CANVAS_PX, dataset.spacing)
    if center == "auto":
        normalized = np.concatenate([*_normalized(frame_slices(volume, 0), dataset)])
        predict = partial(_predict_slices, predictor._replace(tta=False), batch_size=batch_size)
        center = locate(normalized, plane, predict, budget=frames * shape[2])
    if center and not all(0 <= c < n for c, n in zip(center, plane.shape, strict=True)):
        raise UserError(f"--center {center} lies outside the image of {plane.shape} voxels")
    if confidence and shape[2] < 2:
        raise UserError("--confidence compares with another slice: leave it out for a single one")
    plane, pixel = replace(plane, center=center), pixel_mm(dataset.spacing, size)
    grid = replace(plane, size=size, spacing=pixel)
    names = list(MAPS) if confidence else ["seg"]
    maps = {name: np.empty((frames, shape[2], *shape[:2]), MAPS[name]) for name in names}
    quality = []
    for frame in range(frames):
        # Slice by slice: a whole scan at its own resolution, with all classes, would take gigabytes.
        normalized = _normalized(frame_slices(volume, frame), dataset)
        canvas = np.concatenate([plane.to_canvas(image).astype(np.float16) for image in normalized])
        seen = {name: np.empty((len(canvas), size, size), MAPS[name]) for name in {*maps, "agreement"}}
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


def _normalized(slices: np.ndarray, dataset: DatasetInfo) -> Iterator[np.ndarray]:
    return (dataset.normalize(image[None].astype(np.float32)) for image in slices)


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
        for number in range(len(maps["seg"])):
            yield {name: values[number] for name, values in maps.items()}


def structure_quality(
    labels: np.ndarray, certainty: Mapping[str, np.ndarray], class_names: Sequence[str], voxel_ml: float
) -> list[dict[str, Any]]:
    """Return the measures of every structure of one scan, on the network's grid.

    Args:
        labels: (Z, H, W) predicted.
        certainty: maps (Z, H, W) in [0, 1] by name, "agreement" and maybe "confidence".

    Returns:
        volume_ml; the mean of each map inside the structure, where there is one; components, the
        number of connected ones (26 neighbours); gaps, the share of the slices between its first and
        last that lack it.
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
