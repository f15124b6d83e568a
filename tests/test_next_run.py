"""From a run to the next: its networks as a beginning, training on all domains."""

import json
from dataclasses import replace

import pytest
from helpers import MMS, load, tiny_trainer, train
from test_engine import differing

import scgm_dataloader
from utils.data.prepared import PreparedData
from utils.errors import UserError
from utils.evaluation.evaluate import evaluate_run
from utils.evaluation.runs import open_data
from utils.run.checkpoint import load_checkpoint, read_metadata


def test_a_run_begins_with_the_networks_of_another(mms_config):
    first = train(mms_config, max_steps=2)
    cfg = replace(mms_config, init_from=str(first), run_name="second", seed=5, ratio=1, max_steps=2)
    trainer = tiny_trainer(cfg)
    begun, best = ([net.state_dict() for net in nets] for nets in (trainer.nets, load(first).predictor.nets))
    assert not differing(begun, best)
    assert not trainer.optimizer.state
    second = train(cfg)
    metadata = read_metadata(second / "best.safetensors")
    split, seen = json.loads((first / "split.json").read_text()), metadata["seen"]
    assert metadata["config"]["init_from"] == str(first) and {*seen.values()} == {*split["unlabeled"]}
    # A resumed run goes on from its own state, whether or not the other run is still there.
    (first / "best.safetensors").unlink()
    train(cfg, max_steps=4)
    assert load_checkpoint(second)["step"] == 4
    assert read_metadata(second / "best.safetensors")["seen"] == seen
    split = json.loads((second / "split.json").read_text())
    assert sorted(split["labeled"]) == split["unlabeled"]  # ratio 1: all that there are


def test_labelled_patients_by_name_train_the_same_networks(mms_config, tmp_path):
    first, codes = train(mms_config, max_steps=2), tmp_path / "codes.txt"
    codes.write_text("\n".join(json.loads((first / "split.json").read_text())["labeled"]))
    named = replace(mms_config, labeled_patients=str(codes), run_name="named")
    states = [load_checkpoint(run) for run in (first, train(named, max_steps=2))]
    for one, other in zip(*(state["networks"] for state in states), strict=True):
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    codes.write_text(codes.read_text().splitlines()[0])
    with pytest.raises(UserError, match=r"codes\.txt: this run began with other patients"):
        train(named, max_steps=3)


def test_networks_that_do_not_fit_are_refused(mms_config, scgm_config):
    first = train(mms_config, max_steps=1)
    with pytest.raises(UserError, match=r"learnt from \d+ of the patients to hold out.*same domain"):
        train(mms_config, run_name="second", init_from=str(first), test_domain="A")
    with pytest.raises(UserError, match=r"trained on mms with the classes .*'RV'\], expected scgm"):
        train(scgm_config, dataset=scgm_dataloader.DATASET, run_name="third", init_from=str(first))
    with pytest.raises(UserError, match=r"nowhere/best\.safetensors: no such file"):
        train(mms_config, run_name="fourth", init_from="nowhere")


def test_training_on_all_domains(mms_config, mms_root, tmp_path):
    data = PreparedData.open(mms_root, MMS)
    run = train(mms_config, test_domain="none", max_steps=2)
    split = json.loads((run / "split.json").read_text())
    domains = dict(zip(data.index["patient"], data.index["domain"], strict=True))
    assert {str(domains[p]) for p in split["labeled"]} == set("ABCD") and split["held_out"] == []
    assert len(split["unlabeled"]) == len(set(data.index["patient"][data.index["mask"] >= 0]))
    trained = load(run)
    for root, problem in ((None, "on all domains: .*--data-root.*--input"), (mms_root, "has seen 16 of the patients")):
        with pytest.raises(UserError, match=problem):
            data, _, title = open_data(trained, root, MMS)
            evaluate_run(trained, MMS, data, tmp_path / "out", domain="none", title=title)
