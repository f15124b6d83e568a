"""Results of a run on its held-out domain: figures, tables, pictures and predictions."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config import RUNTIME_SETTINGS
from utils.data.dataset import DatasetInfo
from utils.data.loaders import SliceDataset, batch_loader, scan_batches
from utils.data.prepared import PreparedData
from utils.data.volume import radiological, read_volume, write_volume
from utils.errors import UserError
from utils.evaluation.metrics import agreement_limits, bootstrap_interval
from utils.evaluation.predict import ScanPrediction, TrainedRun, mean_dice, predict_scans, to_native, volumetric_rows
from utils.evaluation.report import to_markdown, write_report
from utils.evaluation.tables import method_name
from utils.files import OutputFolder, read_json, write_json
from utils.method.augment import canvas_to_view
from utils.plots import plot_bland_altman, plot_case, plot_dice_per_case
from utils.run.checkpoint import provenance, read_metadata
from utils.run.logger import read_log

FIGURES = ("dice", "hd95", "assd")
RESULT_FILES = ("summary.json", "summary.md", "per_case.csv", "report.html", "dice_per_case.png", "bland_altman.png")
NO_SELECTION = "none, the last state of the training"
CASE_COLUMNS = ("patient", "phase", "structure", *FIGURES, "missed", "predicted_ml", "truth_ml", "paper_dice")


def evaluate_run(
    run: TrainedRun,
    dataset: DatasetInfo,
    *,
    data_root: Path | None,
    out: Path,
    save_predictions: bool,
    precision: str,
    tta: bool,
    keep_largest: bool,
) -> dict[str, Any]:
    """Evaluate a run on its held-out domain; write the tables, pictures, predictions and the report to `out`.

    Returns:
        The summary: paper protocol and volumetric figures with bootstrap intervals (README, Evaluation).
    """
    config = run.metadata["config"]
    remark = unfinished(run.folder)
    data = PreparedData.open(data_root or config["data_root"], dataset)
    domain, size = config["test_domain"], config["image_size"]
    patients = data.patients_with_masks(domain)
    if not patients:
        raise UserError(
            f"{data.root} has no {dataset.domain_kind} {domain} with masks to evaluate on: check --data-root"
        )
    require_unseen(run, patients, data)
    outputs = OutputFolder(out)
    outputs.require_free(*RESULT_FILES)  # before the work
    settings = {"size": size, "reference": run.reference, "device": run.device, "precision": precision, "tta": tta}

    slice_dice: list[tuple[str, str, list[float]]] = []
    rows: list[dict[str, Any]] = []
    outside = np.zeros(2, int)
    loader = _scans(data, patients)
    predictions = predict_scans(run.nets, loader, data, **settings)
    for scan in tqdm(predictions, total=len(loader), unit="scan", desc=f"evaluate {domain}"):
        native = to_native(scan, data, keep_largest=keep_largest)
        slice_dice.append((scan.patient, scan.phase, scan.slice_dice.tolist()))
        rows += volumetric_rows(scan, native, dataset.class_names)
        outside += native.outside
        if save_predictions:
            path = outputs.claim(f"predictions/{scan.patient}_{scan.phase}.nii.gz")
            write_volume(path, native.labels, native.grid)
    paper = mean_dice(slice_dice)
    rows = [{**row, "paper_dice": paper[row["patient"]]} for row in rows]
    clinical = _clinical(rows, dataset)
    summary = {
        "dataset": dataset.key,
        "test_domain": domain,
        "checkpoint": f"{run.checkpoint}, step {run.metadata['step']}{remark}",
        "selection": run.metadata["selection"] if run.checkpoint == "best" else NO_SELECTION,
        "patients": len(paper),
        "paper_protocol": _mean_std_interval(list(paper.values())),
        "volumetric": {name: _volumetric(rows, name) for name in dataset.class_names[1:]},
        "outside_field_percent": 100 * float(outside[0]) / max(int(outside[1]), 1),
        "phantom": data.info["phantom"],
        "method": method_name(run.metadata),
        "unfinished": remark,
        "settings": {key: value for key, value in config.items() if key not in RUNTIME_SETTINGS},
        "ratio": config["ratio"],
        "seed": config["seed"],
        "image_size": size,
        "precision": precision,
        "tta": tta,
        "keep_largest": keep_largest,
        "content_hash": data.info["content_hash"],
        "trained_by": {name: run.metadata[name] for name in ("git_commit", "versions", "content_hash")},
        "evaluated_by": provenance(),
    }
    if clinical:
        summary["clinical"] = {
            name: agreement_limits(*pair) | {"unit": unit} for name, (unit, *pair) in clinical.items()
        }
    write_json(outputs.claim("summary.json"), summary)
    title = f"{dataset.name}, held-out {dataset.domain_kind} {domain}"
    text = to_markdown(title, summary)
    outputs.claim("summary.md").write_text(text, encoding="utf-8")
    with open(outputs.claim("per_case.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, CASE_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    pictures = _draw(outputs, run, data, dataset, rows, paper, clinical, settings, title)
    outputs.claim("report.html")
    write_report(out, title=title, summary=summary, config=config, cases=rows, pictures=pictures)
    outputs.remove_stale()  # of an earlier evaluation, maybe of another checkpoint
    print(text)
    print(f"results in {out}")
    return summary


def require_unseen(run: TrainedRun, patients: Sequence[str], data: PreparedData) -> None:
    """Raise UserError when the run's training has seen a patient to evaluate on; warn of other data than its own."""
    if (run.folder / "split.json").exists():  # not beside converted weights
        split = read_json(run.folder / "split.json")
        seen = sorted({p for part in ("labeled", "unlabeled", "validation") for p in split[part]} & set(patients))
        if seen:
            raise UserError(
                f"{run.folder} was trained with {len(seen)} of the patients that {data.root} holds out: "
                f"{', '.join(seen[:5])}. Evaluate on the data of its training, or train on these"
            )
    trained_on = run.metadata["content_hash"]
    if trained_on not in (None, data.info["content_hash"]):
        print(f"warning: {data.root} holds other data than {run.folder} was trained with")


def runs_table(root: Path, dataset: DatasetInfo) -> str:
    """The runs below `root` with their best scores, as a Markdown table."""
    lines = [f"| run | held out | labelled | method | seed | best at step | source Dice | {dataset.domain_kind} Dice |"]
    lines.append("|---" * 8 + "|")
    rules: dict[str, None] = {}
    for path in sorted(root.glob("*/best.safetensors")):
        folder = path.parent
        try:
            metadata, remark = read_metadata(path), unfinished(folder)
        except UserError as error:  # one damaged run must not cost the list
            lines.append(f"| {folder.name} | {error} |")
            continue
        if metadata["dataset"] != dataset.key:
            continue
        config = metadata["config"]
        source = max((line["val_dice"] for line in read_log(folder / "log.jsonl")), default=None)
        evaluated = folder / "results" / config["test_domain"] / "summary.json"
        held_out = read_json(evaluated)["paper_protocol"] if evaluated.exists() else {"mean": None}
        cells = [folder.name, config["test_domain"], f"{100 * config['ratio']:g} %", method_name(metadata)]
        cells += [config["seed"], f"{metadata['step']}{remark}"]
        cells += [_score(source), _score(held_out["mean"], held_out.get("std"))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        rules[metadata["selection"]] = None
    if len(lines) == 2:
        raise UserError(
            f"{root}: no run of {dataset.name} there; train one first: python {dataset.key}_train.py --help"
        )
    return "\n".join([*lines, "", f"best: {'; '.join(rules) or 'unknown'}"])


def unfinished(folder: Path) -> str:
    """How far a run is that has not trained to its end, as a remark in brackets; empty where it has."""
    if not all((folder / name).exists() for name in ("log.jsonl", "config.json")):  # weights from elsewhere
        return ""
    planned = read_json(folder / "config.json")
    if not {"num_epoch", "max_steps"} <= set(planned):
        raise UserError(f"{folder / 'config.json'} is damaged: num_epoch and max_steps are not in it")
    epochs, steps = planned["num_epoch"], planned["max_steps"]
    last = max(read_log(folder / "log.jsonl"), key=lambda line: line["step"], default={"epoch": 0, "step": 0})
    if last["epoch"] >= epochs or (steps and last["step"] >= steps):
        return ""
    return f" (training not finished: epoch {last['epoch']} of {epochs})"


def _score(mean: float | None, std: float | None = None) -> str:
    return "-" if mean is None else f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _scans(data: PreparedData, patients: Sequence[str]) -> Any:
    dataset = SliceDataset(data, data.rows(list(patients), with_mask=True), with_mask=True)
    return batch_loader(dataset, scan_batches(data, dataset.rows), 0)


def _mean_std_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over patients, sample standard deviation and 95 % bootstrap interval; None for what there is not."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    mean = float(np.mean(values)) if len(values) else None
    return {"mean": mean, "std": std, "ci95": bootstrap_interval(values)}


def _volumetric(rows: Sequence[dict[str, Any]], structure: str) -> dict[str, Any]:
    """Means over patients of one structure's figures, each patient's phases averaged first."""
    of_patient: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["structure"] == structure and "dice" in row:
            of_patient[row["patient"]].append(row)
    result: dict[str, Any] = {}
    for figure in FIGURES:
        spread = _mean_std_interval([np.mean([row[figure] for row in found]) for found in of_patient.values()])
        result |= {figure: spread["mean"], f"{figure}_std": spread["std"], f"{figure}_ci95": spread["ci95"]}
    scans = [row for row in rows if row["structure"] == structure]
    result["scans"] = len(scans)
    result["missed"] = sum(row.get("missed", 0) for row in scans)
    result["both_empty"] = sum("dice" not in row for row in scans)
    return result


def _clinical(rows: Sequence[dict[str, Any]], dataset: DatasetInfo) -> dict[str, tuple[str, list[float], list[float]]]:
    """Unit, truths and predictions of every clinical figure, by its name; empty for a data set without any."""
    if dataset.clinical is None:
        return {}
    volumes: dict[str, dict[tuple[str, str], tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        volumes[row["patient"]][row["phase"], row["structure"]] = (row["truth_ml"], row["predicted_ml"])
    pairs = [
        [dataset.clinical({key: pair[i] for key, pair in of_patient.items()}) for i in (0, 1)]
        for of_patient in volumes.values()
    ]
    return {
        name: (unit, [truth[name][0] for truth, _ in pairs], [predicted[name][0] for _, predicted in pairs])
        for name, (_, unit) in pairs[0][0].items()
    }


def _draw(
    outputs: OutputFolder,
    run: TrainedRun,
    data: PreparedData,
    dataset: DatasetInfo,
    rows: Sequence[dict[str, Any]],
    paper: dict[str, float],
    clinical: dict[str, tuple[str, list[float], list[float]]],
    settings: dict[str, Any],
    title: str,
) -> list[tuple[str, Path]]:
    """Draw all pictures of an evaluation; returns them with captions, for the report."""
    structures = dataset.class_names[1:]
    path = outputs.claim("dice_per_case.png")
    plot_dice_per_case(path, [row for row in rows if "dice" in row], structures, title=title)
    pictures = [("Dice per structure and case", path)]
    if clinical:
        pairs = {name: (np.array(truth), np.array(predicted)) for name, (_, truth, predicted) in clinical.items()}
        path = outputs.claim("bland_altman.png")
        plot_bland_altman(path, pairs, {name: unit for name, (unit, *_) in clinical.items()})
        pictures.append(("Clinical figures: prediction against truth (Bland-Altman)", path))
    ranked = sorted(paper, key=paper.__getitem__)
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    overlays = []
    for scan in predict_scans(run.nets, _scans(data, sorted(set(chosen.values()))), data, **settings):
        for rank in (rank for rank, patient in chosen.items() if patient == scan.patient):
            path = outputs.claim(f"overlays/{rank}_{scan.patient}_{scan.phase}.png")
            _draw_case(path, scan, data, dataset, rank, paper[scan.patient])
            overlays.append((f"{rank} patient by the paper's Dice: {scan.patient} {scan.phase}", path))
    pictures += sorted(overlays, key=lambda overlay: list(chosen).index(overlay[0].split()[0]))
    if (run.folder / "curves.png").is_file():
        pictures.append((f"Training, {len(read_log(run.folder / 'log.jsonl'))} epochs", run.folder / "curves.png"))
    return pictures


def _draw_case(
    path: Path, scan: ScanPrediction, data: PreparedData, dataset: DatasetInfo, rank: str, dice: float
) -> None:
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
        class_names=dataset.class_names[1:],
        title=f"{rank} patient: {scan.patient} {scan.phase}; paper Dice of the patient {dice:.1f} %",
    )
