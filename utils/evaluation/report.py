"""An evaluation as Markdown, and as one HTML page that can be mailed and printed: nothing is loaded from elsewhere."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = {"dice": "Dice %", "hd95": "HD95 mm", "assd": "ASSD mm"}
PHANTOM_WARNING = "Phantom data: these figures say nothing about real scans."
PAPER_NOTE = (
    "Mean ± standard deviation over patients [95 % bootstrap interval]; softmax above 0.5, structures of a slice "
    "pooled, 288 px grid."
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --page: #fff; --band: #eef1f4; --warn: #8a2a00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a0aab4; --page: #16191c; --band: #262c32; --warn: #ffb48a } }
body { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; color: var(--ink); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; font-variant-numeric: tabular-nums }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; break-after: avoid }
p, summary { margin: .4rem 0; max-width: 46rem } b { font-size: 1.9rem; font-weight: 600 }
.soft, figcaption, pre { color: var(--soft); font-size: .875rem; white-space: pre-wrap }
.warning { color: var(--warn); background: var(--band); border-left: .3rem solid; padding: .6rem; font-weight: 600 }
div { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .75rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--band) }
td { white-space: nowrap } th { background: var(--band); font-weight: 600 } tr > :first-child { text-align: left }
figure { margin: 1.2rem 0 } figure, tr { break-inside: avoid }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px }
@media print { :root { font-size: 60% } body { padding: 0 } details::details-content { content-visibility: visible } }
"""


def write_report(
    folder: Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    pictures: Sequence[tuple[str, Path]],
) -> None:
    """Write report.html into a folder that is there.

    Args:
        title: heading, such as "M&Ms, held-out vendor D".
        summary: content of summary.json; with a key "clinical" (what `agreement_limits` gives and the unit, by
            quantity) also the table of the clinical figures.
        config: the run's settings.
        cases: the lines of per_case.csv as numbers, one per patient, phase and structure; a figure is absent, None or
            NaN where the structure was absent from truth and prediction.
        pictures: (caption, PNG file), in this order. A missing file is named in its place: it must not cost the rest.
    """
    dice, interval = _paper_dice(summary)
    page = [
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        # Should a value slip through unescaped, it still loads and runs nothing.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<h1>{escape(title)}</h1><p class="soft">For research use, not for clinical decisions.</p>',
        f'<p class="warning">{PHANTOM_WARNING}</p>' if summary["phantom"] else "",
        f"<p>{escape(_facts(summary))}</p><h2>Paper protocol</h2><p>Dice <b>{dice}</b>{interval}</p>",
        f'<p class="soft">{PAPER_NOTE}</p>',
        *map(_html, _tables(summary)),
        "<h2>Pictures</h2>",
        *(_picture(caption, path) for caption, path in pictures),
        _html(_cases(cases)),
    ]
    provenance = {key: summary[key] for key in ("content_hash", "trained_by", "evaluated_by")}
    for name, content in {"Configuration": config, "Provenance": provenance}.items():
        text = escape(json.dumps(content, indent=2, ensure_ascii=False))
        page.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    (folder / "report.html").write_text("\n".join(page), encoding="utf-8", errors="backslashreplace")


def to_markdown(title: str, summary: Mapping[str, Any]) -> str:
    """What summary.json holds, as summary.md; arguments as `write_report`."""
    lines = [f"# {title}", "", _facts(summary), ""]
    if summary["phantom"]:
        lines += [f"**{PHANTOM_WARNING}**", ""]
    lines += [f"Paper protocol: Dice {''.join(_paper_dice(summary))}. {PAPER_NOTE}", ""]
    for table in _tables(summary):
        rows = [" | ".join(map(str, row)) for row in (table.header, ["---"] * len(table.header), *table.rows)]
        lines += [f"**{table.title}.** {table.note}", "", *(f"| {row} |" for row in rows), ""]
    return "\n".join(lines)


class Table(NamedTuple):
    """A table of an evaluation, for Markdown and HTML alike."""

    title: str
    note: str
    header: list[str]
    rows: list[list[Any]]


def _facts(summary: Mapping[str, Any]) -> str:
    """What was evaluated, in a sentence."""
    options = {"tta": "test-time augmentation, ", "keep_largest": "largest components only, "}
    return (
        f"{summary['patients']} patients, {100 * summary['ratio']:g} % labelled, seed {summary['seed']}, "
        f"{''.join(text for key, text in options.items() if summary.get(key))}{summary['image_size']} px. "
        f"Method: {summary['method']}. Checkpoint: {summary['checkpoint']}; selection: {summary['selection']}."
    )


def _paper_dice(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The one figure to quote, and its interval."""
    paper = summary["paper_protocol"]
    spread = "" if paper["std"] is None else f" ± {_number(paper['std'])}"
    return f"{_number(paper['mean'])}{spread} %", _interval(paper["ci95"])


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    """The volumetric figures and, where the data set has them, the clinical ones."""
    rows = []
    for name, of in summary["volumetric"].items():
        means = [_number(of[key]) + _interval(of[f"{key}_ci95"]) for key in FIGURES]
        rows.append([name, *means, of["missed"], of["both_empty"], of["scans"]])
    note = (
        "Mean over patients [95 % bootstrap interval]. A miss counts as Dice 0 and as distances of the image diagonal; "
        f"empty in both is left out. {summary['outside_field_percent']:.2f} % of the labelled voxels lie outside the "
        "field of view."
    )
    header = ["structure", *FIGURES.values(), "missed", "both empty", "scans"]
    volumetric = Table("Volumetric, in the scans' own grid", note, header, rows)
    if "clinical" not in summary:
        return [volumetric]
    rows = []
    for name, of in summary["clinical"].items():
        bias, error = (_number(of[key]) + _interval(of[f"{key}_ci95"]) for key in ("bias", "mae"))
        means = [_number(of["truth_mean"]), _number(of["predicted_mean"]), bias, _number(of["sd"]), error]
        rows.append([f"{name} ({of['unit']})", of["n"], *means, _interval(of["limits"]).strip() or "–"])
    note = (
        "Bias and SD of predicted − truth, mean error of the absolute differences, over the n patients who have the "
        "figure in both [95 % bootstrap interval]; limits: bias ± 1.96 SD."
    )
    header = ["quantity", "n", "truth", "predicted", "bias", "SD", "mean error", "limits of agreement"]
    return [volumetric, Table("Clinical figures", note, header, rows)]


def _cases(cases: Sequence[Mapping[str, Any]]) -> Table:
    """One line per scan."""
    structures = list(dict.fromkeys(case["structure"] for case in cases))
    scans: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for case in sorted(cases, key=lambda case: (case["paper_dice"], case["patient"])):
        scans.setdefault((case["patient"], case["phase"], case["paper_dice"]), {})[case["structure"]] = case
    columns = [(key, name) for key in FIGURES for name in structures]
    lines = [
        [patient, phase, _number(dice), *(_number(of.get(name, {}).get(key)) for key, name in columns)]
        for (patient, phase, dice), of in scans.items()
    ]
    header = ["patient", "phase", "patient's paper Dice %", *(f"{name} {FIGURES[key]}" for key, name in columns)]
    return Table("Cases, worst first", "–: absent from truth and prediction.", header, lines)


def _picture(caption: str, path: Path) -> str:
    if not path.is_file():
        return f"<p>{escape(caption)}: no picture, {escape(path.name)} is not there.</p>"
    image = f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _html(table: Table) -> str:
    """A table that scrolls sideways where it must, with everything in it escaped."""
    head = "".join(f"<th>{escape(entry)}</th>" for entry in table.header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(entry))}</td>" for entry in row) + "</tr>" for row in table.rows)
    rows = f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    return f'<h2>{escape(table.title)}</h2>{rows}<p class="soft">{escape(table.note)}</p>'


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _interval(interval: Sequence[float] | None) -> str:
    return f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else ""
