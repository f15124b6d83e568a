"""Two processes, started as a user does: with torchrun."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python, start_python, tiny_trainer

from config import ROBUST
from utils.device import autocast_context, bf16_is_faster, choose_device, process_group
from utils.errors import UserError
from utils.run.checkpoint import load_checkpoint, load_networks

PRECISIONS = ("auto", "bf16", "fp32")
WORKER = ROOT / "tests/distributed_worker.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, WORKER]


def torchrun(settings):
    return run_python(*TORCHRUN, json.dumps(settings), timeout=120)


@pytest.fixture
def short(mms_root, tmp_path):
    return {
        "data_root": str(mms_root), "out_root": str(tmp_path), "run_name": "run", "ratio": 0.02, "image_size": 32,
        "batch_size": 16, "num_epoch": 1, "cps_warmup": 0.25, "cps_ramp": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta"])
def test_unknown_device_is_named(name):
    with pytest.raises(UserError, match=f"--device {name}: no such device; choose auto, cpu, cuda"):
        choose_device(name)


def test_gpus_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("cuda:1") == choose_device("auto", 1) == torch.device("cuda", 1)
    for name, rank in (("cuda:7", 0), ("cuda", 2), ("auto", 3)):
        with pytest.raises(UserError, match=r"there are 2 GPUs here, numbered from 0.*--nproc-per-node"):
            choose_device(name, rank)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="several processes take a GPU each; use --device cuda"):
        process_group("cuda:0").__enter__()


@pytest.mark.parametrize(("amx", "avx512", "vendor", "faster"), [
    (True, True, "GenuineIntel", True), (False, True, "AuthenticAMD", True),
    (False, True, "GenuineIntel", False), (False, False, "AuthenticAMD", False),
])  # fmt: skip
def test_bf16_is_chosen_on_the_cpus_where_it_was_measured_to_be_faster(monkeypatch, amx, avx512, vendor, faster):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr("utils.device.bf16_is_faster", bf16_is_faster.__wrapped__)  # without what it remembers
    enabled = {precision: autocast_context(torch.device("cpu"), precision)._enabled for precision in PRECISIONS}
    assert enabled == {"auto": faster, "bf16": True, "fp32": False}


def test_two_processes_train_as_one(short, tmp_path, mms_config):
    done = torchrun(short)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"]  # BatchNorm's statistics included
    assert first["steps"] > 2 and len(first["seen"]) == first["steps"]
    assert [len(unlabeled) for _, unlabeled in first["seen"]][:3] == [0, 0, 32]  # a quarter of 6 steps is warm-up
    for (labeled, unlabeled), (other_labeled, other_unlabeled) in zip(first["seen"], second["seen"], strict=True):
        for half in (slice(16), slice(16, 32)):
            assert not set(unlabeled[half]) & set(other_unlabeled[half])
        assert labeled != other_labeled
    assert first["gradients"] < 1e-6 and second["gradients"] < 1e-6
    # The shared evaluation is that of one process, to the last digit.
    line = json.loads((tmp_path / "run/log.jsonl").read_text())
    assert json.loads((tmp_path / "run/config.json").read_text())["processes"] == 2
    cfg = replace(mms_config, **ROBUST, **{name: short[name] for name in ("ratio", "image_size", "batch_size")})
    trainer = tiny_trainer(cfg)
    load_networks(tmp_path / "run/best.safetensors", trainer.nets)
    assert trainer.validate() == pytest.approx(line["val_dice"], abs=1e-9)
    # Another number of processes would see other batches.
    done = run_python(WORKER, json.dumps(short | {"num_epoch": 2}))
    assert done.returncode == 1 and "processes: 2 there, 1 now" in done.stderr
    # What is the user's to mend is said once, by the main process; the others end without a word.
    done = torchrun(short | {"seed": 1})
    assert done.returncode == 1 and done.stderr.count("seed: 0 there, 1 now") == 1
    assert "Connection" not in done.stderr and "UserError" not in done.stderr


def test_signal_to_torchrun_saves_and_the_same_command_goes_on(short, tmp_path):
    short = short | {"num_epoch": 2}
    started = start_python(*TORCHRUN, json.dumps(short | {"stop_at": 1}))
    for line in started.stdout:
        if "first step done" in line:
            started.send_signal(signal.SIGTERM)
            break
    assert "stopped by a signal at step" in started.stdout.read() and started.wait(60) != 0
    assert load_checkpoint(tmp_path / "run")["step"] in (2, 3)  # the flag of one step is read in the next
    resumed = torchrun(short)
    assert resumed.returncode == 0 and "run: 12 steps" in resumed.stdout, resumed.stderr


def test_when_one_process_dies_the_other_ends_within_a_minute(short):
    began = time.monotonic()
    done = torchrun(short | {"die_at": 2})
    assert done.returncode != 0 and time.monotonic() - began < 60
