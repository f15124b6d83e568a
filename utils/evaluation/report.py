"""An evaluation as Markdown, and as one HTML page that loads nothing from elsewhere."""

import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from config import FIELD_PX
from utils.evaluation.confidence import BINS, MONITORED, SCORES
from utils.evaluation.metrics import IN_PLANE, MISSED_SLICES, VOLUMETRIC
from utils.evaluation.tables import Cell, Table, interval, to_markdown

PHANTOM_WARNING = "Phantom data: these numbers say nothing about real scans."
PAPER_NOTE = (
    "Mean ± standard deviation over patients [95 % bootstrap interval]; softmax above 0.5, "
    f"structures of a slice pooled, {FIELD_PX} px grid. Every slice counts alike, so that slices "
    "with little or nothing to see, where a few wrong pixels bring the Dice near 0, pull this "
    "mean below the volumetric Dice, which counts all voxels of a scan."
)


def write_report(
    path: Path, *, title: str, summary: Mapping[str, Any], tables: Sequence[Table], config: Mapping[str, Any],
    cases: Table, pictures: Sequence[tuple[str, Path]],
) -> None:  # fmt: skip
    """Write the HTML page.

    Args:
        title: heading, such as "M&Ms, held-out vendor D".
        summary: content of summary.json.
        tables: `summary_tables` of it.
        config: the run's settings.
        cases: `cases_table`.
        pictures: (caption, PNG file), in this order. A missing file is named in its place: it must
            not cost the rest.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    provenance = {key: summary[key] for key in ("content_hash", "trained_by", "evaluated_by")}
    details = {"Configuration": config, "Provenance": provenance}
    page = templates.get_template("report.html").render(
        title=title,
        warning=PHANTOM_WARNING if summary["phantom"] else "",
        setting=_setting(summary),
        paper_dice=paper_dice_cell(summary)._replace(ci95=None),
        paper_interval=interval(summary["paper_protocol"]["ci95"]),
        paper_note=PAPER_NOTE,
        tables=tables,
        pictures=[(text, p, b64encode(p.read_bytes()).decode() if p.is_file() else "") for text, p in pictures],
        cases=cases,
        details={name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in details.items()},
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def summary_text(title: str, summary: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """Return the content of summary.md; arguments as `write_report`."""
    blocks = [f"# {title}", _setting(summary), *([f"**{PHANTOM_WARNING}**"] if summary["phantom"] else [])]
    blocks += [f"Paper protocol: Dice (%) {paper_dice_cell(summary)}. {PAPER_NOTE}", to_markdown(tables)]
    return "\n\n".join(blocks)


def _setting(summary: Mapping[str, Any]) -> str:
    """Return in a sentence what was evaluated."""
    options = {"tta": "test-time augmentation, ", "keep_largest": "largest components only, "}
    return (
        f"Run {summary['run']}, data {summary['data']}. {count(summary['patients'], 'patient')}, "
        f"{100 * summary['ratio']:g} % labelled, seed {summary['seed']}, "
        f"{''.join(text for key, text in options.items() if summary.get(key))}{summary['image_size']} "
        f"px. Method: {summary['method']}. Checkpoint: {summary['checkpoint']}; selection: "
        f"{summary['selection']}."
    )


def count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 scan", "2 scans"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def paper_dice_cell(figures: Mapping[str, Any]) -> Cell:
    """Return the one number to quote, of a summary or a group of patients."""
    paper = figures["paper_protocol"]
    return Cell(paper["mean"], paper["std"], paper.get("ci95"))


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the content of summary.json as tables, of what the data set and the run have."""
    structures = summary["volumetric"].items()
    note = (
        "Mean over patients [95 % bootstrap interval]. A miss counts as Dice 0 and as distances "
        f"of the image diagonal; empty in both is left out. {summary['outside_field_percent']:.2f} "
        "% of the labelled voxels lie outside the field of view."
    )
    header = ["structure", *VOLUMETRIC.values(), "missed", "both empty", "scans"]
    rows = [[name, *_means(s, VOLUMETRIC), s["missed"], s["both_empty"], s["scans"]] for name, s in structures]
    tables = [Table("Volumetric, in the scans' own grid", note, header, rows)]
    note = f"Distances of a slice's contours, mean over slices, then over patients. {MISSED_SLICES}"
    header = ["structure", *IN_PLANE.values(), "missed", "slices"]
    rows = [[name, *_means(s, IN_PLANE), s["missed_slices"], s["slices"]] for name, s in structures]
    tables.append(Table("In the plane of the slices", note, header, rows))
    if groups := summary.get("groups"):
        header = ["group", "patients", "paper Dice (%)", *(f"{name} Dice (%)" for name in summary["volumetric"])]
        rows = [[name, g["patients"], paper_dice_cell(g), *map(Cell, g["dice"].values())] for name, g in groups.items()]
        tables.append(Table("By group", "Means over patients, with their standard deviation.", header, rows))
    if clinical := summary.get("clinical"):
        note = (
            "Bias and SD of predicted − truth, mean error of the absolute differences, over the n "
            "patients who have the quantity in both [95 % bootstrap interval]; limits: bias ± "
            "1.96 SD."
        )
        header = ["quantity", "n", "truth", "predicted", "bias", "SD", "mean error", "limits of agreement"]
        rows = []
        for name, q in clinical.items():
            bias, error = _means(q, ("bias", "mae"))
            means = [Cell(q["truth_mean"]), Cell(q["predicted_mean"]), bias, Cell(q["sd"]), error]
            rows.append([f"{name} ({q['unit']})", q["n"], *means, interval(q["limits"]) or "–"])
        tables.append(Table("Clinical quantities", note, header, rows))
    note = (
        "Of the mean softmax on the network's grid. Expected calibration error of its maximum, "
        f"{BINS} bins of equal width; Brier score, summed over the classes (0 to 2). Foreground: "
        "structures in truth or prediction; the background, which is easy, makes most of the "
        "field of view."
    )
    rows = [[name, Cell(c["ece"]), _decimals(c["brier"], 4)] for name, c in summary["calibration"].items()]
    tables.append(Table("Calibration", note, ["pixels", "ECE (%)", "Brier score"], rows))
    note = (
        "Area under the risk-coverage curve: the mean of 100 − paper Dice over all shares of "
        "cases kept, those of the highest score first; lower is better. A slice's score is the "
        "mean over its predicted structures."
    )
    orders = (*SCORES, "random", "best possible")
    rows = [[kind, r["number"], *(Cell(r[name]) for name in orders)] for kind, r in summary["risk"].items()]
    tables.append(Table("Risk when cases are kept by a score", note, ["cases", "number", *orders], rows))
    if pseudo := summary.get("pseudo_labels"):
        dice = ", ".join(f"{domain} {value:.2f} %" for domain, value in pseudo["dice"].items())
        note = (
            f"Against the hidden masks of at most {MONITORED} slices of unlabelled source "
            f"patients, after epoch {pseudo['epoch']}. Dice by domain: {dice}; "
            f"{pseudo['error']:.2f} % of the pixels are wrong. AUROC: the probability that a right "
            "pixel scores higher than a wrong one; foreground: structures in pseudo label or "
            "truth."
        )
        keys = ("auroc", "auroc_foreground")
        rows = [[name, *(_decimals(s[key], 3) for key in keys)] for name, s in pseudo["scores"].items()]
        tables.append(Table("Pseudo labels", note, ["score", "AUROC", "AUROC, foreground"], rows))
    return tables


def _means(figures: Mapping[str, Any], keys: Iterable[str]) -> list[Cell]:
    return [Cell(figures[key], ci95=figures[f"{key}_ci95"]) for key in keys]


def _decimals(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def cases_table(cases: Sequence[Mapping[str, Any]]) -> Table:
    """Return one line per scan.

    Args:
        cases: the lines of per_case.csv as numbers; a metric is absent, None or NaN where the
            structure was absent from truth and prediction.
    """
    columns = [(key, name) for key in VOLUMETRIC for name in dict.fromkeys(case["structure"] for case in cases)]
    header = ["patient", "phase", "patient's paper Dice (%)", *(f"{name} {VOLUMETRIC[key]}" for key, name in columns)]
    scans: dict[tuple, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for case in sorted(cases, key=lambda case: (case["paper_dice"], case["patient"])):
        scans[case["patient"], case["phase"], case["paper_dice"]][case["structure"]] = case
    rows = [
        [patient, phase, Cell(dice), *(Cell(metrics.get(name, {}).get(key)) for key, name in columns)]
        for (patient, phase, dice), metrics in scans.items()
    ]
    note = "–: absent from truth and prediction. In-plane distances are in per_case.csv."
    return Table("Cases, worst first", note, header, rows)
