"""What a run writes as it goes: log (to wandb, too), weights and pictures."""

import json
import os
import secrets
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from torch import nn
from tqdm import tqdm

from utils.errors import first_line
from utils.files import OutputFolder, atomic_write
from utils.run.checkpoint import save_checkpoint, save_networks

WANDB_PATIENCE = 60  # seconds that a run waits for wandb, whose service may be dead


class NullLogger:
    """Does nothing where a Logger writes: for all processes but the main one."""

    def __getattr__(self, _name: str) -> "NullLogger":
        return self

    def __call__(self, *_, **__) -> None: ...


class Logger:
    """Writes a run's folder: log.jsonl, a line an epoch, steps.jsonl, weights, pictures."""

    def __init__(self, outputs: OutputFolder, *, since: int, total: int, use_wandb: bool, config: dict):
        """Go on after step `since` of `total`."""
        self.outputs, self.folder = outputs, outputs.folder
        self.lines, self.points = (JsonLines(self.folder / f"{name}.jsonl", since) for name in ("log", "steps"))
        self.progress = tqdm(total=total, initial=since, unit="step", desc="train", smoothing=0.1)
        self.say = self.progress.write  # above the bar
        self.save_best = partial(save_networks, self.folder / "best.safetensors")
        self.save_checkpoint = partial(save_checkpoint, self.folder)
        self.wandb_run = self._guarded(lambda: _start_wandb(self.folder, config)) if use_wandb else None

    def point(self, point: dict) -> None:
        """Write a point of the curves, and show its losses beside the bar."""
        self.points.append(point)
        self.progress.set_postfix({name: f"{point[name]:.3f}" for name in ("loss", "cps")})

    def log(self, line: dict) -> None:
        """Write the line of an epoch, to wandb, too."""
        self.lines.append(line)
        self._to_wandb(line)

    def picture(self, name: str, draw: Callable[[Path], None]) -> None:
        """Let `draw` write a picture; one that fails is a warning: no picture is worth a run."""
        path = self.outputs.claim(name)
        try:
            draw(path)
        except Exception as error:  # whatever a drawing library raises
            self.say(f"warning: {path} could not be drawn ({type(error).__name__}: {first_line(error)})")
        else:
            if self.wandb_run:
                self._to_wandb({path.stem.split("_")[0]: import_module("wandb").Image(str(path))})

    def keep_epoch(self, epoch: int, count: int, nets: list[nn.Module], metadata: dict) -> None:
        """Keep the networks of the last `count` epochs, this one among them."""
        name = "epochs/epoch_{:03d}.safetensors".format
        save_networks(self.outputs.claim(name(epoch)), nets, metadata)
        for old in {*map(name, range(epoch - count + 1))} & self.outputs.made:
            (self.folder / old).unlink(missing_ok=True)

    def finish(self, text: str) -> None:
        """Print the last line, and delete what only an unfinished run needs."""
        (self.folder / "previous.pt").unlink(missing_ok=True)
        self.say(text)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.progress.close()
        if self.wandb_run:
            self._guarded(lambda: self.wandb_run.finish(exit_code=0 if kind is None else 1))

    def _to_wandb(self, content: dict) -> None:
        if self.wandb_run:
            self._guarded(lambda: self.wandb_run.log(content, step=self.lines[-1]["step"]))

    def _guarded(self, call: Callable):
        """Return what `call` returns; when it fails or hangs, warn and go on without wandb."""
        outcome = _within(WANDB_PATIENCE, call)
        if isinstance(outcome, Exception):
            self.say(f"warning: wandb failed ({first_line(outcome)}); the log is in {self.lines.path} only")
            # Its work at the program's end would wait for its service for ever.
            _within(1, lambda: import_module("wandb").teardown())
            self.wandb_run = outcome = None
        return outcome


class JsonLines(list):
    """The lines of a file; those after step `since` are cut off."""

    def __init__(self, path: Path, since: int):
        super().__init__(line for line in read_log(path) if line["step"] <= since)
        self.path = path
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self))

    def append(self, line: dict) -> None:
        super().append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict]:
    """Read a log; a last line that a kill cut off is dropped, other bad ones are named."""
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


def _within(seconds: float, call: Callable):
    """Return what `call` returns or raises; a TimeoutError when it takes longer."""
    outcome = [TimeoutError(f"no answer within {seconds:g} s")]

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)  # a pool's would delay the end
    thread.start()
    thread.join(seconds)
    return outcome[-1]


def _start_wandb(folder: Path, config: dict):
    """Start or continue the folder's wandb run: online with an account, else offline."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return None
    import wandb  # imported here: it takes seconds

    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not wandb.login(prompt=False):
        mode = "offline"
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    return wandb.init(
        project="semidg-seg", name=folder.resolve().name, id=id_file.read_text(), dir=folder, resume="allow",
        # Its capture of the console would let a dead service block everything that prints.
        config=config, mode=mode, settings=wandb.Settings(silent=True, init_timeout=30, console="off"),
    )  # fmt: skip
