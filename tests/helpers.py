"""What several tests share: a small stand-in for the network, short trainings, processes of their own."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import openpyxl
import torch
from torch import nn

import mms_dataloader
from utils.data.loaders import build_loaders
from utils.device import Process
from utils.engine import fit
from utils.evaluation.runs import load_run
from utils.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
CPU = torch.device("cpu")
MMS = mms_dataloader.DATASET
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/data"}


class TinyNetwork(nn.Module):
    """Has what the training must handle: BatchNorm, dropout, two scales."""

    def __init__(self, num_classes, pretrained="none"):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def forward(self, image):
        return self.classifier(self.features(image))


def train(cfg, build=TinyNetwork, dataset=MMS, device=CPU, **changes):
    """Train by `cfg` and the changes of it, and return the folder of the run."""
    cfg = replace(cfg, **changes)
    fit(cfg, build_loaders(cfg, dataset), build, Process(device))
    return cfg.folder


def tiny_trainer(cfg, state=None):
    """What `train` would train with."""
    return Trainer(cfg, build_loaders(cfg, MMS), TinyNetwork, Process(CPU), state)


def load(folder, checkpoint="best", dataset=MMS, build=TinyNetwork):
    """Load a run for its evaluation."""
    return load_run(folder, checkpoint, dataset, build, CPU, autocast=nullcontext)


def write_table(path, lines, encoding="utf-8", delimiter=","):
    """Write lines of cells as a spreadsheet or, by the file's name, as CSV."""
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for line in lines:
            book.active.append(line)
        book.save(path)
    else:
        with open(path, "w", newline="", encoding=encoding) as file:
            csv.writer(file, delimiter=delimiter).writerows(lines)


def run_python(*arguments, cwd=ROOT, timeout=None, **variables):
    """Run Python in a process of its own, which finds the project and the tests."""
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": cwd, "timeout": timeout, "env": os.environ | PATHS | variables}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **options)


def start_python(*arguments):
    """Start Python at the head of a process group, with output and errors in one stream."""

    def undo_nohup():  # or whatever has the tests ignore signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | PATHS, start_new_session=True, preexec_fn=undo_nohup,
    )  # fmt: skip


def start_process(target, *args):
    """Start `target` in a process of its own; never by a fork of this one, whose threads may hold locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["utils.engine", "utils.data.loaders", "helpers"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def seeded_weights(shapes, seed):
    """Return the weights behind the parity fixtures: the i-th key in sorted order is drawn from rng [seed, i]."""
    state = {}
    for i, (key, shape) in enumerate(sorted(shapes.items())):
        r = np.random.default_rng([seed, i])
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif key.endswith("running_var"):
            value = r.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean") or key.endswith("bias"):
            value = r.normal(0, 0.1, shape)
        elif len(shape) == 4:
            value = r.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        else:
            value = r.uniform(0.5, 1.0, shape)
        state[key] = torch.from_numpy(np.asarray(value)).to(torch.int64 if value.dtype == np.int64 else torch.float32)
    return state
