"""Several runs in one table over their held-out domains; methods compared by patient."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

from scipy.stats import wilcoxon

from config import FIELD_PX, RUNTIME_SETTINGS
from utils.data.dataset import DatasetInfo
from utils.data.prepared import NO_DOMAIN
from utils.errors import UserError
from utils.evaluation.metrics import METRICS, holm, mean_std_interval
from utils.evaluation.report import count
from utils.evaluation.runs import is_other, method_name
from utils.evaluation.tables import Cell, Table, to_csv, to_latex, to_markdown
from utils.files import OutputFolder
from utils.run.folder import DEFAULTS

FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
COMPARISON_FILES = [f"{name}.{form}" for name in ("leave_one_domain_out", "comparison") for form in FORMATS]
VARYING = {"seed", "test_domain", "init_from"}  # settings in which the runs of a row may differ
METHOD_SETTINGS = {"cps_loss", "fourier_aug", "fourier_mode", "cutmix"}  # those that name the method
MARKS = {"phantom": "phantom data", "tta": "test-time augmentation", "keep_largest": "largest components"}
SELECTION_NOTE = "Published checkpoints may have been chosen on the held-out domain; ours never are."
Summary = dict[str, Any]  # content of summary.json
Runs = dict[str, list[Summary]]  # one method's summaries in order of seeds, by held-out domain


def name_rows(
    folders: Sequence[Path], metadata: Sequence[dict[str, Any]], dataset: DatasetInfo, *,
    labels: Sequence[str], one_data: bool,
) -> list[str]:  # fmt: skip
    """Return the rows' names: labels, or methods with differing settings; UserError if runs do not fit."""
    settings = []
    for config, content in ((DEFAULTS | run["config"], run["content_hash"] or "unknown") for run in metadata):
        settings.append(config | {"data": content[:8], "init_from": bool(config["init_from"])})
    names = list(labels) or _names_by_settings([method_name(run) for run in metadata], settings)
    if len(names) != len(folders):
        raise UserError(f"--label gives {len(names)} names for {len(folders)} runs: give one per --run")
    problems = []
    for key, remedy in {"ratio": "", "data": "; --data-root names data for all of them"}.items():
        if len({values[key] for values in settings}) > 1 and not (one_data and key == "data"):
            each = ", ".join(f"{folder}: {values[key]}" for folder, values in zip(folders, settings, strict=True))
            problems.append(f"one table takes one {key}, not {each}{remedy}")
    if any(values["test_domain"] == NO_DOMAIN for values in settings):
        problems.append("a run trained on all domains has no place in a table over held-out ones")
    cells = [(name, values["test_domain"], values["seed"]) for name, values in zip(names, settings, strict=True)]
    if twice := [str(folder) for folder, cell in zip(folders, cells, strict=True) if cells.count(cell) > 1]:
        problems.append(f"{', '.join(twice)}: one method, domain and seed; tell them apart by --label")
    if problems:
        raise UserError("\n".join(problems))
    return names


def _names_by_settings(methods: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return each run's method, with the settings beside it in which the runs differ."""
    texts, hidden = [], RUNTIME_SETTINGS | METHOD_SETTINGS | {"seed", "test_domain"}
    for values in settings:
        idle = () if values["cps_weight"] else ("cps_", "fourier_")  # without effect
        shown = sorted(key for key in values.keys() - hidden if not key.startswith(idle))
        texts.append({key: f"{key} {values[key]}".removesuffix(".0") for key in shown})
    choices = Counter(key for key, _ in set().union(*(text.items() for text in texts)))
    named = [[text for key, text in each.items() if choices[key] > 1] for each in texts]
    return [", ".join([method, *each]) for method, each in zip(methods, named, strict=True)]


def published_rows(dataset: str, ratio: float) -> tuple[list[list[Any]], str]:
    """Return the rows published for a share of labelled patients, and a note on later ones."""
    rows, note = [], ""
    with open(Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if (line["dataset"], float(line["ratio"])) == (dataset, ratio):
                numbers = zip_longest(line["dice"].split(), line["std"].split())
                cells = [Cell(float(dice), float(std) if std else None) for dice, std in numbers]
                rows.append([line["method"], *cells, Cell(float(line["average"]))])
                note += line["note"]
    return rows, note


def by_method(summaries: Sequence[Summary], names: Sequence[str], dataset: DatasetInfo) -> dict[str, Runs]:
    """Return summaries by the names of their rows and by held-out domain, in order of seeds."""
    methods: dict[str, Runs] = {name: {domain: [] for domain in dataset.domains} for name in names}
    for name, summary in sorted(zip(names, summaries, strict=True), key=lambda pair: pair[1]["seed"]):
        methods[name][summary["test_domain"]].append(summary)
    return methods


def leave_one_domain_out(methods: dict[str, Runs], dataset: DatasetInfo) -> list[Table]:
    """Return a table by the paper's protocol, beside published rows, and one per structure."""
    summaries = [summary for runs in methods.values() for seeds in runs.values() for summary in seeds]
    ratio, kind = summaries[0]["ratio"], dataset.domain_kind
    checkpoints = {f"{s['checkpoint'].split(',')[0]}, selection: {s['selection']}": None for s in summaries}
    setting = (
        f"{dataset.name}, data {summaries[0]['data']}, each {kind} held out in turn, {100 * ratio:g} % labelled. "
        "Mean ± SD over patients, of several seeds over their means; average ± population SD of the means. "
        f"Checkpoint: {'; '.join(checkpoints)}."
    )
    sources = [_sources(method, runs) for method, runs in methods.items()]
    header = ["", *dataset.domains, "average"]
    rows = [
        [f"this implementation, {name}", *_cells(runs, lambda s: s["paper_protocol"], "mean", "std")]
        for name, runs in methods.items()
    ]
    notes = [f"Dice (%), structures pooled per slice, {FIELD_PX} px grid. {setting}", *sources]
    published, later = published_rows(dataset.key, ratio)
    if published:
        rows += published
        notes += [*_not_comparable(methods), SELECTION_NOTE, later]
    tables = [Table("Paper protocol", header, rows, notes)]
    notes = [f"In the scans' own grid; a miss: Dice 0, distances of the diagonal. {setting}", *sources]
    for structure in summaries[0]["volumetric"]:
        rows = [
            [f"{title}, {name}", *_cells(runs, lambda s: s["volumetric"][structure], key, f"{key}_std")]  # noqa: B023
            for key, title in METRICS.items()
            for name, runs in methods.items()
        ]
        tables.append(Table(f"Volumetric, {structure}", header, rows, notes))
    return tables


def _cells(runs: Runs, figures: Callable[[Summary], dict[str, Any]], mean: str, std: str) -> list[Cell]:
    """Return a cell per domain, of two keys in its summaries' figures, and their average."""
    cells = []
    for seeds in runs.values():
        numbers = [Cell(figures(summary)[mean], figures(summary)[std]) for summary in seeds]
        cells.append(numbers[0] if len(numbers) == 1 else _average(numbers, stdev, "seed"))
    return [*cells, _average(cells, pstdev, "domain")]


def _average(cells: Sequence[Cell], deviation: Callable[[list[float]], float], noun: str) -> Cell:
    """Return mean and deviation of the known means, remarking how many if that is not plain."""
    known = [cell.mean for cell in cells if cell.mean is not None]
    remark = count(len(known), noun) if noun == "seed" or len(known) < len(cells) else ""
    return Cell(fmean(known) if known else None, deviation(known) if len(known) > 1 else None, remark=remark)


def _sources(method: str, runs: Runs) -> str:
    """Say what stands behind a method's cells, and in which settings its runs differ."""
    summaries = [summary for seeds in runs.values() for summary in seeds]
    sources = "; ".join(f"{s['test_domain']} seed {s['seed']}{s['unfinished']}, n = {s['patients']}" for s in summaries)
    values = {key: {str(s["settings"][key]) for s in summaries} for key in summaries[0]["settings"].keys() - VARYING}
    differ = ", ".join(key for key in sorted(values) if len(values[key]) > 1)
    return f"Runs, {method}: {sources}." + (f" They differ in {differ}." if differ else "")


def _not_comparable(methods: dict[str, Runs]) -> list[str]:
    """Say in a note which methods' results cannot stand beside the published ones, and why."""
    texts = []
    for method, runs in methods.items():
        summaries = [summary for seeds in runs.values() for summary in seeds]
        reasons = [text for key, text in MARKS.items() if any(s[key] for s in summaries)]
        reasons += {"data not its training's" for s in summaries if is_other(s["trained_by"], s)}
        reasons += sorted({s["method"] for s in summaries} - {"full"})
        reasons += [f"{px} px" for px in sorted({s["image_size"] for s in summaries} - {FIELD_PX})]
        if reasons:
            texts.append(f"{method} ({', '.join(reasons)})")
    return [f"Not comparable with the published rows: {'; '.join(texts)}."] if texts else []


def compare_methods(methods: dict[str, Runs]) -> Table:
    """Compare every method with the first, by domain and patient; the last notes are warnings."""
    reference, *others = methods
    dice = {method: _patient_dice(runs) for method, runs in methods.items()}
    rows, warnings = [], []
    for domain in [*methods[reference], "all"]:
        differences = {}  # by patient, in points of Dice
        for method in others:
            both = [key for key in dice[method].keys() & dice[reference].keys() if domain in (key[0], "all")]
            if both or domain == "all":
                differences[method] = sorted(dice[method][key] - dice[reference][key] for key in both)
        # Without zeros, which the versions of scipy treat differently.
        unequal = {method: [value for value in values if value] for method, values in differences.items()}
        p_values = [wilcoxon(values).pvalue if values else 1.0 for values in unequal.values()]
        for method, p, adjusted in zip(differences, p_values, holm(p_values), strict=True):
            row, mean = f"{method}, {domain}", Cell(**mean_std_interval(differences[method]))._replace(std=None)
            rows.append([row, len(differences[method]), mean, f"{p:.3g}", f"{adjusted:.3g}"])
            if (number := len(unequal[method])) < 6:  # the test's least p is 2 / 2^number
                warnings.append(f"{row}: {count(number, 'patient')} differ, too few for p < 0.05.")
            ours, theirs = (methods[name].get(domain, []) for name in (method, reference))
            if [(s["seed"], {*s["paper_dice"]}) for s in ours] != [(s["seed"], {*s["paper_dice"]}) for s in theirs]:
                warnings.append(f"{row}: other seeds or patients than {reference}; those of both count.")
    note = (
        f"Mean difference from {reference} in points of the paper's Dice, paired by patient (mean over seeds) [95 % "
        "bootstrap interval]; two-sided Wilcoxon signed-rank p, and by Holm for the number of methods. The "
        "patients vary, not the trainings: another seed may give another difference."
    )
    header = ["", "patients", "difference", "p", "p (Holm)"]
    return Table("Comparison", header, rows, [note, *(f"Warning: {text}" for text in warnings)])


def _patient_dice(runs: Runs) -> dict[tuple[str, str], float]:
    """Return by domain and patient the mean Dice over the seeds, of patients that all seeds have."""
    return {
        (domain, patient): fmean(summary["paper_dice"][patient] for summary in seeds)
        for domain, seeds in runs.items()
        for patient in (seeds[0]["paper_dice"] if seeds else ())
        if all(patient in summary["paper_dice"] for summary in seeds)
    }


def comparison_folder(parent: Path, names: Sequence[str], facts: Any) -> Path:
    """Return the folder for tables over runs, named by their rows and a hash of `facts`."""
    title = re.sub(r"[^\w.]+", "-", "_vs_".join(dict.fromkeys(names)))[:80]
    return parent / "comparisons" / f"{title}_{sha256(repr((facts, names)).encode()).hexdigest()[:6]}"


def write_comparison(methods: dict[str, Runs], dataset: DatasetInfo, folder: Path) -> None:
    """Write the tables over the domains and the methods' comparison; print the first of each."""
    outputs = OutputFolder(folder)
    written = {"leave_one_domain_out": leave_one_domain_out(methods, dataset)}
    if len(methods) > 1:
        written["comparison"] = [compare_methods(methods)]
    for name, tables in written.items():
        for suffix, text in FORMATS.items():
            outputs.claim(f"{name}.{suffix}").write_text(text(tables), encoding="utf-8")
        print(f"\n{to_markdown(tables[:1])}")
    print(f"tables in {folder}: {', '.join(written)} as .md, .csv and .tex")
