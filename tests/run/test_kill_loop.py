"""A run that is killed at random moments, over and over, ends as the run that was left alone.

KILLS=50 python -m pytest -s tests/run/test_kill_loop.py     # more than the 5 of an ordinary run
"""

import os
import random
import signal
from dataclasses import replace

from helpers import start_process, train
from test_engine import assert_same, run

from utils.run.checkpoint import load_checkpoint


def test_killed_over_and_over(mms_config):
    kills, chance = int(os.environ.get("KILLS", "5")), random.Random(0)
    cfg = replace(mms_config, max_steps=20 + 4 * kills, save_every=3, num_epoch=20, run_name="whole")
    start_process(train, cfg).join()
    whole = run(cfg)  # finished by now: reads it only
    cfg = replace(cfg, run_name="killed")
    unreadable, done, steps, patience = 0, 0, [], 1.5
    while done < kills:
        child = start_process(train, cfg)
        child.join(chance.uniform(0.1, patience))
        child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:  # it was done before the signal: begin the run anew, and go on killing
            assert child.exitcode == 0
            assert_same(whole, run(cfg))
            cfg = replace(cfg, run_name=f"killed{done}")
            continue
        done += 1
        if (cfg.folder / "last.pt").exists() or (cfg.folder / "previous.pt").exists():
            unreadable += load_checkpoint(cfg.folder) is None
            steps.append(load_checkpoint(cfg.folder)["step"])
            # An epoch's end (evaluation, pictures) takes long: a run that is stuck there is given more time.
            patience = patience + 1 if steps[-2:-1] == steps[-1:] else 1.5
    start_process(train, cfg).join()
    assert_same(whole, run(cfg))  # 0 differing tensors, 0 differing log lines
    assert unreadable == 0
    print(f"\n{done} kills, at checkpoints of steps {steps}: no tensor differs, no log line or checkpoint is lost")
