"""Several runs in one table over their held-out domains; methods compared by patient."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import wilcoxon

from config import FIELD_PX, RUNTIME_SETTINGS
from utils.data.dataset import DatasetInfo
from utils.data.prepared import NO_DOMAIN
from utils.errors import UserError
from utils.evaluation.charts import plot_differences
from utils.evaluation.metrics import METRICS, MISSED_SLICES, holm, mean_std_interval
from utils.evaluation.report import count
from utils.evaluation.runs import is_other, method_name
from utils.evaluation.tables import Cell, Table, to_csv, to_latex, to_markdown
from utils.files import OutputFolder

FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
COMPARISON_FILES = (
    *(f"{table}.{suffix}" for table in ("leave_one_domain_out", "comparison") for suffix in FORMATS),
    "comparison.png",
)

VARYING = {"seed", "test_domain", "init_from"}  # settings in which the runs of a table differ by design
METHOD_SETTINGS = {"cps_loss", "fourier_aug", "fourier_mode", "cutmix"}  # those that name the method
MISSED = {"missed": "scans", "missed_slices": "slices"}  # counts in a summary, and there what they are shares of
FEW_PATIENTS = 6  # with fewer, no signed-rank test reaches p < 0.05
SELECTION_NOTE = (
    "A published checkpoint may have been chosen on the held-out domain itself; those of this implementation never are."
)
Summary = dict[str, Any]  # content of summary.json
Runs = dict[str, list[Summary]]  # held-out domain -> one method's summaries by seed; empty where there is none


def name_rows(
    folders: Sequence[Path], metadata: Sequence[dict[str, Any]], dataset: DatasetInfo, *,
    labels: Sequence[str], one_data: bool,
) -> list[str]:  # fmt: skip
    """Return the rows' names of several runs: labels, or methods and settings that differ.

    Args:
        metadata: what was saved beside the weights of each.
        one_data: all runs are evaluated on the same data, whatever their training's.

    Raises:
        UserError: the runs cannot stand in one table, or there are not as many labels as runs.
    """
    # Which run it began with differs by seed and domain, but not whether it began so.
    settings = [
        run["config"]
        | {"data": (run["content_hash"] or "unknown")[:8]}
        | {"begun": "with another run" if run["config"]["init_from"] else "anew"}
        for run in metadata
    ]
    names = list(labels) or _names_by_settings([method_name(run) for run in metadata], settings)
    if len(names) != len(folders):
        raise UserError(f"--label gives {len(labels)} names for {len(folders)} runs: give one per --run, in that order")
    problems = []
    for key, remedy in (("ratio", ""), ("data", "; --data-root names data to evaluate all of them on")):
        if len({s[key] for s in settings}) > 1 and not (key == "data" and one_data):
            each = ", ".join(f"{folder}: {s[key]}" for folder, s in zip(folders, settings, strict=True))
            rule = "one table takes runs of one label ratio, trained on the same data"
            problems.append(f"{rule}, not {key} {each}{remedy}")
    if any(s["test_domain"] == NO_DOMAIN for s in settings):
        problems.append(f"a run trained on all domains has no place in a table over held-out {dataset.domain_kind}s")
    cells = [(name, s["test_domain"], s["seed"]) for name, s in zip(names, settings, strict=True)]
    if twice := ", ".join(str(folder) for folder, cell in zip(folders, cells, strict=True) if cells.count(cell) > 1):
        remedy = "give one, or tell them apart by --label"
        problems.append(f"{twice} have the same settings, held-out domain and seed: {remedy}")
    if problems:
        raise UserError("\n".join(problems))
    return names


def _names_by_settings(methods: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return each run's method, with the settings beside it in which the runs differ."""
    hidden = RUNTIME_SETTINGS | VARYING | METHOD_SETTINGS
    texts = [{key: str(value).removesuffix(".0") for key, value in s.items() if key not in hidden} for s in settings]
    for text in texts:
        if text["cps_weight"] == "0":  # "supervised only" says so
            del text["cps_weight"]
    keys = [key for key in sorted(set().union(*texts)) if len({text[key] for text in texts if key in text}) > 1]
    return [
        ", ".join([method, *(f"{key} {text[key]}" for key in keys if key in text)])
        for method, text in zip(methods, texts, strict=True)
    ]


def published_rows(dataset: str) -> dict[float, tuple[list[list[Any]], str]]:
    """Return the published rows, and the sources of later ones, by share of labelled patients.

    Dice in percent per held-out domain, with the sample standard deviation over patients, and their
    average, as printed there.
    """
    rows: dict[float, list[list[Any]]] = defaultdict(list)
    sources: dict[float, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    with open(Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["dataset"] == dataset:
                ratio, dice, std = float(line["ratio"]), line["dice"].split(), line["std"].split()
                cells = [Cell(float(d), float(s) if s else None) for d, s in zip_longest(dice, std)]
                rows[ratio].append([line["method"], *cells, Cell(float(line["average"]))])
                note = f" ({line['note']})" if line["note"] else ""
                sources[ratio][line["later"]].append(line["method"] + note)
    published = {}
    for ratio, by_source in sources.items():
        later = [f"{', '.join(names)} as in {source}" for source, names in by_source.items() if source]
        published[ratio] = (rows[ratio], f"Published later: {'; '.join(later)}." if later else "")
    return published


def by_method(summaries: Sequence[Summary], names: Sequence[str], dataset: DatasetInfo) -> dict[str, Runs]:
    """Return summaries by the names of their rows and by held-out domain, in order of seeds."""
    methods: dict[str, Runs] = {name: {domain: [] for domain in dataset.domains} for name in names}
    for name, summary in sorted(zip(names, summaries, strict=True), key=lambda pair: pair[1]["seed"]):
        methods[name][summary["test_domain"]].append(summary)
    return methods


def leave_one_domain_out(methods: dict[str, Runs], dataset: DatasetInfo) -> list[Table]:
    """Put summaries, of one or more seeds per held-out domain and method, into tables.

    The first table has a row per method and the published ones, by the paper's protocol; a
    volumetric table per structure follows. A domain's cell holds the mean and sample standard
    deviation over patients or, of several seeds, over the seeds' means. The average is that of the
    domains' means, with their population standard deviation, as in the paper.
    """
    summaries = [summary for runs in methods.values() for seeds in runs.values() for summary in seeds]
    ratio, kind, published = summaries[0]["ratio"], dataset.domain_kind, published_rows(dataset.key)
    other = any(is_other(summary["trained_by"], summary) for summary in summaries)
    of_data = f" of other data than the training's, {summaries[0]['data']}," if other else ""
    checkpoints = dict.fromkeys(f"{s['checkpoint'].split(',')[0]}, selection: {s['selection']}" for s in summaries)
    setting = (
        f"{dataset.name}, each {kind}{of_data} held out in turn, {_percent(ratio)} of the patients "
        "labelled. Mean ± standard deviation over patients, of several seeds over their means; "
        f"average ± population standard deviation of the {kind}s' means. Checkpoint: "
        f"{'; '.join(checkpoints)}."
    )
    sources = [_sources(method, runs) for method, runs in methods.items()]
    header = ["", *dataset.domains, "average"]
    rows = [[f"this implementation, {name}", *_cells(runs, lambda s: s["paper_protocol"], "mean", "std")]
            for name, runs in methods.items()]  # fmt: skip
    remarks, beside = [], ""
    if published:
        nearest = min(published, key=lambda share: abs(share - ratio))
        beside = f" Published rows: {_percent(nearest)} labelled."
        printed, later = published[nearest]
        rows += printed
        remarks = [_not_comparable(methods, dataset, list(published)), SELECTION_NOTE, later]
    note = f"Dice (%) of all structures pooled per slice, softmax > 0.5, on a {FIELD_PX} px grid. {setting}{beside}"
    rules = [len(methods)] if published else []
    tables = [Table("Paper protocol", note, header, rows, [*sources, *filter(None, remarks)], rules)]
    note = (
        "In the scans' own grid; a miss counts as Dice 0 and as distances of the image diagonal. "
        f"In-plane: by the contours of each slice. {MISSED_SLICES} {setting}"
    )
    metrics = METRICS | {key: f"missed (% of {whole})" for key, whole in MISSED.items()}
    for structure in summaries[0]["volumetric"]:
        rows = [
            [f"{text}, {name}", *_cells(runs, lambda s: _volumetric(s, structure), key, f"{key}_std")]  # noqa: B023
            for key, text in metrics.items()
            for name, runs in methods.items()
        ]
        rules = range(len(methods), len(rows), len(methods))
        tables.append(Table(f"Volumetric, {structure}", note, header, rows, sources, rules))
    return tables


def _cells(runs: Runs, figures: Callable[[Summary], dict[str, Any]], mean: str, std: str) -> list[Cell]:
    """Return a cell per domain, of two keys in its summaries' figures, and their average."""
    cells = []
    for seeds in runs.values():
        numbers = [figures(summary) for summary in seeds]
        if len(numbers) == 1:
            cells.append(Cell(numbers[0][mean], numbers[0].get(std)))
        else:
            cells.append(_average([number[mean] for number in numbers], stdev, "seed" if numbers else ""))
    means = [cell.mean for cell in cells]
    return [*cells, _average(means, pstdev, "domain" if None in means else "")]


def _average(means: Sequence[float | None], deviation: Callable[[list[float]], float], noun: str) -> Cell:
    """Return mean and deviation of the known means, with their number if `noun` names them."""
    known = [mean for mean in means if mean is not None]
    std = deviation(known) if len(known) > 1 else None
    return Cell(fmean(known) if known else None, std, remark=count(len(known), noun) if noun else "")


def _volumetric(summary: Summary, structure: str) -> dict[str, Any]:
    """Return the figures of a structure, with its misses in percent."""
    figures = summary["volumetric"][structure]
    shares = {key: 100 * figures[key] / figures[of] if figures[of] else None for key, of in MISSED.items()}
    return figures | shares


def _sources(method: str, runs: Runs) -> str:
    """Say what stands behind a method's cells, and which settings of its runs differ."""
    sources = []
    for domain, seeds in runs.items():
        if seeds:
            numbers = ", ".join(f"{summary['seed']}{summary['unfinished']}" for summary in seeds)
            sources.append(f"{domain} {count(seeds[0]['patients'], 'patient')}, seed {numbers}")
    text = f"Runs, {method}: {'; '.join(sources)}."
    settings = [summary["settings"] for seeds in runs.values() for summary in seeds]
    values = {key: dict.fromkeys(each[key] for each in settings) for key in settings[0].keys() - VARYING}
    unequal = [f"{key} ({', '.join(map(str, each))})" for key, each in sorted(values.items()) if len(each) > 1]
    return f"{text} They differ in {', '.join(unequal)}." if unequal else text


def _not_comparable(methods: dict[str, Runs], dataset: DatasetInfo, published: Sequence[float]) -> str:
    """Say which results cannot stand beside the published numbers, and why; empty where all can."""
    texts = []
    for method, runs in methods.items():
        domains_of: dict[str, list[str]] = {}
        for domain, seeds in runs.items():
            reasons = [text for key, text in (("phantom", "phantom data"), ("tta", "test-time augmentation"))
                       if any(summary[key] for summary in seeds)]  # fmt: skip
            reasons += ["another method"] if {s["method"] for s in seeds} - {"full"} else []
            reasons += [f"{_percent(ratio)} labelled" for ratio in {s["ratio"] for s in seeds} - set(published)]
            reasons += [f"{px} px" for px in sorted({s["image_size"] for s in seeds} - {FIELD_PX})]
            if reasons:
                domains_of.setdefault(", ".join(reasons), []).append(domain)
        texts += [f"{method}, {', '.join(domains)} ({reasons})" for reasons, domains in domains_of.items()]
    facts = f"{dataset.name}, {' or '.join(map(_percent, published))} labelled, {FIELD_PX} px"
    return f"Not comparable with the published rows ({facts}): {'; '.join(texts)}." if texts else ""


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


class Difference(NamedTuple):
    """A method against the reference in one domain, or in "all" of them."""

    method: str
    domain: str
    values: list[float]  # by patient, method - reference, in points of Dice


def compare_methods(methods: dict[str, Runs]) -> tuple[Table, list[Difference]]:
    """Compare every method with the first, on the patients and in the domains that both have.

    Returns:
        A table with a row per method and domain, whose footnotes are warnings; and the differences
        behind its rows.
    """
    reference, *others = methods
    differences, warnings = [], []
    for method in others:
        pooled: list[float] = []
        for domain, runs in methods[method].items():
            base = methods[reference][domain]
            if not (runs and base):
                continue
            ours, theirs = _patient_dice(runs), _patient_dice(base)
            values = [ours[patient] - theirs[patient] for patient in ours.keys() & theirs.keys()]
            differences.append(Difference(method, domain, sorted(values)))
            pooled += values
            if left_out := len(ours.keys() ^ theirs.keys()):
                warnings.append(f"{method}, {domain}: {count(left_out, 'patient')} not in both, left out.")
            seeds, other_seeds = ([run["seed"] for run in each] for each in (runs, base))
            if seeds != other_seeds:
                warnings.append(f"{method}, {domain}: its seeds are {seeds}, those of {reference} {other_seeds}.")
        differences.append(Difference(method, "all", sorted(pooled)))
    if few := [f"{d.method}, {d.domain}" for d in differences if len(d.values) < FEW_PATIENTS]:
        warnings.append(f"Fewer than {FEW_PATIENTS} patients, too few for p < 0.05: {'; '.join(few)}.")
    raw = np.array([wilcoxon(d.values).pvalue if any(d.values) else 1.0 for d in differences])
    domains, adjusted = np.array([d.domain for d in differences]), np.empty(len(differences))
    for domain in {*domains}:
        adjusted[domains == domain] = holm(raw[domains == domain])
    rows: list[list[Any]] = []
    for d, *p_values in zip(differences, raw, adjusted, strict=True):
        spread = mean_std_interval(d.values)
        cell = Cell(spread["mean"], ci95=spread["ci95"])
        rows.append([f"{d.method}, {d.domain}", len(d.values), cell, *(f"{p:.3g}" for p in p_values)])
    note = (
        f"Reference: {reference}. Mean difference from it in points of the paper's Dice (positive: "
        "better than the reference), paired by patient, whose Dice is the mean over a method's "
        "seeds; 95 % bootstrap interval over patients; two-sided Wilcoxon signed-rank p, and by "
        "Holm for the number of methods compared. The patients vary, not the trainings: another "
        "seed may give another difference. All: the patients of all domains."
    )
    header = ["", "patients", "difference [95 % CI]", "p", "p (Holm)"]
    rules = [i for i, d in enumerate(differences) if i and d.method != differences[i - 1].method]
    return Table("Comparison", note, header, rows, [f"Warning: {text}" for text in warnings], rules), differences


def _patient_dice(runs: list[Summary]) -> dict[str, float]:
    """Return the mean Dice over the seeds, of every patient that all seeds have."""
    patients = set.intersection(*(set(run["paper_dice"]) for run in runs))
    return {patient: fmean(run["paper_dice"][patient] for run in runs) for patient in patients}


def comparison_folder(parent: Path, names: Sequence[str], facts: Any) -> Path:
    """Return the folder for tables over runs, named by their rows and a hash of `facts`."""
    title = re.sub(r"[^\w.]+", "-", "_vs_".join(dict.fromkeys(names)))[:80]
    return parent / "comparisons" / f"{title}_{sha256(repr((facts, names)).encode()).hexdigest()[:6]}"


def write_comparison(methods: dict[str, Runs], dataset: DatasetInfo, folder: Path) -> None:
    """Write the leave-one-domain-out tables and the methods' comparison with the first.

    The table by the paper's protocol and the comparison are printed.
    """
    outputs = OutputFolder(folder)
    written = {"leave_one_domain_out": leave_one_domain_out(methods, dataset)}
    if len(methods) > 1:
        table, differences = compare_methods(methods)
        written["comparison"] = [table]
        rows = [(row[0], d.values, row[2].mean, row[2].ci95) for row, d in zip(table.rows, differences, strict=True)]
        phantom = any(s["phantom"] for runs in methods.values() for seeds in runs.values() for s in seeds)
        title = f"{dataset.name}{', phantom' if phantom else ''}: difference from {next(iter(methods))}"
        plot_differences(outputs.claim("comparison.png"), rows, title=title)
    for name, tables in written.items():
        for suffix, form in FORMATS.items():
            outputs.claim(f"{name}.{suffix}").write_text(form(tables), encoding="utf-8")
        print(f"\n{to_markdown(tables[:1])}")
    print(f"tables in {folder}: {', '.join(written)} as .md, .csv and .tex")
