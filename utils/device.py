"""Where a program computes: device, precision, place among the processes of torchrun."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
        """True in the one process that writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print in the main process."""
        if self.is_main:
            print(text)


@contextmanager
def process_group(device: str) -> Iterator[Process]:
    """Join the processes that torchrun started (by nccl or gloo), or be the only one."""
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
        ways = "choose one, or start no more processes (--nproc-per-node)"
        raise UserError(f"--device {device}: there are {count} GPUs here, numbered from 0: {ways}")
    return device


def autocast_context(device: torch.device, precision: str) -> torch.autocast:
    """Return a context of bf16, or of float32; "auto" is bf16 where it is faster."""
    enabled = precision == "bf16" or (precision == "auto" and bf16_is_faster(device.type))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@cache
def bf16_is_faster(device_type: str) -> bool:
    """Tell whether bf16 is faster: on GPUs that have it, on CPUs with AMX or AMD's AVX-512."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported():  # without, Intel's gains nothing (docs/benchmark.md)
        return True
    return torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace float tensors, in place, by their mean over all processes."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        unflatten(flat / dist.get_world_size(), tensors)


def unflatten(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy the concatenated values `flat` into `tensors`, in place."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    # One kernel for all of them, which no public function gives.
    torch._foreach_copy_([*tensors], [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def gather(items: list) -> list:
    """Return the items of all processes, in every process."""
    if not dist.is_initialized():
        return items
    parts = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


@contextmanager
def main_first(process: Process) -> Iterator[None]:
    """Let the other processes wait for the main one, whose error ends them without a word."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if any_process(failed) and not process.is_main:
            sys.exit(1)


def any_process(flag: bool) -> bool:
    """Return, in every process, whether the flag is up in any of them."""
    return any(gather([flag]))
