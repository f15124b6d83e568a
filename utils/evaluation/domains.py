"""The leave-one-domain-out tables: the results of several runs, beside the published ones (published.csv)."""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any, NamedTuple

from config import FIELD_PX
from utils.data.dataset import DatasetInfo
from utils.evaluation.metrics import METRICS, MISSED_SLICES
from utils.evaluation.runs import VARYING, is_other
from utils.evaluation.tables import Cell, Table

MISSED = {"missed": "scans", "missed_slices": "slices"}  # counts in a summary, and there what they are shares of
SELECTION_NOTE = (
    "A published checkpoint may have been chosen on the held-out domain itself; those of this implementation never are."
)
Runs = dict[str, list[dict[str, Any]]]  # held-out domain -> one method's summaries by seed; empty where there is none
MeanStd = tuple[float | None, float | None]


class Published(NamedTuple):
    """A published row: Dice in percent per held-out domain and their average, as printed there."""

    method: str
    dice: list[float]
    average: float
    std: list[float | None]  # sample standard deviation over patients
    later: str  # where a row later than this method is taken from
    note: str  # what to know about it
    cite: str  # its key in published.bib, where that has its source


def published_rows(dataset: str) -> dict[float, list[Published]]:
    """Return the published rows of a data set by share of labelled patients."""
    rows: dict[float, list[Published]] = {}
    with open(Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["dataset"] == dataset:
                dice, std = ([float(value) for value in line[key].split()] for key in ("dice", "std"))
                texts = {key: line[key] for key in ("method", "later", "note", "cite")}
                row = Published(dice=dice, std=std or [None] * len(dice), average=float(line["average"]), **texts)
                rows.setdefault(float(line["ratio"]), []).append(row)
    return rows


def by_method(summaries: Sequence[dict[str, Any]], names: Sequence[str], dataset: DatasetInfo) -> dict[str, Runs]:
    """Return the summary.json of several runs by the names of their rows and by held-out domain, in order of seeds."""
    methods: dict[str, Runs] = {name: {domain: [] for domain in dataset.domains} for name in names}
    for name, summary in sorted(zip(names, summaries, strict=True), key=lambda pair: pair[1]["seed"]):
        methods[name][summary["test_domain"]].append(summary)
    return methods


def leave_one_domain_out(methods: dict[str, Runs], dataset: DatasetInfo) -> list[Table]:
    """Put the summaries of several runs, one or more seeds per held-out domain and method, into tables.

    The first table has a row per method and the published ones, by the paper's protocol; a volumetric table per
    structure follows. A domain's cell holds the mean and sample standard deviation over patients or, of several seeds,
    over the seeds' means. The average is that of the domains' means, with their population standard deviation, as in
    the paper.
    """
    summaries = [summary for runs in methods.values() for found in runs.values() for summary in found]
    ratio, kind = summaries[0]["ratio"], dataset.domain_kind
    other = any(is_other(summary["trained_by"], summary) for summary in summaries)
    of_data = f" of other data than the training's, {summaries[0]['data']}," if other else ""
    published = published_rows(dataset.key)
    nearest = min(published, key=lambda share: abs(share - ratio), default=None)
    printed = published.get(nearest, [])
    marks = {
        method: {d: _differences(found, published) for d, found in runs.items()} for method, runs in methods.items()
    }
    checkpoints = dict.fromkeys(f"{s['checkpoint'].split(',')[0]}, selection: {s['selection']}" for s in summaries)
    setting = (
        f"{dataset.name}, each {kind}{of_data} held out in turn, {_percent(ratio)} of the patients labelled. Mean ± "
        f"standard deviation over patients, of several seeds over their means; average ± population standard deviation "
        f"of the {kind}s' means. Checkpoint: {'; '.join(checkpoints)}."
    )
    sources = [_sources(method, runs, marks[method]) for method, runs in methods.items()]
    header = ["", *dataset.domains, "average"]
    beside, remarks = "", []
    if published:
        beside = f" Published rows: {_percent(nearest)} labelled."
        remarks = [SELECTION_NOTE]
        if any(mark for of_method in marks.values() for mark in of_method.values()):
            beside = f"{beside[:-1]}, not comparable with what is marked †."
            facts = f"{dataset.name}, {' or '.join(map(_percent, published))} labelled, {FIELD_PX} px"
            sources.append(f"† Not comparable with the published numbers ({facts}).")
    rows: list[list[Any]] = [
        [f"this implementation, {method}{_seeds(runs)}", *_cells(runs, marks[method], _paper_dice)]
        for method, runs in methods.items()
    ]
    later: dict[str, list[str]] = {}
    for row in printed:
        rows.append([f"{row.method} ‡" if row.later else row.method, *map(Cell, row.dice, row.std), Cell(row.average)])
        if row.later:
            later.setdefault(row.later, []).append(f"{row.method} ({row.note})" if row.note else row.method)
    if later:
        named = "; ".join(f"{', '.join(names)} as in {source}" for source, names in later.items())
        remarks.append(f"‡ Published later: {named}.")
    note = f"Dice (%) of all structures pooled per slice, softmax > 0.5, on a {FIELD_PX} px grid. {setting}{beside}"
    rules, citations = [len(methods)] if published else [], {row.method: row.cite for row in printed if row.cite}
    tables = [Table("Paper protocol", note, header, rows, [*sources, *remarks], rules, citations)]
    note = (
        "In the scans' own grid; a miss counts as Dice 0 and as distances of the image diagonal. In-plane: by the "
        f"contours of each slice. {MISSED_SLICES} {setting}"
    )
    metrics = METRICS | {key: f"missed (% of {whole})" for key, whole in MISSED.items()}
    for structure in summaries[0]["volumetric"]:
        rows = [
            [f"{text}, {method}", *_cells(runs, marks[method], partial(_volumetric, structure, key))]
            for key, text in metrics.items()
            for method, runs in methods.items()
        ]
        rules = range(len(methods), len(rows), len(methods))
        tables.append(Table(f"Volumetric, {structure}", note, header, rows, sources, rules))
    return tables


def _seeds(runs: Runs) -> str:
    """Say over how many seeds a method's cells are, where all of them are over as many; else the cells say it."""
    counts = {len(found) for found in runs.values() if found}
    return f" ({max(counts)} seeds)" if len(counts) == 1 and counts != {1} else ""


def _cells(runs: Runs, marks: dict[str, str], mean_std: Callable[[dict[str, Any]], MeanStd]) -> list[Cell]:
    """Return one cell per domain, and the average of those that have a mean."""
    cells = []
    for domain, found in runs.items():
        numbers = [mean_std(summary) for summary in found]
        remark = ""
        if len(numbers) > 1:
            means = [mean for mean, _ in numbers if mean is not None]
            numbers, remark = [_over(means, stdev)], "" if _seeds(runs) else f"{len(means)} seeds"
        cells.append(Cell(*(numbers or [(None, None)])[0], remark, marks[domain]))
    means = [cell.mean for cell in cells if cell.mean is not None]
    partly = f"{len(means)} domain{'' if len(means) == 1 else 's'}" if len(means) < len(cells) else ""
    differences = "; ".join(dict.fromkeys(filter(None, marks.values())))
    return [*cells, Cell(*_over(means, pstdev), partly, differences)]


def _paper_dice(summary: dict[str, Any]) -> MeanStd:
    return summary["paper_protocol"]["mean"], summary["paper_protocol"]["std"]


def _volumetric(structure: str, metric: str, summary: dict[str, Any]) -> MeanStd:
    of_structure = summary["volumetric"][structure]
    if metric in MISSED:
        count = of_structure[MISSED[metric]]
        return 100 * of_structure[metric] / count if count else None, None
    return of_structure[metric], of_structure[f"{metric}_std"]


def _over(means: list[float], deviation: Callable[[list[float]], float]) -> MeanStd:
    return fmean(means) if means else None, deviation(means) if len(means) > 1 else None


def _differences(found: Sequence[dict[str, Any]], published: dict[float, list[Published]]) -> str:
    """Say why the runs of a domain cannot stand beside the published numbers; empty where they can, or none are."""
    if not published:
        return ""
    flags = {"phantom": "phantom data", "tta": "test-time augmentation"}
    reasons = [reason for key, reason in flags.items() if any(summary.get(key) for summary in found)]
    reasons += sorted({summary["method"] for summary in found} - {"full"})
    reasons += [f"{_percent(ratio)} labelled" for ratio in {summary["ratio"] for summary in found} - set(published)]
    return ", ".join([*reasons, *(f"{px} px" for px in sorted({s["image_size"] for s in found} - {FIELD_PX}))])


def _sources(method: str, runs: Runs, marks: dict[str, str]) -> str:
    """Say what stands behind a method's cells, and in which settings its runs differ other than by design."""
    sources = []
    for domain, found in runs.items():
        if found:
            seeds = ", ".join(f"{summary['seed']}{summary['unfinished']}" for summary in found)
            mark = f" († {marks[domain]})" if marks[domain] else ""
            sources.append(f"{domain} {found[0]['patients']} patients, seed {seeds}{mark}")
    text = f"Runs, {method}: {'; '.join(sources)}."
    settings = [summary["settings"] for found in runs.values() for summary in found]
    values = {key: dict.fromkeys(of_run[key] for of_run in settings) for key in settings[0].keys() - VARYING}
    unequal = [f"{key} ({', '.join(map(str, found))})" for key, found in sorted(values.items()) if len(found) > 1]
    return f"{text} They differ in {', '.join(unequal)}." if unequal else text


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
