"""The evaluation of a run on its held-out domain: metrics, tables, pictures, predictions and the report."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import RUNTIME_SETTINGS
from utils.data.dataset import DatasetInfo
from utils.data.loaders import scan_loader
from utils.data.prepared import PreparedData
from utils.data.volume import write_volume
from utils.evaluation.calibration import Trust
from utils.evaluation.metrics import METRICS
from utils.evaluation.monitor import last_figures
from utils.evaluation.pictures import draw_pictures
from utils.evaluation.predict import mean_dice, predict_scans, to_native, volumetric_rows
from utils.evaluation.quality import flag_quality, scan_quality
from utils.evaluation.report import summary_text, write_report
from utils.evaluation.runs import TrainedRun, method_name, patients_to_evaluate
from utils.evaluation.statistics import agreement_limits, mean_std_interval
from utils.evaluation.tools import write_label_names
from utils.files import OutputFolder, write_json
from utils.run.checkpoint import provenance
from utils.run.folder import unfinished
from utils.run.logger import read_log

RESULT_FILES = ("summary.json", "summary.md", "per_case.csv", "report.html", "dice_per_case.png", "bland_altman.png",
                "risk_coverage.png")  # fmt: skip
NO_SELECTION = "none, the last state of the training"
COUNTS = ("missed", "slices", "missed_slices")  # of a structure in a scan: is it missed, and in how many slices
CASE_COLUMNS = ("patient", "phase", "structure", *METRICS, *COUNTS, "predicted_ml", "truth_ml", "paper_dice")


def evaluate_run(
    run: TrainedRun, dataset: DatasetInfo, *, data: PreparedData, domain: str, title: str, out: Path,
    save_predictions: bool, precision: str, tta: bool, keep_largest: bool,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run on a domain of prepared data; write tables, pictures, predictions and the report to `out`.

    Args:
        domain: of which all patients with masks are evaluated; the training must not have seen them.
        title: heading of the report.

    Returns:
        The content of summary.json: paper protocol and volumetric metrics with bootstrap intervals.
    """
    config, remark = run.config, unfinished(run.folder)
    patients = patients_to_evaluate(run, data, domain, dataset)
    outputs = OutputFolder(out)
    outputs.require_free(*RESULT_FILES)  # before the work
    structures, how = dataset.class_names[1:], {"precision": precision, "tta": tta}
    slice_dice: list[tuple[str, str, list[float]]] = []
    cases: list[dict[str, Any]] = []
    quality: list[dict[str, Any]] = []
    outside, trust, loader = np.zeros(2, int), Trust(), scan_loader(data, patients)
    ranges = run.metadata.get("quality")  # not beside weights of an earlier version, or converted ones
    scans = predict_scans(run.members, loader, data, device=run.device, **how, confidence=True)
    for scan in tqdm(scans, total=len(loader), unit="scan", desc=f"evaluate {domain}"):
        native = to_native(scan, data, keep_largest=keep_largest)
        slice_dice.append((scan.patient, scan.phase, scan.slice_dice.tolist()))
        cases += volumetric_rows(scan, native, dataset.class_names)
        if ranges:
            quality += [{"patient": scan.patient, **row} for row in scan_quality(scan, data, dataset.class_names)]
        outside += native.outside
        trust.add(scan)
        if save_predictions:
            path = outputs.claim(f"predictions/{scan.patient}_{scan.phase}.nii.gz")
            write_volume(path, native.labels, native.grid)
    if save_predictions:
        write_label_names(outputs, dataset.class_names, "predictions")
    paper_dice = mean_dice(slice_dice)
    cases = [{**case, "paper_dice": paper_dice[case["patient"]]} for case in cases]
    units, clinical = _clinical(cases, dataset)
    settings = {key: value for key, value in asdict(config).items() if key not in RUNTIME_SETTINGS}
    summary = {
        "run": run.folder.resolve().name,
        "data": data.name,
        "dataset": dataset.key,
        "test_domain": domain,
        "checkpoint": f"{run.checkpoint}, step {run.metadata['step']}{remark}",
        "selection": run.metadata["selection"] if run.checkpoint == "best" else NO_SELECTION,
        "patients": len(paper_dice),
        "paper_dice": paper_dice,
        "paper_protocol": mean_std_interval([*paper_dice.values()]),
        "volumetric": {name: _volumetric(cases, name) for name in structures},
        "outside_field_percent": 100 * float(outside[0]) / max(int(outside[1]), 1),
        "method": method_name(run.metadata),
        "unfinished": remark,
        "settings": settings,
        "keep_largest": keep_largest,
        "ensemble": [str(member.folder) for member in (run, *run.others)] if run.others else [],
        "trained_by": {name: run.metadata[name] for name in ("git_commit", "versions", "content_hash")},
        "evaluated_by": provenance(),
    }
    summary |= how | {key: settings[key] for key in ("ratio", "seed", "image_size")}
    summary |= {key: data.info[key] for key in ("phantom", "content_hash")}
    summary |= trust.summary() | last_figures(run.folder)
    if clinical:
        summary["clinical"] = {name: agreement_limits(*of) | {"unit": units[name]} for name, of in clinical.items()}
    if ranges:
        summary["quality"] = flag_quality(quality, paper_dice, ranges)
    if len(groups := _groups(cases, data, structures)) > 1:
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
    loader = scan_loader(data, sorted({*chosen.values()}))
    scans = list(predict_scans(run.members, loader, data, device=run.device, **how))
    found = {"chosen": chosen, "scans": scans, "clinical": clinical, "curves": trust.curves()}
    heading = f"{title}: run {summary['run']}, data {data.name}"
    pictures = draw_pictures(outputs, summary, cases, data, dataset, **found, title=heading)
    if "pseudo_labels" in summary:
        picture = run.folder / summary["pseudo_labels"]["picture"]
        pictures.append(("Pseudo labels and hidden masks, at the end of the training", picture))
    if (run.folder / "curves.png").is_file() and not run.others:
        pictures.append((f"Training, {len(read_log(run.folder / 'log.jsonl'))} epochs", run.folder / "curves.png"))
    outputs.claim("report.html")
    write_report(out, title=title, summary=summary, config=asdict(config), cases=cases, pictures=pictures)
    outputs.remove_stale()  # of an earlier evaluation, maybe of another checkpoint
    print(f"{text}\nresults in {out}")
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
    result |= {count: sum(case.get(count, 0) for case in scans) for count in COUNTS}
    return result | {"scans": len(scans), "both_empty": sum("dice" not in case for case in scans)}


def _groups(
    cases: Sequence[dict[str, Any]], data: PreparedData, structures: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the number of patients, the paper's Dice and every structure's Dice by group of patients."""
    group_of = dict(zip(data.index["patient"], data.index["group"], strict=True))
    groups = {}
    for group in sorted({group_of[case["patient"]] for case in cases}):
        members = [case for case in cases if group_of[case["patient"]] == group]
        paper_dice = {case["patient"]: case["paper_dice"] for case in members}
        groups[str(group)] = {
            "patients": len(paper_dice),
            "paper_protocol": mean_std_interval([*paper_dice.values()]),
            "dice": {name: _volumetric(members, name)["dice"] for name in structures},
        }
    return groups


def _clinical(
    cases: Sequence[dict[str, Any]], dataset: DatasetInfo
) -> tuple[dict[str, str], dict[str, tuple[list[float], list[float]]]]:
    """Return the unit, and truths and predictions, of every clinical quantity; empty where there are none.

    They need both phases: a patient with one of them is left out.
    """
    scans_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases if dataset.clinical else ():
        scans_of[case["patient"]].append(case)
    units: dict[str, str] = {}
    values: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for scans in scans_of.values():
        if {"ED", "ES"} <= {case["phase"] for case in scans}:
            for column, kind in enumerate(("truth_ml", "predicted_ml")):
                quantities = dataset.clinical({(case["phase"], case["structure"]): case[kind] for case in scans})
                for name, (value, unit) in quantities.items():
                    units[name] = unit
                    values[name][column].append(value)
    return units, values
