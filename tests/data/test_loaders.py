"""Who is labelled, who is never seen, what a step reads; workers that stall, die or get signals."""

import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import MMS, ROOT, run_python, start_python

import mms_dataloader
import scgm_dataloader
from config import MMS as MMS_CONFIG
from utils.data import loaders as loaders_module
from utils.data.commands import run_data_command
from utils.data.loaders import batch_loader, build_loaders, labeled_batches, scan_loader, unlabeled_batches
from utils.data.prepared import PreparedData
from utils.errors import UserError


class Numbers(torch.utils.data.Dataset):
    """Each item is the process that made it; `before` is called with the number asked for."""

    def __init__(self, before=lambda number: None):
        self.before = before

    def __getitem__(self, number):
        self.before(number)
        return torch.tensor([number, os.getpid()])


def alive(pid):
    return os.path.exists(f"/proc/{pid}/exe")  # a zombie has none


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
    root = shutil.copytree(mms_config.data_root, tmp_path / "prepared")
    curves = np.load(root / "quantiles.npy", mmap_mode="r+")
    curves[::3] = np.float32(0.5)
    curves.flush()
    reference = build_loaders(replace(mms_config, data_root=str(root)), MMS).reference
    assert len(reference) and (reference[:, 0] < reference[:, -1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stalls", "dies"])
def test_worker_that_stalls_or_dies_ends_in_a_clear_error(kind):
    """Python waits at its end for all workers, so the whole process is watched."""
    action = "time.sleep(1000)" if kind == "stalls" else "os.kill(os.getpid(), 9)"
    code = (
        "import os, time; from test_loaders import Numbers; from utils.data import loaders\n"
        "from utils.errors import clear_errors\n"
        "loaders.STALL_S = 2\n"
        "def before(number):\n"
        f"    if number == 30: {action}\n"
        "with clear_errors():\n"
        "    for item in loaders.batch_loader(Numbers(before), range(50), 2):\n"
        "        print(int(item[1]))\n"
    )
    done = run_python("-c", code, timeout=120)
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
def test_workers_end_with_a_killed_parent():
    code = (
        "import time, torch; from test_loaders import Numbers; from utils.data.loaders import batch_loader\n"
        "loader = iter(batch_loader(Numbers(), range(1000), 2))\n"
        "print(*{int(next(loader)[1]) for _ in range(10)}, flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = start_python("-c", code)
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    assert wait_until_gone(pids, 20)
    parent.wait()


def test_labeled_patients_as_released():
    for ratio, expected in ((0.02, [3, 3, 3, 2, 2]), (0.05, [6, 5, 4, 4, 4])):
        assert [mms_dataloader.labeled_count(n, ratio) for n in (95, 74, 51, 50, 50)] == expected
    assert [scgm_dataloader.labeled_count(n, 0.2) for n in (10, 4, 1, 11, 15)] == [2, 1, 1, 3, 3]


@pytest.mark.parametrize("vendor", "ABCD")
def test_target_vendor_is_nowhere_in_training(mms_config, vendor):
    loaders = build_loaders(replace(mms_config, test_domain=vendor, use_extra_unlabeled=True), MMS)
    domain = loaders.data.index["domain"]
    for loader in (loaders.labeled, loaders.unlabeled, loaders.val):
        assert vendor not in domain[loader.dataset.rows]
    assert set(domain[loaders.data.rows(loaders.split.held_out)]) == {vendor}
    # The curves that histograms are matched to are those of the first source vendor alone.
    first = "B" if vendor == "A" else "A"
    assert sorted(map(tuple, loaders.reference)) == sorted(map(tuple, loaders.data.quantiles[domain == first]))


def test_split_takes_the_first_patients_of_each_group(mms_config):
    loaders = build_loaders(mms_config, MMS)
    index = loaders.data.index
    for group, count in {"A": 2, "B2": 2, "B3": 2, "C": 2}.items():
        members = sorted(set(index["patient"][(index["group"] == group) & (index["mask"] >= 0)]))
        assert [p for p in members if p in loaders.split.labeled] == members[:count]
    # The patient without masks trains only when asked for, and is never evaluated.
    without = set(index["patient"]) - set(index["patient"][index["mask"] >= 0])
    extra = build_loaders(replace(mms_config, use_extra_unlabeled=True), MMS).split
    assert without and not without & {*loaders.split.unlabeled, *loaders.split.held_out}
    assert set(extra.unlabeled) - set(loaders.split.unlabeled) == without
    split = build_loaders(replace(mms_config, val_patients=1), MMS).split
    assert len(split.validation) == 3 and not set(split.validation) & {*split.labeled, *split.unlabeled}


def test_split_takes_the_patients_that_a_file_names(mms_config, tmp_path, monkeypatch, capsys):
    """As the command prints them, as a column of a table; those that cannot be labelled are named all at once."""
    split, path = build_loaders(mms_config, MMS).split, tmp_path / "codes.csv"
    monkeypatch.setattr(
        "sys.argv", ["x", "split", "--data", mms_config.data_root, "--test-vendor", "D", "--ratio", "0.02"]
    )
    run_data_command(MMS, mms_config)
    printed = capsys.readouterr().out
    assert printed.split() == split.labeled
    named = replace(mms_config, labeled_patients=str(path), ratio=1)
    for text in (printed, "External code;Vendor\n" + "".join(f"{code};B\n" for code in reversed(split.labeled))):
        path.write_text(text)
        assert build_loaders(named, MMS).split == split
    path.write_text("code\n" + split.labeled[-1])  # of one domain alone
    assert build_loaders(replace(named, val_patients=0), MMS).split.labeled == split.labeled[-1:]
    without = sorted(
        {*build_loaders(replace(mms_config, use_extra_unlabeled=True), MMS).split.unlabeled} - {*split.unlabeled}
    )
    path.write_text(f"code\n{without[0]}\n{split.held_out[0]}\nnobody")
    message = f"nobody is unknown, {without[0]} is without masks, {split.held_out[0]} is held out"
    with pytest.raises(UserError, match=message):
        build_loaders(named, MMS)


@pytest.mark.parametrize(("change", "message"), [
    ({"test_domain": "E"}, "has no vendor E, only A, B, C, D"),
    ({"ratio": 0.99}, "group A has 4 patients with masks, not 5: use --ratio 1 for all, or a smaller one"),
    ({"labeled_patients": "tests/helpers.py"}, r"helpers\.py: .* is unknown"),
    ({"val_patients": 2}, "none is left to train on"),
    ({"batch_size": 500}, "smaller --batch-size"),
    ({"data_root": "nowhere"}, rf"no data in {ROOT}/nowhere: .*--data-root\nM&Ms(.|\n)*mms_train.py --demo"),
])  # fmt: skip
def test_impossible_splits_are_refused(mms_config, change, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        build_loaders(replace(mms_config, **change), MMS)


def test_array_with_objects_is_refused_and_never_executed(mms_root, tmp_path, monkeypatch):
    hostile = type("Hostile", (), {"__reduce__": lambda self: (os.system, ("touch executed",))})
    root = shutil.copytree(mms_root, tmp_path / "prepared")
    np.save(root / "quantiles.npy", np.array([hostile()], object), allow_pickle=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"prepared is damaged.*prepare the data again"):
        PreparedData.open(root, MMS)
    with pytest.raises(UserError, match="holds mms data"):
        PreparedData.open(mms_root, scgm_dataloader.DATASET)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("count", "size", "world_size"), [(60, 4, 1), (60, 4, 3), (21, 5, 1), (21, 5, 2), (6, 5, 1)])
def test_an_epoch_uses_every_image_once_in_each_half(count, size, world_size):
    """Nor is an image twice in a step, where it could be its own Fourier partner, if there are enough."""
    cfg, steps = replace(MMS_CONFIG, batch_size=size, seed=1), count // (size * world_size)
    samplers = [unlabeled_batches(count, cfg, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = np.array([[s.batch_of_number(n) for s in samplers] for n in range(50 * steps)])  # (steps, ranks, 2B)
    for step in batches:
        assert (step[:, :size] != step[:, size:]).all()
        assert len(set(step.ravel())) == step.size or step.size > count
    for half in (batches[..., :size], batches[..., size:]):
        epochs = half.reshape(50, -1)
        assert all(len(set(epoch)) == steps * size * world_size for epoch in epochs)
        assert (epochs[0] != epochs[1]).any()


def test_batches_follow_from_the_step_alone():
    first, other = labeled_batches(50, MMS_CONFIG), labeled_batches(50, MMS_CONFIG, rank=1)
    first.stop, other.start, other.stop = 9, 5, 9
    batches = [batch.tolist() for batch in first]
    assert batches[5:] == [batch.tolist() for batch in first][5:] != [batch.tolist() for batch in other]
    first.start = 5
    assert [batch.tolist() for batch in first] == batches[5:] and batches[0] != batches[1]


def test_scans_come_whole_and_in_order_with_their_masks(mms_root):
    data = PreparedData.open(mms_root, MMS)
    batches = list(scan_loader(data, data.patients_with_masks("none")))
    assert len(batches) == 32  # 16 patients, ED and ES
    for batch in batches:
        rows = batch["row"].numpy()
        assert len(set(zip(data.index["patient"][rows], data.index["phase"][rows], strict=True))) == 1
        assert data.index["slice"][rows].tolist() == list(range(len(rows)))
        assert (batch["image"][:, 0].numpy() == data.images[rows]).all()
        assert (batch["mask"][:, 0].numpy() == data.masks[data.index["mask"][rows]]).all()
        assert (batch["quantiles"].numpy() == data.quantiles[rows]).all()
