"""The run's log: one JSON line per epoch in log.jsonl, mirrored to wandb when that is wanted and there."""

import json
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any


class Logger:
    """Appends to FOLDER/log.jsonl; lines after step `since` are cut off, as the resumed run writes them again."""

    def __init__(self, folder: Path, *, since: int, use_wandb: bool, config: dict[str, Any]):
        self.path = folder / "log.jsonl"
        self.lines = [line for line in read_log(self.path) if line["step"] <= since]
        temporary = folder / ".log.jsonl.tmp"  # a process killed here must not lose the lines
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(temporary, self.path)
        self.wandb_run = _start_wandb(folder, config) if use_wandb else None

    def log(self, line: dict[str, Any], pictures: dict[str, Path] | None = None) -> None:
        """Write one line, at once to the disk; pictures go to wandb only."""
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.wandb_run:
            import wandb

            images = {name: wandb.Image(str(path)) for name, path in (pictures or {}).items()}
            self.wandb_run.log({**line, **images}, step=line["step"])

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.wandb_run:
            self.wandb_run.finish(exit_code=0 if kind is None else 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; a last line that a killed process left unfinished is dropped, any other bad one named."""
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
    import wandb  # imported here: it takes seconds, and only rank 0 of a run that wants it needs it

    try:
        account = wandb.login(prompt=False)
        name = folder.resolve().name
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        return wandb.init(
            project="semidg-seg",
            name=name,
            id=id_file.read_text(),
            resume="allow",
            dir=folder,
            config=config,
            mode=None if account or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(silent=True, init_timeout=30),
        )
    except Exception as error:  # a logging service must never cost a run
        print(f"warning: wandb could not start ({error}); logging to {folder / 'log.jsonl'} only")
        return None
