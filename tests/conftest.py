"""Fixtures: phantoms that are prepared once for all tests, short configurations, a small disk."""

import os
import subprocess
from dataclasses import replace

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, one per core; read when torch is imported

import pytest
from helpers import TinyNetwork

import mms_dataloader
import scgm_dataloader
from config import MMS, MMS_DEMO, ROBUST, SCGM_DEMO
from utils.data.prepare import prepare_dataset

PAPER = {key: getattr(MMS, key) for key in ROBUST}  # in place of the recipe, which the demos take
# A test that needs one of these prepares phantoms or trains: it is slow, and need not say so itself.
SLOW_FIXTURES = {"mms_raw", "scgm_raw"}


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def mms_raw(tmp_path_factory):
    raw = tmp_path_factory.mktemp("mms") / "raw"
    mms_dataloader.DATASET.write_phantom(raw, patients=4, frames=2, seed=0)
    return raw


@pytest.fixture(scope="session")
def mms_root(mms_raw):
    prepare_dataset(mms_raw, mms_raw.parent / "prepared", mms_dataloader.DATASET, workers=2)
    return mms_raw.parent / "prepared"


@pytest.fixture(scope="session")
def scgm_raw(tmp_path_factory):
    raw = tmp_path_factory.mktemp("scgm") / "raw"
    scgm_dataloader.DATASET.write_phantom(raw, patients=2, seed=0)
    return raw


@pytest.fixture(scope="session")
def scgm_root(scgm_raw):
    prepare_dataset(scgm_raw, scgm_raw.parent / "prepared", scgm_dataloader.DATASET, workers=2)
    return scgm_raw.parent / "prepared"


@pytest.fixture
def mms_config(mms_root, tmp_path):
    """A short run on the M&Ms phantom: 8 steps of everything the method has."""
    return replace(
        MMS_DEMO,
        **PAPER,
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
        SCGM_DEMO, **PAPER, demo=False, data_root=str(scgm_root), out_root=str(tmp_path / "runs"), run_name="run",
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
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def build_tiny():
    return TinyNetwork
