"""The organ's place in a new scan: the run's own networks look at windows all over the plane."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm

from config import CANVAS_PX, FIELD_PX
from utils.data.volume import PlaneMap

STRIDE = 2 * FIELD_PX // 3  # px: neighbouring windows overlap by a third, so that an organ of that size lies in one


def locate(
    slices: np.ndarray, plane: PlaneMap, predict: Callable[[np.ndarray], Iterable[dict[str, np.ndarray]]], budget: int
) -> tuple[float, float] | None:
    """Return and print the voxel of the organ's centre along a slice's axes; None where the networks find nothing.

    It is the centre of the connected region with the largest foreground probability, summed over the slices.

    Args:
        slices: (Z, X, Y), normalised; evenly spaced ones are looked at, at least one.
        plane: from a slice to the canvas on the image's centre.
        predict: from canvases (N, C, C) to the softmax "seg" (K, size, size) of each.
        budget: canvases that may be looked at.
    """
    extent = np.multiply(plane.shape, plane.zooms) / plane.spacing
    sides = [max(CANVAS_PX, 2 * math.ceil(length / 2)) for length in extent]  # px; even, as the square around them is
    starts = [np.linspace(0, n - CANVAS_PX, math.ceil((n - CANVAS_PX) / STRIDE) + 1).astype(int) for n in sides]
    depth = min(max(budget // math.prod(map(len, starts)), 1), len(slices))
    chosen = slices[((np.arange(depth) + 0.5) * len(slices) / depth).astype(int)]
    square = replace(plane, size=max(sides)).to_canvas(chosen).astype(np.float16)
    image = square[:, *(slice((max(sides) - n) // 2, (max(sides) + n) // 2) for n in sides)]
    foreground, times, margin = np.zeros((depth, *sides), np.float32), np.zeros(sides), (CANVAS_PX - FIELD_PX) // 2
    for corner in product(*starts):
        window = tuple(slice(first, first + CANVAS_PX) for first in corner)
        field = tuple(slice(first + margin, first + margin + FIELD_PX) for first in corner)
        for z, maps in enumerate(predict(image[:, *window])):
            background = F.interpolate(torch.from_numpy(maps["seg"][None, :1]), size=FIELD_PX, mode="bilinear")
            foreground[z][field] += 1 - background[0, 0].numpy()
        times[field] += 1
    foreground /= times.clip(1)
    heat = (foreground * (foreground > 0.5)).sum(0)
    regions, count = ndimage.label(heat)
    if not count:
        tqdm.write("center: the networks find nothing, so the image's centre is taken")
        return None
    largest = 1 + int(ndimage.sum(heat, regions, range(1, count + 1)).argmax())
    center = np.array(ndimage.center_of_mass(heat, regions, largest))
    around = [np.abs(np.arange(side) - c) <= FIELD_PX / 2 for side, c in zip(sides, center, strict=True)]
    middle = (np.array(plane.shape) - 1) / 2
    voxel = (middle + (center - (np.array(sides) - 1) / 2) * plane.spacing / plane.zooms).clip(0, 2 * middle).tolist()
    share = 100 * heat[np.ix_(*around)].sum() / heat.sum()
    tqdm.write(f"center: {voxel[0]:.1f} {voxel[1]:.1f}, with {share:.0f} % of what was found around it")
    return tuple(voxel)
