"""Trained runs: loading one for inference, what is known of it, and the list of all in a folder."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from config import Config
from utils.data.dataset import DatasetInfo
from utils.data.prepared import PreparedData
from utils.errors import UserError, first_line
from utils.evaluation.tables import Cell, Table
from utils.files import read_json
from utils.run.checkpoint import load_checkpoint, load_networks, read_metadata
from utils.run.logger import read_log


class TrainedRun(NamedTuple):
    """Both networks of a run, ready to predict, and what was saved beside them."""

    folder: Path
    checkpoint: str
    nets: list[nn.Module]
    config: Config
    metadata: dict[str, Any]
    reference: torch.Tensor | None  # (256,) quantile curve that histograms are matched to
    device: torch.device


def load_run(
    folder: Path, checkpoint: str, dataset: DatasetInfo, build_network: Callable[..., nn.Module], device: torch.device
) -> TrainedRun:
    """Load the networks of a run's "best" or "last" checkpoint; UserError when they are not there or do not fit."""
    require_run(folder, dataset)
    path, state = folder / "best.safetensors", None
    if checkpoint == "last":
        path, state = folder / "last.pt", load_checkpoint(folder)
        if state is None:
            raise UserError(f"{path}: no such file; the run has saved no state, or --run names no run's folder")
    metadata = read_metadata(path) if state is None else state["metadata"]
    if metadata["dataset"] != dataset.key:
        raise UserError(f"{path} was trained on {metadata['dataset']} data: use inference_{metadata['dataset']}.py")
    settings = metadata["config"]  # a setting that is newer than the run counts as its default
    try:
        config = Config(**{field.name: settings[field.name] for field in fields(Config) if field.name in settings})
    except UserError as error:
        raise UserError(f"{path}: {error}; evaluate it with the code that trained it") from error
    nets = [build_network(len(metadata["class_names"])) for _ in range(2)]
    if state is None:
        load_networks(path, nets)
    else:
        for net, weights in zip(nets, state["networks"], strict=True):
            net.load_state_dict(weights)
    nets = [net.to(device, memory_format=torch.channels_last).eval() for net in nets]
    reference = None if metadata["reference"] is None else torch.tensor(metadata["reference"], device=device)
    return TrainedRun(folder, checkpoint, nets, config, metadata, reference, device)


def require_run(folder: Path, dataset: DatasetInfo) -> None:
    """Raise UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; train one first: python {dataset.key}_train.py --help")


def open_data(run: TrainedRun, data_root: Path | None, dataset: DatasetInfo) -> tuple[PreparedData, bool]:
    """Open the data to evaluate a run on, by default those of its training, and say whether they are others."""
    if not data_root and not Path(run.config.data_root).exists():
        raise UserError(
            f"{run.folder} was trained on the data in {run.config.data_root}, which is not there (seen from "
            f"{Path.cwd()}): --data-root names the folder where these data lie now"
        )
    data = PreparedData.open(data_root or run.config.data_root, dataset)
    return data, run.metadata["content_hash"] not in (None, data.info["content_hash"])


def on_other_data(summary: dict[str, Any]) -> bool:
    """Return True if an evaluation was made on other data than those of the training."""
    return summary["trained_by"]["content_hash"] not in (None, summary["content_hash"])


def require_unseen(run: TrainedRun, patients: Sequence[str], root: Path) -> None:
    """Raise UserError when the run's training has seen a patient to evaluate on."""
    if (run.folder / "split.json").exists():  # not beside converted weights
        split = read_json(run.folder / "split.json")
        seen = sorted({p for part in ("labeled", "unlabeled", "validation") for p in split[part]} & set(patients))
        if seen:
            raise UserError(
                f"{run.folder} was trained with {len(seen)} of the patients of {root} to evaluate on: "
                f"{', '.join(seen[:5])}. Evaluate on others, or rename these if they only share their names"
            )


def unfinished(folder: Path) -> str:
    """Return how far a run is that has not trained to its end, as a remark in brackets; empty where it has."""
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


def method_name(metadata: dict[str, Any]) -> str:
    """Return the name of a run's method: the full one, a step of its ablation, or an unknown mode's own name."""
    config = metadata["config"]
    if config["cps_weight"] == 0:
        return "supervised only"
    loss, mode = config["cps_loss"], config["fourier_mode"]
    name = {"pixel": "full", "scalar": "confidence as released", "plain": "plain CPS"}.get(loss, loss)
    if loss == "plain" and config["fourier_aug"]:
        name += " + Fourier"
    if config["fourier_aug"] and mode != "AS":
        name += " (amplitude mix)" if mode == "AM" else f" ({mode})"
    name += "" if config["cutmix"] else ", no CutMix"
    return name if metadata["cps_weight"] else f"{name}, before its pseudo supervision"


def runs_table(root: Path, dataset: DatasetInfo) -> Table:
    """List the runs below `root` with their best scores; a run that cannot be read costs its own row only."""
    rows, rules = [], {}
    for path in sorted(root.glob("*/best.safetensors")):
        name = path.parent.name
        try:
            metadata = read_metadata(path)
            if metadata["dataset"] == dataset.key:
                rows.append([name, *_run_row(path.parent, metadata)])
                rules[metadata["selection"]] = None
        except (UserError, LookupError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            rows.append([name, f"cannot be read ({kind}{first_line(error)})", *[""] * 6])
    if not rows:
        raise UserError(
            f"{root}: no run of {dataset.name} there; train one first: python {dataset.key}_train.py --help"
        )
    header = ["run", "held out", "labelled", "method", "seed", "best at step", "source Dice (%)"]
    note = f"Best checkpoint: {'; '.join(rules) or 'unknown'}."
    return Table(f"Runs in {root}", note, [*header, f"{dataset.domain_kind} Dice (%)"], rows)


def _run_row(folder: Path, metadata: dict[str, Any]) -> list[Any]:
    config = metadata["config"]
    source = max((line["val_dice"] for line in read_log(folder / "log.jsonl")), default=None)
    evaluated = folder / "results" / config["test_domain"] / "summary.json"
    summary = read_json(evaluated) if evaluated.exists() else None  # an earlier version left those of other data there
    held_out = {"mean": None, "std": None} if not summary or on_other_data(summary) else summary["paper_protocol"]
    row = [config["test_domain"], f"{100 * config['ratio']:g} %", method_name(metadata), config["seed"]]
    return [*row, f"{metadata['step']}{unfinished(folder)}", Cell(source), Cell(held_out["mean"], held_out["std"])]
