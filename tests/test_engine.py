"""The training step around the objective, and the loop that never loses a run."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import CPU, MMS, TinyNetwork, tiny_trainer, train
from safetensors.torch import load_file
from torch.utils._pytree import keystr, tree_flatten_with_path

import scgm_dataloader
from config import ROBUST
from utils import engine
from utils.data.loaders import SliceDataset, build_loaders
from utils.device import Process
from utils.engine import EXIT_INTERRUPTED, Interrupt, fit
from utils.errors import UserError
from utils.evaluation.runs import method_name
from utils.files import folder_lock
from utils.run.checkpoint import load_checkpoint, read_metadata
from utils.trainer import MAX_BAD_STEPS, Trainer, batch_norms


def test_switching_cutmix_off_reads_one_batch_and_mixes_nothing(mms_config):
    trainer = tiny_trainer(replace(mms_config, cutmix=False))
    [(_, batch)] = first_batches(trainer, 1)
    assert len(batch["image"]) == mms_config.batch_size
    views = trainer.unlabeled_views(batch)
    assert views.box_mask is None and len(views.plain) == len(views.fourier) == 1
    assert views.mix(views.plain) is views.plain[0]
    assert torch.equal(views.student[0], views.plain[0])


def test_networks_learn_on_changed_gray_values_and_label_the_plain_views(mms_config):
    trainer = tiny_trainer(replace(mms_config, intensity_aug=1.0))
    [(_, batch)] = first_batches(trainer, 1)
    views = trainer.unlabeled_views(batch)
    plain, student = torch.cat(views.plain), torch.cat(views.student)
    assert student.shape == plain.shape and ((student - plain).abs().amax((1, 2, 3)) > 0.01).all()
    trainer.generator.manual_seed(0)
    before = trainer.unlabeled_views(batch)
    trainer.cfg = replace(trainer.cfg, intensity_aug=0.0)
    trainer.augmentation = replace(trainer.augmentation, cfg=trainer.cfg)
    trainer.generator.manual_seed(0)
    without = trainer.unlabeled_views(batch)
    for name in ("plain", "fourier"):  # the same images, boxes and labels as without
        assert all(map(torch.equal, getattr(before, name), getattr(without, name)))
    assert torch.equal(before.box_mask, without.box_mask) and not torch.equal(before.student[0], without.student[0])


def test_weight_of_the_pseudo_supervision_warms_up_and_ramps(mms_config):
    cfg = replace(mms_config, cps_warmup=1, cps_ramp=2)
    trainer = tiny_trainer(cfg)
    steps = trainer.loaders.steps_per_epoch
    numbers = (0, steps - 1, steps, 2 * steps, 3 * steps, 9 * steps)
    assert [trainer.cps_weight(step) for step in numbers] == [0, 0, 0, 1.5, 3, 3]
    trainer.step = steps  # the next would be the first one with the pseudo supervision
    assert method_name(trainer.metadata()) == "full, before its pseudo supervision"
    trainer.cfg = replace(cfg, cps_warmup=0, cps_ramp=0)
    assert trainer.cps_weight(0) == 3
    assert method_name(trainer.metadata()) == "full"
    # Logged are means over the steps that had the pseudo supervision, here 2 of 4.
    sums = {"loss": 12, "supervised": 8, "cps": 1, "cps_weight": 4, "variance": 0.5, "steps": 4, "cps_steps": 2}
    sums = {name: torch.tensor(float(total)) for name, total in sums.items()}
    assert trainer.mean_scalars(sums) == {"loss": 3, "supervised": 2, "cps": 0.5, "cps_weight": 2, "variance": 0.25}


def run(cfg, build=TinyNetwork, **changes):
    """Train, and return the last state and the lines of the log."""
    folder = train(cfg, build, **changes)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return torch.load(folder / "last.pt", weights_only=True), lines


def tensors(state):
    """Every tensor of a checkpoint by its path."""
    leaves, _ = tree_flatten_with_path(state)
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def differing(state, other, same=torch.equal):
    """The paths of the tensors that are not the same in two states."""
    ours, theirs = tensors(state), tensors(other)
    assert ours.keys() == theirs.keys() and len(ours) > 16
    return [path for path in ours if not same(ours[path], theirs[path])]


def assert_same(first, second):
    (state, lines), (other_state, other_lines) = first, second
    assert lines == other_lines and not differing(state, other_state) and len(tensors(state)) > 40


def signalling(at, number):
    """A training step that gets a signal while it makes step `at`, and ends it."""
    train_step = Trainer.train_step

    def stepping(self, batches, **options):
        train_step(self, batches, **options)
        if self.step == at:
            os.kill(os.getpid(), number)

    return stepping


def test_same_seed_same_weights_other_seed_others(mms_config):
    first, again, other = (run(mms_config, max_steps=4, run_name=n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert_same(first, again)
    assert differing(first[0], other[0])
    folder = Path(mms_config.out_root, "a")
    files = {".semidg-files", "best.safetensors", "config.json", "curves.png", "last.pt", ".lock", "log.jsonl"}
    assert set(os.listdir(folder)) == files | {"samples", "split.json", "steps.jsonl"}
    metadata = read_metadata(folder / "best.safetensors")
    assert metadata["class_names"] == ["background", "LV", "MYO", "RV"] and len(metadata["reference"]) == 256


@pytest.mark.parametrize("interval", [0, 2])
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(mms_config, interval, monkeypatch):
    monkeypatch.setattr(engine, "SYNC_EVERY", 3)  # points of the curves after the steps 3, 6 and 8
    mms_config = replace(mms_config, **(ROBUST if interval else {}))
    whole = run(mms_config, run_name="whole")
    cfg = replace(mms_config, run_name="parts", save_every=interval)
    # A signal in the midst of an epoch; the step it comes in is finished.
    for stop, number in ((2, signal.SIGTERM), (5, signal.SIGUSR1), (7, signal.SIGINT)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", signalling(stop, number))
            with pytest.raises(SystemExit) as exit_info:
                run(cfg)
        assert exit_info.value.code == EXIT_INTERRUPTED
        assert load_checkpoint(cfg.folder)["step"] == stop
    assert_same(whole, run(cfg))
    points = [Path(cfg.out_root, name, "steps.jsonl").read_text() for name in ("whole", "parts")]
    assert points[0] == points[1] and [json.loads(line)["step"] for line in points[0].splitlines()] == [3, 6, 8]
    best = [load_file(f"{cfg.out_root}/{name}/best.safetensors") for name in ("whole", "parts")]
    assert not differing(*best)


def test_run_that_dies_in_its_first_epoch_begins_anew_by_the_same_command(mms_config):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Trainer, "train_step", Mock(side_effect=MemoryError))
        run(mms_config)
    assert (mms_config.folder / "log.jsonl").read_text() == ""
    assert run(mms_config)[0]["step"] == 8


def test_moments_in_another_memory_layout_are_resumed_alike(mms_config):
    """The fused optimiser would take them for others, without a word; the weights lie channels_last."""
    trainer = tiny_trainer(mms_config)
    first, second = first_batches(trainer, 2)
    trainer.train_step([first])
    state = copy.deepcopy(trainer.state())
    moments = state["optimizer"]["state"].values()
    assert any(not values["exp_avg"].is_contiguous() for values in moments)
    for values in moments:
        for name in ("exp_avg", "exp_avg_sq"):
            values[name] = values[name].contiguous()
    resumed = tiny_trainer(mms_config, state)
    for each in (trainer, resumed):
        each.train_step([second])
    assert not differing(trainer.state(), resumed.state())


def test_second_signal_ends_at_once():
    child = os.fork()
    if child == 0:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.received == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_INTERRUPTED


def test_finished_run_says_so_and_longer_one_goes_on(mms_config, capsys):
    cfg = replace(mms_config, max_steps=3)
    assert_same(run(cfg), run(cfg))
    printed = capsys.readouterr().out
    assert "this run is finished" in printed and "goes on" not in printed
    longer, lines = run(cfg, max_steps=5, workers=1)
    assert "goes on from step 3 of 5" in capsys.readouterr().out
    whole, _ = run(cfg, max_steps=5, run_name="whole")
    assert [line["step"] for line in lines] == [3, 5]  # the first run's end was logged, too
    assert not differing(longer["networks"], whole["networks"])


def test_signal_during_the_last_step_keeps_the_next_run_from_beginning(mms_config, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", signalling(1, signal.SIGTERM))
    cfg = replace(mms_config, max_steps=1)
    with pytest.raises(SystemExit) as stopped:
        fit(cfg, build_loaders(cfg, MMS), TinyNetwork, Process(CPU), last=False)
    assert stopped.value.code == EXIT_INTERRUPTED
    assert load_checkpoint(cfg.folder)["step"] == 1
    train(cfg, run_name="alone")  # nothing follows: it is finished


def test_last_epochs_are_kept_and_restart_deletes_only_ours(mms_config):
    cfg = replace(mms_config, num_epoch=4, max_steps=None, batch_size=16, keep_epochs=2)
    folder = train(cfg, num_epoch=2)
    (folder / "epochs/mine.txt").write_text("mine")
    state, lines = run(cfg)
    names = [f"epoch_00{epoch}.safetensors" for epoch in (3, 4)]
    assert sorted(path.name for path in (folder / "epochs").iterdir()) == [*names, "mine.txt"]
    assert [read_metadata(folder / "epochs" / name)["step"] for name in names] == [line["step"] for line in lines[2:]]
    kept = load_file(folder / "epochs" / names[1])
    assert all(torch.equal(kept[f"1.{key}"], value) for key, value in state["networks"][1].items())
    train(cfg, num_epoch=1, keep_epochs=0, restart=True)
    assert [path.name for path in (folder / "epochs").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_unlabeled_images_are_read_only_with_pseudo_supervision(mms_config, monkeypatch, accumulate):
    """From then on the batches are those of the same micro-step; the samples show the last step's, read or not."""
    cfg = replace(mms_config, batch_size=4, accumulate=accumulate, cps_ramp=0, max_steps=4)
    loaders = build_loaders(cfg, MMS)
    cfg = replace(cfg, cps_warmup=2 / loaders.steps_per_epoch)  # two steps
    seen, drawn, fetched = [], [], []
    original = SliceDataset.__getitem__
    monkeypatch.setattr(Trainer, "draw_samples", lambda self, path, title: drawn.append(path.name))
    train_step = Trainer.train_step

    def stepping(self, batches, **options):
        seen.append([None if unlabeled is None else unlabeled["row"].tolist() for _, unlabeled in batches])
        train_step(self, batches, **options)

    def fetching(self, positions):
        fetched.append(self)
        return original(self, positions)

    monkeypatch.setattr(Trainer, "train_step", stepping)
    monkeypatch.setattr(SliceDataset, "__getitem__", fetching)

    def rows(number):
        return loaders.unlabeled.dataset.rows[loaders.unlabeled.sampler.batch_of_number(number)].tolist()

    fit(cfg, loaders, TinyNetwork, Process(CPU))
    assert seen[:2] == [[None] * accumulate] * 2
    assert [row for step in seen[2:] for row in step] == [rows(n) for n in range(2 * accumulate, 4 * accumulate)]
    assert drawn == ["epoch_001.png"]
    assert sum(dataset is loaders.unlabeled.dataset for dataset in fetched) == 2 * accumulate
    never = replace(cfg, cps_weight=0, run_name="never", max_steps=2)
    fetched.clear()
    fit(never, loaders, TinyNetwork, Process(CPU))
    assert not any(dataset is loaders.unlabeled.dataset for dataset in fetched)


def test_pretrained_weights_are_fetched_for_a_new_run_only(mms_config):
    """A run goes on, or says that it is finished, where they cannot be had any more; its folder may be renamed."""
    asked = []

    def build(num_classes, pretrained):
        asked.append(pretrained)
        return TinyNetwork(num_classes)

    cfg = replace(mms_config, max_steps=1, pretrained="timm")
    train(cfg, build).rename(Path(cfg.out_root, "renamed"))
    train(cfg, build, run_name="renamed")  # finished
    train(cfg, build, run_name="renamed", max_steps=2)
    assert asked == ["timm", "timm", "none", "none"]


def test_teachers_move_the_statistics_of_batchnorm(mms_config):
    """As in the released code: 4 teacher forwards a network beside 2 student and 1 supervised ones."""
    trainer = tiny_trainer(replace(mms_config, cps_warmup=0, cps_ramp=0))
    trainer.train_step(first_batches(trainer, 1))
    assert [norm.num_batches_tracked.item() for norm in batch_norms(trainer.nets)] == [4 + 2 + 1] * 4


def test_other_settings_and_data_are_refused_and_restart_begins_anew(mms_config):
    cfg = replace(mms_config, max_steps=2)
    train(cfg)
    loaders = build_loaders(replace(cfg, max_steps=3), MMS)
    loaders.data.info["content_hash"] = "another"
    with pytest.raises(UserError, match="holds other data than this run began with"):
        fit(replace(cfg, max_steps=3), loaders, TinyNetwork, Process(CPU))
    with pytest.raises(UserError, match=r"lr: 0.001 there, 0.002 now\n  seed: 0 there, 5 now"):
        train(cfg, lr=2e-3, seed=5)
    state, lines = run(cfg, lr=2e-3, restart=True)
    assert state["step"] == 2 and len(lines) == 1 and lines[0]["lr"] == 2e-3


def test_step_that_is_not_finite_changes_nothing(mms_config):
    trainer = tiny_trainer(mms_config)
    batches = first_batches(trainer, 1)
    trainer.train_step(batches)
    before = copy.deepcopy([*(net.state_dict() for net in trainer.nets), trainer.optimizer.state_dict()])
    broken = {**batches[0][0], "image": torch.full_like(batches[0][0]["image"], torch.nan)}
    trainer.train_step([(broken, batches[0][1])])
    after = [*(net.state_dict() for net in trainer.nets), trainer.optimizer.state_dict()]
    assert all("num_batches_tracked" in path for path in differing(before, after))
    assert trainer.bad_steps == {"in_row": 1, "in_epoch": 1} and trainer.step == 2
    trainer.train_step(batches)
    assert trainer.bad_steps == {"in_row": 0, "in_epoch": 1}
    means = trainer.mean_scalars(trainer.epoch_sums).values()
    assert np.isfinite([value for value in means if value is not None]).all()


def first_batches(trainer, count):
    loaders = trainer.loaders.labeled, trainer.loaders.unlabeled
    return [tuple(x.dataset[x.sampler.batch_of_number(i).tolist()] for x in loaders) for i in range(count)]


def test_accumulated_gradient_is_the_mean_over_the_batches(mms_config, monkeypatch):
    """Two batches in one step against the gradients of each alone, at the place in the run that it has there."""
    cfg = replace(mms_config, batch_size=4, accumulate=2, cps_warmup=0, cps_ramp=0)

    def gradients(cfg, step, batches):
        trainer, kept = tiny_trainer(cfg), []
        monkeypatch.setattr(trainer.optimizer, "step", lambda: kept.extend(p.grad.clone() for p in trainer.parameters))
        trainer.step = step
        trainer.train_step(batches)
        assert len(kept) == sum(1 for net in trainer.nets for _ in net.parameters())
        return kept

    batches = first_batches(tiny_trainer(cfg), 2)
    alone = [gradients(replace(cfg, accumulate=1), number, [batch]) for number, batch in enumerate(batches)]
    for a, b, both in zip(*alone, gradients(cfg, 0, batches), strict=True):
        assert torch.allclose((a + b) / 2, both, atol=1e-6)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(*alone, strict=True))
    train(cfg)


def test_checkpointed_activations_change_nothing(mms_config):
    cfg = replace(mms_config, max_steps=3, cps_warmup=0, cps_ramp=0)
    (plain, _), (recomputed, _) = (run(cfg, run_name=str(f), checkpoint_activations=f) for f in (False, True))
    changed = differing(plain["networks"], recomputed["networks"], same=partial(torch.allclose, atol=1e-6))
    assert all("num_batches_tracked" in path for path in changed)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_networks_train_alike(mms_config, checkpointing):
    cfg = replace(mms_config, max_steps=2, cps_warmup=0, cps_ramp=0, precision="fp32")
    _, plain = run(cfg)
    _, compiled = run(cfg, run_name="compiled", compile=True, checkpoint_activations=checkpointing)
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-3)


def test_without_a_compiler_compiling_is_left_out_with_a_warning(mms_config, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    train(mms_config, max_steps=1, compile=True)
    assert capsys.readouterr().out.count("warning: --compile needs a C++ compiler") == 1


def test_training_that_diverges_stops_and_names_the_images(mms_config, monkeypatch):
    cfg, original = replace(mms_config, max_steps=None, num_epoch=1), Trainer.train_step

    def poisoned(self, batches, **options):
        broken = [({**labeled, "image": labeled["image"] * torch.nan}, other) for labeled, other in batches]
        original(self, broken, **options)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(UserError, match=f"not finite in {MAX_BAD_STEPS} steps in a row.* frame . slice "):
        train(cfg)
    names = (cfg.folder / "not_finite.txt").read_text().splitlines()
    assert len(names) == len(set(names)) > MAX_BAD_STEPS and all(" frame " in name for name in names)
    assert not (cfg.folder / "best.safetensors").exists()


def test_lost_config_of_a_run_is_named(mms_config):
    cfg = replace(mms_config, max_steps=1)
    folder = train(cfg)
    for name in ("config.json", "best.safetensors"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"config\.json.* missing or damaged"):
        train(cfg)
    train(cfg, restart=True)
    assert not (folder / "previous.pt").exists()  # nothing of the lost run is left


def test_restart_that_cannot_begin_loses_nothing(mms_config):
    def build(num_classes, pretrained):
        raise UserError("no weights to be had")

    cfg = replace(mms_config, max_steps=1)
    before = run(cfg)
    config = (cfg.folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="no weights to be had"):
        train(cfg, build, restart=True, lr=0.5, pretrained="timm")
    assert (cfg.folder / "config.json").read_bytes() == config
    assert_same(before, run(cfg))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\xff" * 9)])
def test_lost_best_weights_are_written_anew(mms_config, capsys, damage):
    best = train(mms_config, max_steps=1) / "best.safetensors"
    damage(best)
    train(mms_config, max_steps=2)
    assert "the next evaluation writes it anew" in capsys.readouterr().out
    assert read_metadata(best)["step"] == 2


def test_epoch_without_a_finite_step_is_never_the_best(mms_config, monkeypatch, capfd):
    monkeypatch.setattr("utils.method.objective.dice_loss", lambda p, target: torch.nan * p.sum((0, 2, 3)))
    state, lines = run(mms_config, max_steps=2)
    assert lines[0]["skipped_steps"] == 2 and state["best"] == -1
    assert "2 steps were not finite and skipped" in capfd.readouterr().out
    assert not (mms_config.folder / "best.safetensors").exists()


def test_run_folder_admits_one_process(mms_config):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with folder_lock(mms_config.folder):
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(UserError, match="in use by another process"):
        train(mms_config)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    train(mms_config, max_steps=1)


@pytest.mark.parametrize("change", [{"fourier_aug": False, "cps_loss": "plain"}, {"cutmix": False}, {"cps_weight": 0.0},
                                    {"cps_loss": "scalar"}, {"fourier_mode": "AM"}, {"histogram_matching": False},
                                    {"val_patients": 1}])  # fmt: skip
def test_every_ablation_trains(mms_config, change):
    state, lines = run(mms_config, max_steps=2, cps_warmup=0, cps_ramp=0, **change)
    assert state["step"] == 2 and np.isfinite(lines[0]["loss"])
    assert (lines[0]["cps"] == 0) == (change.get("cps_weight") == 0)


def test_rate_falls_to_zero_by_its_power(mms_config):
    trainer, rates = tiny_trainer(replace(mms_config, lr_power=0.9)), []
    for batches in trainer.loaders.training_batches(1, 0, 3, unlabeled_from=3):
        trainer.train_step(batches)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3 * (1 - step / 8) ** 0.9 for step in range(3)])  # of 8 steps
    assert tiny_trainer(mms_config).learning_rate(7) == mms_config.lr  # kept


def test_scgm_trains_with_the_same_engine(scgm_config):
    _, lines = run(scgm_config, dataset=scgm_dataloader.DATASET)
    assert all(line["cps"] > 0 and np.isfinite(line["loss"]) for line in lines)


def test_training_learns(mms_config):
    """With a network this small the loss must still fall clearly."""
    _, lines = run(mms_config, max_steps=None, num_epoch=9, lr=1e-2, cps_weight=0.0)
    assert lines[-1]["supervised"] < 0.8 * lines[0]["supervised"]
    assert lines[-1]["val_dice"] > 15
