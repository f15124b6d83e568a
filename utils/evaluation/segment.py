"""Segmenting new scans: NIfTI in, label maps in the scans' own grid out."""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from config import CANVAS_PX, pixel_mm
from utils.data.dataset import DatasetInfo
from utils.data.prepared import quantile_curves
from utils.data.user_scans import is_map
from utils.data.volume import PlaneMap, Volume, frame_count, frame_slices, implausible, read_volume, write_volume
from utils.errors import UserError, memory_errors
from utils.evaluation.locate import locate
from utils.evaluation.metrics import largest_components
from utils.evaluation.quality import MEASURES, outside_ranges, structure_quality
from utils.evaluation.runs import TrainedRun
from utils.files import OutputFolder, atomic_write, file_stem, nifti_files
from utils.plots import write_label_names

NOTE = "SemiDG-Seg: for research use, not for clinical decisions"
MAPS = ("seg", "confidence", "agreement")  # as files are called; with --confidence all of them are written
QUALITY_COLUMNS = ("scan", "frame", "structure", *MEASURES, "outside_range")


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """Segments volumes with both networks of a run."""

    run: TrainedRun
    dataset: DatasetInfo
    batch_size: int  # slices at a time
    tta: bool
    keep_largest: bool
    confidence: bool  # also map exp(-V) and the networks' agreement
    # voxel of the organ's centre along a slice's axes; "auto": where the networks find it; None: the image's
    center: tuple[float, float] | Literal["auto"] | None = None
    slice_axis: int | None = None  # of the file, from 1; None: the third

    def frame(self, slices: np.ndarray, plane: PlaneMap) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Segment one frame.

        Args:
            slices: (Z, X, Y) as stored in the file.
            plane: the way from their grid to the canvas.

        Returns:
            Maps (Z, X, Y) by name: "seg", labels as uint8; where wanted also "confidence", exp(-V), and "agreement"
            of the networks, both float32 and 0 outside the field of view. And the same maps, always with "agreement",
            as the networks see them: (Z, size, size).
        """
        size = self.run.config.image_size
        grid = replace(plane, size=size, spacing=pixel_mm(self.dataset.spacing, size))
        # Slice by slice, here and below: a whole scan at its own resolution, with all classes, would take gigabytes.
        normalized = (self.dataset.normalize(image[None].astype(np.float32)) for image in slices)
        canvas = np.concatenate([plane.to_canvas(image).astype(np.float16) for image in normalized])
        # A new scan comes without partners from other scanners: half the scan away lies another amplitude.
        partners = np.roll(range(len(canvas)), len(canvas) // 2)
        wanted = MAPS if self.confidence else MAPS[:1]
        kinds = dict(zip(MAPS, (np.uint8, np.float32, np.float32), strict=True))
        maps = {name: np.empty(slices.shape, kinds[name]) for name in wanted}
        seen = {name: np.empty((len(slices), size, size), kinds[name]) for name in {*wanted, "seg", "agreement"}}
        for first in range(0, len(slices), self.batch_size):
            batch = slice(first, first + self.batch_size)
            found = self._mean(canvas[batch], size, canvas[partners[batch]] if self.confidence else None)
            for name, values in found.items():
                seen[name][batch] = (values.argmax(1) if name == "seg" else values).cpu().numpy()
            for name, array in maps.items():
                for number, values in enumerate(found[name].cpu().numpy(), start=first):
                    native = grid.to_native(values)
                    array[number] = native.argmax(0) if name == "seg" else native
        if self.keep_largest:
            maps["seg"] = largest_components(maps["seg"])
        return maps, seen

    def _mean(self, canvas: np.ndarray, size: int, partners: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Predict canvases (B, C, C): "seg" (B, K, size, size) softmax, other maps without K; see `predict_mean`."""
        predictor = self.run.predictor
        predictor = predictor._replace(config=replace(predictor.config, image_size=size), tta=self.tta)
        curves = torch.from_numpy(quantile_curves(canvas)).to(predictor.device)
        images, others = (
            None if part is None else torch.from_numpy(part)[:, None].to(predictor.device)
            for part in (canvas, partners)
        )
        _, maps = predictor.maps(images, curves, others)
        return {"seg": maps.pop("probability"), **maps}

    def _found(self, volume: Volume, plane: PlaneMap) -> tuple[float, float] | None:
        """Find the organ's centre in the first frame, as `locate` does, and print it; as costly as the prediction."""
        slices = frame_slices(volume, 0)
        normalized = np.concatenate([self.dataset.normalize(image[None].astype(np.float32)) for image in slices])
        budget, size = len(slices) * frame_count(volume), self.run.config.image_size
        center, share = locate(normalized, plane, self._foreground, size=size, budget=budget)
        said = "the networks find nothing, so the image's centre is taken"
        if center:
            said = f"{center[0]:.1f} {center[1]:.1f}, with {100 * share:.0f} % of what was found around it"
        tqdm.write(f"  center: {said}")
        return center

    def _foreground(self, canvas: np.ndarray, size: int) -> np.ndarray:
        """Return the probability of any structure: canvases (N, C, C) -> (N, size, size)."""
        batches = np.array_split(canvas, range(self.batch_size, len(canvas), self.batch_size))
        plain = replace(self, tta=False)
        return np.concatenate([1 - plain._mean(batch, size)["seg"][:, 0].cpu().numpy() for batch in batches])

    def volume(self, volume: Volume) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Segment all frames of a 3D or 4D volume, slices on the third axis.

        Returns maps of its shape as `frame`, and `structure_quality` of every frame with the frame's number.
        """
        shape = volume.array.shape
        plane = PlaneMap(shape[:2], volume.zooms[:2], CANVAS_PX, self.dataset.spacing)
        center = self._found(volume, plane) if self.center == "auto" else self.center
        plane = replace(plane, center=center)
        if center and not all(0 <= c < n for c, n in zip(center, plane.shape, strict=True)):
            raise UserError(f"--center {center} lies outside the image of {plane.shape} voxels")
        if self.confidence and shape[2] < 2:
            raise UserError("--confidence compares with another slice, and there is only one: leave it out")
        frames, quality, voxel_ml = (
            [],
            [],
            pixel_mm(self.dataset.spacing, self.run.config.image_size) ** 2 * volume.zooms[2] / 1000,
        )
        for number in range(frame_count(volume)):
            maps, seen = self.frame(frame_slices(volume, number), plane)
            frames.append(maps)
            rows = structure_quality(seen.pop("seg"), seen, self.dataset.class_names, voxel_ml)
            quality += [{"frame": number, **row} for row in rows]
        stacked = {}
        for name in list(frames[0]):
            found = [maps.pop(name) for maps in frames]
            array = np.stack(found) if len(found) > 1 else found[0][None]  # (T, Z, X, Y), of one frame without a copy
            stacked[name] = array.transpose(2, 3, 1, 0).reshape(shape)
        return stacked, quality

    def file(self, path: Path, target: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
        """Segment a file, write TARGET_seg.nii.gz and, where wanted, the other maps.

        Returns the number of slices, the quality as `volume`, and the clinical quantities of a 4D scan. What is
        doubtful about the scan is printed.

        Raises:
            UserError: it cannot be read, or is no plausible scan.
        """
        volume = read_volume(path)
        axis = (self.slice_axis or 3) - 1
        zooms = list(volume.zooms)
        turned = volume._replace(array=np.moveaxis(volume.array, axis, 2), zooms=(*np.delete(zooms, axis), zooms[axis]))
        thick = int(np.argmax(zooms))
        if not self.slice_axis and thick != 2 and zooms[thick] > 1.05 * sorted(zooms)[1]:
            raise UserError(
                f"with voxels of {np.round(zooms, 2).tolist()} mm its slices seem to lie on axis {thick + 1}, not 3: "
                "name their axis by --slice-axis"
            )
        if reasons := implausible(turned, any_thickness=True):
            raise UserError("; ".join(reasons))
        if volume.warning:
            tqdm.write(f"warning: {path}: {volume.warning}")
        values = np.unique(volume.array[::4, ::4, ::2])
        if len(values) <= 10 and (values == np.rint(values)).all():
            found = ", ".join(f"{value:g}" for value in values)
            tqdm.write(f"warning: {path}: it holds only the values {found}: is it a label map?")
        if self.center == "auto":
            tqdm.write(f"{path}:")
        maps, quality = self.volume(turned)
        for name, array in maps.items():
            write_volume(Path(f"{target}_{name}.nii.gz"), np.moveaxis(array, 2, axis), like=volume, description=NOTE)
        return turned.array[0, 0].size, quality, self._clinical(maps["seg"], math.prod(zooms) / 1000)

    def _clinical(self, labels: np.ndarray, voxel_ml: float) -> dict[str, Any]:
        """Return the clinical quantities of (X, Y, Z, T) labels, empty for a single frame or a data set without any.

        ED and ES are the frames in which the first structure, the left ventricle, is largest and smallest.
        """
        if labels.ndim == 3 or not self.dataset.clinical:
            return {}
        names = self.dataset.class_names[1:]
        ml = {name: (labels == value).sum((0, 1, 2)) * voxel_ml for value, name in enumerate(names, start=1)}
        frames = {"ED": int(ml[names[0]].argmax()), "ES": int(ml[names[0]].argmin())}
        found = self.dataset.clinical({(p, name): float(ml[name][t]) for p, t in frames.items() for name in names})
        return frames | {f"{name} ({unit})": value for name, (value, unit) in found.items()}


def segment_files(
    run: TrainedRun, dataset: DatasetInfo, inputs: Sequence[Path], output: Path, *, overwrite: bool = False,
    volumes: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Segment files, and all NIfTI files of folders, into OUTPUT/STEM_seg.nii.gz.

    With confidence also STEM_confidence.nii.gz (exp(-V), V the KL variance between plain and Fourier view) and
    STEM_agreement.nii.gz (exp(-KL) between the two networks). A file that cannot be read does not stop the others.
    Beside them quality.csv, with `volumes` volumes.csv, and the structures' names and colours for viewers; lines of
    other scans in these tables stay.

    Raises:
        UserError: no input, two inputs of one name, a label map that is there already (unless `overwrite`), or, after
            all the others, the files that failed.
    """
    segmenter = Segmenter(run=run, dataset=dataset, tta=run.predictor.tta, **options)
    stems = _output_stems(inputs, output)
    names = MAPS if segmenter.confidence else MAPS[:1]
    there = [path for stem in stems.values() for name in names if (path := output / f"{stem}_{name}.nii.gz").exists()]
    if there and not overwrite:
        raise UserError(
            f"{len(there)} of the maps to write are there already, perhaps corrected by hand: {there[0]} and so on; "
            "--overwrite replaces them, or choose another --output"
        )
    outputs, ranges = OutputFolder(output), segmenter.run.metadata.get("quality")
    outputs.require_free("quality.csv", "volumes.csv", "labels.txt", "labels.ctbl")
    smaller = f", or a smaller --batch-size (now {segmenter.batch_size})"
    problems, slices, began = [], 0, monotonic()
    quality: list[dict[str, Any]] = []
    clinical: list[dict[str, Any]] = []
    for path, stem in tqdm(stems.items(), unit="scan", desc="segment"):
        try:
            with memory_errors(path, smaller):
                count, rows, quantities = segmenter.file(path, f"{output / stem}")
        except UserError as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        slices += count
        quality += [{"scan": stem, **row, "outside_range": outside_ranges(row, ranges)} for row in rows]
        clinical += [{"scan": stem, **quantities}] if quantities else []
    print(f"{len(stems) - len(problems)} scans in {output}: {slices / (monotonic() - began):.1f} slices/s. {NOTE}.")
    if quality:
        _write_rows(outputs, "quality.csv", QUALITY_COLUMNS, quality)
        write_label_names(outputs, segmenter.dataset.class_names)
        flagged = {row["scan"] for row in quality if row["outside_range"]}
        print(
            f"{len(flagged)} of them have values outside the range of the run's labelled source scans: see quality.csv"
            if ranges
            else "the run was saved without the ranges of its source scans, so quality.csv flags nothing"
        )
    if volumes and clinical:
        _write_rows(outputs, "volumes.csv", list(clinical[0]), clinical)
    if problems:
        raise UserError(f"{len(problems)} of {len(stems)} scans failed:\n  " + "\n  ".join(problems))


def _write_rows(outputs: OutputFolder, name: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a table of scans; the lines that an earlier use of the folder wrote for other scans stay."""
    path, scans = outputs.claim(name), {row["scan"] for row in rows}
    before = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*(row for row in before if row["scan"] not in scans), *rows])


def _output_stems(inputs: Sequence[Path], output: Path) -> dict[Path, str]:
    """Return the beginning of the outputs' names by input; UserError where outputs would overwrite something."""
    files = nifti_files(inputs)
    left_out = [path for path in files if is_map(path) and path not in inputs]
    for path in left_out:
        print(f"left out as a label map, by its name: {path}")
    stems = {path: file_stem(path) for path in files if path not in left_out}
    if not stems:
        raise UserError(f"no .nii or .nii.gz scan in {', '.join(map(str, inputs))} (folders in it are not searched)")
    stem, count = Counter(stems.values()).most_common(1)[0]
    if count > 1:
        raise UserError(f"several inputs would be written as {stem}_seg.nii.gz: segment them into other folders")
    given = {path.resolve() for path in files}
    for target in (output / f"{stem}_{name}.nii.gz" for stem in stems.values() for name in MAPS):
        if target.resolve() in given:
            raise UserError(f"{target} lies among the inputs and would be overwritten: choose another --output")
    return stems
