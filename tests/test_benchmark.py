"""The benchmark: the whole command at a small size, and its training steps with a small network."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from utils import benchmark
from utils.device import Process

pytestmark = pytest.mark.slow


def test_command_measures_input_and_inference(tmp_path):
    command = [sys.executable, "-m", "utils.benchmark", "--device", "cpu", "--image-size", "32", "--batch-size", "2",
               "--steps", "1", "--workers", "0", "--no-training", "--baseline",
               "--out", tmp_path / "b.json"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|  | baseline | auto |" in done.stdout
    measured = json.loads((tmp_path / "b.json").read_text())["measured"]
    assert list(measured) == ["baseline", "auto"]
    for column in measured.values():
        assert min(column.values()) > 0
        assert set(column) == {"input pipeline, unlabelled images/s", "inference of both networks, slices/s"}
    refused = subprocess.run([*command[:3], "--steps", "0"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr == "error: --steps 0: at least 1 must be timed\n"


def test_a_column_measures_training_steps(mms_config, build_tiny, monkeypatch):
    monkeypatch.setattr(benchmark, "build_network", build_tiny)
    column = benchmark.measure("baseline", mms_config, Process(torch.device("cpu")), 2, training=True)
    assert list(column)[:4] == ["step, ms", "step with data loading, ms", "training, images/s", "peak memory, GB"]
    assert min(column.values()) > 0
    assert column["training, images/s"] == pytest.approx(3 * mms_config.batch_size / column["step, ms"] * 1e3)
