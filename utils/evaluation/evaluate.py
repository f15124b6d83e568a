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
from utils import plots
from utils.data.dataset import DatasetInfo
from utils.data.loaders import scan_loader
from utils.data.prepared import PreparedData
from utils.data.volume import Volume, write_volume
from utils.evaluation.confidence import Uncertainty
from utils.evaluation.metrics import METRICS, agreement_limits, mean_std_interval
from utils.evaluation.predict import ScanPrediction, mean_dice, predict_scans, to_native
from utils.evaluation.report import cases_table, count, paper_dice_cell, summary_tables, summary_text, write_report
from utils.evaluation.runs import TrainedRun, method_name, patients_to_evaluate
from utils.evaluation.tables import Cell
from utils.files import OutputFolder, write_json
from utils.run.checkpoint import provenance
from utils.run.folder import unfinished
from utils.run.logger import read_log

RESULT_FILES = ("summary.json", "summary.md", "per_case.csv", "report.html", "dice_per_case.png", "bland_altman.png",
                "risk_coverage.png")  # fmt: skip
CASE_COLUMNS = ("patient", "phase", "structure", *METRICS, "missed", "predicted_ml", "truth_ml", "paper_dice")
SLICES_DRAWN = 6  # of a scan, at most


def evaluate_run(
    run: TrainedRun, dataset: DatasetInfo, data: PreparedData, out: Path, *, domain: str, title: str,
    save_predictions: bool = False, keep_largest: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run on all patients with masks of a domain, into `out`; return the content of summary.json."""
    remark, patients = unfinished(run.folder), patients_to_evaluate(run, data, domain, dataset)
    outputs = OutputFolder(out)
    outputs.require_free(*RESULT_FILES)  # before the work
    slice_dice, cases, drawings = [], [], {}
    uncertainty, loader = Uncertainty(), scan_loader(data, patients)
    scans = predict_scans(run.predictor, loader, data, confidence=True)
    for scan in tqdm(scans, total=len(loader), unit="scan", desc=f"evaluate {run.folder.name}", leave=False):
        labels, truth, rows = to_native(scan, data, dataset.class_names, keep_largest=keep_largest)
        slice_dice.append((scan.patient, scan.phase, scan.slice_dice.tolist()))
        cases += rows
        uncertainty.add(scan)
        drawings[scan.patient, scan.phase] = case_drawing(scan, truth)
        if save_predictions:
            write_volume(outputs.claim(f"predictions/{scan.patient}_{scan.phase}.nii.gz"), labels, truth)
    paper_dice = mean_dice(slice_dice)
    cases = [{**case, "paper_dice": paper_dice[case["patient"]]} for case in cases]
    clinical, pairs = clinical_figures(cases, dataset)
    summary = {
        **run_facts(run),
        "data": data.name,
        "dataset": dataset.key,
        "test_domain": domain,
        "checkpoint": f"{run.checkpoint}, step {run.metadata['step']}{remark}",
        "unfinished": remark,
        "keep_largest": keep_largest,
        "patients": len(paper_dice),
        "paper_dice": paper_dice,
        "paper_protocol": mean_std_interval([*paper_dice.values()]),
        "volumetric": {name: volumetric_figures(cases, name) for name in dataset.class_names[1:]},
        "outside_field_percent": 100 * sum(c["outside_field"] for c in cases) / max(sum(c["voxels"] for c in cases), 1),
        **{key: data.info[key] for key in ("phantom", "content_hash")},
        **uncertainty.summary(),
        **({"clinical": clinical} if clinical else {}),
    }
    tables = summary_tables(summary)
    write_json(outputs.claim("summary.json"), summary)
    outputs.claim("summary.md").write_text(summary_text(title, summary, tables), encoding="utf-8")
    with open(outputs.claim("per_case.csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([CASE_COLUMNS, *([case.get(name) for name in CASE_COLUMNS] for case in cases)])
    heading = f"{title}: run {summary['run']}, data {data.name}"
    pictures = draw_pictures(outputs, dataset, summary, cases, drawings, pairs, uncertainty.curves(), heading)
    pictures += [("Training", path) for path in run.folder.glob("curves.png")]
    write_report(
        outputs.claim("report.html"), title=title, summary=summary, tables=tables, config=asdict(run.config),
        cases=cases_table(cases), pictures=pictures,
    )  # fmt: skip
    outputs.remove_stale()  # of an earlier evaluation, maybe of another checkpoint
    volumetric = ", ".join(f"{name} {Cell(figures['dice'])}" for name, figures in summary["volumetric"].items())
    print(
        f"{run.folder}: {title}: paper Dice {paper_dice_cell(summary)._replace(ci95=None)} % of "
        f"{count(len(paper_dice), 'patient')}; volumetric Dice (%) {volumetric}; report in {out / 'report.html'}"
    )
    return summary


def run_facts(run: TrainedRun) -> dict[str, Any]:
    """Return what summary.json says about the run itself, whatever the data."""
    settings = {key: value for key, value in asdict(run.config).items() if key not in RUNTIME_SETTINGS}
    selection = {"best": run.metadata["selection"], "last": "none, the last state of the training"}
    with run.predictor.autocast():
        precision = "bf16" if torch.is_autocast_enabled(run.predictor.device.type) else "fp32"
    facts = {
        "run": run.folder.resolve().name,
        "selection": selection.get(run.checkpoint, "none, a kept epoch"),
        "method": method_name(run.metadata),
        "settings": settings,
        **{key: settings[key] for key in ("ratio", "seed", "image_size")},
        "precision": precision,
        "tta": run.predictor.tta,
        "trained_by": {name: run.metadata[name] for name in ("git_commit", "versions", "content_hash")},
        "evaluated_by": provenance(),
    }
    if monitored := [line for line in read_log(run.folder / "log.jsonl") if "pseudo_labels" in line]:
        facts["pseudo_labels"] = monitored[-1]["pseudo_labels"] | {"epoch": monitored[-1]["epoch"]}
    return facts


def volumetric_figures(cases: Sequence[dict], structure: str) -> dict[str, Any]:
    """Return one structure's metrics: means over patients, of the means over their scans."""
    scans = [case for case in cases if case["structure"] == structure]
    figures = {"missed": sum(case.get("missed", 0) for case in scans), "scans": len(scans)}
    figures["both_empty"] = sum("dice" not in case for case in scans)
    for metric in METRICS:
        patients: dict[str, list[float]] = defaultdict(list)
        for case in scans:
            if metric in case:
                patients[case["patient"]].append(case[metric])
        spread = mean_std_interval([np.mean(values) for values in patients.values()])
        figures |= {metric: spread["mean"], f"{metric}_std": spread["std"], f"{metric}_ci95": spread["ci95"]}
    return figures


def clinical_figures(cases: Sequence[dict], dataset: DatasetInfo) -> tuple[dict[str, dict], dict[str, tuple]]:
    """Return `agreement_limits` with "unit", and pairs, by clinical quantity; of patients with ED and ES."""
    pairs = defaultdict(lambda: ([], []))
    for patient in dict.fromkeys(case["patient"] for case in cases if dataset.clinical):
        scans = [case for case in cases if case["patient"] == patient]
        if {"ED", "ES"} <= {case["phase"] for case in scans}:
            for column, kind in enumerate(("truth_ml", "predicted_ml")):
                volumes = {(case["phase"], case["structure"]): case[kind] for case in scans}
                for name, (value, unit) in dataset.clinical(volumes).items():
                    pairs[name, unit][column].append(value)
    figures = {name: agreement_limits(*values) | {"unit": unit} for (name, unit), values in pairs.items()}
    return figures, {name: values for (name, _), values in pairs.items()}


def case_drawing(scan: ScanPrediction, grid: Volume) -> dict[str, Any]:
    """Return what `plot_case` draws: few slices, cropped, so that all scans' fit into memory."""
    slices = np.unique(np.linspace(0, len(scan.rows) - 1, SLICES_DRAWN).round().astype(int)).tolist()
    maps = {"image": scan.image, "agreement": scan.agreement}
    maps |= {"truth": scan.truth, "prediction": scan.probability.argmax(1)}
    arrays = {name: plots.radiological(values[slices].float().cpu().numpy(), grid) for name, values in maps.items()}
    places, window = np.argwhere((arrays["truth"] + arrays["prediction"]).any(0)), ()  # of structures, in a slice
    if len(places):
        low, high = places.min(0), places.max(0) + 1
        middle, half = (low + high) // 2, int(0.85 * (high - low).max()) + 1
        window = tuple(map(slice, np.maximum(middle - half, 0), middle + half))
    arrays = {name: array[:, *window].astype(np.float16) for name, array in arrays.items()}
    return {**arrays, "slices": slices, "letters": plots.edge_letters(grid)}


def draw_pictures(
    outputs: OutputFolder, dataset: DatasetInfo, summary: Mapping[str, Any], cases: Sequence[dict],
    drawings: Mapping[tuple[str, str], dict[str, Any]], pairs: Mapping[str, tuple], curves: Mapping, title: str,
) -> list[tuple[str, Path]]:  # fmt: skip
    """Draw the pictures of an evaluation; return captions and files, for the report."""
    structures, paper_dice = dataset.class_names[1:], summary["paper_dice"]
    dice = {name: [c["dice"] for c in cases if c["structure"] == name and "dice" in c] for name in structures}
    pictures: list[tuple[str, Path]] = []

    def picture(caption: str, name: str) -> dict[str, Any]:
        pictures.append((caption, outputs.claim(name)))
        return {"path": pictures[-1][1], "title": f"{caption}\n{title}"}

    plots.plot_dice_per_case(**picture("Dice of every scan", "dice_per_case.png"), dice=dice)
    if pairs:
        options = picture("Clinical quantities: prediction against truth (Bland-Altman)", "bland_altman.png")
        plots.plot_bland_altman(**options, pairs=pairs, agreement=summary["clinical"])
    ranked = sorted(paper_dice, key=paper_dice.__getitem__)
    ranks = {ranked[len(ranked) // 2]: "median", ranked[-1]: "best", ranked[0]: "worst"}
    spacing = pixel_mm(dataset.spacing, summary["image_size"])
    for patient, phase in sorted(drawings, key=lambda key: paper_dice[key[0]]):
        if rank := ranks.get(patient):
            caption = f"{rank} patient: {patient} {phase}; paper Dice of the patient {paper_dice[patient]:.1f} %"
            options = picture(caption, f"overlays/{rank}_{patient}_{phase}.png")
            plots.plot_case(**options, **drawings[patient, phase], spacing=spacing, class_names=structures)
    plots.plot_risk_coverage(**picture("Risk of cases kept by a score", "risk_coverage.png"), curves=curves)
    return pictures
