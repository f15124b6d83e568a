"""Segmenting new scans: NIfTI in, label maps in the scans' own grid out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from tqdm import tqdm

from utils.data.dataset import DatasetInfo
from utils.data.own import file_stem, is_map, nifti_files
from utils.data.prepare import quantile_curves
from utils.data.volume import PlaneMap, Volume, frame_count, frame_slices, implausible, read_volume, write_volume
from utils.errors import UserError
from utils.evaluation.metrics import largest_components
from utils.evaluation.predict import predict, prepare_view
from utils.evaluation.runs import TrainedRun
from utils.method.augment import CANVAS_PX, FIELD_PX, fourier_view
from utils.method.losses import kl_variance

NOTE = "SemiDG-Seg: for research use, not for clinical decisions"
OUT_OF_MEMORY = "out of memory: try --device cpu, --precision bf16"


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
    center: tuple[float, float] | None = None  # voxel of the organ's centre along a slice's axes; None: the image's
    slice_axis: int | None = None  # of the file, from 1; None: the third

    def frame(self, slices: np.ndarray, plane: PlaneMap) -> dict[str, np.ndarray]:
        """Segment one frame.

        Args:
            slices: (Z, X, Y) as stored in the file.
            plane: the way from their grid to the canvas.

        Returns:
            Maps (Z, X, Y) by name: "seg", labels as uint8; where wanted also "confidence", exp(-V), and "agreement"
            of the networks, both float32 and 0 outside the field of view.
        """
        config, device = self.run.config, self.run.device
        spacing = self.dataset.spacing * FIELD_PX / config.image_size
        grid = PlaneMap(plane.shape, plane.zooms, config.image_size, spacing, plane.center)
        batches = [slice(first, first + self.batch_size) for first in range(0, len(slices), self.batch_size)]
        # Slice by slice, here and below: a whole scan at its own resolution, with all classes, would take gigabytes.
        normalized = (self.dataset.normalize(image[None].astype(np.float32)) for image in slices)
        canvas = np.concatenate([plane.to_canvas(image).astype(np.float16) for image in normalized])
        # A new scan comes without partners from other scanners: half the scan away lies another amplitude.
        partners = np.roll(range(len(canvas)), len(canvas) // 2)
        maps = {"seg": np.empty(slices.shape, np.uint8)}
        if self.confidence:
            maps |= {name: np.empty(slices.shape, np.float32) for name in ("confidence", "agreement")}
        for batch in batches:
            curves = torch.from_numpy(quantile_curves(canvas[batch])).to(device)
            images, other = (torch.from_numpy(canvas[s])[:, None].to(device) for s in (batch, partners[batch]))
            view = prepare_view(images, curves, size=config.image_size, reference=self.run.reference)
            probability, agreement = predict(self.run.nets, view, precision=self.precision, tta=self.tta)
            found = {"seg": probability, "agreement": agreement}
            if self.confidence:
                partner = prepare_view(other, curves, size=config.image_size, reference=None)
                found["confidence"] = self._confidence(view, partner)
            for name, array in maps.items():
                for number, values in enumerate(found[name].cpu().numpy(), start=batch.start):
                    native = grid.to_native(values)
                    array[number] = native.argmax(0) if name == "seg" else native
        if self.keep_largest:
            maps["seg"] = largest_components(maps["seg"])
        return maps

    def _confidence(self, view: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
        """Return exp(-V), V the KL variance between the prediction of a view and that of its Fourier view."""
        config = self.run.config
        # Training with AM draws the share up to fourier_alpha; here it is the largest, so that maps are repeatable.
        ratio = config.fourier_alpha if config.fourier_mode == "AM" else config.fourier_ratio
        fourier = fourier_view(view, partner, mode=config.fourier_mode, window=config.fourier_window, ratio=ratio)
        predictions = (predict(self.run.nets, image, precision=self.precision)[0] for image in (view, fourier))
        return torch.exp(-kl_variance(*(probability.clamp_min(1e-12).log() for probability in predictions)))

    def volume(self, volume: Volume) -> dict[str, np.ndarray]:
        """Segment all frames of a 3D or 4D volume, slices on the third axis; return maps of its shape as `frame`."""
        shape = volume.array.shape
        plane = PlaneMap(shape[:2], volume.zooms[:2], CANVAS_PX, self.dataset.spacing, self.center)
        if self.center and not all(0 <= c < n for c, n in zip(self.center, plane.shape, strict=True)):
            raise UserError(f"--center {self.center} lies outside the image of {plane.shape} voxels")
        if self.confidence and shape[2] < 2:
            raise UserError("--confidence compares with another slice, and there is only one: leave it out")
        frames = [self.frame(frame_slices(volume, number), plane) for number in range(frame_count(volume))]
        maps = {}
        for name in list(frames[0]):
            found = [maps_of_frame.pop(name) for maps_of_frame in frames]
            stacked = np.stack(found) if len(found) > 1 else found[0][None]  # (T, Z, X, Y), of one frame without a copy
            maps[name] = stacked.transpose(2, 3, 1, 0).reshape(shape)
        return maps

    def file(self, path: Path, target: str) -> int:
        """Segment a file, write TARGET_seg.nii.gz and, where wanted, the other maps; return the number of slices.

        What is doubtful about the scan is printed.

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
        warnings = [volume.warning] if volume.warning else []
        values = np.unique(volume.array[::4, ::4, ::2])
        if len(values) <= 10 and (values == np.rint(values)).all():
            warnings.append(f"it holds only the values {', '.join(f'{v:g}' for v in values)}: is it a label map?")
        for warning in warnings:
            tqdm.write(f"warning: {path}: {warning}")
        for name, array in self.volume(turned).items():
            write_volume(Path(f"{target}_{name}.nii.gz"), np.moveaxis(array, 2, axis), like=volume, description=NOTE)
        return turned.array[0, 0].size


def is_out_of_memory(error: Exception) -> bool:
    """Return True if an exception says that the memory, of the machine or its GPU, is full."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or "can't allocate memory" in str(error)  # PyTorch has no class of its own for the machine's memory


def segment_files(segmenter: Segmenter, inputs: Sequence[Path], output: Path, *, overwrite: bool = False) -> None:
    """Segment files, and all NIfTI files of folders, into OUTPUT/STEM_seg.nii.gz.

    With confidence also STEM_confidence.nii.gz (exp(-V), V the KL variance between plain and Fourier view) and
    STEM_agreement.nii.gz (exp(-KL) between the two networks). A file that cannot be read does not stop the others.

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
            slices += segmenter.file(path, f"{output / stem}")
        except UserError as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            problems.append(f"{path}: {OUT_OF_MEMORY}, or a smaller --batch-size (now {segmenter.batch_size})")
    print(f"{len(stems) - len(problems)} scans in {output}: {slices / (monotonic() - began):.1f} slices/s. {NOTE}.")
    if problems:
        raise UserError(f"{len(problems)} of {len(stems)} scans failed:\n  " + "\n  ".join(problems))


def _output_stems(inputs: Sequence[Path], output: Path) -> dict[Path, str]:
    files = nifti_files(inputs)
    stems = {path: file_stem(path) for path in files}
    for path in [path for path in files if is_map(path) and path not in inputs]:
        print(f"left out as a label map, by its name: {path}")
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
