"""The folder of a run: its settings and split, who may write in it, how it is resumed or begun anew."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from config import RUNTIME_SETTINGS, Config
from utils.errors import UserError
from utils.files import RECORD, OutputFolder, folder_lock, read_json, require_space, write_json

CHECKPOINTS = ("last.pt", "previous.pt", "best.safetensors")
RUN_FILES = (*CHECKPOINTS, "config.json", "split.json", "log.jsonl", "curves.png", "not_finite.txt", "wandb_id")
KEPT_EPOCHS = "epochs/*.safetensors"  # the networks that --keep-epochs keeps
# Settings that may differ between the command that began a run and the one that resumes it.
FREE_ON_RESUME = RUNTIME_SETTINGS | {"num_epoch", "max_steps"}
DEFAULTS = {field.name: field.default for field in fields(Config) if field.default is not MISSING}


@contextmanager
def open_run(folder: Path, cfg: Config, world_size: int) -> Iterator[None]:
    """Hold the folder of a run while it is resumed or begun by `cfg`.

    Raises:
        UserError: another process holds it, it cannot be written, it holds files of another program or of an earlier
            version of this one, or a run with other settings (unless `cfg.restart`).
    """
    with folder_lock(folder):
        if not (folder / RECORD).exists() and (folder / "last.pt").exists():
            raise UserError(
                f"{folder} holds a run of an earlier version of this project, or files of another program: finish it "
                "with the code that began it, or choose another --run-name"
            )
        OutputFolder(folder).require_free(*RUN_FILES)
        if not cfg.restart and any((folder / name).exists() for name in CHECKPOINTS):
            require_same_settings(folder, settings_of(cfg, world_size))
        yield


def settings_of(cfg: Config, world_size: int) -> dict[str, Any]:
    """Return what config.json says of a run: its settings and its number of processes."""
    return json.loads(json.dumps(asdict(cfg))) | {"processes": world_size}


def require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, where `folder` holds a run with other settings."""
    try:
        began = DEFAULTS | read_json(folder / "config.json")  # a setting that is new in the code had its default
    except UserError as error:
        raise UserError(f"{error}: restore it, or begin anew with --restart") from error
    differing = {
        key: (began.get(key), settings.get(key))
        for key in {*began, *settings} - FREE_ON_RESUME
        if began.get(key) != settings.get(key)
    }
    if differing:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in sorted(differing.items())]
        raise UserError(
            f"{folder} holds a run with other settings:\n" + "\n".join(lines) + "\n"
            "Choose another --run-name, or begin anew with --restart"
        )


def begin_run(
    folder: Path, cfg: Config, world_size: int, split: dict[str, list[str]], weight_bytes: int
) -> OutputFolder:
    """Make `folder` the run of these settings; with `cfg.restart`, delete what an earlier run of that name made.

    Args:
        split: patients by their part in the run.
        weight_bytes: of both networks.

    Raises:
        UserError: the disk has no room for the checkpoints.
    """
    # Weights and two moments, as last, as previous and as the file being written; the best weights and kept epochs.
    kept = len(list(folder.glob(KEPT_EPOCHS)))
    epochs = max(min(cfg.keep_epochs, cfg.num_epoch) + 1 - kept, 1) if cfg.keep_epochs else 0
    require_space(folder, (10 + epochs) * weight_bytes)
    if cfg.restart:
        for made in [folder, *(record.parent for record in folder.glob(f"results/*/{RECORD}"))]:
            OutputFolder(made).remove_stale()
    outputs = OutputFolder(folder)
    for name in RUN_FILES:
        outputs.claim(name)
    write_json(folder / "config.json", settings_of(cfg, world_size))
    write_json(folder / "split.json", split)
    return outputs
