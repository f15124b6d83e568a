"""Where a program computes: device, precision, and its place among the processes of torchrun."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from utils.errors import UserError


class Process(NamedTuple):
    """This process among all of a run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes the log and the checkpoints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print in the main process alone."""
        if self.is_main:
            print(text)


@contextmanager
def process_group(device: str) -> Iterator[Process]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or be the only one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Process(choose_device(device))
        return
    if ":" in device:
        raise UserError(f"--device {device}: several processes take a GPU each; use --device cuda")
    chosen = choose_device(device, int(os.environ["LOCAL_RANK"]))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def choose_device(name: str, number: int = 0) -> torch.device:
    """Return the device of that name; "auto" is GPU `number` where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and number == 0:
            print("warning: no GPU found, running on the CPU")
    if name == "cpu":
        return torch.device(name)
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UserError(f"--device {name}: no such device; choose auto, cpu, cuda or cuda:NUMBER")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no GPU here (torch {torch.__version__}); use --device cpu")
    device, count = torch.device(name if ":" in name else f"{name}:{number}"), torch.cuda.device_count()
    if device.index >= count:
        raise UserError(f"--device {device}: there are {count} GPUs here, numbered from 0: choose one, or start "
                        "no more processes (--nproc-per-node)")  # fmt: skip
    return device


def autocast_context(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context of bf16 autocast, or of float32; "auto" is bf16 where it is faster."""
    enabled = precision == "bf16" or (precision == "auto" and bf16_is_faster(device.type))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@cache
def bf16_is_faster(device_type: str) -> bool:
    """Tell whether bf16 is faster than float32: natively on GPUs; on CPUs by AMX, or AMD's AVX-512.

    Intel's AVX-512 BF16 without AMX gains nothing over its float32 (docs/benchmark.md).
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported():  # PyTorch 2.10 has no public way to ask
        return True
    return torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace float tensors, in place, by their mean over all processes."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    unflatten(flat / dist.get_world_size(), tensors)


def unflatten(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy the concatenated values `flat` into `tensors`, in place."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    # One kernel for all of them, which no public function gives.
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def gather(items: list[Any]) -> list[Any]:
    """Return the items of all processes, in every process."""
    if not dist.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


@contextmanager
def main_first(process: Process) -> Iterator[None]:
    """Let the other processes wait for the main one, whose UserError ends them without a word."""
    failed = False
    try:
        yield
    except UserError:
        failed = True
        raise
    finally:
        if any_process(failed) and not process.is_main:
            sys.exit(1)


def any_process(flag: bool) -> bool:
    """Return True, in every process alike, when the flag is up in any of them."""
    return any(gather([flag]))
