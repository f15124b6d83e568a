"""Phantoms, prepared once for all tests, and a small stand-in for the network."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, one per core; read when torch is imported

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mms_dataloader  # noqa: E402
import scgm_dataloader  # noqa: E402
from config import MMS_DEMO, SCGM_DEMO  # noqa: E402
from utils.prepare import prepare_dataset  # noqa: E402


@pytest.fixture(scope="session")
def mms_raw(tmp_path_factory):
    raw = tmp_path_factory.mktemp("mms") / "raw"
    mms_dataloader.FACTS.write_phantom(raw, patients=4, frames=2, seed=0)
    return raw


@pytest.fixture(scope="session")
def mms_root(mms_raw):
    prepare_dataset(mms_raw, mms_raw.parent / "prepared", mms_dataloader.FACTS, workers=2)
    return mms_raw.parent / "prepared"


@pytest.fixture(scope="session")
def scgm_raw(tmp_path_factory):
    raw = tmp_path_factory.mktemp("scgm") / "raw"
    scgm_dataloader.FACTS.write_phantom(raw, patients=2, seed=0)
    return raw


@pytest.fixture(scope="session")
def scgm_root(scgm_raw):
    prepare_dataset(scgm_raw, scgm_raw.parent / "prepared", scgm_dataloader.FACTS, workers=2)
    return scgm_raw.parent / "prepared"


@pytest.fixture
def mms_config(mms_root, tmp_path):
    """A short run on the M&Ms phantom: 8 steps of everything the method has."""
    return replace(
        MMS_DEMO,
        demo=False,
        data_root=str(mms_root),
        out_root=str(tmp_path / "runs"),
        run_name="run",
        ratio=0.02,
        image_size=32,
        batch_size=8,
        max_steps=8,
        cps_warmup=0.1,
        cps_ramp=0.2,
        device="cpu",
    )


@pytest.fixture
def scgm_config(scgm_root, tmp_path):
    return replace(
        SCGM_DEMO, demo=False, data_root=str(scgm_root), out_root=str(tmp_path / "runs"), run_name="run",
        image_size=32, batch_size=16, num_epoch=2, cps_warmup=0.5, device="cpu",
    )  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


class TinyNetwork(nn.Module):
    """Has what the training must handle: BatchNorm, dropout, two scales."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def forward(self, image):
        return self.classifier(self.features(image))


@pytest.fixture
def build_tiny():
    return lambda num_classes, pretrained="none": TinyNetwork(num_classes)
