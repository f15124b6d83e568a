"""NIfTI volumes: reading that validates, writing, and the way between native grid and canvas."""

import gzip
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np

from utils.errors import UserError
from utils.files import atomic_write

LARGEST = 1e30  # absolute value of a voxel: differences and products of such stay within float32
MAX_DEFLATE_RATIO = 1032  # zlib's densest possible compression: more data than this a file cannot hold


class Volume(NamedTuple):
    """One NIfTI file in memory."""

    array: np.ndarray  # (X, Y, Z) or (X, Y, Z, T), scaled by the header's slope
    header: nib.Nifti1Header
    affine: np.ndarray  # (4, 4) voxel to mm
    zooms: tuple[float, ...]  # mm per voxel, three values

    @property
    def warning(self) -> str | None:
        """Oddity of the geometry that is no error: affine columns whose norm is not the voxel size."""
        norms = np.linalg.norm(self.affine[:3, :3], axis=0)
        if np.allclose(norms, self.zooms, rtol=0.01):
            return None
        return f"voxel size by the affine {np.round(norms, 3).tolist()} is not that of the header {self.zooms}"


def read_volume(path: Path, ndim: int | Sequence[int] = (3, 4)) -> Volume:
    """Read a .nii or .nii.gz file whole, checksum included, and validate it.

    nibabel accepts many damaged files in silence, so header, length and values are checked here.

    Raises:
        UserError: names the file and what is wrong with it: truncated or corrupt gzip, short data, impossible
            dimensions, voxel size or affine, NaN or infinite voxels, another number of dimensions than `ndim`.
    """
    allowed = [ndim] if isinstance(ndim, int) else list(ndim)
    try:
        with _open(path) as file:
            head = file.read(540)
            header, size = _parse_header(path, head, allowed)
            content = bytearray(head)
            while len(content) < size and (piece := file.read(min(size - len(content), 1 << 24))):
                content += piece  # piece by piece: one read would allocate whatever a damaged header claims
            while file.read(1 << 20):  # what follows is not data, but the gzip checksum comes after it
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read whole ({error}); copy or download it again") from error
    if len(content) < size:
        raise UserError(f"{path}: {len(content)} bytes, but its header promises {size}; copy or download it again")
    try:
        array, affine = header.data_from_fileobj(io.BytesIO(content)), header.get_best_affine()
    except Exception as error:  # nibabel raises a dozen kinds for what a header can hold
        raise UserError(f"{path}: not a valid NIfTI file ({error})") from error
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: voxels are of type {array.dtype}, expected one number per voxel")
    if bad := 0 if array.dtype.kind != "f" else np.count_nonzero(~(np.abs(array) <= LARGEST)):
        slope = header["scl_slope"]
        raise UserError(f"{path}: {bad} voxels are NaN, infinite or above {LARGEST:g} (the header scales by {slope})")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{path}: the affine (sform or qform) is NaN or singular")
    return Volume(array, header, affine, tuple(float(z) for z in header.get_zooms()[:3]))


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if _is_packed(path) else open(path, "rb")


def _is_packed(path: Path) -> bool:
    """Return True if the file begins as gzip does, whatever its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_shape(path: Path) -> tuple[int, ...]:
    """Return the shape that the header gives, without reading the voxels; raises UserError as `read_volume` does."""
    try:
        with _open(path) as file:
            header, _ = _parse_header(path, file.read(540), [3, 4])
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from error
    return tuple(int(n) for n in header["dim"][1 : header["dim"][0] + 1])


def _parse_header(path: Path, head: bytes, allowed: list[int]) -> tuple[nib.Nifti1Header, int]:
    """Parse and check the header; return it with the length in bytes of the file it describes."""
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    found = next((c for c in (nib.Nifti1Header, nib.Nifti2Header) if c.sizeof_hdr in sizes), None)
    if found is None or len(head) < found.sizeof_hdr:
        raise UserError(f"{path}: not a NIfTI file (expected .nii or .nii.gz)")
    try:
        header = found(head[: found.sizeof_hdr], check=False)
        itemsize = header.get_data_dtype().itemsize
    except Exception as error:
        raise UserError(f"{path}: not a valid NIfTI header ({error})") from error
    dim, pixdim = header["dim"], header["pixdim"]
    if not header["magic"].item().startswith(b"n+"):
        raise UserError(f"{path}: not a single-file NIfTI (magic {header['magic'].item()!r})")
    if not 1 <= dim[0] <= 7 or (dim[1 : dim[0] + 1] < 1).any():
        raise UserError(f"{path}: impossible dimensions {dim.tolist()} in the header")
    if dim[0] not in allowed:
        names = " or ".join(f"{n}D" for n in allowed)
        raise UserError(f"{path}: {dim[0]}D image of shape {dim[1 : dim[0] + 1].tolist()}, expected {names}")
    if not np.isfinite(pixdim[1:4]).all() or (pixdim[1:4] <= 0).any():
        raise UserError(f"{path}: voxel size {pixdim[1:4].tolist()} mm in the header; must be positive")
    if (unit := int(header["xyzt_units"]) & 7) in (1, 3):
        name = "metres" if unit == 1 else "micrometres"
        raise UserError(f"{path}: the header gives lengths in {name}; rewrite it in mm")
    offset = float(header["vox_offset"])
    voxels = math.prod(int(n) for n in dim[1 : dim[0] + 1])
    limit = path.stat().st_size * (MAX_DEFLATE_RATIO if _is_packed(path) else 1) + 1024
    if not (found.sizeof_hdr <= offset <= limit) or voxels * itemsize > limit:
        raise UserError(f"{path}: the header claims {voxels * itemsize:.3g} bytes of data, more than the file can hold")
    return header, int(offset) + voxels * itemsize


def frame_count(volume: Volume) -> int:
    """Return the number of frames of a 4D volume; 1 for a 3D volume."""
    return volume.array.shape[3] if volume.array.ndim == 4 else 1


def frame_slices(volume: Volume, frame: int) -> np.ndarray:
    """Return one frame of a 3D or 4D volume as slices: (Z, X, Y)."""
    array = volume.array[..., frame] if volume.array.ndim == 4 else volume.array
    return np.moveaxis(array, 2, 0)


def write_volume(path: Path, array: np.ndarray, like: Volume, description: str = "") -> None:
    """Write `array` in the voxel grid of `like`: its affine, zooms, qform and sform codes.

    `description` goes into the header, cut to the 79 characters that it holds.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["descrip"] = description[:79].encode()
    header["cal_min"] = header["cal_max"] = 0  # display window of the scan, not of this map
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = image_class(array, None, header)  # affine None: the header's own qform and sform stay to the bit
    with atomic_write(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, temporary)


def radiological(array: np.ndarray, like: Volume) -> np.ndarray:
    """Turn slices as a radiologist looks at them, if the scan says how its axes lie.

    (..., X, Y) in the voxel grid of `like` -> (..., X', Y'): X' from the patient's right to left (or front to back),
    Y' from front to back (or head to feet).
    """
    if not (like.header["sform_code"] or like.header["qform_code"]):
        return array
    axes = list(zip(nib.aff2axcodes(like.affine)[:2], (-2, -1), strict=True))
    axes.sort(key=lambda axis: "LRAPSI".index(axis[0]) // 2)
    array = np.flip(array, [axis for code, axis in axes if code in "RAS"])
    return array if axes[0][1] == -2 else array.swapaxes(-2, -1)


@dataclass(frozen=True)
class PlaneMap:
    """Resampling between the slices of a scan and a square canvas on the same centre.

    Both directions interpolate along one axis after the other; the outside is 0. `shape`, `zooms` and `center` belong
    to the scan's first two axes, in voxels, mm and voxels; `center` None is the centre of the slice.
    """

    shape: tuple[int, int]
    zooms: tuple[float, float]
    size: int  # px of the canvas
    spacing: float  # mm per canvas px
    center: tuple[float, float] | None = None

    def to_canvas(self, array: np.ndarray) -> np.ndarray:
        """Resample (..., X, Y) to (..., size, size): labels (uint8) by nearest neighbour, else bilinear in float32."""
        for axis in (0, 1):
            position = self._center(axis) + self._offsets(self.size) * self.spacing / self.zooms[axis]
            array = _sample(array, position, axis - 2)
        return array

    def to_native(self, array: np.ndarray) -> np.ndarray:
        """Resample (..., size, size) to (..., X, Y), as `to_canvas` does."""
        for axis in (0, 1):
            distance = (np.arange(self.shape[axis]) - self._center(axis)) * self.zooms[axis]
            array = _sample(array, (self.size - 1) / 2 + distance / self.spacing, axis - 2)
        return array

    def inside(self) -> np.ndarray:
        """Return the voxels of a slice that lie on the canvas: (X, Y) bool."""
        return self.to_native(np.ones((self.size, self.size), np.uint8)) > 0

    def _center(self, axis: int) -> float:
        return (self.shape[axis] - 1) / 2 if self.center is None else self.center[axis]

    @staticmethod
    def _offsets(size: int) -> np.ndarray:
        return np.arange(size) - (size - 1) / 2


def _sample(array: np.ndarray, position: np.ndarray, axis: int) -> np.ndarray:
    """Sample `array` along a negative `axis` at fractional indices; 0 beyond half a voxel outside."""
    last = array.shape[axis] - 1
    inside = ((position >= -0.5) & (position <= last + 0.5)).reshape(-1, *(1,) * (-axis - 1))
    position = position.clip(0, last)
    if array.dtype == np.uint8:
        return array.take(np.floor(position + 0.5).astype(int).clip(0, last), axis) * inside
    low = np.floor(position).astype(int)
    weight = (position - low).astype(np.float32).reshape(inside.shape)
    array = array.astype(np.float32, copy=False)
    upper = array.take(np.minimum(low + 1, last), axis)
    return (array.take(low, axis) * (1 - weight) + upper * weight) * inside
