"""Metrics of a scan: the paper's Dice on the network's grid, overlap and distances in the scan's own grid."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from skimage import measure

# Metrics of a structure, by their keys in files.
VOLUMETRIC = {"dice": "Dice (%)", "hd95": "HD95 (mm)", "assd": "ASSD (mm)"}
IN_PLANE = {"hd95_2d": "in-plane HD95 (mm)", "assd_2d": "in-plane ASSD (mm)"}
METRICS = VOLUMETRIC | IN_PLANE
MISSED_SLICES = (
    "A slice that has the structure on one side only is counted as missed and has no in-plane distance; where every "
    "slice is missed, it is the plane's diagonal."
)


def paper_dice(probability: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the paper's Dice: one per slice, pooled over all structures of the thresholded ensemble softmax.

    Args:
        probability: (B, K, H, W), class 0 is the background.
        labels: (B, H, W) integer.

    Returns:
        (B,) in [0, 1]; 1 where truth and prediction are both empty (eps 1e-4 in numerator and denominator).
    """
    predicted = probability[:, 1:] > 0.5
    classes = torch.arange(1, probability.shape[1], device=labels.device)[:, None, None]
    truth = labels[:, None] == classes
    dims = (1, 2, 3)
    return (2 * (predicted & truth).sum(dims) + 1e-4) / (predicted.sum(dims) + truth.sum(dims) + 1e-4)


def structure_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float] | None:
    """Return Dice (percent), HD95 and ASSD (mm) of one structure in its native grid.

    Args:
        prediction, truth: (X, Y, Z) bool.
        spacing: mm per voxel.

    Returns:
        dict with dice, hd95, assd and missed (0 or 1); None when both are empty. When one of the two is empty, the
        structure is missed: its Dice is 0 and both distances are the image diagonal in mm.
    """
    if not prediction.any() and not truth.any():
        return None
    if not prediction.any() or not truth.any():
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        return {"dice": 0.0, "hd95": diagonal, "assd": diagonal, "missed": 1}
    dice = 200 * np.count_nonzero(prediction & truth) / (np.count_nonzero(prediction) + np.count_nonzero(truth))
    hd95, assd = surface_distances(prediction, truth, spacing)
    return {"dice": float(dice), "hd95": hd95, "assd": assd, "missed": 0}


def plane_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float] | None:
    """Return HD95 and ASSD (mm) of one structure's contours in the planes of the slices, as the mean over slices.

    Args:
        prediction, truth: (X, Y, Z) bool.
        spacing: mm per voxel.

    Returns:
        dict with hd95_2d, assd_2d, slices (that have the structure in either) and missed_slices (that have it in only
        one); None when both are empty. A missed slice has no distance of its own, as the plane's diagonal would drown
        those of all others: it is counted. Where every slice is missed, both distances are the diagonal.
    """
    in_prediction, in_truth = prediction.any((0, 1)), truth.any((0, 1))
    in_both, slices = np.flatnonzero(in_prediction & in_truth), int((in_prediction | in_truth).sum())
    if not slices:
        return None
    distances = [surface_distances(prediction[..., z], truth[..., z], spacing[:2]) for z in in_both]
    diagonal = float(np.linalg.norm(np.multiply(truth.shape[:2], spacing[:2])))
    hd95, assd = np.mean(distances, axis=0).tolist() if distances else (diagonal, diagonal)
    return {"hd95_2d": hd95, "assd_2d": assd, "slices": slices, "missed_slices": slices - len(in_both)}


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """Return HD95 and ASSD in mm of two bool masks, neither of them empty, of 2 or 3 dimensions."""
    # Imported here: it takes seconds, which training and every mistyped command would wait for.
    from monai.metrics.utils import get_edge_surface_distance

    [box] = ndimage.find_objects((prediction | truth).view(np.uint8))  # the rest costs time, and changes no distance
    pair = [torch.from_numpy(np.ascontiguousarray(mask[box])) for mask in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # monai's notes on itself
        _, distances, _ = get_edge_surface_distance(*pair, spacing=[float(s) for s in spacing], symmetric=True)
    hd95 = max(torch.quantile(directed, 0.95) for directed in distances)
    return float(hd95), float(torch.cat(distances).mean())


def largest_components(labels: np.ndarray) -> np.ndarray:
    """Return a label map (X, Y, Z) with the largest connected component (26 neighbours) of every structure."""
    kept = np.zeros_like(labels)
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            components = measure.label(labels[box] == value)
            kept[box][components == np.bincount(components.ravel())[1:].argmax() + 1] = value
    return kept
