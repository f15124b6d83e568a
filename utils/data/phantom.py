"""Synthetic raw scans: beating hearts of four vendors (M&Ms), necks of four sites (SCGM).

Every structure is a signed distance (mm, positive inside) on coordinates bent by a smooth field: it
gives the image its soft edges, and its positive side is the mask. x points to the left, y to the
back, z across the slices. All randomness derives from (seed, scanner, subject).
"""

from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tqdm import tqdm
from tyro.conf import Positional

from utils.data.volume import save_scan
from utils.errors import UserError

PHANTOM_NOTE = "PHANTOM.txt"  # marks a raw folder as synthetic


class Scanner(NamedTuple):
    matrix: tuple[int, int]  # pixels
    spacing: float  # in-plane, mm
    thickness: float  # mm
    slices: tuple[int, int]  # fewest and most
    axes: str  # where the array's point: Left/Right, Posterior/Anterior, Superior/Inferior
    gain: float  # stored value of a signal of 1
    gamma: float
    noise: float  # SD, as a share of a signal of 1
    bias: float  # SD of the logarithm of the coil's sensitivity
    blur: float  # SD of the point spread, pixels
    signal: tuple[float, ...]  # of the tissues


# Balanced steady-state cine. Signal of blood, muscle, fat, lung, liver, bone.
VENDORS = {
    "A": Scanner((256, 216), 1.35, 9, (8, 10), "LPS", 350, 1.0, 0.025, 0.15, 0.6, (0.95, 0.3, 0.8, 0.07, 0.38, 0.45)),
    "B": Scanner((288, 288), 1.15, 8, (9, 11), "RPS", 900, 0.85, 0.03, 0.25, 0.8, (0.85, 0.22, 0.95, 0.05, 0.3, 0.55)),
    "C": Scanner((192, 208), 1.5, 10, (7, 9), "PLS", 1400, 1.15, 0.035, 0.2, 0.5, (0.9, 0.36, 1.05, 0.12, 0.46, 0.5)),
    "D": Scanner((320, 288), 0.98, 9, (8, 10), "LAI", 600, 0.95, 0.045, 0.3, 1.0, (1.0, 0.28, 0.85, 0.09, 0.5, 0.35)),
}
MAKERS = {"A": ("Siemens", (1,)), "B": ("Philips", (2, 3)), "C": ("GE", (4,)), "D": ("Canon", (5,))}
# T2*-weighted. Signal of fluid, grey and white matter, muscle, fat, bone, blood.
SITES = {
    1: Scanner((100, 100), 0.5, 5, (3, 3), "RAS", 300, 1, 0.02, 0.1, 0.4, (0.95, 0.68, 0.46, 0.4, 0.3, 0.12, 0.8)),
    2: Scanner((650, 600), 0.25, 7.5, (3, 5), "LAS", 800, .85, 0.03, 0.2, 1.2, (0.8, 0.62, 0.44, 0.32, 0.6, 0.15, 0.7)),
    3: Scanner((192, 180), 0.25, 2.5, (20, 28), "RAS", 1500, 1.2, 0.04, 0.15, 1, (1, 0.78, 0.58, 0.5, 0.6, 0.2, 0.95)),
    4: Scanner((380, 340), 0.29, 5, (8, 12), "LAI", 500, 1, 0.025, 0.25, 0.8, (0.9, 0.58, 0.4, 0.45, 0.55, 0.1, 0.85)),
}
TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"


def ellipse(x, y, centre, radii, angle=0.0) -> np.ndarray:
    """Return the approximate signed distance (mm) to an ellipse turned by `angle` (rad)."""
    cx, cy, a, b, cos, sin = map(np.float32, (*centre, *radii, np.cos(angle), np.sin(angle)))
    u, v = (x - cx) * (cos / a) + (y - cy) * (sin / a), (y - cy) * (cos / b) - (x - cx) * (sin / b)
    return (1 - np.sqrt(u * u + v * v)) * np.sqrt(a * b)


def stroke(x, y, start, end, widths) -> np.ndarray:
    """Return the signed distance (mm) to a stroke; `widths` are half of those (mm) at its ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    x, y = x - start[0], y - start[1]
    along = np.clip((x * dx + y * dy) / (dx**2 + dy**2), 0, 1)
    return widths[0] + along * (widths[1] - widths[0]) - np.hypot(x - along * dx, y - along * dy)


def paint(image: np.ndarray, edge: float, inside: np.ndarray, value) -> None:
    """Lay `value` over `image` in place where `inside` > 0, with an edge soft over `edge` mm."""
    image += np.clip(inside / edge + 0.5, 0, 1) * (value - image)


def smooth_field(shape, zooms, rng, size: float) -> np.ndarray:
    """Draw a Gaussian random field (X, Y, Z), mean 0, variance 1, blobs of about `size` mm."""
    weights = []
    for n, zoom in zip(shape, zooms, strict=True):
        knots = np.arange(-1, n * zoom / size * 2 + 2)
        weight = np.exp(-0.5 * (np.arange(n)[:, None] * zoom / size * 2 - knots) ** 2)
        weights.append((weight / np.linalg.norm(weight, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([weight.shape[1] for weight in weights], dtype=np.float32)
    for weight in weights:  # from the first axis of the field to a new last one
        field = np.tensordot(field, weight, (0, 1))
    return field


def scan_grid(scanner: Scanner, tilt: float, rng):
    """Draw the voxel grid of a scan, oblique by about `tilt` rad: x, y, z, affine, field by size."""
    shape = np.array((*scanner.matrix, rng.integers(*scanner.slices, endpoint=True)))
    zooms = np.array((scanner.spacing, scanner.spacing, scanner.thickness))
    codes = nib.orientations.axcodes2ornt(scanner.axes, ("RL", "AP", "IS"))
    turn = nib.orientations.inv_ornt_aff(codes, shape)[:3, :3].T * zooms
    index = np.indices(shape, np.float32) - np.float32((shape - 1) / 2)[:, None, None, None]
    position = np.tensordot(turn.astype(np.float32), index, 1)  # (3, X, Y, Z), mm from the centre
    oblique = Rotation.from_rotvec(rng.normal(0, tilt, 3)).as_matrix()
    matrix = oblique @ np.diag((-1, -1, 1)) @ turn  # the world is right, front, head
    affine = nib.affines.from_matvec(matrix, rng.uniform(-30, 30, 3) - matrix @ (shape - 1) / 2)
    return position, affine, partial(smooth_field, shape, zooms, rng)


def middle(shape, reach: float) -> tuple[slice, slice]:
    """Return the in-plane pixels at most `reach` from the image centre."""
    return tuple(slice(max(0, n // 2 - int(reach)), n // 2 + int(reach)) for n in shape[:2])


def acquire(image: np.ndarray, scanner: Scanner, field, rng) -> np.ndarray:
    """Return the stored values of a signal (X, Y, Z, T): blur, coil, Rician noise, gamma."""
    sensitivity = np.exp(scanner.bias * field(250)) * (1 + 0.04 * field(9))  # coil, tissue grain
    image = gaussian_filter(image, scanner.blur, axes=(0, 1), truncate=3) * sensitivity[..., None]
    real, imaginary = scanner.noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.sqrt((image + real) ** 2 + imaginary**2)
    return (scanner.gain * image**scanner.gamma).astype(np.int16)


def chest(x, y, depth, scanner, field, rng) -> np.ndarray:
    """Paint the signal (X, Y, Z) around a heart at the origin; `depth` (Z,) is 0 at its base."""
    blood, muscle, fat, lung, liver, bone = scanner.signal
    image = np.full(x.shape, 0.02, np.float32)
    draw, oval = partial(paint, image, scanner.spacing), partial(ellipse, x, y)
    front, sink = rng.uniform(14, 30), rng.uniform(-8, 8)  # fat in front; height of the diaphragm
    trunk = oval((-15, 15 + front / 3), (150 - front / 2, 122 - front / 2), 0.1)
    draw(oval((-15, 15), (150, 125)), fat)
    draw(trunk, muscle)
    draw(trunk - 6 - 2 * field(30), fat * 0.7)
    thorax = trunk - 10
    draw(thorax, lung)
    draw(np.minimum(trunk - 18, 3 * (field(9) - 2.2)), 0.55 * blood)  # vessels
    draw(oval((-25, 62 + sink), (42, 60), 0.5), 0.4 * (muscle + fat))
    stomach = oval((62, 90 + sink - 15 * depth), (38, 36))
    draw(np.minimum(thorax, oval((-75, 88 + sink - 25 * depth), (75, 52), 0.25)), liver)
    draw(np.minimum(thorax, stomach), 0.85 * liver)
    draw(np.minimum(thorax, stomach - 9 - 3 * field(40)), muscle)
    for x0, y0, radius, value in ((-25, 104, 22, bone), (-25, 130, 8, blood), (2, 80, 13, muscle), (2, 80, 11, blood)):
        draw(oval((x0, y0), (radius, radius)), value)  # spine, then aorta
    above = np.where(depth < 0, 0, 1e3).astype(np.float32)  # fat with the great vessels, unlabelled
    draw(oval((-4, 6), (38, 27), 0.5) - above, 0.6 * fat)
    for centre in ((-16, 0), (10, 8)):
        draw(oval(centre, (10, 9)) - above, blood)
    return image


def heart(position, scanner, contraction, field, rng) -> tuple[np.ndarray, np.ndarray]:
    """Paint signal and labels (X, Y, Z, T) of a chest; the heart follows `contraction` (T,), 0 to 1."""
    blood, muscle, fat, *_ = scanner.signal
    x, y = (axis - rng.uniform(-10, 10) + 3 * field(90) for axis in position[:2])
    z, beat = position[2][0, 0], contraction.astype(np.float32)
    length, wall, cavity = (rng.uniform(*mm) for mm in ((78, 90), (8.5, 11), (23, 27)))  # relaxed
    depth = (z - z.min() - rng.integers(0, 2) * abs(z[1] - z[0])) / length + 0.08
    angle = np.radians(210 + rng.uniform(-40, 40))  # from left to right ventricle, y down
    towards = np.array((np.cos(angle), np.sin(angle)))
    still = chest(x, y, depth.astype(np.float32), scanner, field, rng)
    image = np.repeat(still[..., None], len(beat), axis=-1)
    labels = np.zeros(image.shape, np.uint8)

    # Sizes (Z, T): the base moves towards the apex, the muscle keeps its volume.
    level = (depth[:, None] - 0.06 * beat) / (1 - 0.06 * beat)
    absent = np.where((level > 0) & (level < 0.93), 0, 1e3).astype(np.float32)
    level = np.clip(level, 0, 0.93)
    inner = cavity * (1 - 0.34 * beat)
    outer = np.sqrt(inner**2 + (cavity + wall) ** 2 - cavity**2) * np.sqrt(1 - level**2.4)
    inner = inner * np.sqrt(np.clip(1 - (level / 0.95) ** 2.4, 0, 1))
    right = rng.uniform(28, 34) * (1 - 0.38 * beat) * np.sqrt(np.clip(1 - (level / 0.88) ** 2, 0, 1))

    inside = middle(x.shape, 80 / scanner.spacing)  # all else stands still
    moving, oval = image[inside], partial(ellipse, x[inside][..., None], y[inside][..., None])
    left = -14 * towards
    right_centre = [c + t * (0.4 * outer + 0.5 * right) for c, t in zip(left, towards, strict=True)]
    left_outer = oval(left, (1.03 * outer, 0.97 * outer), angle + 0.8) - absent
    left_inner = oval(left, (1.04 * inner, 0.96 * inner), angle + 0.4) - absent
    right_inner = oval(right_centre, (0.6 * outer + 0.5 * right, 0.75 * outer + 0.4 * right), angle) - absent
    whole = np.maximum(left_outer, right_inner)
    labels[inside] = np.select([left_inner > 0, left_outer > 0, right_inner > 0], [1, 2, 3])

    draw = partial(paint, moving, scanner.spacing)
    draw(whole + 6 + 3 * field(40)[inside][..., None], fat * 0.8)
    draw(whole + 3, muscle)
    draw(right_inner, blood * (0.94 + 0.05 * field(12)[inside][..., None]))
    draw(left_outer, muscle)
    draw(left_inner, blood)
    for around in (angle + 1.9, angle + 3.9):  # papillary muscles: cavity in the truth
        centre = left[0] + 0.62 * inner * np.cos(around), left[1] + 0.62 * inner * np.sin(around)
        outside = absent + 1e3 * ((level < 0.2) | (level > 0.75))
        draw(oval(centre, (5.0, 3.8), around) - outside.astype(np.float32), muscle)
    return image, labels


def begin(out: Path, enough: bool, seed: int) -> None:
    """Mark the folder `out`, which must be empty or absent, as a phantom's."""
    if not enough or seed < 0:
        raise UserError("a phantom needs at least 1 patient and 2 frames, and a seed from 0")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: remove it, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / PHANTOM_NOTE).write_text("Synthetic data made by this project; no patient was scanned.\n")


def write_mms(out: Positional[Path], *, patients: int = 4, frames: int = 6, seed: int = 0) -> None:
    """Write synthetic data in the raw M&Ms layout: four vendors, beating hearts, the info table.

    As in the release, one more patient, of vendor C, lies in Training/Unlabeled with an empty mask.
    In every fifth patient ED comes after ES.

    Args:
        out: folder to write; must be empty or absent.
        patients: patients per vendor, at least 1.
        frames: frames per patient, at least 2.
        seed: seed of everything random, from 0.
    """
    begin(out, patients >= 1 and frames >= 2, seed)
    people = [*product(VENDORS, range(patients)), ("C", patients)]
    draws = np.random.default_rng(seed).choice(260**3, len(people), replace=False)
    rows, systole = [], round(frames / 3)
    for index, (vendor, number) in enumerate(tqdm(people, desc="phantom patients")):
        scanner, rng = VENDORS[vendor], np.random.default_rng([seed, ord(vendor), number])
        pairs = np.unravel_index(draws[index], (260, 260, 260))
        code = "".join(f"{chr(65 + pair // 10)}{pair % 10}" for pair in pairs)  # like A0S9V9
        ed = frames - systole if index % 5 == 1 else 0
        es = (ed + systole) % frames
        step = (np.arange(frames) - ed) % frames
        contraction = np.sin(np.pi / 2 * np.interp(step, (0, systole, 0.85 * frames), (0, 1, 0))) ** 2
        position, affine, field = scan_grid(scanner, 0.35, rng)
        image, labels = heart(position, scanner, contraction, field, rng)
        labeled = number < patients
        drawn = np.isin(np.arange(frames), (ed, es)) & labeled
        parts = ("Training/Labeled", "Validation", "Testing")
        folder = out / "OpenDataset" / (parts[index % 3] if labeled else "Training/Unlabeled") / code
        for name, array in (("sa", acquire(image, scanner, field, rng)), ("sa_gt", labels * drawn)):
            save_scan(folder / f"{code}_{name}.nii.gz", array, affine, 0.9 / frames)
        name, centres = MAKERS[vendor]
        centre = centres[number % len(centres)]
        rows.append(f"{code},{name},{vendor},{centre},{ed * labeled},{es * labeled}")
    lines = [f"{n},{row}" for n, row in enumerate(sorted(rows))]
    (out / TABLE).write_text("\n".join([",External code,VendorName,Vendor,Centre,ED,ES", *lines, ""]))


def neck(x, y, scanner, field) -> np.ndarray:
    """Paint the signal (X, Y, Z) of a neck around the canal at the origin."""
    fluid, _, _, muscle, fat, bone, blood = scanner.signal
    image = np.full(x.shape, 0.02, np.float32)
    draw, oval = partial(paint, image, scanner.spacing), partial(ellipse, x, y)
    skin, side = oval((0, -8), (66, 58)), np.abs(x)
    draw(skin, fat)
    draw(skin - 6, muscle * (1 + 0.12 * field(15) + 0.1 * field(4)))
    for belly in (((11, 30), (8, 14), 0.3), ((27, 22), (9, 17), 0.5), ((43, -5), (7, 20), -0.2)):
        fascia = 0.5 - np.abs(ellipse(side, y, *belly) + field(15))
        draw(fascia, 0.5 * (fat + muscle))
    draw(oval((0, -46), (12, 9)), 0.03)  # windpipe
    for centre, radius in (((16.5, -9), 2.0), ((27, -30), 3.6), ((33, -24), 4.5)):  # arteries, a vein
        draw(ellipse(side, y, centre, (radius, radius)), blood)
    draw(oval((0, -18), (13, 9)), bone * 1.8)
    draw(stroke(side, y, (15, -4), (0, 12), (3.0, 3.0)), bone)  # the arch, then its spine
    draw(stroke(x, y, (0, 9), (0, 30), (3.0, 3.5)), bone)
    draw(oval((0, -0.3), (11.7, 9.0)), bone)
    draw(oval((0, -0.3), (10.5, 7.8)), fluid * (0.95 + 0.05 * field(6)))
    return image


def cord(x, y, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the signed distances (mm) to grey matter and cord, of a relative `size`."""
    x, y = np.abs(x) / size, y / size
    front = stroke(x, y, (1.9, -0.3), (2.4, -1.4), (0.9, 1.15))
    back = stroke(x, y, (1.8, -0.3), (3.0, 2.6), (0.9, 0.55))
    bridge = stroke(x, y, (0, 0.0), (1.8, -0.3), (0.6, 0.8))
    whole = np.minimum(ellipse(x, y, (0, 0), (6.6, 4.5)), 3.6 + y + 2.5 * x)  # less its fissure
    return size * np.maximum(np.maximum(front, back), bridge), size * whole


def write_scgm(out: Positional[Path], *, patients: int = 4, seed: int = 0) -> None:
    """Write synthetic data in the raw SCGM layout: four sites, four raters who disagree a little.

    Args:
        out: folder to write; must be empty or absent.
        patients: subjects with masks per site, at least 1; one more has none.
        seed: seed of everything random, from 0.
    """
    begin(out, patients >= 1, seed)
    people = product(SITES, [*range(1, patients + 1), max(11, patients + 1)])
    for site, number in tqdm(list(people), desc="phantom subjects"):
        scanner, rng = SITES[site], np.random.default_rng([seed, site, number])
        position, affine, field = scan_grid(scanner, 0.08, rng)
        x, y = (axis - rng.uniform(-3, 3) + 0.5 * field(40) for axis in position[:2])
        size, turn = rng.uniform(0.95, 1.15), rng.normal(0, 0.08)
        x, y = x + turn * y, y - turn * x
        image = neck(x + 0.8 * field(60), y + 0.8 * field(60), scanner, field)
        inside = middle(x.shape, 16 / scanner.spacing)
        grey, whole = cord(x[inside], y[inside], size)
        for distance, value in ((whole, scanner.signal[2]), (grey, scanner.signal[1])):
            paint(image[inside], scanner.spacing, distance, value)
        labeled = number <= patients
        path = f"{out}/{'train' if labeled else 'test'}/site{site}-sc{number:02d}"
        save_scan(Path(f"{path}-image.nii.gz"), acquire(image[..., None], scanner, field, rng)[..., 0], affine)
        for rater in range(1, 5) if labeled else ():
            seen = [axis[inside] + 0.1 * field(4)[inside] for axis in (x, y)]
            grey, whole = cord(*seen, size * rng.uniform(0.98, 1.02))
            mask = np.zeros(x.shape, np.uint8)
            mask[inside] = np.select([(grey > 0) & (whole > 0), whole > 0], [1, 2])
            save_scan(Path(f"{path}-mask-r{rater}.nii.gz"), mask, affine)
