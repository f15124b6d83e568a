"""From a run to the next: its networks as a beginning, training on all domains, averaged runs, slimmed folders."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from utils.evaluation.results import evaluate_run

import mms_dataloader
import scgm_dataloader
from utils.data.loaders import build_loaders, scan_loader
from utils.data.prepared import PreparedData, split_patients
from utils.device import Process
from utils.engine import fit
from utils.errors import UserError
from utils.evaluation.predict import predict_scans
from utils.evaluation.runs import ensemble, load_run, open_data
from utils.run import slim
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


def evaluate(run, out, data_root=None):
    data, _, title = open_data(run, data_root, MMS)
    options = {"save_predictions": False, "precision": "fp32", "tta": False, "keep_largest": False}
    return evaluate_run(run, MMS, data=data, domain=run.config.test_domain, title=title, out=out, **options)


def test_a_run_begins_with_the_networks_of_another(mms_config, build_tiny, scgm_config):
    first = train(mms_config, build_tiny, max_steps=2)
    cfg = replace(mms_config, init_from=str(first), run_name="second", seed=5, ratio=1, max_steps=2)
    trainer = Trainer(cfg, build_loaders(cfg, MMS), build_tiny, Process(CPU))
    begun, best = weights(trainer.nets), weights(load_run(first, "best", MMS, build_tiny, CPU).nets)
    assert begun.keys() == best.keys() and all((begun[key] == best[key]).all() for key in best)
    assert not any(optimizer.state for optimizer in trainer.optimizers)
    second = train(cfg, build_tiny)
    metadata = read_metadata(second / "best.safetensors")
    split = json.loads((first / "split.json").read_text())
    assert metadata["config"]["init_from"] == str(first) and metadata["seen_before"] == sorted(split["unlabeled"])
    # A resumed run goes on from its own state, whether or not the other run is still there.
    (first / "best.safetensors").unlink()
    train(cfg, build_tiny, max_steps=4)
    assert load_checkpoint(second)["step"] == 4
    assert read_metadata(second / "best.safetensors")["seen_before"] == sorted(split["unlabeled"])


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
    trained = load_run(run, "best", MMS, build_tiny, CPU)
    with pytest.raises(UserError, match=r"trained on all domains: .*--data-root.*--input"):
        evaluate(trained, tmp_path / "out")
    with pytest.raises(UserError, match="was trained with 16 of the patients"):
        evaluate(trained, tmp_path / "out", mms_root)


def test_ratio_1_labels_all_patients_there_are(mms_config, mms_root):
    data = PreparedData.open(mms_root, MMS)
    split = split_patients(data, MMS, replace(mms_config, ratio=1))
    assert sorted(split.labeled) == split.unlabeled
    with pytest.raises(UserError, match=r"ratio 0\.99 asks for"):
        split_patients(data, MMS, replace(mms_config, ratio=0.99))


def test_an_ensemble_is_the_mean_of_its_runs(mms_config, mms_root, build_tiny, tmp_path):
    """Each run sees the images by its own reference; the mean is computed here by hand."""
    folders = [train(mms_config, build_tiny, run_name=f"seed{n}", seed=n, max_steps=2) for n in range(2)]
    runs = [load_run(folder, "best", MMS, build_tiny, CPU) for folder in folders]
    runs[1] = runs[1]._replace(reference=runs[1].reference ** 2)
    both = ensemble(runs, evaluate=True)
    data = PreparedData.open(mms_root, MMS)
    loader = scan_loader(data, data.patients_with_masks("D")[:1])
    settings = {"device": CPU, "precision": "fp32", "confidence": True}
    found = list(predict_scans(both.members, loader, data, **settings))
    single = [list(predict_scans(run.members, loader, data, **settings)) for run in runs]
    for scan, *parts in zip(found, *single, strict=True):
        expected = np.mean([part.probability.numpy() for part in parts], axis=0)
        assert np.allclose(scan.probability.numpy(), expected, atol=1e-6)
        assert np.abs(parts[0].probability.numpy() - parts[1].probability.numpy()).max() > 1e-3
        assert np.allclose(scan.agreement, (parts[0].agreement + parts[1].agreement) / 2)
        assert np.allclose(scan.confidence, (parts[0].confidence + parts[1].confidence) / 2)
    summary = evaluate(both, tmp_path / "out")
    assert summary["ensemble"] == [str(folder) for folder in folders]
    assert "mean of 2 runs' networks" in (tmp_path / "out/summary.md").read_text()
    other = runs[1]._replace(config=replace(runs[1].config, test_domain="A", image_size=48))
    with pytest.raises(UserError, match="different image sizes"):
        ensemble([runs[0], other], evaluate=False)
    other = other._replace(config=replace(other.config, image_size=32))
    with pytest.raises(UserError, match=r"different held-out domains \(.*D; .*A\)"):
        ensemble([runs[0], other], evaluate=True)
    assert ensemble([runs[0], other], evaluate=False).others == (other,)


def test_a_slimmed_run_keeps_its_networks_and_cannot_go_on(mms_config, build_tiny, capsys):
    run = train(mms_config, build_tiny, max_steps=2)
    train(mms_config, build_tiny, run_name="begun", max_steps=2)
    config = json.loads((run.parent / "begun/config.json").read_text()) | {"max_steps": 9}
    (run.parent / "begun/config.json").write_text(json.dumps(config))
    before = weights(load_run(run, "last", MMS, build_tiny, CPU).nets)
    sizes = sum((run / name).stat().st_size for name in ("last.pt", "previous.pt") if (run / name).exists())
    with pytest.raises(UserError, match=r"only finished runs are slimmed: .*begun: \(training not finished"):
        slim.slim((run, run.parent / "begun"))
    assert "optimizers" in load_checkpoint(run)
    slim.slim((run,))
    assert not (run / "previous.pt").exists() and (run / "last.pt").stat().st_size < sizes / 2
    after = weights(load_run(run, "last", MMS, build_tiny, CPU).nets)
    assert all((before[key] == after[key]).all() for key in before)
    assert f"{run}: 0.00 GB freed" in capsys.readouterr().out
    train(mms_config, build_tiny, max_steps=2)  # finished already, which is no error
    with pytest.raises(UserError, match=r"slimmed.*--init-from"):
        train(mms_config, build_tiny, max_steps=4)
