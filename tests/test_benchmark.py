"""The benchmark: the whole command at a small size, and its training steps with a small network."""

import pytest
import torch

from utils import benchmark
from utils.device import Process
from utils.errors import UserError

pytestmark = pytest.mark.slow


def test_a_column_measures_steps_and_inference(mms_config, build_tiny, monkeypatch):
    monkeypatch.setattr(benchmark, "build_network", build_tiny)
    column = benchmark.measure("baseline", mms_config, Process(torch.device("cpu")), 2)
    assert min(column.values()) > 0
    assert column["training, images/s"] == pytest.approx(3 * mms_config.batch_size / column["step, ms"] * 1e3)


def test_the_command_prints_a_column_per_precision(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda name, cfg, process, steps: {"step, ms": float(steps)})
    benchmark.benchmark(device="cpu", image_size=32, batch_size=2, steps=3, baseline=True)
    out = capsys.readouterr().out
    assert "|  | baseline | auto |" in out and "| step, ms | 3 | 3 |" in out
    with pytest.raises(UserError, match="--steps 0: at least 1 must be timed"):
        benchmark.benchmark(steps=0)
