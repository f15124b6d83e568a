"""The evaluation of a run on its held-out domain: metrics, tables, pictures, predictions and the report."""

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import RUNTIME_SETTINGS
from utils.data.dataset import DatasetInfo
from utils.data.loaders import scan_loader
from utils.data.prepared import PreparedData
from utils.data.volume import write_volume
from utils.errors import UserError
from utils.evaluation.metrics import METRICS
from utils.evaluation.pictures import draw_patients, draw_results
from utils.evaluation.predict import (
    ScanPrediction,
    mean_dice,
    predict_scans,
    to_native,
    volumetric_rows,
)
from utils.evaluation.report import summary_text, write_report
from utils.evaluation.runs import TrainedRun, method_name, require_unseen, unfinished
from utils.evaluation.statistics import agreement_limits, mean_std_interval
from utils.files import OutputFolder, write_json
from utils.run.checkpoint import provenance
from utils.run.logger import read_log

RESULT_FILES = ("summary.json", "summary.md", "per_case.csv", "report.html", "dice_per_case.png", "bland_altman.png")
NO_SELECTION = "none, the last state of the training"
COUNTS = ("missed", "slices", "missed_slices")  # of a structure in a scan: is it missed, and in how many slices
CASE_COLUMNS = ("patient", "phase", "structure", *METRICS, *COUNTS, "predicted_ml", "truth_ml", "paper_dice")


def evaluate_run(
    run: TrainedRun,
    dataset: DatasetInfo,
    *,
    data: PreparedData,
    domain: str,
    title: str,
    out: Path,
    save_predictions: bool,
    precision: str,
    tta: bool,
    keep_largest: bool,
) -> dict[str, Any]:
    """Evaluate a run on a domain of prepared data; write tables, pictures, predictions and the report to `out`.

    Args:
        domain: of which all patients with masks are evaluated; the training must not have seen them.
        title: heading of the report.

    Returns:
        The content of summary.json: paper protocol and volumetric metrics with bootstrap intervals.
    """
    config, remark = run.config, unfinished(run.folder)
    patients = data.patients_with_masks(domain)
    if not patients:
        raise UserError(
            f"{data.root} has no {dataset.domain_kind} {domain} with masks to evaluate on: check --data-root"
        )
    require_unseen(run, patients, data.root)
    outputs = OutputFolder(out)
    outputs.require_free(*RESULT_FILES)  # before the work

    def predicted(loader: DataLoader) -> Iterator[ScanPrediction]:
        options = {"size": config.image_size, "reference": run.reference, "device": run.device}
        return predict_scans(run.nets, loader, data, **options, precision=precision, tta=tta)

    slice_dice: list[tuple[str, str, list[float]]] = []
    cases: list[dict[str, Any]] = []
    outside = np.zeros(2, int)
    loader = scan_loader(data, patients)
    for scan in tqdm(predicted(loader), total=len(loader), unit="scan", desc=f"evaluate {domain}"):
        native = to_native(scan, data, keep_largest=keep_largest)
        slice_dice.append((scan.patient, scan.phase, scan.slice_dice.tolist()))
        cases += volumetric_rows(scan, native, dataset.class_names)
        outside += native.outside
        if save_predictions:
            path = outputs.claim(f"predictions/{scan.patient}_{scan.phase}.nii.gz")
            write_volume(path, native.labels, native.grid)
    paper_dice = mean_dice(slice_dice)
    cases = [{**case, "paper_dice": paper_dice[case["patient"]]} for case in cases]
    units, clinical = _clinical(cases, dataset)
    agreement = {name: agreement_limits(*pair) | {"unit": units[name]} for name, pair in clinical.items()}
    summary = {
        "dataset": dataset.key,
        "test_domain": domain,
        "data": data.root.resolve().name,
        "checkpoint": f"{run.checkpoint}, step {run.metadata['step']}{remark}",
        "selection": run.metadata["selection"] if run.checkpoint == "best" else NO_SELECTION,
        "patients": len(paper_dice),
        "paper_protocol": mean_std_interval(list(paper_dice.values())),
        "volumetric": {name: _volumetric(cases, name) for name in dataset.class_names[1:]},
        "outside_field_percent": 100 * float(outside[0]) / max(int(outside[1]), 1),
        "phantom": data.info["phantom"],
        "method": method_name(run.metadata),
        "unfinished": remark,
        "settings": {key: value for key, value in asdict(config).items() if key not in RUNTIME_SETTINGS},
        "ratio": config.ratio,
        "seed": config.seed,
        "image_size": config.image_size,
        "precision": precision,
        "tta": tta,
        "keep_largest": keep_largest,
        "content_hash": data.info["content_hash"],
        "trained_by": {name: run.metadata[name] for name in ("git_commit", "versions", "content_hash")},
        "evaluated_by": provenance(),
    } | ({"clinical": agreement} if agreement else {})
    if len(groups := _groups(cases, data)) > 1:
        summary["groups"] = groups
    text = summary_text(title, summary)
    write_json(outputs.claim("summary.json"), summary)
    outputs.claim("summary.md").write_text(text, encoding="utf-8")
    with open(outputs.claim("per_case.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CASE_COLUMNS)
        writer.writeheader()
        writer.writerows(cases)
    ranked = sorted(paper_dice, key=paper_dice.__getitem__)
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    pictures = draw_results(outputs, cases, dataset, clinical=clinical, agreement=agreement, title=title)
    overlaid = predicted(scan_loader(data, sorted(set(chosen.values()))))
    pictures += draw_patients(outputs, overlaid, data, dataset, chosen=chosen, paper_dice=paper_dice)
    if (run.folder / "curves.png").is_file():
        pictures.append((f"Training, {len(read_log(run.folder / 'log.jsonl'))} epochs", run.folder / "curves.png"))
    outputs.claim("report.html")
    write_report(out, title=title, summary=summary, config=asdict(config), cases=cases, pictures=pictures)
    outputs.remove_stale()  # of an earlier evaluation, maybe of another checkpoint
    print(text)
    print(f"results in {out}")
    return summary


def _volumetric(cases: Sequence[dict[str, Any]], structure: str) -> dict[str, Any]:
    """Return the means over patients of one structure's metrics, each patient's phases averaged first."""
    scans = [case for case in cases if case["structure"] == structure]
    of_patient: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in scans:
        if "dice" in case:
            of_patient[case["patient"]].append(case)
    result: dict[str, Any] = {}
    for metric in METRICS:
        spread = mean_std_interval([np.mean([case[metric] for case in found]) for found in of_patient.values()])
        result |= {metric: spread["mean"], f"{metric}_std": spread["std"], f"{metric}_ci95": spread["ci95"]}
    result["scans"] = len(scans)
    result |= {count: sum(case.get(count, 0) for case in scans) for count in COUNTS}
    result["both_empty"] = sum("dice" not in case for case in scans)
    return result


def _groups(cases: Sequence[dict[str, Any]], data: PreparedData) -> dict[str, dict[str, Any]]:
    """Return the number of patients, the paper's Dice and every structure's Dice by group of patients."""
    group_of = dict(zip(data.index["patient"], data.index["group"], strict=True))
    by_group: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        by_group[str(group_of[case["patient"]])].append(case)
    groups = {}
    for group, members in sorted(by_group.items()):
        paper_dice = {case["patient"]: case["paper_dice"] for case in members}
        dice = {name: _volumetric(members, name)["dice"] for name in dict.fromkeys(c["structure"] for c in members)}
        paper = mean_std_interval(list(paper_dice.values()))
        groups[group] = {"patients": len(paper_dice), "paper_protocol": paper, "dice": dice}
    return groups


def _clinical(
    cases: Sequence[dict[str, Any]], dataset: DatasetInfo
) -> tuple[dict[str, str], dict[str, tuple[list[float], list[float]]]]:
    """Return the unit, and truths and predictions, of every clinical quantity; empty where there are none.

    They need both phases: a patient with one of them is left out.
    """
    if dataset.clinical is None:
        return {}, {}
    volumes: dict[str, tuple[dict, dict]] = defaultdict(lambda: ({}, {}))
    for case in cases:
        for of_patient, kind in zip(volumes[case["patient"]], ("truth_ml", "predicted_ml"), strict=True):
            of_patient[case["phase"], case["structure"]] = case[kind]
    both = [pair for pair in volumes.values() if {"ED", "ES"} <= {phase for phase, _ in pair[0]}]
    if not both:
        return {}, {}
    pairs = [tuple(map(dataset.clinical, pair)) for pair in both]
    units = {name: unit for name, (_, unit) in pairs[0][0].items()}
    return units, {name: tuple([of[name][0] for of in column] for column in zip(*pairs, strict=True)) for name in units}
