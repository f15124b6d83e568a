"""The pictures of an evaluation: Dice of all cases, clinical agreement, and the worst, median and best patient."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.data.dataset import DatasetInfo
from utils.data.prepared import PreparedData
from utils.data.volume import edge_letters, radiological, read_volume
from utils.evaluation.predict import ScanPrediction
from utils.evaluation.statistics_plots import plot_scores
from utils.files import OutputFolder
from utils.method.augment import FIELD_PX, canvas_to_view
from utils.plots import plot_bland_altman, plot_case, plot_dice_per_case


def draw_results(
    outputs: OutputFolder,
    cases: Sequence[Mapping[str, Any]],
    dataset: DatasetInfo,
    *,
    clinical: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    agreement: Mapping[str, Mapping[str, Any]],
    title: str,
) -> list[tuple[str, Path]]:
    """Draw the Dice of all cases and the clinical agreement; returns captions and files, for the report.

    Args:
        cases: the lines of per_case.csv.
        clinical: truths and predictions by quantity; empty for a data set without any.
        agreement: what `agreement_limits` says of them, and the unit.
    """
    path = outputs.claim("dice_per_case.png")
    plot_dice_per_case(path, [case for case in cases if "dice" in case], dataset.class_names[1:], title=title)
    pictures = [("Dice per structure and case", path)]
    if clinical:
        path = outputs.claim("bland_altman.png")
        plot_bland_altman(path, clinical, agreement, title=title)
        pictures.append(("Clinical quantities: prediction against truth (Bland-Altman)", path))
    return pictures


def draw_patients(
    outputs: OutputFolder,
    scans: Iterable[ScanPrediction],
    data: PreparedData,
    dataset: DatasetInfo,
    *,
    chosen: Mapping[str, str],
    paper_dice: Mapping[str, float],
    title: str,
) -> list[tuple[str, Path]]:
    """Draw the scans of chosen patients; returns captions and files, for the report.

    Args:
        chosen: patients by rank: "worst", "median", "best". One patient may have several ranks.
        paper_dice: percent by patient.
    """
    scans, pictures = list(scans), []
    for rank, patient in chosen.items():
        for scan in (scan for scan in scans if scan.patient == patient):
            path = outputs.claim(f"overlays/{rank}_{patient}_{scan.phase}.png")
            heading = f"{rank} patient: {patient} {scan.phase}; paper Dice of the patient {paper_dice[patient]:.1f} %"
            _draw_case(path, scan, data, dataset, f"{heading}\n{title}")
            pictures.append((f"{rank} patient by the paper's Dice: {patient} {scan.phase}", path))
    return pictures


def draw_risk(path: Path, curves: Mapping[str, Mapping[str, np.ndarray]], title: str) -> tuple[str, Path]:
    """Draw the risk-coverage curves by kind of case and score; returns caption and file, for the report."""
    labels = ("coverage, highest scores first (%)", "100 − Dice of the kept (%)")
    plot_scores(path, {kind: (*labels, of) for kind, of in curves.items()}, title=title)
    return "Risk when slices or patients are kept by a score (risk-coverage curves)", path


def _draw_case(path: Path, scan: ScanPrediction, data: PreparedData, dataset: DatasetInfo, title: str) -> None:
    masks = torch.from_numpy(data.masks[data.index["mask"][scan.rows]])[:, None]
    depth, size = len(scan.rows), scan.image.shape[-1]
    maps = {
        "image": scan.image,
        "truth": canvas_to_view(masks, size)[:, 0],
        "prediction": scan.probability.argmax(1),
        "agreement": scan.agreement.float(),
    }
    like = read_volume(data.truth_path(scan.patient, scan.phase), 3)
    plot_case(
        path,
        **{name: radiological(array.cpu().numpy(), like) for name, array in maps.items()},
        slices=np.unique(np.linspace(0, depth - 1, min(depth, 6)).round().astype(int)).tolist(),
        letters=edge_letters(like),
        spacing=dataset.spacing * FIELD_PX / size,
        class_names=dataset.class_names[1:],
        title=title,
    )
