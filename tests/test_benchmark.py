"""The benchmark: the whole command at a small size, and its training steps with a small network."""

import json

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


def test_the_command_writes_a_column_per_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda name, cfg, process, steps: {"step, ms": float(steps)})
    benchmark.benchmark(device="cpu", image_size=32, batch_size=2, steps=3, baseline=True, out=tmp_path / "b.json")
    assert "|  | baseline | auto |" in capsys.readouterr().out
    measured = json.loads((tmp_path / "b.json").read_text())["measured"]
    assert measured == {"baseline": {"step, ms": 3.0}, "auto": {"step, ms": 3.0}}
    with pytest.raises(UserError, match="--steps 0: at least 1 must be timed"):
        benchmark.benchmark(steps=0)
