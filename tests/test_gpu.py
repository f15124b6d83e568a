"""What only a GPU can show; skipped where there is none."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import MMS, train
from test_engine import first_batches

from network import build_network
from utils.data.loaders import build_loaders
from utils.device import Process
from utils.errors import clear_errors
from utils.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_step_never_waits_for_the_gpu(mms_config):
    cfg = replace(mms_config, device="cuda", image_size=64, cps_warmup=0, cps_ramp=0)
    trainer = Trainer(cfg, build_loaders(cfg, MMS), build_network, Process(torch.device("cuda", 0)))
    batches = [
        tuple({name: value.pin_memory() for name, value in part.items()} for part in pair)
        for pair in first_batches(trainer, 1)
    ]
    trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.means(trainer.sums)["loss"] > 0


def test_training_on_a_gpu_and_on_a_cpu_begin_alike(mms_config):
    losses = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        run = train(mms_config, device=device, max_steps=1, run_name=device.type, precision="fp32", flip=False,
                    blur=False, rotation=0, max_shift=0, histogram_matching=False, cps_weight=0.0)  # fmt: skip
        losses.append(json.loads((run / "log.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # dropout draws other channels


def test_full_gpu_memory_is_a_message():
    said = r"(?s)out of GPU memory.*--checkpoint-activations.*--batch-size"
    with pytest.raises(SystemExit, match=said), clear_errors():
        torch.empty(1 << 50, device="cuda")
