"""The benchmark: its arithmetic, and the whole command at a small size."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

from config import MMS
from network import build_network
from utils import benchmark
from utils.method.objective import UnlabeledViews, training_step

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


def test_least_times_are_those_of_hand():
    """On an H100 with 989 TFLOP/s and 3.35 TB/s: 2 ms of products, and 1 ms of memory that a compiler saves."""
    found = {"convolutions": [(989e9, 1e9), (0.0, 3.35e9)], "elementwise and the rest": [(0.0, 3.35e9)]}
    rows = {row[0]: row[3] for row in benchmark.least_times(found).rows}
    assert rows["convolutions"] == "2.0" and rows["elementwise and the rest"] == "1.0"
    assert rows["step, eager"] == "3" and rows["step, fused"] == "2" and rows["of it bound by memory"] == "67 %"


def test_operations_are_counted_as_pytorch_counts_a_real_step():
    cfg = replace(MMS, image_size=32, batch_size=2)
    counted = sum(flop for flop, _ in benchmark.count_operations(cfg)["convolutions"])
    nets = [build_network(4).train() for _ in range(2)]
    image = torch.rand(2, 1, 32, 32)
    views = UnlabeledViews((image, image), (image, image), torch.zeros_like(image))
    with FlopCounterMode(display=False) as counter:
        options = {"dice_classes": slice(None), "cps_loss": "pixel", "cps_weight": 3.0, "autocast": nullcontext}
        training_step(nets, image, torch.zeros(2, 32, 32).long(), views, **options)
    assert counted == counter.get_total_flops()
