"""Trained runs: loading one for inference, what is known of it, and the list of all in a folder."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from config import RUNTIME_SETTINGS, Config
from utils.data.dataset import DatasetInfo
from utils.data.prepared import NO_DOMAIN, PreparedData
from utils.errors import UserError, first_line
from utils.evaluation.predict import Member
from utils.evaluation.tables import Cell, Table
from utils.files import read_json
from utils.run.checkpoint import load_checkpoint, load_networks, read_metadata
from utils.run.folder import DEFAULTS, patients_seen, unfinished
from utils.run.logger import read_log

VARYING = {"seed", "test_domain", "init_from"}  # settings in which the runs of a table differ by design
METHOD_SETTINGS = {"cps_weight", "cps_loss", "fourier_aug", "fourier_mode", "cutmix"}  # those that name the method


class TrainedRun(NamedTuple):
    """Both networks of a run, ready to predict, and what was saved beside them."""

    folder: Path
    checkpoint: str
    nets: list[nn.Module]
    config: Config
    metadata: dict[str, Any]
    reference: torch.Tensor | None  # (256,) quantile curve that histograms are matched to
    device: torch.device
    others: tuple["TrainedRun", ...] = ()  # runs whose predictions are averaged with this one's

    @property
    def members(self) -> list[Member]:
        """What this run and the others predict with."""
        return [Member(run.nets, run.reference, run.config) for run in (self, *self.others)]


def load_run(
    folder: Path, checkpoint: str, dataset: DatasetInfo, build_network: Callable[..., nn.Module], device: torch.device
) -> TrainedRun:
    """Load the networks of a run's "best" or "last" checkpoint, or of a kept one such as "epochs/epoch_007".

    Raises:
        UserError: they are not there or do not fit.
    """
    path, metadata, state = _read_run(folder, checkpoint, dataset)
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


def ensemble(runs: Sequence[TrainedRun], *, evaluate: bool) -> TrainedRun:
    """Return the first run with the others to average with; UserError, naming what differs, when they do not fit."""
    facts = {
        "classes": lambda run: ", ".join(run.metadata["class_names"]),
        "image sizes": lambda run: run.config.image_size,
        "held-out domains": lambda run: run.config.test_domain if evaluate else None,
    }
    for name, fact in facts.items():
        if len({fact(run) for run in runs}) > 1:
            found = "; ".join(f"{run.folder}: {fact(run)}" for run in runs)
            raise UserError(f"--ensemble: the runs have different {name} ({found})")
    return runs[0]._replace(others=tuple(runs[1:]))


def _read_run(folder: Path, checkpoint: str, dataset: DatasetInfo) -> tuple[Path, dict, dict | None]:
    """Return the file of a run's checkpoint, its metadata and, of "last", the whole state."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; train one first: python {dataset.key}_train.py --help")
    path, state = folder / f"{checkpoint}.safetensors", None
    if checkpoint == "last":
        path, state = folder / "last.pt", load_checkpoint(folder)
        if state is None:
            raise UserError(f"{path}: no such file; the run has saved no state, or --run names no run's folder")
    metadata = read_metadata(path) if state is None else state["metadata"]
    if metadata["dataset"] != dataset.key:
        raise UserError(f"{path} was trained on {metadata['dataset']} data: use inference_{metadata['dataset']}.py")
    return path, metadata, state


def name_rows(
    folders: Sequence[Path], checkpoint: str, dataset: DatasetInfo, *, labels: Sequence[str], one_data: bool
) -> list[str]:
    """Return the names of several runs in one table: their labels, or their methods and the settings that tell apart.

    Args:
        one_data: all runs are evaluated on the same data, whatever their training's.

    Raises:
        UserError: the runs cannot stand in one table, or there are not as many labels as runs.
    """
    found = [_read_run(folder, checkpoint, dataset)[1] for folder in folders]
    settings = [DEFAULTS | m["config"] | {"data": (m["content_hash"] or "unknown")[:8]} for m in found]
    for of_run in settings:  # which run it began with differs by seed and domain, but not whether it began so
        of_run["begun"] = "with another run" if of_run["init_from"] else "anew"
    names = list(labels) or _names_by_settings(list(map(method_name, found)), settings)
    if len(names) != len(folders):
        raise UserError(f"--label gives {len(labels)} names for {len(folders)} runs: give one per --run, in that order")
    problems = []
    for key, remedy in (("ratio", ""), ("data", "; --data-root names data to evaluate all of them on")):
        if len({s[key] for s in settings}) > 1 and not (key == "data" and one_data):
            each = ", ".join(f"{folder}: {s[key]}" for folder, s in zip(folders, settings, strict=True))
            rule = "one table takes runs of one label ratio, trained on the same data"
            problems.append(f"{rule}, not {key} {each}{remedy}")
    if any(s["test_domain"] == NO_DOMAIN for s in settings):
        problems.append(f"a run trained on all domains has no place in a table over held-out {dataset.domain_kind}s")
    cells = [(name, s["test_domain"], s["seed"]) for name, s in zip(names, settings, strict=True)]
    if twice := ", ".join(str(folder) for folder, cell in zip(folders, cells, strict=True) if cells.count(cell) > 1):
        remedy = "give one, or tell them apart by --label"
        problems.append(f"{twice} have the same settings, held-out domain and seed: {remedy}")
    if problems:
        raise UserError("\n".join(problems))
    return names


def _names_by_settings(methods: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return each run's method with the settings in which two of the runs differ.

    A setting that makes the method is named only between runs of one method.
    """
    keys = sorted(set().union(*settings) - RUNTIME_SETTINGS - VARYING)
    texts = [{key: str(s.get(key)).removesuffix(".0") for key in keys} for s in settings]
    names = []
    for method, own in zip(methods, texts, strict=True):
        of_method = [text for other, text in zip(methods, texts, strict=True) if other == method]
        beside = {key: of_method if key in METHOD_SETTINGS else texts for key in keys}
        told_apart = [key for key in keys if any(text[key] != own[key] for text in beside[key])]
        names.append(", ".join([method, *(f"{key} {own[key]}" for key in told_apart)]))
    return names


def open_data(run: TrainedRun, data_root: Path | None, dataset: DatasetInfo) -> tuple[PreparedData, str, str]:
    """Open the data to evaluate a run on, by default those of its training.

    Returns:
        The data, the name of the results' folder, and their title; both name data other than those of the training.
    """
    domain = run.config.test_domain
    if domain == NO_DOMAIN and not data_root:
        raise UserError(
            f"{run.folder} was trained on all domains: name labelled data that it has not seen by --data-root, or "
            "scans of your own by --input"
        )
    if not data_root and not Path(run.config.data_root).exists():
        raise UserError(
            f"{run.folder} was trained on the data in {run.config.data_root}, which is not there (seen from "
            f"{Path.cwd()}): --data-root names the folder where these data lie now"
        )
    data = PreparedData.open(data_root or run.config.data_root, dataset)
    held_out = "all domains" if domain == NO_DOMAIN else f"{dataset.domain_kind} {domain}"
    if not is_other(run.metadata, data.info):
        return data, domain, f"{dataset.name}, held-out {held_out}"
    name = data.root.resolve().name
    return data, f"{domain}@{name}", f"{dataset.name}, {held_out} of data other than the training's: {name}"


def is_other(training: dict[str, Any], data: dict[str, Any]) -> bool:
    """Return True if data are not those of a training, by their content hashes; weights from elsewhere know none."""
    return training["content_hash"] not in (None, data["content_hash"])


def patients_to_evaluate(run: TrainedRun, data: PreparedData, domain: str, dataset: DatasetInfo) -> list[str]:
    """Return the patients with masks of a domain.

    Raises:
        UserError: there are none, or the training of the run, or of one averaged with it, has seen one of them.
    """
    patients = data.patients_with_masks(domain)
    if not patients:
        raise UserError(
            f"{data.root} has no {dataset.domain_kind} {domain} with masks to evaluate on: check --data-root"
        )
    for member in (run, *run.others):
        if seen := sorted({*patients} & patients_seen(member.folder, member.metadata)):
            raise UserError(
                f"{member.folder} was trained with {len(seen)} of the patients of {data.root} to evaluate on: "
                f"{', '.join(seen[:5])}. Evaluate on others, or rename these if they only share their names"
            )
    return patients


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
    header = ["run", "held out", "labelled", "method", "seed", "best at step", "Dice on labelled source (%)"]
    note = f"Best checkpoint: {'; '.join(rules) or 'unknown'}."
    return Table(f"Runs in {root}", note, [*header, f"{dataset.domain_kind} Dice (%)"], rows)


def _run_row(folder: Path, metadata: dict[str, Any]) -> list[Any]:
    config = metadata["config"]
    source = max((line["val_dice"] for line in read_log(folder / "log.jsonl")), default=None)
    evaluated, held_out = folder / "results" / config["test_domain"] / "summary.json", Cell(None)
    if evaluated.exists() and not is_other((found := read_json(evaluated))["trained_by"], found):  # earlier versions
        held_out = Cell(found["paper_protocol"]["mean"], found["paper_protocol"]["std"])
    row = [config["test_domain"], f"{100 * config['ratio']:g} %", method_name(metadata), config["seed"]]
    return [*row, f"{metadata['step']}{unfinished(folder)}", Cell(source), held_out]
