"""An evaluation as Markdown, and as one HTML page that can be mailed and printed: nothing is loaded from elsewhere."""

import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from config import FIELD_PX
from utils.evaluation.calibration import trust_tables
from utils.evaluation.metrics import IN_PLANE, MISSED_SLICES, VOLUMETRIC
from utils.evaluation.monitor import monitor_tables
from utils.evaluation.quality import BAD_DICE
from utils.evaluation.tables import Cell, Table, interval, to_markdown

PHANTOM_WARNING = "Phantom data: these numbers say nothing about real scans."
PAPER_NOTE = (
    "Mean ± standard deviation over patients [95 % bootstrap interval]; softmax above 0.5, structures of a slice "
    f"pooled, {FIELD_PX} px grid. Every slice counts alike, so that slices with little or nothing to see, where a few "
    "wrong pixels bring the Dice near 0, pull this mean below the volumetric Dice, which counts all voxels of a scan."
)


def write_report(
    folder: Path, *, title: str, summary: Mapping[str, Any], config: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]], pictures: Sequence[tuple[str, Path]],
) -> None:  # fmt: skip
    """Write report.html into a folder that is there.

    Args:
        title: heading, such as "M&Ms, held-out vendor D".
        summary: content of summary.json.
        config: the run's settings.
        cases: the lines of per_case.csv as numbers; a metric is absent, None or NaN where the structure was absent
            from truth and prediction.
        pictures: (caption, PNG file), in this order. A missing file is named in its place: it must not cost the rest.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    provenance = {key: summary[key] for key in ("content_hash", "trained_by", "evaluated_by")}
    details = {"Configuration": config, "Provenance": provenance}
    embedded = [
        (text, path, b64encode(path.read_bytes()).decode() if path.is_file() else "") for text, path in pictures
    ]
    page = templates.get_template("report.html").render(
        title=title,
        warning=PHANTOM_WARNING if summary["phantom"] else "",
        setting=_setting(summary),
        paper_dice=_paper_dice(summary)._replace(ci95=None),
        paper_interval=interval(summary["paper_protocol"]["ci95"]),
        paper_note=PAPER_NOTE,
        tables=_tables(summary),
        pictures=embedded,
        cases=_cases(cases),
        details={name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in details.items()},
    )
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def summary_text(title: str, summary: Mapping[str, Any]) -> str:
    """Return the content of summary.json as Markdown, for summary.md; arguments as `write_report`."""
    blocks = [f"# {title}", _setting(summary), *([f"**{PHANTOM_WARNING}**"] if summary["phantom"] else [])]
    blocks += [f"Paper protocol: Dice (%) {_paper_dice(summary)}. {PAPER_NOTE}", to_markdown(_tables(summary))]
    return "\n\n".join(blocks)


def _setting(summary: Mapping[str, Any]) -> str:
    """Return in a sentence what was evaluated."""
    options = {"tta": "test-time augmentation, ", "keep_largest": "largest components only, "}
    options["ensemble"] = f"mean of {len(summary.get('ensemble', []))} runs' networks, "
    return (
        f"Run {summary['run']}, data {summary['data']}. "
        f"{summary['patients']} patients, {100 * summary['ratio']:g} % labelled, seed {summary['seed']}, "
        f"{''.join(text for key, text in options.items() if summary.get(key))}{summary['image_size']} px. "
        f"Method: {summary['method']}. Checkpoint: {summary['checkpoint']}; selection: {summary['selection']}."
    )


def _paper_dice(of: Mapping[str, Any]) -> Cell:
    """Return the one number to quote, of a summary or a group of patients."""
    paper = of["paper_protocol"]
    return Cell(paper["mean"], paper["std"], ci95=paper["ci95"])


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return volumetric and in-plane metrics and what else the data set and the run have."""
    structures = summary["volumetric"].items()
    header = ["structure", *VOLUMETRIC.values(), "missed", "both empty", "scans"]
    rows = [[name, *_means(of, VOLUMETRIC), of["missed"], of["both_empty"], of["scans"]] for name, of in structures]
    note = (
        "Mean over patients [95 % bootstrap interval]. A miss counts as Dice 0 and as distances of the image diagonal; "
        f"empty in both is left out. {summary['outside_field_percent']:.2f} % of the labelled voxels lie outside the "
        "field of view."
    )
    tables = [Table("Volumetric, in the scans' own grid", note, header, rows)]
    header = ["structure", *IN_PLANE.values(), "missed", "slices"]
    rows = [[name, *_means(of, IN_PLANE), of["missed_slices"], of["slices"]] for name, of in structures]
    note = f"Distances of a slice's contours, mean over slices, then over patients. {MISSED_SLICES}"
    tables.append(Table("In the plane of the slices", note, header, rows))
    if groups := summary.get("groups"):
        header = ["group", "patients", "paper Dice (%)", *(f"{name} Dice (%)" for name in summary["volumetric"])]
        rows = [
            [group, of["patients"], _paper_dice(of)._replace(ci95=None), *map(Cell, of["dice"].values())]
            for group, of in groups.items()
        ]
        tables.append(Table("By group", "Means over patients, with their standard deviation.", header, rows))
    if clinical := summary.get("clinical"):
        header = ["quantity", "n", "truth", "predicted", "bias", "SD", "mean error", "limits of agreement"]
        rows = []
        for name, of in clinical.items():
            bias, error = _means(of, ("bias", "mae"))
            means = [Cell(of["truth_mean"]), Cell(of["predicted_mean"]), bias, Cell(of["sd"]), error]
            rows.append([f"{name} ({of['unit']})", of["n"], *means, interval(of["limits"]) or "–"])
        note = (
            "Bias and SD of predicted − truth, mean error of the absolute differences, over the n patients who have "
            "the quantity in both [95 % bootstrap interval]; limits: bias ± 1.96 SD."
        )
        tables.append(Table("Clinical quantities", note, header, rows))
    if of := summary.get("quality"):
        header = ["patients", f"Dice below {BAD_DICE} %", "flagged", "sensitivity (%)", "specificity (%)", "Spearman"]
        cells = [Cell(of[key]) for key in ("sensitivity", "specificity", "spearman")]
        note = (
            "A patient is flagged where volume, agreement, components or gaps lie outside the range of the run's "
            f"labelled source scans. Sensitivity and specificity are for a paper Dice below {BAD_DICE} %, "
            "Spearman's correlation for the networks' agreement and the paper Dice."
        )
        rows = [[summary["patients"], of["bad"], of["flagged"], *cells]]
        tables.append(Table("Quality without truth", note, header, rows))
    return tables + trust_tables(summary) + monitor_tables(summary)


def _means(of: Mapping[str, Any], keys: Iterable[str]) -> list[Cell]:
    return [Cell(of[key], ci95=of[f"{key}_ci95"]) for key in keys]


def _cases(cases: Sequence[Mapping[str, Any]]) -> Table:
    """Return one line per scan."""
    columns = [(key, name) for key in VOLUMETRIC for name in dict.fromkeys(case["structure"] for case in cases)]
    header = ["patient", "phase", "patient's paper Dice (%)", *(f"{name} {VOLUMETRIC[key]}" for key, name in columns)]
    scans: dict[tuple, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for case in sorted(cases, key=lambda case: (case["paper_dice"], case["patient"])):
        scans[case["patient"], case["phase"], case["paper_dice"]][case["structure"]] = case
    rows = [
        [patient, phase, Cell(dice), *(Cell(of.get(name, {}).get(key)) for key, name in columns)]
        for (patient, phase, dice), of in scans.items()
    ]
    note = "–: absent from truth and prediction. In-plane distances are in per_case.csv."
    return Table("Cases, worst first", note, header, rows)
