"""The benchmark: its arithmetic, and the whole command at a small size."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

from config import MMS
from network import build_network
from utils import benchmark

pytestmark = pytest.mark.slow


def test_flop_of_a_step_are_those_of_its_forwards(mms_root):
    cfg = replace(MMS, data_root=str(mms_root), image_size=64, batch_size=4, pretrained="none", workers=0)
    net = build_network(4).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.rand(4, 1, 64, 64))
    forward = counter.get_total_flops()
    # 8 teacher forwards; 4 student and 2 supervised ones with their backward. The first layer needs no input gradient.
    assert benchmark.step_flop(cfg, torch.device("cpu")) == pytest.approx(26 * forward, rel=0.02)


def test_table_puts_precisions_side_by_side():
    table = benchmark.table("title", {"auto": {"step, ms": 100.0}, "fp32": {"step, ms": 250.0}})
    assert (table.title, table.header) == ("title", ["", "auto", "fp32", "fp32 / auto"])
    assert table.rows == [["step, ms", "100", "250", "2.50"]]
    alone = benchmark.table("title", {"auto": {"step, ms": 100.0}})
    assert (alone.header, alone.rows) == (["", "auto"], [["step, ms", "100"]])


def test_command_measures_input_and_inference(tmp_path):
    command = [sys.executable, "-m", "utils.benchmark", "--device", "cpu", "--image-size", "32", "--batch-size", "2",
               "--steps", "1", "--workers", "0", "--no-training", "--baseline",
               "--out", tmp_path / "b.json"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|  | baseline | auto | auto / baseline |" in done.stdout
    measured = json.loads((tmp_path / "b.json").read_text())["measured"]
    assert list(measured) == ["baseline", "auto"]
    for column in measured.values():
        assert min(column.values()) > 0
        assert set(column) == {
            "matmul peak, TFLOP/s", "input pipeline, unlabelled images/s", "inference of both networks, slices/s",
        }  # fmt: skip
