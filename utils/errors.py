"""Errors that are a user's to mend: one clear message, exit status 1, no traceback."""

import contextlib
import sys
from collections.abc import Iterator

import torch


class UserError(Exception):
    """A mistake in the input or its surroundings; the message names the file, key or value and the remedy."""


def first_line(error: Exception) -> str:
    """What an exception of a library says, on one line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a UserError, or a full GPU memory, inside the block into a message on stderr and exit status 1."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: out of GPU memory ({first_line(error)})\n"
            "Use a smaller --batch-size or --image-size, or --precision bf16."
        )
