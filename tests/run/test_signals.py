"""Signals to a whole process group, loaders' workers included, as schedulers and closed terminals send them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import ROOT

from utils.engine import EXIT_INTERRUPTED
from utils.run.checkpoint import load_checkpoint

TRAINING = """
import json, sys, torch
sys.path[:0] = sys.argv[1:3]
import mms_dataloader
from config import Config
from helpers import TinyNetwork
from utils.data.loaders import build_loaders
from utils.device import Process
from utils.engine import fit
from utils.errors import clear_errors

with clear_errors():
    cfg = Config(**json.loads(sys.argv[3]))
    loaders = build_loaders(cfg, mms_dataloader.DATASET)
    fit(cfg, loaders, lambda classes, pretrained: TinyNetwork(classes), Process(torch.device("cpu")))
"""


SEEDS = """
import sys
sys.path[:0] = sys.argv[1:3]
del sys.argv[1:3]
import network
import mms_train
from helpers import TinyNetwork

network.build_network = lambda classes, pretrained: TinyNetwork(classes)
mms_train.main()
"""


def test_seeds_are_trained_in_turn_and_resumed_as_a_whole(mms_root, tmp_path):
    flags = ["--data-root", mms_root, "--out-root", tmp_path, "--run-name", "run", "--image-size", 32, "--workers", 0,
             "--batch-size", 16, "--device", "cpu", "--no-wandb", "--cps-warmup", 9]  # fmt: skip
    command = [sys.executable, "-c", SEEDS, ROOT, ROOT / "tests", *flags, "--seeds", 0, 5]

    def start(*more):
        text = list(map(str, [*command, *more]))
        return subprocess.Popen(text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start("--num-epoch", 1)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    states = [load_checkpoint(tmp_path / f"run_seed{seed}") for seed in (0, 5)]
    assert [state["metadata"]["config"]["seed"] for state in states] == [0, 5]
    stopped = start("--num-epoch", 1000)
    while load_checkpoint(tmp_path / "run_seed0")["step"] == states[0]["step"]:
        time.sleep(0.05)
    stopped.terminate()
    output, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == EXIT_INTERRUPTED and "run_seed5" not in output, output
    step = load_checkpoint(tmp_path / "run_seed0")["step"]
    again = start("--num-epoch", 1, "--max-steps", step + 1)  # seed 0 is finished by now, and says so
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and output.index("run_seed0: this run is finished") < output.index("run_seed5"), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_process_group_saves_the_run(mms_config, number):
    cfg = replace(mms_config, workers=2, max_steps=None, num_epoch=1000, cps_warmup=0, cps_ramp=0)
    command = [sys.executable, "-c", TRAINING, str(ROOT), str(ROOT / "tests"), json.dumps(asdict(cfg))]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may run under nohup
    )
    folder = Path(cfg.out_root) / "run"
    while not (folder / "last.pt").exists():  # the first epoch is over: the workers are at work
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.05)
    before = load_checkpoint(folder)["step"]
    os.killpg(started.pid, number)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == EXIT_INTERRUPTED, output
    assert "Traceback" not in output and "saved; the same command goes on from there" in output
    assert load_checkpoint(folder)["step"] >= before
    with pytest.raises(ProcessLookupError):  # no worker is left behind
        os.killpg(started.pid, 0)
