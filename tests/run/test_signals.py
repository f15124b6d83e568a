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

from utils.run.checkpoint import load_checkpoint
from utils.run.interrupt import EXIT_INTERRUPTED

TRAINING = """
import json, sys, torch
sys.path[:0] = sys.argv[1:3]
import mms_dataloader
from config import Config
from helpers import TinyNetwork
from utils.data.loaders import build_loaders
from utils.distributed import Process
from utils.engine import fit
from utils.errors import clear_errors

with clear_errors():
    cfg = Config(**json.loads(sys.argv[3]))
    loaders = build_loaders(cfg, mms_dataloader.DATASET)
    fit(cfg, loaders, lambda classes, pretrained: TinyNetwork(classes), Process(torch.device("cpu")))
"""


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
