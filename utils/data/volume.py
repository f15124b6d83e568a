"""NIfTI volumes: reading that validates, writing, and the way between native grid and canvas."""

import gzip
import io
import itertools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np

from utils.errors import UserError, naming
from utils.files import atomic_write

PROGRAM = "SemiDG-Seg"  # begins the description of every map that is written with one
LARGEST = 1e30  # absolute value of a voxel: differences and products of such stay within float32
MAX_DEFLATE_RATIO = 1032  # zlib's densest possible compression: more data than this a file cannot hold
HEADER_BYTES = 540  # of the longer kind, NIfTI-2
UNREADABLE = (OSError, EOFError, zlib.error)
AGAIN = "; copy or download it again"


class Volume(NamedTuple):
    """One NIfTI file in memory."""

    array: np.ndarray  # (X, Y, Z) or (X, Y, Z, T), scaled by the header's slope
    header: nib.Nifti1Header
    affine: np.ndarray  # (4, 4) voxel to mm
    zooms: tuple[float, ...]  # mm per voxel, three values
    warning: str = ""  # oddity of the file that is no error


def read_volume(path: Path, max_ndim: int = 4) -> Volume:
    """Read a .nii or .nii.gz file whole, checksum included, and validate it.

    nibabel accepts many damaged files in silence, so header, length and values are checked here. Trailing axes of
    length 1 are dropped. Bytes after the end of the gzip stream are ignored, with a warning.

    Raises:
        UserError: names the file and what is wrong with it: truncated or corrupt gzip, short data, impossible
            dimensions, voxel size or affine, NaN or infinite voxels, neither 3 dimensions nor up to `max_ndim`.
    """
    warnings = []
    with naming(path, "cannot be read whole", errors=UNREADABLE, remedy=AGAIN), _open(path) as file:
        content = bytearray(file.read(HEADER_BYTES))
        header, shape, size = _parse_header(path, content, max_ndim)
        while len(content) < size and (piece := file.read(min(size - len(content), 1 << 24))):
            content += piece  # piece by piece: a damaged header may claim any size
        try:
            while file.read(1 << 20):  # what follows is not data, but the gzip checksum comes after it
                pass
        except gzip.BadGzipFile as error:
            if not str(error).startswith("Not a gzipped file"):  # the checksum is wrong
                raise
            warnings.append("the bytes after the end of its gzip stream are ignored")
    if len(content) < size:
        raise UserError(f"{path}: {len(content)} bytes, but its header promises {size}{AGAIN}")
    with naming(path, "is not a valid NIfTI file"):  # nibabel raises a dozen kinds for what a header can hold
        array = header.data_from_fileobj(io.BytesIO(content)).reshape(shape)
        affine = header.get_best_affine()
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: voxels are of type {array.dtype}, expected one number per voxel")
    del content  # its memory, before more is needed
    if not (array.min() >= -LARGEST and array.max() <= LARGEST):  # NaN is neither
        bad, slope = np.count_nonzero(~(np.abs(array) <= LARGEST)), header["scl_slope"]
        raise UserError(f"{path}: {bad} voxels are NaN, infinite or above {LARGEST:g} (the header scales by {slope})")
    if not (np.abs(affine) < 1e6).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{path}: the affine (sform or qform) is NaN, beyond 1 km or singular")
    norms, zooms = np.linalg.norm(affine[:3, :3], axis=0), tuple(map(float, header.get_zooms()[:3]))
    if not np.allclose(norms, zooms, rtol=0.01):
        warnings.append(f"voxel size by the affine {np.round(norms, 3).tolist()} is not that of the header {zooms}")
    return Volume(array, header, affine, zooms, "; ".join(warnings))


def read_header(path: Path) -> tuple[nib.Nifti1Header, tuple[int, ...]]:
    """Return the header and the shape that it gives, without the voxels; raises UserError as `read_volume` does."""
    with naming(path, "cannot be read", errors=UNREADABLE, remedy=AGAIN), _open(path) as file:
        return _parse_header(path, file.read(HEADER_BYTES), 4)[:2]


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # the content says so, whatever the name
    return gzip.open(path) if packed else open(path, "rb")


def _parse_header(path: Path, head: bytes, max_ndim: int) -> tuple[nib.Nifti1Header, tuple[int, ...], int]:
    """Parse and check the header; return it with the shape, and the length in bytes, of the file it describes."""
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    kind = next((kind for kind in (nib.Nifti1Header, nib.Nifti2Header) if kind.sizeof_hdr in sizes), None)
    if kind is None or len(head) < kind.sizeof_hdr:
        raise UserError(f"{path}: not a NIfTI file (expected .nii or .nii.gz)")
    with naming(path, "is not a valid NIfTI file"):
        header = kind(bytes(head[: kind.sizeof_hdr]), check=False)
        itemsize = header.get_data_dtype().itemsize
    turn = np.array([header[f"quatern_{axis}"] for axis in "bcd"], float)
    if 1 < turn @ turn < 1 + 1.1e-5:  # by rounding; nibabel refuses such quaternions
        header["quatern_b"], header["quatern_c"], header["quatern_d"] = turn / np.linalg.norm(turn)
    dim, voxel_mm = header["dim"].tolist(), header["pixdim"][1:4]
    shape = dim[1 : dim[0] + 1]
    offset, data_bytes = float(header["vox_offset"]), math.prod(shape) * itemsize
    limit = path.stat().st_size * MAX_DEFLATE_RATIO + 1024
    problem = ""
    if not header["magic"].item().startswith(b"n+"):
        problem = f"not a single-file NIfTI (magic {header['magic'].item()!r})"
    elif not 1 <= dim[0] <= 7 or min(shape) < 1:
        problem = f"impossible dimensions {dim} in the header"
    elif not (np.isfinite(voxel_mm) & (voxel_mm > 0)).all():
        problem = f"voxel size {voxel_mm.tolist()} mm in the header; must be positive"
    elif (unit := int(header["xyzt_units"]) & 7) in (1, 3):
        problem = f"the header gives lengths in {'metres' if unit == 1 else 'micrometres'}; rewrite it in mm"
    elif not offset >= kind.sizeof_hdr:  # NaN is not
        problem = f"the header says that the data begin at byte {offset:g}, which is within the header"
    elif offset > limit or data_bytes > limit:
        problem = f"the header claims {data_bytes:.3g} bytes of data, more than the file can hold"
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if not problem and not 3 <= len(shape) <= max_ndim:
        problem = f"{len(shape)}D image of shape {shape}, expected 3D{' or 4D' if max_ndim == 4 else ''}"
    if problem:
        raise UserError(f"{path}: {problem}")
    return header, tuple(shape), int(offset) + data_bytes


def frame_count(volume: Volume) -> int:
    """Return the number of frames of a 4D volume; 1 for a 3D volume."""
    return volume.array.shape[3] if volume.array.ndim == 4 else 1


def frame_slices(volume: Volume, frame: int) -> np.ndarray:
    """Return one frame of a 3D or 4D volume as slices: (Z, X, Y)."""
    array = volume.array[..., frame] if volume.array.ndim == 4 else volume.array
    return np.moveaxis(array, 2, 0)


def implausible(volume: Volume, *, any_thickness: bool = False) -> list[str]:
    """Return reasons why a scan cannot be a stack of slices along its third axis; empty for a plausible one."""
    reasons, zooms = [], np.round(volume.zooms, 3).tolist()
    field = [round(n * zoom, 1) for n, zoom in zip(volume.array.shape[:2], volume.zooms, strict=False)]
    if min(field) < 20 or max(field) > 1000:
        reasons.append(f"the slices measure {field} mm, expected 20 to 1000 mm: correct the voxel size in the header")
    if not any_thickness and (max(zooms[:2]) > 1.05 * zooms[2] or zooms[2] > 25):
        reasons.append(
            f"voxels of {zooms} mm: the third axis must be that of the slices, up to 25 mm thick, and the fourth that "
            "of the frames; exchange the axes"
        )
    low, high = volume.array.min(), volume.array.max()
    if low == high or high <= 0:
        reasons.append(f"all voxels lie in {low:g} to {high:g}, so there is no image; copy or convert the file again")
    return reasons


def whole_numbers(mask: Volume) -> Volume:
    """Return a mask with rounded values: scaling by the header can leave 0.9999999998 where a 1 was.

    Raises:
        UserError: a value is more than 1e-3 away from a whole number; the message names no file.
    """
    if mask.array.dtype.kind != "f":
        return mask
    rounded = np.rint(mask.array)
    distance = np.abs(mask.array - rounded)
    if distance.max() > 1e-3:
        value = mask.array.flat[distance.argmax()]
        raise UserError(
            f"the value {value:g} is no label: resample the mask by nearest neighbour, and save it with an integer type"
        )
    return mask._replace(array=rounded)


def mask_in_grid(mask: Volume, image: Volume) -> Volume:
    """Return a mask in the voxel grid of its image: flipped or exchanged axes are turned as the affines say.

    The result's `warning` says so, or that the affines differ by up to half a voxel. An affine that is lost (identity,
    or none) says nothing about the axes: such a mask is taken as it is stored, with a warning.

    Raises:
        UserError: the shapes differ, or the affines by more than half a voxel; the message names no file.
    """
    array, warnings = mask.array, [mask.warning] if mask.warning else []
    codes, image_codes = ("".join(map(str, nib.aff2axcodes(volume.affine))) for volume in (mask, image))
    shift, shift_mm = np.zeros(1), 0.0
    lost = [name for name, volume in (("mask", mask), ("image", image)) if _affine_is_lost(volume)]
    if np.allclose(mask.affine, image.affine, atol=1e-3):
        pass
    elif lost:
        warnings.append(f"the affine of the {' and the '.join(lost)} is lost (identity or none): axes taken as stored")
    else:
        to_image = np.linalg.inv(image.affine) @ mask.affine  # voxels of the mask -> voxels of the image
        axes = nib.io_orientation(to_image)
        axes = nib.orientations.axcodes2ornt("RAS") if np.isnan(axes).any() else axes
        array = nib.apply_orientation(array, axes)
        moved = to_image @ nib.orientations.inv_ornt_aff(axes, mask.array.shape[:3]) - np.eye(4)
        corners = np.array([*itertools.product(*((0, n - 1) for n in array.shape[:3]), [1])]).T  # (4, 8)
        shift = (moved @ corners)[:3]  # voxels
        shift_mm = np.linalg.norm(image.affine[:3, :3] @ shift, axis=0).max()
        difference = f"orientation {codes} against {image_codes}, corners {shift_mm:.2g} mm apart"
        warnings.append(f"its affine differs from the image's: {difference}, brought into the image's voxel grid")
    if array.shape != image.array.shape:
        shape = f"shape {mask.array.shape} ({codes})"
        raise UserError(f"{shape} differs from the image's {image.array.shape} ({image_codes})")
    if not np.abs(shift).max() <= 0.5:
        raise UserError(
            f"its orientation {codes} and place do not fit the image's {image_codes}: corners lie {shift_mm:.1f} mm "
            "apart. Resample the mask to its image, or correct the wrong affine"
        )
    return image._replace(array=array, warning="; ".join(warnings))


def _affine_is_lost(volume: Volume) -> bool:
    """Return True if the file does not say where its voxels lie: no qform and sform, or voxels of 1 mm from 0."""
    named = volume.header["sform_code"] or volume.header["qform_code"]
    return not named or np.array_equal(np.abs(volume.affine), np.eye(4))


def write_volume(path: Path, array: np.ndarray, like: Volume, description: str = "") -> None:
    """Write `array` in the voxel grid of `like`: its affine, zooms, qform and sform codes.

    `description` goes into the header, cut to the 79 characters that it holds.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["descrip"] = description[:79].encode()
    header["cal_min"] = header["cal_max"] = 0  # display window of the scan, not of this map
    header["vox_offset"] = 0  # of a new file; the scan's extensions, which may hold a patient's name, are never read
    for field in {"db_name", "aux_file", "intent_name"} & set(header):
        header[field] = b""
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = image_class(array, None, header)  # affine None: the header's own qform and sform stay to the bit
    with atomic_write(path) as temporary:
        nib.save(image, temporary)


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
            distance = (np.arange(self.size) - (self.size - 1) / 2) * self.spacing
            array = _sample(array, self.middle[axis] + distance / self.zooms[axis], axis - 2)
        return array

    def to_native(self, array: np.ndarray) -> np.ndarray:
        """Resample (..., size, size) to (..., X, Y), as `to_canvas` does."""
        for axis in (0, 1):
            distance = (np.arange(self.shape[axis]) - self.middle[axis]) * self.zooms[axis]
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
    """Sample `array` along a negative `axis` at fractional indices; 0 beyond half a voxel outside."""
    last = array.shape[axis] - 1
    inside = ((position >= -0.5) & (position <= last + 0.5)).reshape(-1, *(1,) * (-axis - 1))
    position = position.clip(0, last)
    if array.dtype == np.uint8:
        return array.take(np.floor(position + 0.5).astype(int).clip(0, last), axis) * inside
    low = np.floor(position).astype(int)
    weight = (position - low).astype(np.float32).reshape(inside.shape)
    array = array.astype(np.float32, copy=False)
    sampled, upper = array.take(low, axis), array.take(np.minimum(low + 1, last), axis)
    sampled *= 1 - weight  # in place: fresh memory costs more than the sums
    upper *= weight
    sampled += upper
    sampled *= inside
    return sampled


def save_scan(path: Path, array: np.ndarray, affine: np.ndarray, frame_s: float = 1.0) -> None:
    """Write a 3D or 4D NIfTI whose zooms, qform and sform agree; `frame_s` is the time between frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = frame_s
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)
