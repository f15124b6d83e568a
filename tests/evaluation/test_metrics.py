"""The metrics of the evaluation against loops, distances between all pairs of surface voxels, and numbers by hand."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage import measure

from utils.evaluation.metrics import agreement_limits, largest_components, mean_std_interval, structure_metrics

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
    surfaces = [volume & ~ndimage.binary_erosion(volume) for volume in (mask, other)]
    return cdist(*(np.argwhere(surface) * spacing for surface in surfaces)).min(axis=1)


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
    overlap = sum(p and t for p, t in zip(prediction.flat, truth.flat, strict=True))
    # HD95 is the larger directed percentile, ASSD the mean over both surfaces' voxels together.
    expected = {"dice": 100 * 2 * overlap / (prediction.sum() + truth.sum()), "missed": 0}
    expected["hd95"] = max(np.percentile(there, 95), np.percentile(back, 95))
    expected["assd"] = np.concatenate([there, back]).mean()
    for pair in ((prediction, truth), (truth, prediction)):
        metrics = structure_metrics(*pair, SPACING)
        assert metrics == pytest.approx(expected, rel=1e-5) and metrics["dice"] == pytest.approx(expected["dice"])


def test_overlaps_by_hand():
    prediction, truth = np.zeros((2, 4, 4, 1), bool)
    prediction[:2], truth[1:] = True, True  # 8 and 12 voxels, 4 in common
    assert structure_metrics(prediction, truth, (1, 1, 1))["dice"] == pytest.approx(40)
    assert structure_metrics(truth, truth, SPACING) == {"dice": 100.0, "hd95": 0.0, "assd": 0.0, "missed": 0}
    assert structure_metrics(*np.zeros((2, 4, 4, 4), bool), SPACING) == {}  # excluded
    # One side empty is a miss at the diagonal.
    mask, diagonal = SHAPES["shifted"][0], math.sqrt((32 * 1.5) ** 2 + (30 * 1.25) ** 2 + (10 * 8) ** 2)
    expected = {"dice": 0, "hd95": diagonal, "assd": diagonal, "missed": 1}
    for pair in ((mask, np.zeros_like(mask)), (np.zeros_like(mask), mask)):
        assert structure_metrics(*pair, SPACING) == pytest.approx(expected)


def test_largest_components_equal_a_search_of_the_whole():
    labels = (np.random.default_rng(0).random((20, 21, 6)) ** 4 * 4).astype(np.uint8)
    expected = np.zeros_like(labels)
    for value in (1, 2, 3):
        components = measure.label(labels == value)
        expected[components == np.bincount(components.ravel())[1:].argmax() + 1] = value
    assert (largest_components(labels) == expected).all() and 0 < (expected > 0).sum() < (labels > 0).sum()


def test_statistics_over_patients():
    values = np.random.default_rng(3).normal(80, 10, 50)
    result = mean_std_interval(list(values))
    assert (result["mean"], result["std"]) == pytest.approx((values.mean(), values.std(ddof=1)))
    half = 1.96 * values.std(ddof=1) / math.sqrt(50)  # the normal approximation
    assert result["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.4)
    assert mean_std_interval([7.0] * 4) == {"mean": 7, "std": 0, "ci95": [7, 7]}
    assert mean_std_interval([80.0]) == {"mean": 80, "std": None, "ci95": None}  # two patients are needed
    assert set(mean_std_interval([]).values()) == {None}
    # Agreement: differences 1, 2, 3 with mean 2, standard deviation 1, limits 2 -+ 1.96; no pair with a NaN.
    figures = agreement_limits([100.0, 120.0, 140.0, np.nan], [101.0, 122.0, 143.0, 5.0])
    assert figures["limits"] == pytest.approx([0.04, 3.96]) and figures["n"] == 3
    expected = {"bias": 2, "sd": 1, "mae": 2, "truth_mean": 120, "predicted_mean": 122}
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    for pair, bias, n in (([50.0], [48.0]), -2, 1), (([np.nan], [3.0]), None, 0):
        figures = agreement_limits(*pair)
        assert (figures["n"], figures["bias"], figures["sd"], figures["limits"]) == (n, bias, None, None)
