"""The organ's place in a new scan: the run's own networks look at windows all over the plane."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import ndimage

from config import FIELD_PX
from utils.data.volume import PlaneMap


def locate(
    slices: np.ndarray, plane: PlaneMap, look: Callable[[np.ndarray, int], np.ndarray], *, size: int, budget: int
) -> tuple[tuple[float, float] | None, float]:
    """Return the voxel of the organ's centre along a slice's axes, and the share of what was found that lies around it.

    Neighbouring windows overlap by a third, so that an organ of that size lies whole in one. The centre is that of the
    connected region with the largest foreground probability, summed over the slices; None where nothing is found.

    Args:
        slices: (Z, X, Y), normalised; evenly spaced ones are looked at.
        plane: from a slice to the canvas on the image's centre.
        look: foreground probability of canvases (N, C, C), seen at a size: (N, size, size).
        size: px of the run's images.
        budget: images of that size that may be looked at; with fewer than windows, these are seen more coarsely.
    """
    stride = 2 * FIELD_PX // 3  # px of the canvas
    extent = np.multiply(plane.shape, plane.zooms) / plane.spacing
    counts = [math.ceil(max(length - FIELD_PX, 0) / stride) + 1 for length in extent]
    windows = math.prod(counts)
    depth = min(max(budget // windows, 1), len(slices))
    size = 8 * round(size * min(max(math.sqrt(budget / windows), 0.5), 1) / 8)
    middle, step = (np.array(plane.shape) - 1) / 2, size / FIELD_PX  # px of a window per px of the canvas
    chosen = slices[((np.arange(depth) + 0.5) * len(slices) / depth).astype(int)]
    sides = [size + round((count - 1) * stride * step) for count in counts]
    found, seen = np.zeros((depth, *sides), np.float32), np.zeros(sides, np.float32)
    places, canvases = list(itertools.product(*map(range, counts))), []
    for place in places:
        offset = (np.array(place) - (np.array(counts) - 1) / 2) * stride * plane.spacing / plane.zooms
        canvases.append(replace(plane, center=tuple(middle + offset)).to_canvas(chosen).astype(np.float16))
    for place, probability in zip(places, np.split(look(np.concatenate(canvases), size), windows), strict=True):
        corner = [round(number * stride * step) for number in place]
        part = (..., *(slice(first, first + size) for first in corner))
        found[part] += probability
        seen[part] += 1
    found /= seen
    heat = (found * (found > 0.5)).sum(0)
    regions, count = ndimage.label(heat)
    if not count:
        return None, 0.0
    sums = ndimage.sum(heat, regions, range(1, count + 1))
    center = np.array(ndimage.center_of_mass(heat, regions, 1 + int(sums.argmax())))
    around = [np.abs(np.arange(side) - c) <= size / 2 for side, c in zip(sides, center, strict=True)]
    voxel = middle + (center - (np.array(sides) - 1) / 2) / step * plane.spacing / plane.zooms
    return tuple(voxel.clip(0, 2 * middle).tolist()), float(heat[np.ix_(*around)].sum() / heat.sum())
