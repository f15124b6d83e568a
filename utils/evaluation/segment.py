"""Segmenting new scans: NIfTI in, label maps in the scans' own grid out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from tqdm import tqdm

from utils.data.dataset import DatasetInfo
from utils.data.prepare import quantile_curves
from utils.data.volume import (
    PlaneMap,
    Volume,
    frame_count,
    frame_slices,
    implausible,
    read_volume,
    write_volume,
)
from utils.errors import UserError
from utils.evaluation.metrics import largest_components
from utils.evaluation.predict import native_labels, predict, prepare_view
from utils.evaluation.runs import TrainedRun
from utils.method.augment import CANVAS_PX, FIELD_PX, fourier_view
from utils.method.losses import kl_variance

NOTE = "SemiDG-Seg: for research use, not for clinical decisions"
SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
# Endings of what lies beside scans and is none: label maps as this and other tools name them, and our own maps.
MAPS = re.compile(r"[_-](gt|seg|[dg]m?seg|mask(-r\d+)?|labels?|confidence|agreement)([_-]manual)?$", re.IGNORECASE)
FEW_VALUES = 10  # a scan has more different values than a label map


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """Segments volumes with both networks of a run."""

    run: TrainedRun
    dataset: DatasetInfo
    precision: str
    batch_size: int  # slices at a time
    tta: bool
    keep_largest: bool
    confidence: bool  # also map exp(-V) and the networks' agreement
    center: tuple[float, float] | None  # voxel of the organ's centre in the first two axes; None: the image's centre

    def frame(self, slices: np.ndarray, plane: PlaneMap) -> dict[str, np.ndarray]:
        """Segment one frame.

        Args:
            slices: (Z, X, Y) as stored in the file.
            plane: the way from their grid to the canvas.

        Returns:
            Maps (Z, X, Y) by name: "seg", labels as uint8; where wanted also "confidence", exp(-V), and "agreement"
            of the networks, both float32 and 0 outside the field of view.
        """
        parts = np.split(slices, range(self.batch_size, len(slices), self.batch_size))  # float copies of few slices
        normalized = (plane.to_canvas(self.dataset.normalize(part.astype(np.float32))) for part in parts)
        canvas = np.concatenate([part.astype(np.float16) for part in normalized])
        config, device = self.run.config, self.run.device
        curves = torch.from_numpy(quantile_curves(canvas)).to(device)
        images = torch.from_numpy(canvas)[:, None].to(device)
        view = prepare_view(images, curves, size=config.image_size, reference=self.run.reference)
        probability, agreement = self._predict(view, tta=self.tta)
        spacing = self.dataset.spacing * FIELD_PX / config.image_size
        grid = PlaneMap(plane.shape, plane.zooms, config.image_size, spacing, plane.center)
        labels = native_labels(probability, grid)
        maps = {"seg": largest_components(labels) if self.keep_largest else labels}
        if self.confidence:
            # A new scan comes without partners from other scanners: half the scan away lies another amplitude.
            partner = prepare_view(images.roll(len(images) // 2, 0), curves, size=config.image_size, reference=None)
            # Training with AM draws the share up to fourier_alpha; here it is the largest, so that maps are repeatable.
            ratio = config.fourier_alpha if config.fourier_mode == "AM" else config.fourier_ratio
            fourier = fourier_view(view, partner, mode=config.fourier_mode, window=config.fourier_window, ratio=ratio)
            plain, augmented = (self._predict(x)[0].clamp_min(1e-12).log() for x in (view, fourier))
            maps["confidence"] = grid.to_native(torch.exp(-kl_variance(plain, augmented)).cpu().numpy())
            maps["agreement"] = grid.to_native(agreement.cpu().numpy())
        return maps

    def _predict(self, view: torch.Tensor, *, tta: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean softmax and agreement of the networks, computed `batch_size` slices at a time."""
        parts = [
            predict(self.run.nets, part, precision=self.precision, tta=tta) for part in view.split(self.batch_size)
        ]
        probability, agreement = zip(*parts, strict=True)
        return torch.cat(probability), torch.cat(agreement)

    def volume(self, volume: Volume) -> dict[str, np.ndarray]:
        """Segment all frames of a 3D or 4D volume; maps as `frame` gives them, of the volume's shape."""
        plane = PlaneMap(volume.array.shape[:2], volume.zooms[:2], CANVAS_PX, self.dataset.spacing, self.center)
        if self.center and not all(0 <= c < n for c, n in zip(self.center, plane.shape, strict=True)):
            raise UserError(f"--center {self.center} lies outside the image of {plane.shape} voxels")
        if self.confidence and volume.array.shape[2] < 2:
            raise UserError("--confidence compares with another slice, and there is only one: leave it out")
        frames = [self.frame(frame_slices(volume, number), plane) for number in range(frame_count(volume))]
        # Slices back to the third axis; frames to the fourth, where the volume has one.
        stacked = {name: np.stack([np.moveaxis(maps[name], 0, 2) for maps in frames], axis=-1) for name in frames[0]}
        return {name: array.reshape(volume.array.shape) for name, array in stacked.items()}


def segment_files(
    segmenter: Segmenter, inputs: Sequence[Path], output: Path, *, overwrite: bool = False, slice_axis: int = 2
) -> None:
    """Segment files, and all NIfTI files of folders, into OUTPUT/STEM_seg.nii.gz.

    With confidence also STEM_confidence.nii.gz (exp(-V), V the KL variance between plain and Fourier view) and
    STEM_agreement.nii.gz (exp(-KL) between the two networks). A file that cannot be segmented does not stop the
    others. `slice_axis` is the axis of the slices in the files, counted from 0.

    Raises:
        UserError: no input, two inputs of one name, a label map that is there already (unless `overwrite`), or, after
            all the others, the files that failed.
    """
    stems = _output_stems(inputs, output)
    kinds = ("seg", "confidence", "agreement") if segmenter.confidence else ("seg",)
    there = [path for stem in stems.values() for kind in kinds if (path := output / f"{stem}_{kind}.nii.gz").exists()]
    if there and not overwrite:
        raise UserError(
            f"{len(there)} of the maps to write are there already, perhaps corrected by hand: {there[0]} and so on; "
            "--overwrite replaces them, or choose another --output"
        )
    problems, slices, began = [], 0, monotonic()
    for path, stem in tqdm(stems.items(), unit="scan", desc="segment"):
        try:
            volume = read_volume(path)
            if volume.warning:
                tqdm.write(f"warning: {path}: {volume.warning}")
            stack = _slices_last(volume, slice_axis)
            if reasons := implausible(stack):
                raise UserError("; ".join(reasons) + " (--slice-axis says which axis that of the slices is)")
            if len(np.unique(stack.array[::4, ::4])) <= FEW_VALUES:
                tqdm.write(f"warning: {path}: at most {FEW_VALUES} different values: is it a label map and no scan?")
            for name, array in segmenter.volume(stack).items():
                array = np.moveaxis(array, 2, slice_axis)
                write_volume(output / f"{stem}_{name}.nii.gz", array, like=volume, description=NOTE)
            slices += stack.array[0, 0].size
        except UserError as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        except (MemoryError, torch.OutOfMemoryError):
            problems.append(f"{path}: too little memory: a smaller --batch-size, --device cpu or --precision bf16")
    print(f"{len(stems) - len(problems)} scans in {output}: {slices / (monotonic() - began):.1f} slices/s. {NOTE}.")
    if problems:
        raise UserError(f"{len(problems)} of {len(stems)} scans failed:\n  " + "\n  ".join(problems))


def _slices_last(volume: Volume, axis: int) -> Volume:
    """Return the volume with its slices on the third axis, for the networks only: its header stays that of the file."""
    zooms = [zoom for number, zoom in enumerate(volume.zooms) if number != axis] + [volume.zooms[axis]]
    return volume._replace(array=np.moveaxis(volume.array, axis, 2), zooms=tuple(zooms))


def _output_stems(inputs: Sequence[Path], output: Path) -> dict[Path, str]:
    files = []
    for path in inputs:
        if not path.exists():
            raise UserError(f"--input {path}: no such file or folder")
        found = [p for p in path.glob("[!.]*") if SUFFIX.search(p.name)] if path.is_dir() else [path]
        files += sorted(found)
    stems = {path: SUFFIX.sub("", path.name) for path in files}
    for path in [path for path, stem in stems.items() if MAPS.search(stem) and path not in inputs]:
        print(f"left out as no scan: {path}")
        del stems[path]
    if not stems:
        raise UserError(f"no .nii or .nii.gz scan in {', '.join(map(str, inputs))} (folders in it are not searched)")
    doubles = sorted({stem for stem in stems.values() if list(stems.values()).count(stem) > 1})
    if doubles:
        raise UserError(f"several inputs would be written as {doubles[0]}_seg.nii.gz: segment them into other folders")
    given = {path.resolve() for path in files}
    for stem in stems.values():
        for target in (output / f"{stem}_{name}.nii.gz" for name in ("seg", "confidence", "agreement")):
            if target.resolve() in given:
                raise UserError(f"{target} lies among the inputs and would be overwritten: choose another --output")
    return stems
