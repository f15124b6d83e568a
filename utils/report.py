"""An evaluation as one HTML page that can be mailed and printed: nothing in it is loaded from elsewhere."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

FIGURES = {"dice": "Dice %", "hd95": "HD95 mm", "assd": "ASSD mm"}
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
        summary: content of summary.json; with a key "clinical" (quantity -> unit, n, truth_mean, predicted_mean,
            bias, sd, limits, mae) also the table of the clinical figures.
        config: the run's settings.
        cases: the lines of per_case.csv as numbers, one per patient, phase and structure; a figure is absent, None or
            NaN where the structure was absent from truth and prediction.
        pictures: (caption, PNG file), in this order. A missing file is named in its place: it must not cost the rest.
    """
    page = [
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        # Should a value slip through unescaped, it still loads and runs nothing.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        _head(title, summary),
        _volumetric(summary["volumetric"], summary["outside_field_percent"]),
        _clinical(summary["clinical"]) if "clinical" in summary else "",
        "<h2>Pictures</h2>",
        *(_picture(caption, path) for caption, path in pictures),
        _cases(cases),
    ]
    provenance = {key: summary[key] for key in ("content_hash", "trained_by", "evaluated_by")}
    for name, content in {"Configuration": config, "Provenance": provenance}.items():
        text = escape(json.dumps(content, indent=2, ensure_ascii=False))
        page.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    (folder / "report.html").write_text("\n".join(page), encoding="utf-8", errors="backslashreplace")


def _head(title: str, summary: Mapping[str, Any]) -> str:
    """What was evaluated, and the one figure to quote."""
    paper = summary["paper_protocol"]
    warning = '<p class="warning">Phantom data: these figures say nothing about real scans.</p>'
    options = {"tta": "test-time augmentation, ", "keep_largest": "largest components only, "}
    facts = (
        f"{summary['patients']} patients, {100 * summary['ratio']:g} % labelled, seed {summary['seed']}, "
        f"{''.join(text for key, text in options.items() if summary.get(key))}{summary['image_size']} px. "
        f"Method: {summary['method']}. Checkpoint: {summary['checkpoint']}; selection: {summary['selection']}."
    )
    spread = "" if paper["std"] is None else f" ± {_number(paper['std'])}"
    return (
        f'<h1>{escape(title)}</h1><p class="soft">For research use, not for clinical decisions.</p>'
        f"{warning if summary['phantom'] else ''}<p>{escape(facts)}</p><h2>Paper protocol</h2>"
        f"<p>Dice <b>{_number(paper['mean'])}{spread} %</b>{_interval(paper['ci95'])}</p>"
        '<p class="soft">Mean ± standard deviation over patients [95 % bootstrap interval]; softmax above 0.5, '
        "structures of a slice pooled, 288 px grid.</p>"
    )


def _volumetric(structures: Mapping[str, Mapping[str, Any]], outside: float) -> str:
    lines = []
    for name, of in structures.items():
        means = [_number(of[key]) + _interval(of[f"{key}_ci95"]) for key in FIGURES]
        lines.append([name, *means, of["missed"], of["both_empty"], of["scans"]])
    header = ["structure", *FIGURES.values(), "missed", "both empty", "scans"]
    note = (
        "Mean over patients [95 % bootstrap interval]. A miss counts as Dice 0 and as distances of the image diagonal; "
        f"empty in both is left out. {outside:.2f} % of the labelled voxels lie outside the field of view."
    )
    return _table("Volumetric, in the scans' own grid", header, lines, note)


def _clinical(quantities: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {"truth_mean": "truth", "predicted_mean": "predicted", "bias": "bias", "sd": "SD", "mae": "mean error"}
    lines = [
        [f"{name} ({of['unit']})", of["n"], *(_number(of[key]) for key in columns), _interval(of["limits"]) or "–"]
        for name, of in quantities.items()
    ]
    note = "Bias and SD of predicted − truth; mean error: of the absolute differences; limits: bias ± 1.96 SD."
    return _table("Clinical figures", ["quantity", "n", *columns.values(), "limits of agreement"], lines, note)


def _cases(cases: Sequence[Mapping[str, Any]]) -> str:
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
    return _table("Cases, worst first", header, lines, "–: absent from truth and prediction.")


def _picture(caption: str, path: Path) -> str:
    if not path.is_file():
        return f"<p>{escape(caption)}: no picture, {escape(path.name)} is not there.</p>"
    image = f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(title: str, header: Sequence[str], lines: Sequence[Sequence[Any]], note: str) -> str:
    """A table that scrolls sideways where it must, with everything in it escaped."""
    head = "".join(f"<th>{escape(entry)}</th>" for entry in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(entry))}</td>" for entry in line) + "</tr>" for line in lines)
    table = f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    return f'<h2>{escape(title)}</h2>{table}<p class="soft">{escape(note)}</p>'


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _interval(interval: Sequence[float] | None) -> str:
    return f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else ""
