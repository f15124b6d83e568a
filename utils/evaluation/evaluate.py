"""The evaluation of a run on a domain: metrics, tables, pictures, predictions, report."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config import RUNTIME_SETTINGS, pixel_mm
from utils.data.dataset import DatasetInfo
from utils.data.loaders import scan_loader
from utils.data.prepared import PreparedData
from utils.data.volume import Volume, write_volume
from utils.evaluation.charts import plot_bland_altman, plot_dice_per_case, plot_risk_coverage
from utils.evaluation.confidence import Uncertainty
from utils.evaluation.metrics import METRICS, agreement_limits, bootstrap_interval, mean_and_std, mean_std_interval
from utils.evaluation.predict import ScanPrediction, mean_dice, predict_scans, to_native, volumetric_rows
from utils.evaluation.report import cases_table, count, paper_dice_cell, summary_tables, summary_text, write_report
from utils.evaluation.runs import TrainedRun, method_name, patients_to_evaluate
from utils.files import OutputFolder, write_json
from utils.plots import edge_letters, plot_case, radiological, write_label_names
from utils.run.checkpoint import provenance
from utils.run.folder import unfinished
from utils.run.logger import read_log

RESULT_FILES = ("summary.json", "summary.md", "per_case.csv", "report.html", "dice_per_case.png", "bland_altman.png",
                "risk_coverage.png")  # fmt: skip
COUNTS = ("missed", "slices", "missed_slices")  # of a structure in a scan: is it missed, and in how many slices
CASE_COLUMNS = ("patient", "phase", "structure", *METRICS, *COUNTS, "predicted_ml", "truth_ml", "paper_dice")
SLICES_DRAWN = 6  # of a scan, at most

Case = dict[str, Any]  # a line of per_case.csv


def evaluate_run(
    run: TrainedRun, dataset: DatasetInfo, data: PreparedData, out: Path, *, domain: str, title: str,
    save_predictions: bool = False, keep_largest: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run on a domain of prepared data, and write the results to `out`.

    Args:
        domain: of which all patients with masks are evaluated; the training must not have seen
            them.
        title: heading of the report.

    Returns:
        The content of summary.json: paper protocol and volumetric metrics with bootstrap intervals.
    """
    remark, patients = unfinished(run.folder), patients_to_evaluate(run, data, domain, dataset)
    outputs = OutputFolder(out)
    outputs.require_free(*RESULT_FILES)  # before the work
    slice_dice: list[tuple[str, str, list[float]]] = []
    cases: list[Case] = []
    drawings: dict[tuple[str, str], dict[str, Any]] = {}  # by patient and phase
    outside, uncertainty, loader = np.zeros(2, int), Uncertainty(), scan_loader(data, patients)
    scans = predict_scans(run.predictor, loader, data, confidence=True)
    for scan in tqdm(scans, total=len(loader), unit="scan", desc=f"evaluate {run.folder.name}", leave=False):
        native = to_native(scan, data, keep_largest=keep_largest)
        slice_dice.append((scan.patient, scan.phase, scan.slice_dice.tolist()))
        cases += volumetric_rows(scan, native, dataset.class_names)
        outside += native.outside
        uncertainty.add(scan)
        drawings[scan.patient, scan.phase] = case_drawing(scan, native.grid)
        if save_predictions:
            path = outputs.claim(f"predictions/{scan.patient}_{scan.phase}.nii.gz")
            write_volume(path, native.labels, native.grid)
    if save_predictions:
        write_label_names(outputs, dataset.class_names, "predictions")
    paper_dice = mean_dice(slice_dice)
    cases = [{**case, "paper_dice": paper_dice[case["patient"]]} for case in cases]
    selection = {"best": run.metadata["selection"], "last": "none, the last state of the training"}
    with run.predictor.autocast():
        precision = "bf16" if torch.is_autocast_enabled(run.predictor.device.type) else "fp32"
    settings = {key: value for key, value in asdict(run.config).items() if key not in RUNTIME_SETTINGS}
    summary = {
        "run": run.folder.resolve().name,
        "data": data.name,
        "dataset": dataset.key,
        "test_domain": domain,
        "checkpoint": f"{run.checkpoint}, step {run.metadata['step']}{remark}",
        "selection": selection.get(run.checkpoint, "none, a kept epoch"),
        "patients": len(paper_dice),
        "paper_dice": paper_dice,
        "paper_protocol": mean_std_interval([*paper_dice.values()]),
        "volumetric": {name: _volumetric(cases, name) for name in dataset.class_names[1:]},
        "outside_field_percent": 100 * float(outside[0]) / max(int(outside[1]), 1),
        "method": method_name(run.metadata),
        "unfinished": remark,
        "settings": settings,
        "precision": precision,
        "tta": run.predictor.tta,
        "keep_largest": keep_largest,
        "trained_by": {name: run.metadata[name] for name in ("git_commit", "versions", "content_hash")},
        "evaluated_by": provenance(),
    }
    summary |= {key: settings[key] for key in ("ratio", "seed", "image_size")}
    summary |= {key: data.info[key] for key in ("phantom", "content_hash")} | uncertainty.summary()
    if monitored := [line for line in read_log(run.folder / "log.jsonl") if "pseudo_labels" in line]:
        summary["pseudo_labels"] = monitored[-1]["pseudo_labels"] | {"epoch": monitored[-1]["epoch"]}
    units, clinical = _clinical(cases, dataset)
    if clinical:
        summary["clinical"] = {
            name: agreement_limits(*values) | {"unit": units[name]} for name, values in clinical.items()
        }
    if len(groups := _groups(cases, data)) > 1:
        summary["groups"] = groups
    tables = summary_tables(summary)
    write_json(outputs.claim("summary.json"), summary)
    outputs.claim("summary.md").write_text(summary_text(title, summary, tables), encoding="utf-8")
    with open(outputs.claim("per_case.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CASE_COLUMNS)
        writer.writeheader()
        writer.writerows(cases)
    heading = f"{title}: run {summary['run']}, data {data.name}"
    pictures = draw_pictures(outputs, dataset, summary, cases, drawings, clinical, uncertainty, heading)
    if (run.folder / "curves.png").is_file():
        epochs = count(len(read_log(run.folder / "log.jsonl")), "epoch")
        pictures.append((f"Training, {epochs}", run.folder / "curves.png"))
    page = {"title": title, "summary": summary, "tables": tables, "config": asdict(run.config), "pictures": pictures}
    write_report(outputs.claim("report.html"), **page, cases=cases_table(cases))
    outputs.remove_stale()  # of an earlier evaluation, maybe of another checkpoint
    volumetric = ", ".join(f"{name} {metrics['dice']:.2f}" for name, metrics in summary["volumetric"].items()
                           if metrics["dice"] is not None)  # fmt: skip
    print(
        f"{run.folder}: {title}: paper Dice {paper_dice_cell(summary)._replace(ci95=None)} % of "
        f"{count(len(paper_dice), 'patient')}; volumetric Dice (%) {volumetric}; "
        f"report in {out / 'report.html'}"
    )
    return summary


def _volumetric(cases: Sequence[Case], structure: str) -> dict[str, Any]:
    """Return one structure's metrics: means over patients, of the means over their phases."""
    scans = [case for case in cases if case["structure"] == structure]
    result: dict[str, Any] = {}
    for metric in METRICS:
        values = _by_patient(scans, metric)
        spread = mean_and_std(values)
        result |= {metric: spread["mean"], f"{metric}_std": spread["std"], f"{metric}_ci95": bootstrap_interval(values)}
    result |= {name: sum(case.get(name, 0) for case in scans) for name in COUNTS}
    return result | {"scans": len(scans), "both_empty": sum("dice" not in case for case in scans)}


def _by_patient(scans: Sequence[Case], metric: str) -> list[float]:
    """Return the mean of a metric over each patient's scans that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for case in scans:
        if metric in case:
            values[case["patient"]].append(case[metric])
    return [float(np.mean(of_patient)) for of_patient in values.values()]


def _groups(cases: Sequence[Case], data: PreparedData) -> dict[str, dict[str, Any]]:
    """Return number, paper Dice and every structure's Dice by group of patients."""
    group_of = dict(zip(data.index["patient"], data.index["group"], strict=True))
    groups = {}
    for group in sorted({group_of[case["patient"]] for case in cases}):
        members = [case for case in cases if group_of[case["patient"]] == group]
        paper_dice = {case["patient"]: case["paper_dice"] for case in members}
        dice = {
            name: mean_and_std(_by_patient([case for case in members if case["structure"] == name], "dice"))["mean"]
            for name in dict.fromkeys(case["structure"] for case in members)
        }
        paper = mean_and_std([*paper_dice.values()])
        groups[str(group)] = {"patients": len(paper_dice), "paper_protocol": paper, "dice": dice}
    return groups


def _clinical(
    cases: Sequence[Case], dataset: DatasetInfo
) -> tuple[dict[str, str], dict[str, tuple[list[float], list[float]]]]:
    """Return the unit, and truths and predictions, of every clinical quantity there is.

    They need both phases: a patient with one of them is left out.
    """
    volumes: dict[str, dict[str, dict[tuple[str, str], float]]] = defaultdict(lambda: defaultdict(dict))
    for case in cases if dataset.clinical else ():
        for kind in ("truth_ml", "predicted_ml"):
            volumes[case["patient"]][kind][case["phase"], case["structure"]] = case[kind]
    units: dict[str, str] = {}
    values: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for of_patient in volumes.values():
        if {"ED", "ES"} <= {phase for phase, _ in of_patient["truth_ml"]}:
            for column, kind in enumerate(("truth_ml", "predicted_ml")):
                for name, (value, unit) in dataset.clinical(of_patient[kind]).items():
                    units[name] = unit
                    values[name][column].append(value)
    return units, values


def case_drawing(scan: ScanPrediction, grid: Volume) -> dict[str, Any]:
    """Return what `plot_case` draws: few slices, cropped, so that all scans' fit into memory."""
    depth = len(scan.rows)
    slices = np.unique(np.linspace(0, depth - 1, min(depth, SLICES_DRAWN)).round().astype(int)).tolist()
    label = scan.probability.argmax(1)
    maps = {"image": scan.image, "truth": scan.truth, "prediction": label, "agreement": scan.agreement}
    arrays = {name: radiological(values[slices].float().cpu().numpy(), grid) for name, values in maps.items()}
    window = structure_window(np.maximum(arrays["truth"], arrays["prediction"]))
    arrays = {name: array[(..., *window)].astype(np.float16) for name, array in arrays.items()}
    return {**arrays, "slices": slices, "letters": edge_letters(grid)}


def structure_window(labels: np.ndarray, margin: float = 0.35) -> tuple[slice, slice]:
    """Return the square around the structures of labels (S, H, W), or all of (H, W)."""
    places = np.argwhere(labels.any(axis=0))
    if len(places) == 0:
        return np.s_[:, :]
    low, high = places.min(axis=0), places.max(axis=0) + 1
    half = int((0.5 + margin) * (high - low).max()) + 1
    centre = (low + high) // 2
    (x0, y0), (x1, y1) = np.maximum(centre - half, 0), centre + half
    return np.s_[x0:x1, y0:y1]


def draw_pictures(
    outputs: OutputFolder, dataset: DatasetInfo, summary: Mapping[str, Any], cases: Sequence[Case],
    drawings: Mapping[tuple[str, str], dict[str, Any]], clinical: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    uncertainty: Uncertainty, title: str,
) -> list[tuple[str, Path]]:  # fmt: skip
    """Draw the pictures of an evaluation; return captions and files, for the report.

    Args:
        drawings: `case_drawing` by patient and phase.
        clinical: truths and predictions by quantity; empty for a data set without any.
    """
    pictures: list[tuple[str, Path]] = []

    def picture(caption: str, name: str) -> Path:
        pictures.append((caption, outputs.claim(name)))
        return pictures[-1][1]

    structures, paper_dice = dataset.class_names[1:], summary["paper_dice"]
    path = picture("Dice per structure and case", "dice_per_case.png")
    plot_dice_per_case(path, [case for case in cases if "dice" in case], structures, title=title)
    if clinical:
        path = picture("Clinical quantities: prediction against truth (Bland-Altman)", "bland_altman.png")
        plot_bland_altman(path, clinical, summary["clinical"], title=title)
    ranked = sorted(paper_dice, key=paper_dice.__getitem__)
    ranks: dict[str, list[str]] = defaultdict(list)  # of a patient: with few patients, it may have several
    for rank, position in (("worst", 0), ("median", len(ranked) // 2), ("best", -1)):
        ranks[ranked[position]].append(rank)
    spacing = pixel_mm(dataset.spacing, summary["image_size"])
    chosen = sorted((key for key in drawings if key[0] in ranks), key=lambda key: paper_dice[key[0]])
    for patient, phase in chosen:
        rank, name = " and ".join(ranks[patient]), f"{patient} {phase}"
        file = f"overlays/{rank.replace(' ', '_')}_{patient}_{phase}.png"
        path = picture(f"{rank} patient by the paper's Dice: {name}", file)
        text = f"{rank} patient: {name}; paper Dice of the patient {paper_dice[patient]:.1f} %\n{title}"
        plot_case(path, **drawings[patient, phase], spacing=spacing, class_names=structures, title=text)
    path = picture("Risk when slices or patients are kept by a score (risk-coverage curves)", "risk_coverage.png")
    plot_risk_coverage(path, uncertainty.curves(), title=title)
    return pictures
