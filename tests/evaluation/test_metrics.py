"""The metrics of the evaluation against loops, distances between all pairs of surface voxels, and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage import measure

from utils.evaluation.metrics import (
    bootstrap_interval,
    largest_components,
    paper_dice,
    plane_metrics,
    structure_metrics,
)  # fmt: skip

SPACING = (1.5, 1.25, 8.0)  # mm


def ball(center, radii, shape=(32, 30, 10)):
    """An ellipsoid; center and radii in voxels."""
    position = np.indices(shape) - np.reshape(center, (3, 1, 1, 1))
    return ((position / np.reshape(radii, (3, 1, 1, 1))) ** 2).sum(0) <= 1


def surface_distances(mask, other, spacing):
    """mm from each surface voxel of `mask` to the nearest one of `other`.

    The surface, as monai takes it: the voxels that an erosion by the direct neighbours removes, where everything
    outside the image is background; distances run between voxel centres.
    """
    points = []
    for volume in (mask, other):
        surface = volume & ~ndimage.binary_erosion(
            volume, ndimage.generate_binary_structure(mask.ndim, 1), border_value=0
        )
        points.append(np.argwhere(surface) * spacing)
    return cdist(*points).min(axis=1)


SHAPES = {
    "shifted": (ball((15, 14, 5), (8, 7, 3)), ball((18, 13, 4), (8, 7, 3))),
    "larger": (ball((15, 14, 5), (11, 10, 4)), ball((15, 14, 5), (6, 6, 2))),
    "apart": (ball((6, 6, 2), (3, 3, 1)), ball((25, 22, 8), (4, 4, 1))),
    "at the border": (ball((0, 14, 0), (8, 7, 3)), ball((2, 14, 9), (8, 7, 8))),
    "one voxel": (ball((15, 14, 5), (0.5, 0.5, 0.5)), ball((15, 14, 5), (6, 6, 2))),
    "with an island": (ball((15, 14, 5), (8, 7, 3)) | ball((29, 27, 9), (1, 1, 0.5)), ball((15, 14, 5), (8, 7, 3))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_surface_distances_on_anisotropic_voxels(name):
    prediction, truth = SHAPES[name]
    there, back = surface_distances(prediction, truth, SPACING), surface_distances(truth, prediction, SPACING)
    metrics = structure_metrics(prediction, truth, SPACING)
    # HD95: the larger of the two directed percentiles. ASSD: the mean over both surfaces' voxels together.
    assert metrics["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert metrics["assd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
    swapped = structure_metrics(truth, prediction, SPACING)
    assert swapped == pytest.approx(metrics)
    overlap = sum(p and t for p, t in zip(prediction.flat, truth.flat, strict=True))
    assert metrics["dice"] == pytest.approx(100 * 2 * overlap / (prediction.sum() + truth.sum()))
    assert metrics["missed"] == 0


@pytest.mark.parametrize(("axis", "mm"), [(0, 1.5), (1, 1.25), (2, 8.0)])
def test_two_voxels_by_hand(axis, mm):
    prediction, truth = np.zeros((2, 5, 5, 5), bool)
    prediction[1, 1, 1] = True
    truth[tuple(1 + 2 * (a == axis) for a in range(3))] = True
    expected = {"dice": 0.0, "hd95": 2 * mm, "assd": 2 * mm, "missed": 0}
    assert structure_metrics(prediction, truth, SPACING) == pytest.approx(expected)


def test_overlaps_by_hand():
    prediction, truth = np.zeros((2, 4, 4, 1), bool)
    prediction[:2], truth[1:] = True, True  # 8 and 12 voxels, 4 in common
    assert structure_metrics(prediction, truth, (1, 1, 1))["dice"] == pytest.approx(40)
    assert structure_metrics(truth, truth, SPACING) == {"dice": 100.0, "hd95": 0.0, "assd": 0.0, "missed": 0}
    assert structure_metrics(*np.zeros((2, 4, 4, 4), bool), SPACING) is None  # excluded


@pytest.mark.parametrize("empty", [0, 1])
def test_one_side_empty_is_a_miss_at_the_diagonal(empty):
    pair = [SHAPES["shifted"][0], SHAPES["shifted"][1]]
    pair[empty] = np.zeros_like(pair[0])
    diagonal = math.sqrt((32 * 1.5) ** 2 + (30 * 1.25) ** 2 + (10 * 8) ** 2)
    expected = {"dice": 0, "hd95": diagonal, "assd": diagonal, "missed": 1}
    assert structure_metrics(*pair, SPACING) == pytest.approx(expected)


@pytest.mark.parametrize("name", SHAPES)
def test_distances_in_the_plane_are_means_over_the_slices(name):
    prediction, truth = SHAPES[name]
    hd95, assd, missed = [], [], 0
    for z in range(truth.shape[2]):
        p, t = prediction[..., z], truth[..., z]
        missed += p.any() != t.any()
        if p.any() and t.any():
            there, back = surface_distances(p, t, SPACING[:2]), surface_distances(t, p, SPACING[:2])
            hd95.append(max(np.percentile(there, 95), np.percentile(back, 95)))
            assd.append(np.concatenate([there, back]).mean())
    metrics = plane_metrics(prediction, truth, SPACING)
    assert (metrics["slices"], metrics["missed_slices"]) == (len(hd95) + missed, missed)
    diagonal = math.hypot(32 * 1.5, 30 * 1.25)
    assert metrics["hd95_2d"] == pytest.approx(np.mean(hd95 or [diagonal]), rel=1e-5)
    assert metrics["assd_2d"] == pytest.approx(np.mean(assd or [diagonal]), rel=1e-5)


@pytest.mark.parametrize(("slices", "volumetric"), [(3, 3.61), (30, 5.0)])
def test_two_discs_five_mm_apart(slices, volumetric):
    """In a flat stack much of the surface are the faces of the outer slices, where both lie close."""
    rows, columns = np.mgrid[:96, :96]
    pair = [
        np.repeat((((rows - 48) ** 2 + (columns - centre) ** 2) <= 400)[..., None], slices, 2) for centre in (45, 50)
    ]
    assert structure_metrics(*pair, (1, 1, 10))["hd95"] == pytest.approx(volumetric, abs=0.01)
    metrics = plane_metrics(*pair, (1, 1, 10))
    assert metrics["hd95_2d"] == pytest.approx(5) and metrics["missed_slices"] == 0 < metrics["assd_2d"] < 5
    contours = [measure.find_contours(mask[..., 1].astype(float), 0.5)[0] for mask in pair]  # between the pixels
    distances = cdist(*contours)
    directed = [np.percentile(distances.min(axis), 95) for axis in (0, 1)]
    assert metrics["hd95_2d"] == pytest.approx(max(directed), abs=0.1)


def test_slices_on_one_side_only_are_counted():
    truth = np.zeros((10, 10, 4), bool)
    truth[2:5, 2:5, :3] = True
    prediction = np.roll(truth, (1, 1), (0, 2))  # one voxel aside, one slice on: in slices 1 to 3
    assert plane_metrics(prediction, truth, (2, 2, 8)) == {
        "hd95_2d": 2.0, "assd_2d": pytest.approx(2 * 8 / 16), "slices": 4, "missed_slices": 2,
    }  # fmt: skip
    nothing = np.zeros_like(truth)
    missed = {"hd95_2d": math.hypot(20, 20), "assd_2d": math.hypot(20, 20), "slices": 3, "missed_slices": 3}
    assert plane_metrics(nothing, truth, (2, 2, 8)) == plane_metrics(truth, nothing, (2, 2, 8)) == pytest.approx(missed)
    assert plane_metrics(nothing, nothing, (2, 2, 8)) is None


def test_largest_components_equal_a_search_of_the_whole():
    labels = (np.random.default_rng(0).random((20, 21, 6)) ** 4 * 4).astype(np.uint8)
    expected = np.zeros_like(labels)
    for value in (1, 2, 3):
        components = measure.label(labels == value)
        expected[components == np.bincount(components.ravel())[1:].argmax() + 1] = value
    assert (largest_components(labels) == expected).all() and 0 < (expected > 0).sum() < (labels > 0).sum()


def test_paper_dice_equals_a_loop():
    probability = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    labels = torch.randint(0, 4, (3, 9, 8), generator=torch.Generator().manual_seed(1))
    labels[2] = 0  # a slice without structures
    for dice, p, truth in zip(paper_dice(probability, labels), probability.numpy(), labels.numpy(), strict=True):
        overlap = predicted = true = 0
        for c in (1, 2, 3):
            for x, y in np.ndindex(truth.shape):
                predicted += p[c, x, y] > 0.5
                true += truth[x, y] == c
                overlap += p[c, x, y] > 0.5 and truth[x, y] == c
        assert dice.item() == pytest.approx((2 * overlap + 1e-4) / (predicted + true + 1e-4), rel=1e-6)


def one_pixel(*probability):
    return torch.tensor(probability).view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("probability", "label", "expected"),
    [
        ((1.0, 0.0, 0.0), 0, 1),  # both empty
        ((0.0, 1.0, 0.0), 1, 1),
        ((0.0, 1.0, 0.0), 2, 0),  # the wrong structure does not count as a hit
        ((0.5, 0.5, 0.0), 1, 0),  # the threshold is exclusive ...
        ((0.5, 0.5, 0.0), 0, 1),
        ((0.3, 0.4, 0.3), 1, 0),  # ... and the largest probability is not enough
        ((0.0, 1.0, 0.0), 0, 0),
    ],
)
def test_paper_dice_of_one_pixel(probability, label, expected):
    dice = paper_dice(one_pixel(*probability), torch.tensor([[[label]]]))
    assert dice.item() == pytest.approx(expected, abs=2e-4)


def test_bootstrap_interval():
    values = np.random.default_rng(3).normal(80, 10, 50)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(50)  # the normal approximation
    assert low == pytest.approx(values.mean() - half, abs=0.4) and high == pytest.approx(values.mean() + half, abs=0.4)
    assert bootstrap_interval(list(values)) == (low, high)
    assert bootstrap_interval([7.0] * 4) == (7.0, 7.0)
    assert bootstrap_interval([]) is bootstrap_interval([80.0]) is None  # two patients are needed
