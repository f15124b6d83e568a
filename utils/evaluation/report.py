"""An evaluation as Markdown, and as an HTML page that loads nothing."""

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from config import FIELD_PX
from utils.evaluation.metrics import METRICS, SCORES
from utils.evaluation.tables import MARKS, Cell, Table, count, incomparable, published_rows, to_markdown

PHANTOM_WARNING = "Phantom data: these numbers say nothing about real scans."
PAPER_NOTE = (
    "Mean ± SD over patients [95 % bootstrap interval]; structures pooled per slice, "
    f"{FIELD_PX} px grid. Slices with little to see pull it below the volumetric Dice."
)


def write_report(
    path: Path, *, title: str, summary: dict, tables: Sequence[Table], config: dict,
    cases: Table, pictures: Sequence[tuple[str, Path]],
) -> None:  # fmt: skip
    """Write the HTML page; pictures are captions with PNG files, missing or not."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    details = {key: summary[key] for key in ("content_hash", "trained_by", "evaluated_by")}
    encoded = [b64encode(p.read_bytes()).decode() if p.is_file() else "" for _, p in pictures]
    page = templates.get_template("report.html").render(
        title=title, warning=PHANTOM_WARNING if summary["phantom"] else "", tables=tables, cases=cases,
        setting=_setting(summary), paper_dice=Cell(**summary["paper_protocol"]), paper_note=PAPER_NOTE,
        pictures=[(*pair, data) for pair, data in zip(pictures, encoded, strict=True)],
        details=json.dumps({"config": config} | details, indent=2, ensure_ascii=False),
    )  # fmt: skip
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def summary_text(title: str, summary: dict, tables: Sequence[Table]) -> str:
    """Return summary.md."""
    warning = f"**{PHANTOM_WARNING}**\n\n" if summary["phantom"] else ""
    paper = f"Paper protocol: Dice (%) {Cell(**summary['paper_protocol'])}. {PAPER_NOTE}"
    return f"# {title}\n\n{_setting(summary)}\n\n{warning}{paper}\n\n{to_markdown(tables)}"


def _setting(summary: dict) -> str:
    marks = "".join(f", {text}" for key, text in MARKS.items() if summary[key])
    return (
        "Run {run}, data {data}. {number}; labelled {labeled} ({share}); seed {seed}, {image_size} px{marks}. "
        "Method: {method}. Checkpoint: {checkpoint}; selection: {selection}.{labels_text}{warnings_text}"
    ).format(
        **summary, number=count(summary["patients"], "patient"), marks=marks,
        share=summary["settings"]["labeled_patients"] or f"{100 * summary['ratio']:g} %",
        labels_text=f" Labels in the masks: {', '.join(summary['labels'])}." if summary["labels"] else "",
        warnings_text="".join(f" Warning: {text}." for text in summary["warnings"]),
    )  # fmt: skip


def summary_tables(summary: dict) -> list[Table]:
    """Return the content of summary.json as tables."""
    outside = f"{summary['outside_field_percent']:.2f} % of the labelled voxels"
    pooled, domain = summary["pooled"], summary["test_domain"]
    tables = [Table(
        "Volumetric, in the scans' own grid",
        ["structure", *METRICS.values(), "missed", "both empty", "scans"],
        [[name, *_means(s, METRICS), s["missed"], s["both_empty"], s["scans"]]
         for name, s in summary["volumetric"].items()],
        ["Mean over patients [95 % interval]; a miss is Dice 0 and distances of the diagonal. "
         f"{outside} lie outside the field of view."],
    )]  # fmt: skip
    tables.append(Table(
        "Pooled over all patients",
        ["structure", "Dice (%)"],
        [[name, Cell(pooled[name], ci95=pooled["ci95"][name])] for name in pooled["ci95"]],
        [f"Of sums over all slices, {FIELD_PX} px grid: slices with little to see weigh little."],
    ))  # fmt: skip
    paper, reasons = Cell(**summary["paper_protocol"])._replace(ci95=None), incomparable(summary)
    for kind, title, ours in (
        ("paper", "Published, by the paper's protocol", [paper, "patients"]),
        ("pooled", "Published, pooled", [Cell(pooled["mean"]), "–"]),
    ):
        published, notes = published_rows(summary["dataset"], summary["ratio"], kind)
        rows = [[row.method, row.dice[domain], row.over, row.chosen_on] for row in published if domain in row.dice]
        if rows:
            notes += [f"This run is not comparable: {', '.join(reasons)}."] if reasons else []
            header = ["", domain, "± over", "checkpoint chosen on"]
            tables.append(Table(title, header, [["this run", *ours, "as noted"], *rows], notes))
    if clinical := summary["clinical"]:
        tables.append(Table(
            "Clinical quantities",
            ["quantity", "n", "truth", "predicted", "bias", "mean error", "SD", "from", "to"],
            [[f"{name} ({q['unit']})", q["n"], Cell(q["truth_mean"]), Cell(q["predicted_mean"]),
              *_means(q, ("bias", "mae")), *map(Cell, (q["sd"], *(q["limits"] or (None, None))))]
             for name, q in clinical.items()],
            ["Of the n patients who have both [95 % interval]; from, to: limits of agreement."],
        ))  # fmt: skip
    tables.append(Table(
        "Calibration", ["pixels", "ECE (%)"],
        [[name, Cell(c["ece"])] for name, c in summary["calibration"].items()],
        ["Of the mean softmax; foreground: in truth or prediction."],
    ))  # fmt: skip
    scores = (*SCORES, "random", "best possible")
    tables.append(Table(
        "Risk when cases are kept by a score", ["cases", "number", *scores],
        [[kind, r["number"], *(Cell(r[name]) for name in scores)]
         for kind, r in summary["risk"].items()],
        ["Mean of 100 − paper Dice over all shares kept; lower is better."],
    ))  # fmt: skip
    return tables


def _means(figures: dict, keys: Iterable[str]) -> list[Cell]:
    return [Cell(figures[key], ci95=figures[f"{key}_ci95"]) for key in keys]


def cases_table(cases: Sequence[dict]) -> Table:
    """Return a row per scan, of lines of per_case.csv; a metric may be absent, None or NaN."""
    structures = dict.fromkeys(case["structure"] for case in cases)
    columns = {(s, key): f"{s} {name}" for key, name in METRICS.items() for s in structures}
    scans: dict[tuple, dict[tuple[str, str], Cell]] = {}
    for case in sorted(cases, key=lambda case: (case["paper_dice"], case["patient"])):
        scan = scans.setdefault((case["patient"], case["phase"], Cell(case["paper_dice"])), {})
        scan |= {(case["structure"], key): Cell(case.get(key)) for key in METRICS}
    rows = [[*scan, *(cells.get(key, "–") for key in columns)] for scan, cells in scans.items()]
    header = ["patient", "phase", "patient's paper Dice (%)", *columns.values()]
    return Table("Cases, worst first", header, rows)
