"""The run's log: a JSON line per epoch in log.jsonl, mirrored to wandb when that is wanted and there; steps.jsonl."""

import json
import os
import secrets
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.errors import first_line
from utils.files import atomic_write

WANDB_PATIENCE = 60  # seconds that a run waits for wandb, whose service may be stopped or dead


class JsonLines(list):
    """The lines of a file; what is after step `since` is cut off, as a resumed run writes it again."""

    def __init__(self, path: Path, since: int):
        super().__init__(line for line in read_log(path) if line["step"] <= since)
        self.path = path
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, at once to the disk."""
        super().append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Logger:
    """The lines of log.jsonl, one per epoch, and the points of steps.jsonl, which several steps share."""

    def __init__(self, folder: Path, *, since: int, use_wandb: bool, config: dict[str, Any]):
        self.lines, self.points = JsonLines(folder / "log.jsonl", since), JsonLines(folder / "steps.jsonl", since)
        self.wandb_run = None
        if use_wandb:
            self.wandb_run = self._guarded(lambda: _start_wandb(folder, config))

    def log(self, line: dict[str, Any], pictures: dict[str, Path] | None = None) -> None:
        """Write the line of an epoch, to wandb, too; pictures go there only."""
        self.lines.append(line)
        if self.wandb_run:
            import wandb

            images = {name: wandb.Image(str(path)) for name, path in (pictures or {}).items()}
            self._guarded(lambda: self.wandb_run.log({**line, **images}, step=line["step"]))

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.wandb_run:
            self._guarded(lambda: self.wandb_run.finish(exit_code=0 if kind is None else 1))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns; when it fails or hangs, warn and go on without wandb, which costs no run."""
        outcome = _within(WANDB_PATIENCE, call)
        if not isinstance(outcome, Exception):
            return outcome
        print(f"warning: wandb failed ({first_line(outcome)}); from here on the log is in {self.lines.path} only")
        self.wandb_run = None
        # It has registered work for the end of the program, which would wait for its service for ever.
        _within(1, lambda: import_module("wandb").teardown())
        return None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what `call` returns or the exception that it raises; a TimeoutError when it takes longer."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else TimeoutError(f"no answer within {seconds:g} s")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; a last line that a killed process left unfinished is dropped, other bad ones named."""
    lines = []
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            if number < len(texts):
                print(f"warning: {path}: line {number} is damaged and left out")
    return lines


def _start_wandb(folder: Path, config: dict[str, Any]) -> Any:
    """Start or continue the wandb run of this folder: online with an account, else offline, never with a prompt."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return None
    import wandb  # imported here: it takes seconds, and only rank 0 of a run that wants it needs it

    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not wandb.login(prompt=False):
        mode = "offline"
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    return wandb.init(
        project="semidg-seg",
        name=folder.resolve().name,
        id=id_file.read_text(),
        resume="allow",
        dir=folder,
        config=config,
        mode=mode,
        # Without console capture: a dead service would otherwise block everything that prints.
        settings=wandb.Settings(silent=True, init_timeout=30, console="off"),
    )
