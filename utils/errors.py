"""Errors that are a user's to mend: one clear message, exit status 1, no traceback."""

import io
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake of the input or surroundings; it names the file, key or value and the remedy."""


def first_line(error: Exception) -> str:
    """Return what a library's exception says, on one line; its kind where it says nothing."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a user's mistake, a refusing disk, a full GPU or Ctrl-C into a message and an exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal shows every character
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        kind, reason = type(error).__name__, first_line(error)  # `--help` shall not wait for torch
        if kind == "OutOfMemoryError":
            sys.exit(
                f"error: out of GPU memory ({reason})\nUse --checkpoint-activations, --precision bf16, or a "
                "smaller --image-size or --batch-size (with --accumulate the step stays as large)."
            )
        if kind == "InductorError":  # for instance without Python.h
            sys.exit(f"error: --compile failed: leave it out, or mend the compiler ({reason})")
        if not str(error).startswith("DataLoader"):  # PyTorch has no class for it
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch reports the workers
        for worker in multiprocessing.active_children():  # Python would wait for a stalled one
            worker.kill()
        sys.exit(
            f"error: a process that reads the data stalled or died ({reason}). Check the disk of the data "
            "and the memory, or use --workers 0; what was saved before is intact"
        )
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'}: {first_line(error)}; what was saved before is intact")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


@contextmanager
def memory_errors(name: Path, remedy: str = "") -> Iterator[None]:
    """Turn a full memory, of machine or GPU, into a UserError that names a path."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not full and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"{name}: out of memory: try --device cpu, --precision bf16{remedy}") from error


@contextmanager
def naming(
    path: Path | str, problem: str, *, errors: type[Exception] | tuple = Exception, remedy: str = ""
) -> Iterator[None]:
    """Turn what a library raises into a UserError: "PATH PROBLEM (what the library says)REMEDY"."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: permission denied: ask its owner for the right, or choose another place") from error
    except errors as error:
        raise UserError(f"{path} {problem} ({first_line(error)}){remedy}") from error
