"""The leave-one-domain-out table: several runs' summaries in one, beside the published numbers."""

import csv
import io
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import fmean, pstdev, stdev
from typing import Any, NamedTuple

from utils.errors import UserError

GRID = 288  # px, of the published experiments
FIGURES = {"dice": "Dice (%)", "hd95": "HD95 (mm)", "assd": "ASSD (mm)", "missed": "missed (% of scans)"}
LATEX = str.maketrans(
    {character: rf"\{character}" for character in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    | {"±": r"$\pm$", "–": "--", "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$"}
)
VARYING = {"seed", "test_domain"}  # settings in which the runs of a table differ by design
Runs = dict[str, list[dict[str, Any]]]  # held-out domain -> one method's summaries by seed; empty where there is none


class Published(NamedTuple):
    """A published row: Dice in percent per held-out domain and their average, as printed there."""

    method: str
    dice: tuple[float, ...]
    average: float
    std: tuple[float | None, ...] = (None,) * 4  # sample standard deviation over patients
    note: str = ""  # what to know about a method published after this one


PUBLISHED = {  # (dataset, labelled share) -> rows, as printed in the papers
    ("mms", 0.02): (
        Published("nnUNet", (52.87, 64.63, 72.97, 73.27), 65.94),
        Published("SDNet+Aug", (54.48, 67.81, 76.46, 74.35), 68.28),
        Published("LDDG", (59.47, 56.16, 68.21, 68.56), 63.16),
        Published("SAML", (56.31, 56.32, 75.70, 69.94), 64.57),
        Published("Meta (DGNet)", (66.01, 72.72, 77.54, 75.14), 72.85),
        Published("this method, as published", (82.35, 82.84, 86.31, 86.58), 84.52, (6.24, 7.59, 5.47, 4.78)),
        Published("S&D Messenger", (86.50, 87.58, 88.30, 89.76), 88.04, note="SegFormer, splits unpublished"),
        Published("VDPL", (78.82, 81.07, 85.23, 85.42), 82.64, note="U-Net"),
    ),
    ("mms", 0.05): (
        Published("nnUNet", (65.30, 79.73, 78.06, 81.25), 76.09),
        Published("SDNet+Aug", (71.21, 77.31, 81.40, 79.95), 77.47),
        Published("LDDG", (66.22, 69.49, 73.40, 75.66), 71.29),
        Published("SAML", (67.11, 76.35, 77.43, 78.64), 74.88),
        Published("Meta (DGNet)", (72.40, 80.30, 82.51, 83.77), 79.75),
        Published("this method, as published", (83.30, 85.04, 87.14, 87.38), 85.72, (5.83, 6.49, 4.74, 4.49)),
        Published("S&D Messenger", (87.04, 87.32, 89.67, 89.85), 88.47, note="SegFormer, splits unpublished"),
    ),
    ("scgm", 0.2): (
        Published("nnUNet", (59.07, 69.94, 60.25, 70.13), 64.85),
        Published("SDNet+Aug", (83.07, 80.01, 58.57, 85.27), 76.73),
        Published("LDDG", (77.71, 44.08, 48.04, 83.42), 63.31),
        Published("SAML", (78.71, 75.58, 54.36, 85.36), 73.50),
        Published("Meta (DGNet)", (87.45, 81.05, 61.85, 87.96), 79.58),
        Published("this method, as published", (87.13, 87.31, 78.75, 91.73), 86.23, (1.4, 2.02, 9.44, 1.28)),
        Published("VDPL", (89.69, 89.31, 86.17, 92.12), 89.32, note="U-Net"),
    ),
}


class Cell(NamedTuple):
    """A mean and its standard deviation; None where there is none."""

    mean: float | None
    std: float | None = None
    remark: str = ""  # over how many seeds or domains, where that is not one seed or every domain
    differences: str = ""  # why it is not comparable with the published numbers; marked †

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        mark = "†" if self.differences else ""
        return f"{self.mean:.2f}{spread}{mark}" + (f" ({self.remark})" if self.remark else "")


class Grid(NamedTuple):
    """Rows under one caption, above footnotes."""

    name: str
    caption: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]  # group, label, cells of all columns; rules part the groups
    notes: list[str]


def method_name(metadata: dict[str, Any]) -> str:
    """What a checkpoint's settings make of the method: the full one, or a step of its ablation."""
    config = metadata["config"]
    if config["cps_weight"] == 0:
        return "supervised only"
    name = {"pixel": "full", "scalar": "confidence as released", "plain": "plain CPS"}[config["cps_loss"]]
    if config["cps_loss"] == "plain" and config["fourier_aug"]:
        name += " + Fourier"
    if config["fourier_aug"] and config["fourier_mode"] == "AM":
        name += " (amplitude mix)"
    name += "" if config["cutmix"] else ", no CutMix"
    return name if metadata["cps_weight"] else f"{name}, before its pseudo supervision"


def combine(summaries: list[dict[str, Any]], *, name: str, domain_kind: str, domains: Sequence[str]) -> list[Grid]:
    """Put the summary.json of several runs, one or more seeds per held-out domain and method, into one table.

    Its first grid has a row per method and the published ones, by the paper's protocol; a volumetric grid per method
    follows. `name` is the data set's, `domain_kind` says what a domain of it is, and `domains` are all of them.

    A domain's cell holds the mean and sample standard deviation over patients or, of several seeds, over the seeds'
    means. The average is that of the domains' means, with their population standard deviation, as the paper has it.

    Raises:
        UserError: the runs differ in data set or label ratio, or one of them is there twice.
    """
    names = [
        f"{s['dataset']} {s['test_domain']} {_percent(s['ratio'])} seed {s['seed']} ({s['method']})" for s in summaries
    ]
    if len({(summary["dataset"], summary["ratio"]) for summary in summaries}) > 1:
        raise UserError(f"one table takes one data set and one label ratio, not {', '.join(names)}")
    if len(set(names)) < len(names):
        raise UserError(f"give each held-out domain, seed and method once, not {', '.join(names)}")
    dataset, ratio, structures = (summaries[0][key] for key in ("dataset", "ratio", "volumetric"))
    by_seed = sorted(summaries, key=lambda summary: summary["seed"])
    methods: dict[str, Runs] = {s["method"]: {domain: [] for domain in domains} for s in summaries}
    for summary in by_seed:
        methods[summary["method"]][summary["test_domain"]].append(summary)
    published = {share: rows for (key, share), rows in PUBLISHED.items() if key == dataset}
    nearest = min(published, key=lambda share: abs(share - ratio), default=None)
    checkpoints = dict.fromkeys(f"{s['checkpoint'].split(',')[0]}, selection: {s['selection']}" for s in summaries)
    setting = (
        f"{name}, each {domain_kind} held out in turn, {_percent(ratio)} of the patients labelled. Mean ± standard "
        "deviation over patients, of several seeds over their means; average ± population standard deviation of the "
        f"{domain_kind}s' means. Checkpoint: {'; '.join(checkpoints)}."
    )
    beside = f" Published rows: {_percent(nearest)} labelled." if published else ""
    sources = {
        method: f"Runs, {method}: {'; '.join(_source(domain, found) for domain, found in runs.items() if found)}."
        + _unequal([summary["settings"] for found in runs.values() for summary in found])
        for method, runs in methods.items()
    }
    not_comparable = []
    if published and any(_differences([summary]) for summary in summaries):
        beside = f"{beside[:-1]}, not comparable with what is marked †."
        setting_there = f"{name}, {' or '.join(map(_percent, published))} labelled, {GRID} px"
        not_comparable = [f"† Not comparable with the published numbers ({setting_there})."]
    caption = f"Paper protocol: Dice (%) of all structures pooled per slice, softmax > 0.5, on a {GRID} px grid."
    rows = [("ours", f"this implementation, {method}", _cells(runs, "", "dice")) for method, runs in methods.items()]
    later = []
    for method, dice, average, std, note in published.get(nearest, ()):
        rows.append(("published", f"{method} ‡" if note else method, [*map(Cell, dice, std), Cell(average)]))
        later += [f"{method}: {note}"] if note else []
    columns = [*domains, "average"]
    later = [f"‡ Later work. {'; '.join(later)}."] if later else []
    notes = [*sources.values(), *not_comparable, *later]
    paper = Grid("paper protocol", f"{caption} {setting}{beside}", columns, rows, notes)
    caption = "Volumetric: the scans' own grid; a miss counts as Dice 0 and as distances of the image diagonal."
    figures = [(key, f"{part} {unit}", part) for key, unit in FIGURES.items() for part in structures]
    volumetric = [
        Grid(
            f"volumetric, {method}",
            f"{caption} {setting} Method: {method}.",
            columns,
            [(key, label, _cells(runs, part, key)) for key, label, part in figures],
            [sources[method], *not_comparable],
        )
        for method, runs in methods.items()
    ]
    return [paper, *volumetric]


def _cells(runs: Runs, structure: str, figure: str) -> list[Cell]:
    """One cell per domain, and the average of those that have a mean."""
    cells = []
    for found in runs.values():
        figures = [_mean_std(summary, structure, figure) for summary in found]
        if len(figures) > 1:
            means = [mean for mean, _ in figures if mean is not None]
            cells.append(Cell(*_over(means, stdev), f"{len(means)} seeds", _differences(found)))
        else:
            cells.append(Cell(*(figures[0] if figures else [None]), differences=_differences(found)))
    means = [cell.mean for cell in cells if cell.mean is not None]
    partly = f"{len(means)} domain{'' if len(means) == 1 else 's'}" if len(means) < len(cells) else ""
    differences = "; ".join(dict.fromkeys(cell.differences for cell in cells if cell.differences))
    return [*cells, Cell(*_over(means, pstdev), partly, differences)]


def _mean_std(summary: dict[str, Any], structure: str, figure: str) -> tuple[float | None, float | None]:
    if not structure:
        return summary["paper_protocol"]["mean"], summary["paper_protocol"]["std"]
    of_structure = summary["volumetric"][structure]
    if figure == "missed":
        return 100 * of_structure["missed"] / of_structure["scans"], None
    return of_structure[figure], of_structure[f"{figure}_std"]


def _over(means: list[float], deviation: Callable[[list[float]], float]) -> tuple[float | None, float | None]:
    return fmean(means) if means else None, deviation(means) if len(means) > 1 else None


def _differences(found: list[dict[str, Any]]) -> str:
    """Why the runs of a domain cannot stand beside the published numbers; empty where they can, or there are none."""
    if {summary["dataset"] for summary in found}.isdisjoint(dataset for dataset, _ in PUBLISHED):
        return ""
    flags = {"phantom": "phantom data", "tta": "test-time augmentation"}
    reasons = [reason for key, reason in flags.items() if any(summary.get(key) for summary in found)]
    ratios = {summary["ratio"] for summary in found if (summary["dataset"], summary["ratio"]) not in PUBLISHED}
    sizes = {summary["image_size"] for summary in found} - {GRID}
    reasons += sorted({summary["method"] for summary in found} - {"full"})
    return ", ".join([*reasons, *(f"{_percent(r)} labelled" for r in ratios), *(f"{px} px" for px in sorted(sizes))])


def _unequal(settings: list[dict[str, Any]]) -> str:
    """Names the settings in which one method's runs differ, other than those that vary by design."""
    values = {key: dict.fromkeys(of_run[key] for of_run in settings) for key in settings[0].keys() - VARYING}
    differing = [f"{key} ({', '.join(map(str, found))})" for key, found in sorted(values.items()) if len(found) > 1]
    return f" **They differ in {', '.join(differing)}.**" if differing else ""


def _source(domain: str, found: list[dict[str, Any]]) -> str:
    """What stands behind a domain's cells."""
    seeds = ", ".join(f"{summary['seed']}{summary['unfinished']}" for summary in found)
    differences = _differences(found)
    return f"{domain} {found[0]['patients']} patients, seed {seeds}" + (f" († {differences})" if differences else "")


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def to_markdown(table: list[Grid]) -> str:
    """Each grid with its caption above and its notes below."""
    lines = []
    for grid in table:
        lines += [grid.caption, "", f"| | {' | '.join(grid.columns)} |", "|---" * (len(grid.columns) + 1) + "|"]
        lines += [f"| {label} | {' | '.join(map(str, cells))} |" for _, label, cells in grid.rows]
        lines += ["", "\n\n".join(grid.notes), ""]
    return "\n".join(lines)


def to_csv(table: list[Grid]) -> str:
    """A line per number, unrounded; captions do not fit in."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "domain", "mean", "sd", "remark", "not_comparable"])
    for grid in table:
        for _, label, cells in grid.rows:
            for column, cell in zip(grid.columns, cells, strict=True):
                writer.writerow([grid.name, label, column, *cell])
    return file.getvalue()


def to_latex(table: list[Grid]) -> str:
    r"""Each grid as a LaTeX table; needs \usepackage{booktabs}."""
    lines = []
    for grid in table:
        lines += [r"\begin{table}\centering\footnotesize\setlength{\tabcolsep}{3pt}"]
        lines += [rf"\caption{{{grid.caption.translate(LATEX)}}}", rf"\begin{{tabular}}{{l{'c' * len(grid.columns)}}}"]
        for group, rows in groupby([("", "", grid.columns), *grid.rows], key=itemgetter(0)):
            lines.append(r"\midrule" if group else r"\toprule")
            lines += [" & ".join(str(e).translate(LATEX) for e in (label, *row)) + r" \\" for _, label, row in rows]
        notes = [rf"\par {note.translate(LATEX)}" for note in grid.notes]
        lines += [r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}", ""]
    return "\n".join(lines)
