"""The table over the domains against numbers worked out by hand, and each format against what reads it."""

import csv
import io
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import product

import pytest

import mms_dataloader
import scgm_dataloader
from utils.evaluation.compare import by_method, compare_methods, leave_one_domain_out
from utils.evaluation.runs import method_name
from utils.evaluation.tables import MARKS, SELECTION_NOTE, Cell, Table, published_rows, to_csv, to_latex, to_markdown

PUBLISHED = [("mms", 0.02), ("mms", 0.05), ("scgm", 0.2)]  # data set and share of labelled patients
SETTINGS = {"num_epoch": 50, "max_steps": None, "pretrained": "timm", "field": 288}
RULE = "highest ensemble Dice on 100 % of source_images"
DATASETS = {
    "mms": mms_dataloader.DATASET,
    "scgm": scgm_dataloader.DATASET,
    "new": replace(mms_dataloader.DATASET, key="new", name="New", domain_kind="hospital", domains=("x", "y")),
}


def combine(summaries):
    dataset = DATASETS[summaries[0]["dataset"]]
    return leave_one_domain_out(by_method(summaries, [s["method"] for s in summaries], dataset), dataset)


def summary(domain="A", mean=80.0, std=5.0, *, seed=0, structures=("LV", "MYO", "RV"), **changes):
    """A run's summary.json, as far as the table reads it; every structure has Dice `mean`."""
    metrics = {"dice": mean, "dice_std": std, "hd95": 9.0, "hd95_std": 3.0, "assd": 2.0, "assd_std": None}
    facts = {"dataset": "mms", "test_domain": domain, "checkpoint": "best, step 100", "selection": RULE, "patients": 50}
    facts |= dict.fromkeys(MARKS, False) | {
        "method": "full",
        "unfinished": "",
        "data": "mms",
        "step": 9,
        "labeled": "A 3",
    }
    facts |= {"settings": SETTINGS | {"seed": seed, "test_domain": domain}, "ratio": 0.02, "seed": seed}
    facts |= {"image_size": 288}
    facts |= {"pooled": {"mean": None if mean is None else mean + 5}}
    facts["paper_protocol"] = {"mean": mean, "std": std, "ci95": None}
    return facts | {"volumetric": dict.fromkeys(structures, metrics)} | changes


def all_domains(**changes):
    return [summary(domain, mean, **changes) for domain, mean in zip("ABCD", (70.0, 74.0, 82.0, 86.0), strict=True)]


def cells(table, label):
    [row] = [row for name, *row in table.rows if name == label]
    return dict(zip(table.header[1:], row, strict=True))


def labels(table):
    return [row[0] for row in table.rows]


def test_averages_over_domains_and_seeds():
    """Over domains with the population deviation of their means."""
    paper, _, left, myocardium, right = combine(all_domains())
    found = cells(paper, "this implementation, full")
    assert {domain: found[domain][:2] for domain in "ABCD"} == {"A": (70, 5), "B": (74, 5), "C": (82, 5), "D": (86, 5)}
    # deviations -8, -4, 4, 8: sqrt(160 / 4), not sqrt(160 / 3)
    assert found["average"] == (78, pytest.approx(6.3246, abs=1e-4), None, "")
    assert str(found["average"]) == "78.00 ± 6.32" and str(found["A"]) == "70.00 ± 5.00"
    assert cells(myocardium, "Dice (%), full")["average"][:2] == found["average"][:2]
    assert cells(right, "HD95 (mm), full")["average"][:2] == (9, 0)
    assert str(cells(left, "ASSD (mm), full")["B"]) == "2.00"
    # Seeds are averaged with their sample deviation.
    runs = [summary("B", mean, seed=seed) for seed, mean in ((2, 90.0), (0, 80.0), (1, 82.0))]
    table = combine([*runs, summary("A", 70.0)])
    found = cells(table[0], "this implementation, full")
    # 84; deviations 6, -4, -2: sqrt(56 / 2)
    assert found["B"] == (84, pytest.approx(5.2915, abs=1e-4), None, "3 seeds")
    assert str(found["A"]) == "70.00 ± 5.00"
    assert found["average"][:2] == (77, 7)  # of the domains, however many seeds one has
    assert found["± over"] == "patients or seeds"
    assert "full, pretrained timm: A seed 0, n = 50, labelled A 3, 9 steps; B seed 0, n = 50" in table[0].notes[1]
    assert cells(table[1], "this implementation, full")["average"][:2] == (82, 7)  # pooled: 5 more each
    # No mean and no deviation.
    empty = summary("A", None, None)
    paper, _, volumetric, *_ = combine([empty, summary("B", 70.0, None), summary("B", None, None, seed=1)])
    found = cells(paper, "this implementation, full")
    assert (str(found["A"]), str(found["B"]), str(found["average"])) == ("–", "70.00 (1 seed)", "70.00 (1 domain)")
    assert str(cells(volumetric, "Dice (%), full")["A"]) == "–"
    nothing = combine([empty])
    assert "None" not in to_markdown(nothing) + to_csv(nothing) + to_latex(nothing)


def test_methods_and_what_is_not_comparable():
    runs = [summary("A"), summary("B", image_size=64), summary("B", seed=1, other_data=True, keep_largest=True)]
    runs[0]["settings"] |= {"pretrained": "none", "max_steps": 9}
    runs += [summary(d, method="new", phantom=True, tta=True) for d in "AB"]
    tables = combine(runs)
    note = (
        "Not comparable with published rows: full (not pretrained, 9 steps, 64 px, largest components, "
        "data not its training's); new (phantom data, test-time augmentation, new)."
    )
    assert note in tables[0].notes and to_markdown(tables).count("Not comparable") == 2
    assert cells(tables[0], "this method, as published")["average"].mean == 84.52  # still beside ours
    assert "Not comparable" not in to_markdown(combine(all_domains(checkpoint="last, step 9")))
    tables = combine([summary("A", 70.0), summary("A", 60.0, method="plain CPS"), summary("B", 80.0)])
    titles = ["Paper protocol", "Pooled over the list", *(f"Volumetric, {s}" for s in ("LV", "MYO", "RV"))]
    assert [table.title for table in tables] == titles
    means = [[cell.mean for cell in row[1:6]] for row in tables[0].rows[:2]]
    assert means == [[70, 80, None, None, 75], [60, None, None, None, 60]]
    assert labels(tables[2])[:3] == ["Dice (%), full", "Dice (%), plain CPS", "HD95 (mm), full"]
    # What stands behind the numbers is said.
    remark = " (training not finished: epoch 12 of 50)"
    other = {"seed": 3, "unfinished": remark, "settings": SETTINGS | {"seed": 3, "num_epoch": 8, "test_domain": "B"}}
    for table in combine([summary("A"), summary("B", **other)]):
        assert f"B seed 3{remark}, n = 50, labelled A 3, 9 steps. They differ in num_epoch." in table.notes[1]
        assert "each vendor held out in turn, average ± population SD of the means; 2 % labelled." in table.notes[0]
        assert f"Checkpoint: best, selection: {RULE}." in table.notes[0]


def test_published_rows_stand_in_the_table_of_their_own_dice():
    """The numbers of rows by the papers, one of them by hand, and the sentence beside every comparison."""
    numbers = {
        kind: [len(published_rows(*key, kind)[0]) for key in PUBLISHED] for kind in ("paper", "pooled", "unknown")
    }
    assert numbers == {"paper": [7, 6, 7], "pooled": [1, 1, 0], "unknown": [5, 5, 0]}
    assert published_rows("mms", 0.3, "paper") == ([], [])
    (at_2, pooled_2), (at_5, pooled_5) = (combine(all_domains(ratio=ratio))[:2] for ratio in (0.02, 0.05))
    ours = {"± over": "patients", "checkpoint chosen on": "the best Dice, its first author says"}
    row = cells(at_5, "this method, as published")
    assert str(row["A"]) == "83.30 ± 5.83" and row | ours == row
    messenger = "S&D Messenger (MiT-B5, splits unpublished)"
    assert [str(cell) for cell in cells(pooled_2, messenger).values()][:5] == [
        "86.50",
        "87.58",
        "88.30",
        "89.76",
        "88.04",
    ]
    assert labels(pooled_5) == ["this implementation, full", messenger] and messenger not in labels(at_5)
    assert SELECTION_NOTE in at_2.notes and "VDPL (U-Net)" in labels(at_2) and "VDPL (U-Net)" not in labels(at_5)
    assert any("A&D (GenericSSL) 81.31, AllSpark (MiT-B5) 84.97, IS2Net 86.67" in note for note in at_2.notes)
    assert at_2.notes[-1] == "LDDG: printed as 63.16, the mean of its domains is 63.10."
    scgm, *_ = combine([summary("3", dataset="scgm", ratio=0.2, structures=["GM"])])
    assert scgm.header == ["", "1", "2", "3", "4", "average", "± over", "checkpoint chosen on"]
    assert str(cells(scgm, "this method, as published")["3"]) == "78.75 ± 9.44"
    # Of a data set without published numbers there are none.
    tables = combine([summary("x", dataset="new"), summary("y", dataset="new", mean=70.0)])
    assert labels(tables[0]) == ["this implementation, full"] and tables[0].header[:4] == ["", "x", "y", "average"]
    assert "New, data mms, each hospital held out in turn" in tables[0].notes[0] and len(tables[0].notes) == 2
    off = {}  # averages that are not the means of their domains
    for key, kind in product(PUBLISHED, numbers):
        off |= {(*key, note.split(":")[0]): note[-6:-1] for note in published_rows(*key, kind)[1] if "printed" in note}
    # In the papers, too; a slip of the copying would show as one more.
    assert off == {
        ("mms", 0.02, "LDDG"): "63.10",
        ("mms", 0.05, "LDDG"): "71.19",
        ("mms", 0.05, "AllSpark (MiT-B5)"): "83.87",
    }


def test_every_step_of_the_ablation_has_its_name():
    settings = {"cps_weight": 3.0, "cps_loss": "pixel", "fourier_aug": True, "fourier_mode": "AS", "cutmix": True}
    settings |= {"robust": False}
    for changes, name in (
        ({}, "full"),
        ({"robust": True}, "robust"),
        ({"robust": True, "cps_weight": 0}, "supervised only, robust"),
        ({"cps_weight": 0.0, "cutmix": False}, "supervised only"),
        ({"cps_loss": "plain", "fourier_aug": False}, "plain CPS"),
        ({"cps_loss": "plain"}, "plain CPS + Fourier"),
        ({"cps_loss": "scalar", "fourier_mode": "AM"}, "confidence as released (amplitude mix)"),
        ({"cps_loss": "threshold", "fourier_mode": "phase", "cutmix": False}, "threshold (phase), no CutMix"),  # new
    ):
        assert method_name({"config": settings | changes, "cps_weight": 3.0}) == name


def test_csv_and_markdown_hold_the_same_numbers():
    tables = combine([*all_domains(), summary("D", 81.3333333333, seed=1)])
    lines = list(csv.DictReader(io.StringIO(to_csv(tables))))
    entries = [cell for table in tables for _, *row in table.rows for cell in row]
    for line, cell in zip(lines, entries, strict=True):
        if isinstance(cell, str):
            assert line["mean"] == cell
            continue
        numbers = tuple(float(line[key]) if line[key] else None for key in ("mean", "sd"))
        assert numbers == (cell.mean, cell.std) and line["remark"] == cell.remark
    assert [line["column"] for line in lines[:5]] == [*"ABCD", "average"] and lines[3]["remark"] == "2 seeds"
    table = Table("Title", ["name", "n", "Dice"], [["a|b", 3, Cell(80.126, ci95=(70.0, 90.0))]], ["Foot."])
    assert to_markdown([table]) == (
        "**Title**\n\n| name | n | Dice |\n| --- | --- | --- |\n| a\\|b | 3 | 80.13 [70.00, 90.00] |\n\nFoot.\n"
    )
    assert "Title,a|b,Dice,80.126,,70.0,90.0,\n" in to_csv([table]) and "Title,a|b,n,3,,,,\n" in to_csv([table])
    assert str(Cell(float("nan"))) == str(Cell(None)) == "–"


def test_latex_is_well_formed():
    text = to_latex(combine(all_domains(phantom=True, ratio=0.05)))
    first, text = text.split("\n", 1)
    assert first.startswith("% needs \\usepackage{booktabs}") and text.isascii() and r"S\&D Messenger" in text
    plain = re.sub(r"\\[%&_#$]", "", text.replace("{!}{%\n", "{!}{\n"))  # what remains has a meaning to LaTeX
    assert not {*plain} & {*"%#_"} and plain.count("$") % 2 == 0 and text.count("{") == text.count("}")
    tabulars = re.findall(r"\\begin\{tabular\}\{lc{6,7}\}\n\\toprule\n(.*?)\\bottomrule", plain, re.DOTALL)
    assert len(tabulars) == text.count(r"\begin{table}") == text.count(r"\end{table}") == 5
    rows = [line for tabular in tabulars for line in tabular.splitlines() if line != r"\midrule"]
    assert all(row.count("&") in (6, 7) and row.endswith(r" \\") for row in rows)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_compiles_and_fits_the_page(tmp_path):
    """Of four methods with long names and two seeds, and of characters that have a meaning to LaTeX."""
    methods = ["full", "plain CPS + Fourier", "full, cps_weight 1.0", "supervised only"]
    dice = {f"P{i}": 80.0 + i for i in range(8)}
    facts = [{"phantom": True, "paper_dice": dice, "seed": seed, "method": name} for name in methods for seed in (0, 1)]
    runs = [run for each in facts for run in all_domains(**each)]
    tables = [*combine(runs), compare_methods(by_method(runs, [run["method"] for run in runs], DATASETS["mms"]))]
    tables.append(Table("Hostile ~ 50 %_&#${}^\\|<>", ["", "a_b"], [["x~y", "50 % {"]], ["±–−≥"]))
    packages = r"\usepackage{booktabs}\usepackage{graphicx}"
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{to_latex(tables)}\end{{document}}"
    (tmp_path / "table.tex").write_text(document, encoding="utf-8")
    latex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(latex, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    for complaint in ("Overfull", "Missing character", "Float too large"):
        assert complaint not in done.stdout
