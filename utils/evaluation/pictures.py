"""The pictures of an evaluation: Dice of all cases, clinical agreement, worst, median and best patient, and risk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config import pixel_mm
from utils.data.dataset import DatasetInfo
from utils.data.prepared import PreparedData
from utils.data.volume import read_volume
from utils.evaluation.predict import ScanPrediction
from utils.evaluation.statistics_plots import plot_scores
from utils.files import OutputFolder
from utils.plots import edge_letters, plot_bland_altman, plot_case, plot_dice_per_case, radiological


def draw_pictures(
    outputs: OutputFolder, summary: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], data: PreparedData,
    dataset: DatasetInfo, *, chosen: Mapping[str, str], scans: Sequence[ScanPrediction],
    clinical: Mapping[str, tuple[Sequence[float], Sequence[float]]], curves: Mapping[str, Mapping[str, np.ndarray]],
    title: str,
) -> list[tuple[str, Path]]:  # fmt: skip
    """Draw the pictures of an evaluation; returns captions and files, for the report.

    Args:
        summary: content of summary.json.
        cases: the lines of per_case.csv.
        chosen: patients by rank: "worst", "median", "best". One patient may have several ranks.
        scans: predictions of the chosen patients.
        clinical: truths and predictions by quantity; empty for a data set without any.
        curves: risk-coverage curves by kind of case and score.
    """
    pictures: list[tuple[str, Path]] = []

    def picture(caption: str, name: str) -> Path:
        pictures.append((caption, outputs.claim(name)))
        return pictures[-1][1]

    path = picture("Dice per structure and case", "dice_per_case.png")
    plot_dice_per_case(path, [case for case in cases if "dice" in case], dataset.class_names[1:], title=title)
    if clinical:
        path = picture("Clinical quantities: prediction against truth (Bland-Altman)", "bland_altman.png")
        plot_bland_altman(path, clinical, summary["clinical"], title=title)
    for patient in dict.fromkeys(chosen.values()):
        rank = " and ".join(rank for rank, of in chosen.items() if of == patient)
        dice = f"paper Dice of the patient {summary['paper_dice'][patient]:.1f} %"
        for scan in (scan for scan in scans if scan.patient == patient):
            name = f"{patient} {scan.phase}"
            file = f"overlays/{rank.replace(' ', '_')}_{patient}_{scan.phase}.png"
            path = picture(f"{rank} patient by the paper's Dice: {name}", file)
            _draw_case(path, scan, data, dataset, f"{rank} patient: {name}; {dice}\n{title}")
    path = picture("Risk when slices or patients are kept by a score (risk-coverage curves)", "risk_coverage.png")
    labels = ("coverage, highest scores first (%)", "100 − Dice of the kept (%)")
    plot_scores(path, {kind: (*labels, of) for kind, of in curves.items()}, title=title)
    return pictures


def _draw_case(path: Path, scan: ScanPrediction, data: PreparedData, dataset: DatasetInfo, title: str) -> None:
    depth, size = len(scan.rows), scan.image.shape[-1]
    maps = {
        "image": scan.image,
        "truth": scan.truth,
        "prediction": scan.probability.argmax(1),
        "agreement": scan.agreement.float(),
    }
    like = read_volume(data.truth_path(scan.patient, scan.phase), 3)
    plot_case(
        path,
        **{name: radiological(array.cpu().numpy(), like) for name, array in maps.items()},
        slices=np.unique(np.linspace(0, depth - 1, min(depth, 6)).round().astype(int)).tolist(),
        letters=edge_letters(like),
        spacing=pixel_mm(dataset.spacing, size),
        class_names=dataset.class_names[1:],
        title=title,
    )
