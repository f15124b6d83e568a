"""Evaluation of a trained run on its held-out domain: tables, pictures and predictions."""

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from utils.augment import GRID, canvas_to_grid
from utils.checkpoint import load_checkpoint, load_networks, provenance, read_metadata, write_json
from utils.data import DatasetFacts, PreparedData, SliceDataset, batch_loader, scan_batches, split_patients
from utils.engine import choose_device
from utils.errors import UserError, clear_errors
from utils.evaluate import ScanPrediction, predict_scans, to_native, volumetric_rows
from utils.metrics import bootstrap_interval
from utils.visualize import plot_case, plot_dice_per_case
from utils.volume import read_volume, write_volume

FIGURES = ("dice", "hd95", "assd")


def run_inference(facts: DatasetFacts, build_network: Callable[..., nn.Module]) -> None:
    """Run what the command line asks for."""

    def inference(
        run: Path,
        data_root: Path | None = None,
        checkpoint: Literal["best", "last"] = "best",
        save_predictions: bool = False,
        out: Path | None = None,
        device: str = "auto",
        precision: Literal["auto", "bf16", "fp32"] = "fp32",
    ) -> None:
        """Evaluate a trained run on the domain that its training never saw.

        Args:
            run: the run's folder.
            data_root: prepared data; by default those of the training.
            checkpoint: "best" by source validation, or "last".
            save_predictions: write every prediction as NIfTI in its scan's own grid.
            out: folder for the results; by default RUN/results/DOMAIN.
            device: "cuda", "cpu", or "auto": a GPU where there is one.
            precision: bf16 autocast, or float32.
        """
        trained = load_run(run, checkpoint, facts, build_network, choose_device(device))
        evaluate_run(
            trained, facts, data_root=data_root, out=out, save_predictions=save_predictions, precision=precision
        )

    with clear_errors():
        tyro.cli(inference)


class TrainedRun(NamedTuple):
    """Both networks of a run, ready to predict, and what was saved beside them."""

    folder: Path
    checkpoint: str
    nets: list[nn.Module]
    metadata: dict[str, Any]
    reference: torch.Tensor | None  # (256,)
    device: torch.device


def load_run(
    folder: Path, checkpoint: str, facts: DatasetFacts, build_network: Callable[..., nn.Module], device: torch.device
) -> TrainedRun:
    """Load the networks of a run's "best" or "last" checkpoint; UserError when they are not there or do not fit."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; train one first: python {facts.key}_train.py --help")
    path, state = folder / "best.safetensors", None
    if checkpoint == "last":
        path, state = folder / "last.pt", load_checkpoint(folder)
        if state is None:
            raise UserError(f"{path}: no such file; train first, or check --run")
    metadata = read_metadata(path) if state is None else state["metadata"]
    if metadata["dataset"] != facts.key:
        raise UserError(f"{path} was trained on {metadata['dataset']} data: use inference_{metadata['dataset']}.py")
    nets = [build_network(len(metadata["class_names"])) for _ in range(2)]
    if state is None:
        load_networks(path, nets)
    else:
        for net, weights in zip(nets, state["networks"], strict=True):
            net.load_state_dict(weights)
    nets = [net.to(device).eval() for net in nets]
    reference = None if metadata["reference"] is None else torch.tensor(metadata["reference"], device=device)
    return TrainedRun(folder, checkpoint, nets, metadata, reference, device)


def evaluate_run(
    run: TrainedRun,
    facts: DatasetFacts,
    *,
    data_root: Path | None,
    out: Path | None,
    save_predictions: bool,
    precision: str,
) -> dict[str, Any]:
    """Evaluate a run on its held-out domain and write summary.json, summary.md, per_case.csv and overlays.

    Returns:
        The summary (METHOD, section 7): paper protocol and volumetric figures with bootstrap intervals.
    """
    config = run.metadata["config"]
    data = PreparedData.open(data_root or config["data_root"], facts)
    domain, size = config["test_domain"], config["image_size"]
    held_out = split_patients(
        data,
        facts,
        **{name: config[name] for name in ("test_domain", "ratio", "val_patients", "use_extra_unlabeled")},
    ).held_out
    out = out or run.folder / "results" / domain
    settings = {"size": size, "reference": run.reference, "device": run.device, "precision": precision}

    slice_dice: dict[str, list[np.ndarray]] = defaultdict(list)
    rows: list[dict[str, Any]] = []
    outside = np.zeros(2, int)
    loader = _scans(data, held_out)
    for scan in tqdm(
        predict_scans(run.nets, loader, data, **settings), total=len(loader), unit="scan", desc="evaluate"
    ):
        native = to_native(scan, data)
        slice_dice[scan.patient].append(scan.slice_dice)
        rows += volumetric_rows(scan, native, facts.class_names)
        outside += native.outside
        if save_predictions:
            path = out / "predictions" / f"{scan.patient}_{scan.phase}.nii.gz"
            write_volume(path, native.labels, like=read_volume(data.truth_path(scan.patient, scan.phase), 3))
    paper = {patient: 100 * float(np.concatenate(dice).mean()) for patient, dice in slice_dice.items()}
    summary = {
        "dataset": facts.key,
        "test_domain": domain,
        "checkpoint": f"{run.checkpoint}, step {run.metadata['step']}",
        "selection": run.metadata["selection"],
        "patients": len(paper),
        "paper_protocol": _mean_std_interval(list(paper.values())),
        "volumetric": {name: _volumetric(rows, name) for name in facts.class_names[1:]},
        "outside_field_percent": 100 * float(outside[0]) / max(int(outside[1]), 1),
        "phantom": data.info["phantom"],
        "ratio": config["ratio"],
        "seed": config["seed"],
        "image_size": size,
        "precision": precision,
        "content_hash": data.info["content_hash"],
        "trained_by": {name: run.metadata[name] for name in ("git_commit", "versions", "content_hash")},
        "evaluated_by": provenance(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "summary.json", summary)
    text = format_summary(summary, facts)
    (out / "summary.md").write_text(text)
    _write_cases(out / "per_case.csv", rows, paper)
    plot_dice_per_case(
        out / "dice_per_case.png",
        [{"dice": float("nan"), **row} for row in rows],
        facts.class_names[1:],
        title=f"{facts.name}, held-out {facts.domain_word} {domain}",
    )
    _draw_overlays(out / "overlays", run, data, facts, paper, settings)
    print(text)
    print(f"results in {out}")
    return summary


def _scans(data: PreparedData, patients: Sequence[str]) -> Any:
    dataset = SliceDataset(data, data.rows(list(patients), with_mask=True), with_mask=True)
    return batch_loader(dataset, scan_batches(data, dataset.rows), 0)


def _mean_std_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over patients, sample standard deviation and 95 % bootstrap interval; NaN becomes None."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    interval = bootstrap_interval(values) if len(values) > 1 else None
    return {"mean": float(np.mean(values)) if len(values) else None, "std": std, "ci95": interval}


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


def format_summary(summary: dict[str, Any], facts: DatasetFacts) -> str:
    """The summary as Markdown."""
    paper = summary["paper_protocol"]
    lines = [
        f"# {facts.name}: held-out {facts.domain_word} {summary['test_domain']}",
        "",
        f"{summary['patients']} patients, {100 * summary['ratio']:g} % labelled, seed {summary['seed']}, "
        f"{summary['image_size']} px. Checkpoint: {summary['checkpoint']}; selection: {summary['selection']}.",
    ]
    if summary["phantom"]:
        lines += ["", "**Phantom data: these figures say nothing about real scans.**"]
    lines += [
        "",
        f"Paper protocol: Dice {_figure(paper)} % (mean ± SD over patients, 95 % interval; softmax > 0.5, slices of "
        f"all structures pooled, {GRID} px grid).",
        "",
        "Volumetric, in the scans' own grid (mean [95 % interval] over patients; a miss counts as Dice 0 and the "
        "image diagonal):",
        "",
        "| structure | Dice % | HD95 mm | ASSD mm | missed | both empty | scans |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in summary["volumetric"].items():
        cells = [_interval(figures[key], figures[f"{key}_ci95"]) for key in FIGURES]
        cells += [str(figures[key]) for key in ("missed", "both_empty", "scans")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"{summary['outside_field_percent']:.2f} % of the labelled voxels lie outside the field of view."]
    return "\n".join(lines) + "\n"


def _figure(spread: dict[str, Any]) -> str:
    if spread["std"] is None:
        return f"{spread['mean']:.2f}"
    low, high = spread["ci95"]
    return f"{spread['mean']:.2f} ± {spread['std']:.2f} [{low:.2f}, {high:.2f}]"


def _interval(mean: float | None, interval: Sequence[float] | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _write_cases(path: Path, rows: Sequence[dict[str, Any]], paper: dict[str, float]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["patient", "phase", "structure", *FIGURES, "missed", "paper_dice"])
        writer.writeheader()
        writer.writerows({**row, "paper_dice": paper[row["patient"]]} for row in rows)


def _draw_overlays(
    folder: Path,
    run: TrainedRun,
    data: PreparedData,
    facts: DatasetFacts,
    paper: dict[str, float],
    settings: dict[str, Any],
) -> None:
    """Draw the worst, the median and the best patient by the paper's Dice."""
    ranked = sorted(paper, key=paper.__getitem__)
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    for old in folder.glob("*.png"):
        old.unlink()
    for scan in predict_scans(run.nets, _scans(data, list(chosen.values())), data, **settings):
        for rank in (rank for rank, patient in chosen.items() if patient == scan.patient):
            _draw_case(folder / f"{rank}_{scan.patient}_{scan.phase}.png", scan, data, facts, rank, paper[scan.patient])


def _draw_case(
    path: Path, scan: ScanPrediction, data: PreparedData, facts: DatasetFacts, rank: str, dice: float
) -> None:
    masks = torch.from_numpy(data.masks[data.index["mask"][scan.rows]])[:, None]
    depth, size = len(scan.rows), scan.image.shape[-1]
    plot_case(
        path,
        image=scan.image.cpu().numpy(),
        truth=canvas_to_grid(masks, size)[:, 0].numpy(),
        prediction=scan.probability.argmax(1).cpu().numpy(),
        confidence=scan.agreement.float().cpu().numpy(),
        slices=np.unique(np.linspace(0, depth - 1, min(depth, 6)).round().astype(int)).tolist(),
        class_names=facts.class_names[1:],
        title=f"{rank} patient: {scan.patient} {scan.phase}, paper Dice {dice:.1f} %",
    )
