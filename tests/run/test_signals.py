"""Signals to a whole process group, loaders' workers included, as schedulers and closed terminals send them."""

import json
import os
import signal
import time
from dataclasses import asdict, replace

import pytest
from helpers import start_python

from utils.engine import EXIT_INTERRUPTED
from utils.run.checkpoint import load_checkpoint

TRAINING = """
import json, sys
from config import Config
from helpers import train
from utils.errors import clear_errors

with clear_errors():
    train(Config(**json.loads(sys.argv[1])))
"""

SEEDS = """
import helpers, mms_train, network

network.build_network = helpers.TinyNetwork
mms_train.main()
"""


def test_seeds_are_trained_in_turn_and_resumed_as_a_whole(mms_root, tmp_path):
    flags = ["--data-root", mms_root, "--out-root", tmp_path, "--run-name", "run", "--image-size", 32, "--workers", 0,
             "--batch-size", 16, "--device", "cpu", "--no-wandb", "--cps-warmup", 9]  # fmt: skip
    command = ["-c", SEEDS, *flags, "--seeds", 0, 5]
    first = start_python(*command, "--num-epoch", 1)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    states = [load_checkpoint(tmp_path / f"run_seed{seed}") for seed in (0, 5)]
    assert [state["metadata"]["config"]["seed"] for state in states] == [0, 5]
    stopped = start_python(*command, "--num-epoch", 1000)
    while load_checkpoint(tmp_path / "run_seed0")["step"] == states[0]["step"]:
        time.sleep(0.05)
    stopped.terminate()
    output, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == EXIT_INTERRUPTED and "run_seed5" not in output, output
    step = load_checkpoint(tmp_path / "run_seed0")["step"]
    # Seed 0 is finished by now, and says so.
    again = start_python(*command, "--num-epoch", 1, "--max-steps", step + 1)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and output.index("run_seed0: this run is finished") < output.index("run_seed5"), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_process_group_saves_the_run(mms_config, number):
    cfg = replace(mms_config, workers=2, max_steps=None, num_epoch=1000, cps_warmup=0, cps_ramp=0)
    started = start_python("-c", TRAINING, json.dumps(asdict(cfg)))
    while not (cfg.folder / "last.pt").exists():  # the first epoch is over: the workers are at work
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.05)
    before = load_checkpoint(cfg.folder)["step"]
    os.killpg(started.pid, number)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == EXIT_INTERRUPTED, output
    assert "Traceback" not in output and "saved; the same command goes on from there" in output
    assert load_checkpoint(cfg.folder)["step"] >= before
    with pytest.raises(ProcessLookupError):  # no worker is left behind
        os.killpg(started.pid, 0)
