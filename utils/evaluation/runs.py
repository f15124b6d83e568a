"""A trained run and the data to evaluate it on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from config import Config
from utils.data.dataset import DatasetInfo
from utils.data.prepared import NO_DOMAIN, PreparedData
from utils.errors import UserError
from utils.evaluation.predict import Autocast, Predictor
from utils.run.checkpoint import load_checkpoint, load_networks, read_metadata
from utils.run.folder import KEPT_EPOCHS

CHECKPOINT = re.compile(r"best|last|epochs/epoch_\d+")


class TrainedRun(NamedTuple):
    """Both networks of a run, and what was saved beside them."""

    folder: Path
    checkpoint: str  # "best", "last" or as "epochs/epoch_007"
    predictor: Predictor
    config: Config
    metadata: dict


def load_run(
    folder: Path, checkpoint: str, dataset: DatasetInfo, build_network: Callable,
    device: torch.device, *, autocast: Autocast, tta: bool = False,
) -> TrainedRun:  # fmt: skip
    """Load a checkpoint's networks into a `Predictor`; raises as `read_run`."""
    path, metadata, state = read_run(folder, checkpoint, dataset)
    try:
        config, _ = Config(**metadata["config"]), (metadata["seen"], metadata["labeled"])
    except (UserError, TypeError, KeyError) as error:
        raise UserError(f"{path}: of another version ({error}); use the code that trained it") from error
    nets = [build_network(len(metadata["class_names"])) for _ in range(2)]
    if state is None:
        load_networks(path, nets)
    else:
        for net, weights in zip(nets, state["networks"], strict=True):
            net.load_state_dict(weights)
    nets = [net.to(device, memory_format=torch.channels_last).eval() for net in nets]
    reference = metadata["reference"] and torch.tensor(metadata["reference"], device=device)
    predictor = Predictor(nets, reference, config, autocast, tta)
    return TrainedRun(folder, checkpoint, predictor, config, metadata)


def read_run(folder: Path, checkpoint: str, dataset: DatasetInfo) -> tuple[Path, dict, dict | None]:
    """Return a checkpoint's file, metadata and, of "last", state; UserError if missing or foreign."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; train one: python {dataset.key}_train.py --help")
    if runs := ", ".join(sorted(path.parent.name for path in folder.glob("*/best.safetensors"))):
        raise UserError(f"{folder} is no run but holds runs: {runs}")
    path, state = folder / f"{checkpoint}.safetensors", None
    if checkpoint == "last":
        path, state = folder / "last.pt", load_checkpoint(folder)
        if state is None:
            raise UserError(f"{path}: no such file; the run has saved no state, or is none")
    elif checkpoint != "best" and not path.exists():
        kept = ", ".join(sorted(f"epochs/{file.stem}" for file in folder.glob(KEPT_EPOCHS)))
        raise UserError(f"{path}: no such file; --keep-epochs has kept: {kept or 'none'}")
    metadata = read_metadata(path) if state is None else state["metadata"]
    if (key := metadata["dataset"]) != dataset.key:
        raise UserError(f"{path} was trained on {key} data: use inference_{key}.py")
    return path, metadata, state


def open_data(run: TrainedRun, data_root: Path | None, dataset: DatasetInfo) -> tuple[PreparedData, str, str]:
    """Open the data to evaluate on; return the results' folder's name and title, too."""
    domain, root = run.config.test_domain, data_root or Path(run.config.data_root)
    if domain == NO_DOMAIN and not data_root:
        raise UserError(f"{run.folder} was trained on all domains: use --data-root or --input")
    if not data_root and not root.exists():
        raise UserError(
            f"{run.folder} was trained on the data in {root}, which is not there (seen from "
            f"{Path.cwd()}): name their folder by --data-root"
        )
    data = PreparedData.open(root, dataset)
    held_out = "all domains" if domain == NO_DOMAIN else f"{dataset.domain_kind} {domain}"
    if not is_other(run.metadata, data.info):
        return data, domain, f"{dataset.name}, held-out {held_out}"
    name = root.resolve().name
    return data, f"{domain}@{name}", f"{dataset.name}, {held_out} of other data: {name}"


def is_other(training: dict, data: dict) -> bool:
    """Return True if data are not the training's; converted weights know no content hash."""
    return training["content_hash"] not in (None, data["content_hash"])


def patients_to_evaluate(run: TrainedRun, data: PreparedData, domain: str) -> list[str]:
    """Return a domain's patients with masks; UserError for none, or one seen in training, by name or voxels."""
    patients = data.patients_with_masks(domain)
    if not patients:
        raise UserError(f"{data.root}: no masks of domain {domain} to evaluate on: check --data-root")
    seen = run.metadata["seen"]  # patients by checksum
    known = {patient: patient for patient in {*patients} & {*seen.values()}}
    known |= {p: seen[key] for key, p in data.checksums(patients).items() if key in seen}
    if known:
        pairs = ", ".join(f"{name} is {known[name]} of the training" for name in sorted(known)[:5])
        raise UserError(
            f"{run.folder} has seen {len(known)} of the patients of {data.root}: {pairs}. "
            "Evaluate on others; rename those that only share a name"
        )
    return patients


def method_name(metadata: dict) -> str:
    """Name a run's method; an unknown mode goes by its own name."""
    config = metadata["config"]
    if config["cps_weight"] == 0:
        return "supervised only" + ", robust" * config["robust"]
    loss, mode = config["cps_loss"], config["fourier_mode"]
    name = {"pixel": "full", "scalar": "confidence as released", "plain": "plain CPS"}.get(loss, loss)
    if config["fourier_aug"]:
        name += " + Fourier" if loss == "plain" else ""
        name += {"AS": "", "AM": " (amplitude mix)"}.get(mode, f" ({mode})")
    name += "" if config["cutmix"] else ", no CutMix"
    name = name.replace("full", "robust") if config["robust"] else name
    return name if metadata["cps_weight"] else f"{name}, before its pseudo supervision"
