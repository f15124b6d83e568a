"""Paired comparison of methods against scipy and numbers worked out by hand; any runs in one table, or refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_tables import DATASETS, summary

from config import MMS as DEFAULTS
from config import ROBUST
from utils.errors import UserError
from utils.evaluation import commands
from utils.evaluation.compare import (
    COMPARISON_FILES,
    by_method,
    compare_methods,
    leave_one_domain_out,
    name_rows,
    write_comparison,
)
from utils.evaluation.metrics import holm
from utils.run.checkpoint import run_metadata, save_networks

MMS = DATASETS["mms"]


def scored(method, domain, dice, seed=0):
    """A summary whose patients, P0, P1, ..., have these Dice."""
    patients = {f"{domain}{i}": value for i, value in enumerate(dice)}
    return summary(domain, float(np.mean(dice)), seed=seed, method=method, paper_dice=patients)


def grouped(*summaries):
    return by_method(summaries, [s["method"] for s in summaries], MMS)


def rows(table):
    return {name: texts for name, *texts in table.rows}


def test_differences_are_paired_by_patient_and_averaged_over_seeds():
    base, gains = np.array([80.0, 82, 70, 75, 90, 60]), np.arange(1, 7)
    seeds = [scored("full", "A", base, seed) for seed in (0, 1)]
    table = compare_methods(grouped(*seeds, scored("new", "A", base + 2 * gains, 0), scored("new", "A", base, 1)))
    count, difference, p, adjusted, between, seeds, both = rows(table)["new, A"]
    assert count == 6 and difference.mean == both.mean == pytest.approx(3.5)  # 1 to 6, the means of both seeds
    # Of the patients 1 to 6; of the seeds 7 and 0: sqrt(2) 3.5. One seed is drawn: all gain twice, or none does.
    assert between.mean == pytest.approx(gains.std(ddof=1)) and seeds.mean == pytest.approx(7 / 2**0.5)
    assert both.ci95[0] == 0 and 7 < both.ci95[1] < 12
    assert p == adjusted == "0.0312"  # six of six positive: 2 / 2^6
    assert rows(table)["new, all"] == rows(table)["new, A"] and len(table.notes) == 1
    # Patients without a difference, which the versions of scipy treat differently, are left out of the test.
    gains = [1.1, 2.2, 3.3, 0.4, 5.5, 0]
    table = compare_methods(grouped(scored("full", "A", [70.0] * 6), scored("new", "A", [70 + gain for gain in gains])))
    count, difference, p, *_, seeds, both = rows(table)["new, A"]
    assert str(seeds) == str(both) == "–"
    assert (count, p) == (6, "0.0625") and difference.mean == pytest.approx(np.mean(gains))  # 2 / 2^5
    assert table.notes[1] == "Warning: new, A: 5 patients differ, too few for p < 0.05."


def test_every_figure_against_scipy():
    rng = np.random.default_rng(0)
    dice = {(m, d): 80 + gain + rng.normal(0, 3, 30) for m, gain in (("full", 0), ("a", 1), ("b", -2)) for d in "AB"}
    table = compare_methods(grouped(*(scored(*key, values.tolist()) for key, values in dice.items())))
    assert list(rows(table)) == [f"{method}, {domain}" for domain in ("A", "B", "all") for method in "ab"]
    for method in "ab":
        both = [dice[method, domain] - dice["full", domain] for domain in "AB"]
        for domain, values in (("A", both[0]), ("B", both[1]), ("all", np.concatenate(both))):
            count, difference, p, adjusted, *_ = rows(table)[f"{method}, {domain}"]
            assert count == len(values) and difference.mean == pytest.approx(values.mean())
            interval = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
            assert difference.ci95 == pytest.approx(tuple(interval), abs=0.1)
            assert float(p) == pytest.approx(stats.wilcoxon(values).pvalue, rel=6e-3)
            assert float(p) <= float(adjusted) <= 2 * float(p) * 1.01
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01; 2 x 0.03; 0.04 is not below that
    assert holm([0.7, 0.6]) == [1, 1] and holm([0.2]) == [0.2]


def test_own_scans_have_a_table_of_trainings_and_pairs_of_them():
    """Four trainings, of two seeds and held-out domains, of each method on the same two patients, in any order."""
    dice, summaries = {("full", 0, "A"): [60, 70], ("full", 0, "B"): [50, 70], ("full", 1, "A"): [40, 60],
                       ("full", 1, "B"): [70, 80]}, []  # fmt: skip
    dice |= {("new", *key[1:]): [a + 10 * key[1] + 4 * (key[2] == "B"), b] for key, (a, b) in dice.items()}
    for (method, seed, held_out), values in sorted(dice.items(), key=lambda one: (one[0][0], one[0][2], -one[0][1])):
        one = scored(method, "mine", values, seed)
        summaries.append(one | {"settings": one["settings"] | {"test_domain": held_out}})
    dataset = replace(MMS, domains=("mine",))
    methods = by_method(summaries, [s["method"] for s in summaries], dataset)
    ((name, row),) = rows(compare_methods(methods)).items()
    gains = [np.mean([10 * seed + 4 * (held_out == "B"), 0]) for seed in (0, 1) for held_out in "AB"]
    assert (name, row[0]) == ("new, mine", 2) and row[1].mean == pytest.approx(np.mean(gains))
    assert row[5].mean == pytest.approx(np.std(gains, ddof=1))
    tables = leave_one_domain_out(methods, dataset)
    assert tables[0].header == ["", "mine", "± over", "checkpoint chosen on"]
    means = [np.mean(values) for key, values in dice.items() if key[0] == "full"]
    expected = f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f} (4 trainings)"
    assert [str(text) for text in rows(tables[0])["this implementation, full"][:2]] == [expected, "trainings"]
    assert len(tables[0].rows) == 2 and "own scans" in tables[0].notes[0]


def test_what_limits_a_comparison_is_said():
    full = [scored("full", "A", [80.0] * 8), scored("full", "B", [80.0] * 5), scored("full", "C", [80.0] * 6)]
    new = [scored("new", "A", [80.0] * 6, 1), scored("new", "B", [81.0] * 5), scored("new", "D", [81.0] * 9)]
    table = compare_methods(grouped(*full, *new))
    assert {name: row[0] for name, row in rows(table).items()} == {"new, A": 6, "new, B": 5, "new, all": 11}
    assert rows(table)["new, A"][2] == "1"  # no difference at all
    assert table.notes[1:] == [
        "Warning: new, A: 0 patients differ, too few for p < 0.05.",
        "Warning: new, A: other trainings or patients than full.",
        "Warning: new, B: 5 patients differ, too few for p < 0.05.",
        "Warning: new, all: 5 patients differ, too few for p < 0.05.",
    ]
    table = compare_methods(grouped(full[0], new[2]))  # no domain in common
    assert [str(text) for text in rows(table)["new, all"]] == ["0", "–", "1", "1", "–", "–", "–"]


def test_files_of_a_comparison(tmp_path):
    both = [scored(m, "A", [80.0 + gain, 70, 75, 77, 79, 81, 60]) for m, gain in (("full", 0), ("new", 1))]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/comparison.md").write_text("mine")
    with pytest.raises(UserError, match=r"comparison\.md is there"):
        write_comparison(grouped(*both), MMS, tmp_path / "mine")
    assert (tmp_path / "mine/comparison.md").read_text() == "mine"
    write_comparison(grouped(*both), MMS, tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").glob("[!.]*")} < set(COMPARISON_FILES)
    assert len(list((tmp_path / "ours").glob("[!.]*"))) == 6
    write_comparison(grouped(both[0]), MMS, tmp_path / "one")
    assert not list((tmp_path / "one").glob("comparison*"))


def names(*changes, labels=(), same_data=False):
    metadata = [{"cps_weight": 3.0, "config": vars(DEFAULTS) | change} for change in changes]
    for run in metadata:
        run["content_hash"] = run["config"].pop("hash", "1" * 9)
    folders = [Path(f"run{i}") for i in range(len(metadata))]
    return name_rows(folders, metadata, labels, same_data=same_data)


def test_rows_are_told_apart_by_what_differs():
    assert names({}, {"seed": 1}, {"test_domain": "A", "run_name": "x"}) == ["full"] * 3
    assert names({}, {"cps_weight": 0.0}, {"cutmix": False}) == ["full", "supervised only", "full, no CutMix"]
    assert names({}, {"cps_weight": 1.0}) == ["full, cps_weight 3", "full, cps_weight 1"]
    idle = {"cps_weight": 0.0, "cps_warmup": 4.0}  # a warm-up of nothing
    assert names({}, idle, {"seed": 1} | idle) == ["full", "supervised only", "supervised only"]
    expected = ["full, num_epoch 50", "plain CPS + Fourier, num_epoch 8"]
    assert names({}, {"cps_loss": "plain", "num_epoch": 8}) == expected
    assert names({}, ROBUST) == ["full", "robust"]
    assert names({}, ROBUST | {"field": 160}, ROBUST) == [
        f"{name}, cross_entropy {ce}, field {px}, intensity_aug {share}, lr_power {power}"
        for name, ce, px, share, power in (
            ("full", 0, 288, 0, 0),
            ("robust", 1, 160, 0.5, 0.9),
            ("robust", 1, 200, 0.5, 0.9),
        )
    ]
    begun = {"init_from": "a"}, {"init_from": "b", "seed": 1}
    assert names(*begun) == ["full"] * 2
    assert names(*begun, {"seed": 2}) == ["full, init_from True"] * 2 + ["full, init_from False"]
    assert names({}, {"cps_weight": 1.0}, {"seed": 1}, labels=["a", "b", "a"]) == ["a", "b", "a"]
    assert names({}, {"hash": "2" * 9}, same_data=True) == ["full, data 11111111", "full, data 22222222"]
    # Runs that do not belong together are refused at once.
    with pytest.raises(UserError, match=r"one ratio(.|\n)*one data(.|\n)*--data-root") as refused:
        names({}, {"ratio": 0.05}, {"hash": "2" * 9})
    assert "0.05" in str(refused.value) and "22222222" in str(refused.value)
    for problem, changes, labels in (
        ("run0, run2: one method", [{}, {"seed": 1}, {}], []),
        ("run0, run1: one method", [{}, {"num_epoch": 8}], ["a", "a"]),
        ("1 names for 2 runs", [{}, {"seed": 1}], ["a"]),
    ):
        with pytest.raises(UserError, match=problem):
            names(*changes, labels=labels)


def test_the_command_refuses_first_and_gives_every_comparison_a_folder(monkeypatch, tmp_path, capsys):
    """With networks of one layer, and an evaluation that only returns what it would have found."""
    for name, change in {"a": {}, "b": {"seed": 1}, "c": {"cps_weight": 1.0}, "copy": {}}.items():
        facts = {"selection": "rule", "step": 1, "cps_weight": 3.0, "seen": {}, "labeled": {}}
        metadata = run_metadata(MMS, vars(replace(DEFAULTS, **change)), None, {"content_hash": "1" * 9}, **facts)
        (tmp_path / name).mkdir()
        save_networks(tmp_path / name / "best.safetensors", [torch.nn.Linear(1, 1) for _ in range(2)], metadata)
    evaluated = []

    def evaluate(run, *_, **__):
        evaluated.append(run.folder.name)
        gain = run.config.cps_weight
        return scored("full", "D", [70 + gain, 80 - run.config.seed, 75, 60 + gain, 90, 85, 82], run.config.seed)

    monkeypatch.setattr(commands, "evaluate_run", evaluate)
    monkeypatch.setattr(commands, "open_data", lambda *_: (None, "D", "title"))

    def inference(*arguments):
        monkeypatch.setattr("sys.argv", ["x", *map(str, arguments), "--device", "cpu"])
        commands.run_inference(MMS, lambda classes: torch.nn.Linear(1, 1))
        return capsys.readouterr().out

    a, b, c, copy = (tmp_path / name for name in ("a", "b", "c", "copy"))
    with pytest.raises(SystemExit, match=r"a, .*copy: one method"):
        inference("--run", a, c, copy)
    assert not evaluated and not (tmp_path / "comparisons").exists()
    out = inference("--run", a, b, c)
    assert "| full, cps_weight 1, D | 7 |" in out and "other trainings or patients than full, cps_weight 3" in out
    [folder] = (tmp_path / "comparisons").iterdir()
    assert folder.name.startswith("full-cps_weight-3_vs_full-cps_weight-1_")
    inference("--run", a, b, c)
    assert list((tmp_path / "comparisons").iterdir()) == [folder]
    assert "| weak, D | 7 |" in inference("--run", a, c, "--label", "ours", "weak")
    assert len(list((tmp_path / "comparisons").iterdir())) == 2
    assert "**Comparison**" in out and "**Comparison**" not in inference("--run", a, b, "--out", tmp_path / "seeds")
    assert (tmp_path / "seeds/leave_one_domain_out.md").is_file()
