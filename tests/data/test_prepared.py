"""Splits and samplers: who is labelled, who is never seen, and what a step reads."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

import mms_dataloader
import scgm_dataloader
from config import MMS
from utils.data.loaders import build_loaders, labeled_batches, scan_loader, unlabeled_batches
from utils.data.prepared import PreparedData
from utils.errors import UserError


def test_labeled_patients_as_released():
    for ratio, expected in ((0.02, [3, 3, 3, 2, 2]), (0.05, [6, 5, 4, 4, 4])):
        assert [mms_dataloader.labeled_count(n, ratio) for n in (95, 74, 51, 50, 50)] == expected
    assert [scgm_dataloader.labeled_count(n, 0.2) for n in (10, 4, 1, 11, 15)] == [2, 1, 1, 3, 3]


@pytest.mark.parametrize("vendor", "ABCD")
def test_target_vendor_is_nowhere_in_training(mms_config, vendor):
    loaders = build_loaders(replace(mms_config, test_domain=vendor, use_extra_unlabeled=True), mms_dataloader.DATASET)
    domain = loaders.data.index["domain"]
    for loader in (loaders.labeled, loaders.unlabeled, loaders.val):
        assert vendor not in domain[loader.dataset.rows]
    assert set(domain[loaders.data.rows(loaders.split.held_out)]) == {vendor}
    # The curves that histograms are matched to are those of the first source vendor alone.
    first = "B" if vendor == "A" else "A"
    assert sorted(map(tuple, loaders.reference)) == sorted(map(tuple, loaders.data.quantiles[domain == first]))


def test_split_takes_the_first_patients_of_each_group(mms_config):
    loaders = build_loaders(mms_config, mms_dataloader.DATASET)
    index = loaders.data.index
    for group, count in {"A": 2, "B2": 2, "B3": 2, "C": 2}.items():
        members = sorted(set(index["patient"][(index["group"] == group) & (index["mask"] >= 0)]))
        assert [p for p in members if p in loaders.split.labeled] == members[:count]
    # The patient without masks trains only when asked for, and is never evaluated.
    without = set(index["patient"]) - set(index["patient"][index["mask"] >= 0])
    extra = build_loaders(replace(mms_config, use_extra_unlabeled=True), mms_dataloader.DATASET).split
    assert without and not without & {*loaders.split.unlabeled, *loaders.split.held_out}
    assert set(extra.unlabeled) - set(loaders.split.unlabeled) == without
    split = build_loaders(replace(mms_config, val_patients=1), mms_dataloader.DATASET).split
    assert len(split.validation) == 3 and not set(split.validation) & {*split.labeled, *split.unlabeled}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_domain": "E"}, "has no vendor E, only A, B, C, D"),
        ({"ratio": 0.99}, "asks for 5 labelled patients of group A"),
        ({"val_patients": 2}, "none is left to train on"),
        ({"batch_size": 500}, "smaller --batch-size"),
        ({"data_root": "nowhere"}, "mms_train.py --demo"),
    ],
)
def test_impossible_splits_are_refused(mms_config, change, message):
    with pytest.raises(UserError, match=message):
        build_loaders(replace(mms_config, **change), mms_dataloader.DATASET)


def test_array_with_objects_is_refused_and_never_executed(mms_root, tmp_path, monkeypatch):
    hostile = type("Hostile", (), {"__reduce__": lambda self: (os.system, ("touch executed",))})
    root = tmp_path / "prepared"
    shutil.copytree(mms_root, root)
    np.save(root / "quantiles.npy", np.array([hostile()], object), allow_pickle=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"prepared is damaged.*prepare the data again"):
        PreparedData.open(root, mms_dataloader.DATASET)
    with pytest.raises(UserError, match="holds mms data"):
        PreparedData.open(mms_root, scgm_dataloader.DATASET)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_uses_every_image_once_in_each_half(world_size):
    count, size = 60, 4
    cfg = replace(MMS, batch_size=size)
    parts = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    samplers = [unlabeled_batches(count, cfg, **part) for part in parts]
    steps = count // (size * world_size)
    batches = np.array([[s.batch_of_number(step) for s in samplers] for step in range(2 * steps)])  # (steps, ranks, 2B)
    first, second = batches[..., :size], batches[..., size:]
    assert (first != second).all()
    for half in (first, second):
        for epoch in (half[:steps], half[steps:]):
            assert sorted(epoch.ravel()) == list(range(count))
    assert (first[:steps] != first[steps:]).any()


def test_no_image_is_twice_in_a_step():
    """Else it could be its own Fourier partner; uneven counts, many epochs, and too few images to avoid it."""
    count, cfg = 21, replace(MMS, batch_size=5, seed=1)
    for world_size in (1, 2):
        samplers = [unlabeled_batches(count, cfg, rank=rank, world_size=world_size) for rank in range(world_size)]
        for number in range(200):
            step = np.concatenate([sampler.batch_of_number(number) for sampler in samplers])
            assert len(set(step)) == len(step)
    few = unlabeled_batches(6, cfg).batch_of_number(0)
    assert (few[:5] != few[5:]).all()


def test_batches_follow_from_the_step_alone():
    cfg = replace(MMS, batch_size=8, seed=3)

    def batches(start, stop):
        sampler = labeled_batches(50, cfg)
        sampler.start, sampler.stop = start, stop
        return [batch.tolist() for batch in sampler]

    assert batches(0, 9)[5:] == batches(5, 9)
    assert batches(0, 1) != batches(1, 2)
    assert labeled_batches(50, cfg, rank=1).batch_of_number(0).tolist() != batches(0, 1)[0]


def test_scans_come_whole_and_in_order_with_their_masks(mms_root):
    data = PreparedData.open(mms_root, mms_dataloader.DATASET)
    batches = list(scan_loader(data, data.patients_with_masks("none")))
    assert len(batches) == 32  # 16 patients, ED and ES
    for batch in batches:
        rows = batch["row"].numpy()
        assert len(set(zip(data.index["patient"][rows], data.index["phase"][rows], strict=True))) == 1
        assert data.index["slice"][rows].tolist() == list(range(len(rows)))
        assert (batch["image"][:, 0].numpy() == data.images[rows]).all()
        assert (batch["mask"][:, 0].numpy() == data.masks[data.index["mask"][rows]]).all()
        assert (batch["quantiles"].numpy() == data.quantiles[rows]).all()
