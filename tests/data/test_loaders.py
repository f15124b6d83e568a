"""Worker processes of the loaders: little shared memory, stalls, deaths and signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT

import mms_dataloader
from utils.data import loaders as loaders_module
from utils.data.loaders import batch_loader, build_loaders

MMS = mms_dataloader.DATASET
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/data"}


class Numbers(torch.utils.data.Dataset):
    """Each item is the process that made it; `before` is called with the number asked for."""

    def __init__(self, before=lambda number: None):
        self.before = before

    def __getitem__(self, number):
        self.before(number)
        return torch.tensor([number, os.getpid()])


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


def test_too_little_shared_memory_is_said_and_avoided(mms_config, small_disk, monkeypatch, capsys):
    monkeypatch.setattr(loaders_module, "usable_cores", lambda: 2)
    cfg = replace(mms_config, workers=2)
    assert build_loaders(cfg, MMS).labeled.num_workers == 2
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(loaders_module, "SHARED_MEMORY", small_disk)
    loaders = build_loaders(cfg, MMS)
    assert (loaders.labeled.num_workers, loaders.unlabeled.num_workers) == (0, 0)
    out = capsys.readouterr().out
    # 8 labelled and 16 unlabelled images, for 2 workers 2 batches ahead and one in hand
    need = (8 * (300 * 300 * 3 + 1024 + 8) + 16 * (300 * 300 * 2 + 1024 + 8)) * 3 * 2
    assert f"need {need / 1e6:.0f} MB of shared memory" in out and "--shm-size" in out
    build_loaders(cfg, MMS, rank=1, world_size=2)
    assert capsys.readouterr().out == ""  # the main process has said it


def test_empty_slices_are_no_reference(mms_config, tmp_path):
    """An image whose histogram is matched to that of an empty slice would be black."""
    root = tmp_path / "prepared"
    shutil.copytree(mms_config.data_root, root)
    curves = np.load(root / "quantiles.npy", mmap_mode="r+")
    curves[::3] = np.float32(0.5)
    curves.flush()
    reference = build_loaders(replace(mms_config, data_root=str(root)), MMS).reference
    assert len(reference) and (reference[:, 0] < reference[:, -1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stalls", "dies"])
def test_worker_that_stalls_or_dies_ends_in_a_clear_error(tmp_path, kind):
    """Python waits at its end for all workers, so the whole process is watched."""
    action = "time.sleep(1000)" if kind == "stalls" else "os.kill(os.getpid(), 9)"
    (tmp_path / "train.py").write_text(
        "import os, time; from test_loaders import Numbers; from utils.data import loaders\n"
        "from utils.errors import clear_errors\n"
        "loaders.STALL_S = 2\n"
        "def before(number):\n"
        f"    if number == 30: {action}\n"
        "with clear_errors():\n"
        "    for item in loaders.batch_loader(Numbers(before), range(50), 2):\n"
        "        print(int(item[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "train.py"], capture_output=True, text=True, timeout=40, env=ENVIRONMENT
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: a process that reads the data stalled or died (DataLoader" in done.stderr
    assert "use --workers 0" in done.stderr and wait_until_gone(set(map(int, done.stdout.split())), 10)


def test_workers_leave_signals_to_the_training_process():
    """A scheduler signals every process of a job."""
    iterator = iter(batch_loader(Numbers(), range(2000), 2))
    pids = {int(next(iterator)[1]) for _ in range(10)}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(0.05)
    later = [next(iterator).tolist() for _ in range(500)]
    assert [number for number, _ in later] == list(range(10, 510)) and {pid for _, pid in later} == pids
    del iterator
    assert len(pids) == 2 and wait_until_gone(pids, 10)


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "train.py").write_text(
        "import time, torch; from test_loaders import Numbers; from utils.data.loaders import batch_loader\n"
        "loader = iter(batch_loader(Numbers(), range(1000), 2))\n"
        "print(*{int(next(loader)[1]) for _ in range(10)}, flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, tmp_path / "train.py"], stdout=subprocess.PIPE, env=ENVIRONMENT)
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    assert wait_until_gone(pids, 20)
    parent.wait()
