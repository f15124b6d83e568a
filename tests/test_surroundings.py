"""Scripts as notebooks, old terminals and other folders start them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import mms_dataloader
from utils.data.loaders import build_loaders
from utils.device import Process
from utils.engine import fit


def script(*command, cwd=ROOT, **variables):
    command = [sys.executable, ROOT / command[0], *map(str, command[1:])]
    return subprocess.run(command, cwd=cwd, capture_output=True, env=os.environ | variables)


def test_backend_of_a_notebook_does_not_end_a_script(tmp_path):
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = script("mms_dataloader.py", "check", tmp_path / "nowhere", **notebook)
    assert b"Traceback" not in done.stderr and b"nowhere: no such folder" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_is_not_utf_8_loses_no_work(mms_config, build_tiny, encoding):
    """An evaluation prints a ±."""
    code = f"""
import sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers import TinyNetwork
from mms_dataloader import DATASET
from utils.evaluation.commands import run_inference
sys.argv = ["inference_mms.py", *sys.argv[1:]]
run_inference(DATASET, lambda classes, pretrained="none": TinyNetwork(classes))
"""
    cfg = replace(mms_config, max_steps=1)
    fit(cfg, build_loaders(cfg, mms_dataloader.DATASET), build_tiny, Process(torch.device("cpu")))
    run = Path(cfg.out_root) / "run"
    command = [sys.executable, "-c", code, "--run", str(run), "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "±" in (run / "results/D/summary.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_evaluating_from_another_folder_names_data_root(tmp_path):
    done = script("mms_train.py", "--no-wandb", cwd=tmp_path)
    assert done.returncode == 1
    assert b"name it by --data-root" in done.stderr
