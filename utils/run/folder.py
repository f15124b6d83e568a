"""The folder of a run: settings and split, who may write in it, how it is resumed or begun."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from config import RUNTIME_SETTINGS, Config
from utils.errors import UserError
from utils.files import RECORD, OutputFolder, folder_lock, read_json, require_space, write_json
from utils.run.checkpoint import load_networks, read_metadata
from utils.run.logger import read_log

CHECKPOINTS = ("last.pt", "previous.pt", "best.safetensors")
RUN_FILES = (*CHECKPOINTS, "config.json", "split.json", "log.jsonl", "steps.jsonl", "curves.png", "not_finite.txt",
             "wandb_id")  # fmt: skip
KEPT_EPOCHS = "epochs/*.safetensors"  # the networks that --keep-epochs keeps
# Settings that may differ between the command that began a run and the one that resumes it.
FREE_ON_RESUME = RUNTIME_SETTINGS | {"num_epoch", "max_steps"}
DEFAULTS = {field.name: field.default for field in fields(Config) if field.default is not MISSING}


@contextmanager
def hold_run(cfg: Config, world_size: int) -> Iterator[None]:
    """Hold the folder of a run while it is resumed or begun by `cfg`.

    Raises UserError when another process holds it, it cannot be written, it holds files of another program, or a run
    with other settings (unless `cfg.restart`).
    """
    with folder_lock(cfg.folder):
        OutputFolder(cfg.folder).require_free(*RUN_FILES)
        if not cfg.restart and any((cfg.folder / name).exists() for name in CHECKPOINTS):
            _require_same_settings(cfg.folder, _settings(cfg, world_size))
        yield


def _settings(cfg: Config, world_size: int) -> dict[str, Any]:
    """Return what config.json says of a run: its settings and its number of processes."""
    return json.loads(json.dumps(asdict(cfg))) | {"processes": world_size}


def _require_same_settings(folder: Path, now: dict[str, Any]) -> None:
    there = DEFAULTS | read_json(folder / "config.json")  # for settings that are new in the code
    keys = sorted(key for key in {*there, *now} - FREE_ON_RESUME if there.get(key) != now.get(key))
    if keys:
        lines = "".join(f"  {key}: {there.get(key)!r} there, {now.get(key)!r} now\n" for key in keys)
        raise UserError(f"{folder} holds a run with other settings:\n{lines}"
                        "Choose another --run-name, or begin anew with --restart")  # fmt: skip


def begin_run(cfg: Config, world_size: int, split: dict[str, list[str]], weight_bytes: int) -> OutputFolder:
    """Make the folder of a run; with `cfg.restart`, delete what an earlier run made there.

    Raises UserError where the disk has no room for checkpoints of networks of `weight_bytes` together.
    """
    folder = cfg.folder
    # Weights and two moments, three times (last, previous, being written); best, kept epochs.
    kept = len(list(folder.glob(KEPT_EPOCHS)))
    epochs = max(min(cfg.keep_epochs, cfg.num_epoch) + 1 - kept, 1) if cfg.keep_epochs else 0
    require_space(folder, (10 + epochs) * weight_bytes)
    if cfg.restart:
        for made in [folder, *(record.parent for record in folder.glob(f"results/*/{RECORD}"))]:
            OutputFolder(made).remove_stale()
    outputs = OutputFolder(folder)
    for name in RUN_FILES:
        outputs.claim(name)
    write_json(folder / "config.json", _settings(cfg, world_size))
    write_json(folder / "split.json", split)
    return outputs


def load_initial(run: Path, nets: list[nn.Module], dataset: Any, held_out: dict[str, str]) -> dict[str, str]:
    """Load the best networks of another run; return by checksum the patients that they have seen.

    Args:
        dataset: the DatasetInfo that they must be of.
        held_out: patients by checksum that they must not have seen; UserError where they have, or do not fit.
    """
    path = run / "best.safetensors"
    metadata = read_metadata(path)
    if (metadata["dataset"], metadata["class_names"]) != (dataset.key, list(dataset.class_names)):
        raise UserError(
            f"--init-from {run}: trained on {metadata['dataset']} with the classes {metadata['class_names']}, "
            f"expected {dataset.key} with {list(dataset.class_names)}"
        )
    if known := sorted({held_out[checksum] for checksum in held_out.keys() & metadata["seen"].keys()}):
        raise UserError(
            f"--init-from {run}: its networks have learnt from {len(known)} of the patients to hold out, "
            f"{', '.join(known[:5])}: begin with a run that held out the same domain"
        )
    load_networks(path, nets)
    return metadata["seen"]


def unfinished(folder: Path) -> str:
    """Return in brackets how far an unfinished run is; an empty text for a finished one."""
    lines = read_log(folder / "log.jsonl")
    if not lines:  # weights from elsewhere
        return ""
    planned = DEFAULTS | read_json(folder / "config.json")
    if lines[-1]["epoch"] >= planned["num_epoch"] or lines[-1]["step"] >= (planned["max_steps"] or sys.maxsize):
        return ""
    return f" (training not finished: epoch {lines[-1]['epoch']} of {planned['num_epoch']})"
