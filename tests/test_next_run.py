"""From a run to the next: its networks as a beginning, training on all domains."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mms_dataloader
import scgm_dataloader
from utils.data.loaders import build_loaders
from utils.data.prepared import PreparedData
from utils.device import Process
from utils.engine import fit
from utils.errors import UserError
from utils.evaluation.evaluate import evaluate_run
from utils.evaluation.runs import load_run, open_data
from utils.run.checkpoint import load_checkpoint, read_metadata
from utils.trainer import Trainer

MMS = mms_dataloader.DATASET
CPU = torch.device("cpu")


def train(cfg, build, **changes):
    cfg = replace(cfg, **changes)
    fit(cfg, build_loaders(cfg, MMS), build, Process(CPU))
    return Path(cfg.out_root) / cfg.run_name


def weights(nets):
    return {f"{i}.{key}": value for i, net in enumerate(nets) for key, value in net.state_dict().items()}


def test_a_run_begins_with_the_networks_of_another(mms_config, build_tiny, scgm_config):
    first = train(mms_config, build_tiny, max_steps=2)
    cfg = replace(mms_config, init_from=str(first), run_name="second", seed=5, ratio=1, max_steps=2)
    trainer = Trainer(cfg, build_loaders(cfg, MMS), build_tiny, Process(CPU))
    loaded = load_run(first, "best", MMS, build_tiny, CPU, autocast=nullcontext)
    begun, best = weights(trainer.nets), weights(loaded.predictor.nets)
    assert begun.keys() == best.keys() and all((begun[key] == best[key]).all() for key in best)
    assert not trainer.optimizer.state
    second = train(cfg, build_tiny)
    metadata = read_metadata(second / "best.safetensors")
    split, seen = json.loads((first / "split.json").read_text()), metadata["seen"]
    assert metadata["config"]["init_from"] == str(first) and {*seen.values()} == {*split["unlabeled"]}
    # A resumed run goes on from its own state, whether or not the other run is still there.
    (first / "best.safetensors").unlink()
    train(cfg, build_tiny, max_steps=4)
    assert load_checkpoint(second)["step"] == 4
    assert read_metadata(second / "best.safetensors")["seen"] == seen
    split = json.loads((second / "split.json").read_text())
    assert sorted(split["labeled"]) == split["unlabeled"]  # ratio 1: all that there are


def test_labelled_patients_by_name_train_the_same_networks(mms_config, build_tiny, tmp_path):
    first, codes = train(mms_config, build_tiny, max_steps=2), tmp_path / "codes.txt"
    codes.write_text("\n".join(json.loads((first / "split.json").read_text())["labeled"]))
    named = replace(mms_config, labeled_patients=str(codes), run_name="named")
    states = [load_checkpoint(run) for run in (first, train(named, build_tiny, max_steps=2))]
    for one, other in zip(*(state["networks"] for state in states), strict=True):
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    codes.write_text(codes.read_text().splitlines()[0])
    with pytest.raises(UserError, match=r"codes\.txt: this run began with other patients"):
        train(named, build_tiny, max_steps=3)


def test_networks_that_do_not_fit_are_refused(mms_config, scgm_config, build_tiny):
    first = train(mms_config, build_tiny, max_steps=1)
    with pytest.raises(UserError, match=r"learnt from \d+ of the patients to hold out.*same domain"):
        train(mms_config, build_tiny, run_name="second", init_from=str(first), test_domain="A")
    cfg = replace(scgm_config, run_name="third", init_from=str(first))
    with pytest.raises(UserError, match=r"trained on mms with the classes .*'RV'\], expected scgm"):
        fit(cfg, build_loaders(cfg, scgm_dataloader.DATASET), build_tiny, Process(CPU))
    with pytest.raises(UserError, match=r"nowhere/best\.safetensors: no such file"):
        train(mms_config, build_tiny, run_name="fourth", init_from="nowhere")


def test_training_on_all_domains(mms_config, mms_root, build_tiny, tmp_path):
    data = PreparedData.open(mms_root, MMS)
    run = train(mms_config, build_tiny, test_domain="none", max_steps=2)
    split = json.loads((run / "split.json").read_text())
    domains = dict(zip(data.index["patient"], data.index["domain"], strict=True))
    assert {str(domains[p]) for p in split["labeled"]} == set("ABCD") and split["held_out"] == []
    assert len(split["unlabeled"]) == len(set(data.index["patient"][data.index["mask"] >= 0]))
    trained = load_run(run, "best", MMS, build_tiny, CPU, autocast=nullcontext)
    for root, problem in ((None, "on all domains: .*--data-root.*--input"), (mms_root, "has seen 16 of the patients")):
        with pytest.raises(UserError, match=problem):
            data, _, title = open_data(trained, root, MMS)
            evaluate_run(trained, MMS, data, tmp_path / "out", domain="none", title=title)
