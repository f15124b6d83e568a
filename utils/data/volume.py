"""NIfTI volumes: checked reading, writing, and the way between native grid and canvas."""

import gzip
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from utils.errors import UserError, naming
from utils.files import atomic_write

PROGRAM = "SemiDG-Seg"  # begins the description of a written map
LARGEST = 1e30  # absolute value of a voxel: products stay within float32
DENSEST = 1032  # bytes that zlib can pack into one
AGAIN = "; copy or download it again"


class Volume(NamedTuple):
    """One NIfTI file in memory."""

    array: np.ndarray  # (X, Y, Z) or (X, Y, Z, T), scaled as the header says
    header: nib.Nifti1Header
    affine: np.ndarray  # (4, 4) voxel to mm
    zooms: tuple[float, ...]  # mm per voxel, three values
    warning: str = ""  # oddity of the file that is no error


def read_volume(path: Path, max_ndim: int = 4) -> Volume:
    """Read a .nii or .nii.gz file whole: 3 to `max_ndim` dimensions, trailing ones of length 1 dropped.

    Raises UserError, also for damage that nibabel accepts in silence.
    """
    content = _read(path)
    header, shape, size = _parse_header(path, content, max_ndim)
    if len(content) < size:
        raise UserError(f"{path}: {len(content)} bytes, but its header promises {size}{AGAIN}")
    with naming(path, "is not a valid NIfTI file"):
        array = header.data_from_fileobj(io.BytesIO(content)).reshape(shape)
        affine = header.get_best_affine()
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: voxels are of type {array.dtype}, expected one number per voxel")
    if not (array.min() >= -LARGEST and array.max() <= LARGEST):  # NaN is neither
        bad, slope = np.count_nonzero(~(np.abs(array) <= LARGEST)), header["scl_slope"]
        raise UserError(f"{path}: {bad} voxels are NaN, infinite or above {LARGEST:g} (scaled by {slope})")
    if not (np.abs(affine) < 1e6).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{path}: the affine (sform or qform) is NaN, beyond 1 km or singular")
    norms, zooms = nib.affines.voxel_sizes(affine), tuple(map(float, header.get_zooms()[:3]))
    differ = f"voxel size {zooms} in the header, but {np.round(norms, 3).tolist()} by the affine"
    return Volume(array, header, affine, zooms, "" if np.allclose(norms, zooms, rtol=0.01) else differ)


def read_header(path: Path) -> tuple[nib.Nifti1Header, tuple[int, ...]]:
    """Return the header and the shape that it gives; raises as `read_volume`."""
    return _parse_header(path, _read(path, nib.Nifti2Header.sizeof_hdr), 4)[:2]


def _read(path: Path, size: int = -1) -> bytes:
    damage = (OSError, EOFError, zlib.error)
    with naming(path, "cannot be read whole", errors=damage, remedy=AGAIN), open(path, "rb") as file:
        packed = file.peek(2).startswith(b"\x1f\x8b")
        return (gzip.GzipFile(fileobj=file) if packed else file).read(size)  # with its checksum


def _parse_header(path: Path, head: bytes, max_ndim: int) -> tuple:
    """Check the header; return it, and the shape and file length that it gives."""
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    kind = next((kind for kind in (nib.Nifti1Header, nib.Nifti2Header) if kind.sizeof_hdr in sizes), None)
    if kind is None or len(head) < kind.sizeof_hdr:
        raise UserError(f"{path}: not a NIfTI file (expected .nii or .nii.gz)")
    with naming(path, "is not a valid NIfTI file"):
        header = kind(head[: kind.sizeof_hdr], check=False)
        itemsize = header.get_data_dtype().itemsize
    dim, voxel_mm, magic = header["dim"].tolist(), header["pixdim"][1:4], header["magic"].item()
    shape, offset = dim[1 : dim[0] + 1], float(header["vox_offset"])
    size = offset + math.prod(shape) * itemsize
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if not magic.startswith(b"n+"):
        problem = f"not a single-file NIfTI (magic {magic!r})"
    elif not 1 <= dim[0] <= 7 or min(shape) < 1:
        problem = f"impossible dimensions {dim} in the header"
    elif not (np.isfinite(voxel_mm) & (voxel_mm > 0)).all():
        problem = f"voxel size {voxel_mm.tolist()} mm in the header; must be positive"
    elif not kind.sizeof_hdr <= offset <= size <= path.stat().st_size * DENSEST + 1024:  # NaN is not
        problem = f"the header claims data at bytes {offset:g} to {size:.3g}, where the file has none"
    elif not 3 <= len(shape) <= max_ndim:
        problem = f"{len(shape)}D image of shape {shape}, expected at least 3D, at most {max_ndim}D"
    else:
        return header, tuple(shape), int(size)
    raise UserError(f"{path}: {problem}")


def frame_count(volume: Volume) -> int:
    """Return the number of frames of a 4D volume; 1 for a 3D volume."""
    return (*volume.array.shape, 1)[3]


def frame_slices(volume: Volume, frame: int) -> np.ndarray:
    """Return one frame of a 3D or 4D volume as slices: (Z, X, Y)."""
    array = volume.array[..., frame] if volume.array.ndim == 4 else volume.array
    return np.moveaxis(array, 2, 0)


def implausible(volume: Volume) -> list[str]:
    """Return reasons why a scan cannot be a stack of slices along its third axis."""
    zooms, low, high = np.round(volume.zooms, 3).tolist(), volume.array.min(), volume.array.max()
    field = np.round(np.multiply(volume.array.shape[:2], volume.zooms[:2]), 1).tolist()
    values = np.unique(volume.array[::3, ::3])
    turned = max(zooms[:2]) > 1.05 * sorted(zooms)[1] or zooms[2] > 25
    faults = {
        f"the slices measure {field} mm, not 20 to 1000: correct the header": min(field) < 20 or max(field) > 1000,
        f"voxels of {zooms} mm: slices (up to 25 mm) belong on axis 3, frames on 4: exchange the axes": turned,
        f"its voxels hold only {values.tolist()}: is it a label map?": 1 < len(values) < 9
        and values.max() < 1000
        and not (values % 1).any(),
        f"all voxels lie in {low:g} to {high:g}: copy or convert it again": low == high or high <= 0,
    }
    return [text for text, holds in faults.items() if holds]


def whole_numbers(mask: Volume) -> Volume:
    """Return a mask rounded by up to 1e-3; beyond, raise a UserError without a file's name."""
    if mask.array.dtype.kind != "f":
        return mask
    rounded = np.rint(mask.array)
    if (far := np.abs(mask.array - rounded) > 1e-3).any():
        raise UserError(f"the value {mask.array[far][0]:g} is no label: resample by nearest neighbour")
    return mask._replace(array=rounded)


def mask_in_grid(mask: Volume, image: Volume) -> Volume:
    """Return a mask in the voxel grid of its image, turned as the affines say, with a `warning`.

    Where an affine is lost (identity or none), it is taken as stored. Raises UserError, which names no
    file, for another shape or affines over half a voxel apart.
    """
    array, warnings, shift, volumes = mask.array, [mask.warning], 0, (mask, image)
    codes = " against ".join("".join(map(str, nib.aff2axcodes(volume.affine))) for volume in volumes)
    placed = all(volume.header["sform_code"] or volume.header["qform_code"] for volume in volumes)
    identity = any(np.array_equal(np.abs(volume.affine), np.eye(4)) for volume in volumes)
    differ = not np.allclose(mask.affine, image.affine, atol=1e-3)
    if differ and (identity or not placed):
        warnings.append("the affine of mask or image is lost (identity or none): axes taken as stored")
    elif differ:
        to_image = np.linalg.inv(image.affine) @ mask.affine  # in voxels
        axes = nib.io_orientation(to_image)
        axes = nib.orientations.axcodes2ornt("RAS") if np.isnan(axes).any() else axes
        array = nib.apply_orientation(array, axes)
        moved = to_image @ nib.orientations.inv_ornt_aff(axes, mask.array.shape[:3]) - np.eye(4)
        corners = np.array([*np.ndindex(2, 2, 2)]) * np.subtract(array.shape[:3], 1)
        shift = nib.affines.apply_affine(moved, corners)  # voxels
        shift_mm = np.linalg.norm(shift @ image.affine[:3, :3].T, axis=1).max()
        codes += f", corners {shift_mm:.2g} mm apart"
        warnings.append(f"its affine differs from the image's: orientation {codes}, turned into its grid")
    if array.shape != image.array.shape:
        raise UserError(f"shape {mask.array.shape} against {image.array.shape}, orientation {codes}")
    if not np.abs(shift).max() <= 0.5:
        raise UserError(f"orientation {codes}: resample the mask to its image, or correct the affine")
    return image._replace(array=array, warning="; ".join(filter(None, warnings)))


def write_volume(path: Path, array: np.ndarray, like: Volume, description: str = "") -> None:
    """Write `array` in the voxel grid of `like`, with a description (up to 79 characters)."""
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    # No display window; no extensions and texts, which may hold a patient's name.
    for field in {"cal_min", "cal_max", "vox_offset", "db_name", "aux_file", "intent_name"} & set(header):
        header[field] = np.zeros_like(header[field])
    header["descrip"] = description[:79].encode()
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    with atomic_write(path) as temporary:
        nib.save(image_class(array, None, header), temporary)  # None: qform and sform stay to the bit


@dataclass(frozen=True)
class PlaneMap:
    """Resampling between a scan's slices and a square canvas; 0 outside."""

    shape: tuple[int, int]  # of a slice, voxels
    zooms: tuple[float, float]  # mm per voxel
    size: int  # px of the canvas
    spacing: float  # mm per canvas px
    center: tuple[float, float] | None = None  # of the canvas, voxel; None: the slice's

    def to_canvas(self, array: np.ndarray) -> np.ndarray:
        """Resample (..., X, Y) to (..., size, size): uint8 by nearest neighbour, else bilinear."""
        distance = (np.arange(self.size) - (self.size - 1) / 2) * self.spacing
        for axis in (0, 1):
            array = _sample(array, self.middle[axis] + distance / self.zooms[axis], axis - 2)
        return array

    def to_native(self, array: np.ndarray) -> np.ndarray:
        """Resample (..., size, size) to (..., X, Y), as `to_canvas` does."""
        for axis, length in enumerate(self.shape):
            distance = (np.arange(length) - self.middle[axis]) * self.zooms[axis]
            array = _sample(array, (self.size - 1) / 2 + distance / self.spacing, axis - 2)
        return array

    def inside(self) -> np.ndarray:
        """Return the voxels of a slice that lie on the canvas: (X, Y) bool."""
        return self.to_native(np.ones((self.size, self.size), np.uint8)) > 0

    @property
    def middle(self) -> tuple[float, float]:
        """The voxel under the canvas's centre."""
        return self.center or tuple((length - 1) / 2 for length in self.shape)


def _sample(array: np.ndarray, position: np.ndarray, axis: int) -> np.ndarray:
    """Sample along a negative `axis` at fractional indices; 0 beyond half a voxel outside."""
    last = array.shape[axis] - 1
    inside = ((position >= -0.5) & (position <= last + 0.5)).reshape(-1, *(1,) * (-axis - 1))
    position = position.clip(0, last)
    if array.dtype == np.uint8:
        return array.take(np.floor(position + 0.5).astype(int).clip(0, last), axis) * inside
    low = np.floor(position).astype(int)
    weight = (position - low).astype(np.float32).reshape(inside.shape)
    ends = low, np.minimum(low + 1, last)
    lower, upper = (array.take(n, axis).astype(np.float32, copy=False) for n in ends)
    return (lower * (1 - weight) + upper * weight) * inside


def save_scan(path: Path, array: np.ndarray, affine: np.ndarray, frame_s: float = 1.0) -> None:
    """Write a 3D or 4D NIfTI whose zooms, qform and sform agree; a frame takes `frame_s` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = frame_s
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)
