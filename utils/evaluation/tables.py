"""A table in Markdown, CSV and LaTeX (report.html prints it as HTML), and published numbers."""

import csv
import io
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from config import FIELD_PX

MARKS = {"phantom": "phantom data", "open_data": "open data, not the challenge's",
         "tta": "test-time augmentation", "keep_largest": "largest components",
         "other_data": "data not its training's"}  # fmt: skip
SELECTION_NOTE = "Published checkpoints may be chosen on the held-out domain; ours never are."
LATEX = str.maketrans(
    {char: rf"\{char}" for char in "%_&#${}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    | {"^": r"\textasciicircum{}", "|": r"\textbar{}", "<": "$<$", ">": "$>$"}
    | {"±": r"$\pm$", "≥": r"$\geq$", "–": "--", "−": "$-$"}
)  # fmt: skip


class Cell(NamedTuple):
    """A number of a table with its spread; None where there is none."""

    mean: float | None
    std: float | None = None
    ci95: Sequence[float] | None = None
    remark: str = ""  # printed in brackets, such as "2 seeds"

    def __str__(self) -> str:
        if self.mean is None or math.isnan(self.mean):
            return "–"
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        spread += "" if self.ci95 is None else " [{:.2f}, {:.2f}]".format(*self.ci95)
        return f"{self.mean:.2f}{spread}" + (self.remark and f" ({self.remark})")


class Table(NamedTuple):
    """Rows under a title and a header, with notes below."""

    title: str
    header: list[str]
    rows: list[list[Any]]  # texts, numbers and Cells; the first entry names the row
    notes: Sequence[str] = ()


class Published(NamedTuple):
    """A published row, as published.csv has it."""

    method: str
    dice: dict[str, Cell]  # by held-out domain
    average: Cell
    kind: str  # of Dice: "paper" and "pooled" are ours, too
    chosen_on: str  # what the checkpoint was chosen on

    @property
    def over(self) -> str:
        """What the deviation after ± is taken over."""
        return "patients" if any(cell.std for cell in self.dice.values()) else "–"


def published_rows(dataset: str, ratio: float, kind: str) -> tuple[list[Published], list[str]]:
    """Return the published rows of one kind of Dice, and notes on these and on the others."""
    rows = []
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if (line["dataset"], float(line["ratio"])) == (dataset, ratio):
                words = line["dice"].split()
                pairs = zip_longest(map(float, words[1::2]), map(float, line["std"].split()))
                dice = dict(zip(words[::2], (Cell(*pair) for pair in pairs), strict=True))
                average = Cell(float(line["average"]))
                rows.append(Published(line["method"], dice, average, line["kind"], line["chosen_on"]))
    others = ", ".join(f"{row.method} {row.average}" for row in rows if row.kind != kind)
    rows = [row for row in rows if row.kind == kind]
    notes = [SELECTION_NOTE] if rows else []
    notes += [f"Average of another or an unknown Dice, not to be compared: {others}."] if others else []
    for row in rows:
        mean = fmean(cell.mean for cell in row.dice.values())
        if abs(mean - row.average.mean) > 0.01:  # more than rounding
            notes.append(f"{row.method}: printed as {row.average}, the mean of its domains is {mean:.2f}.")
    return rows, notes


def incomparable(summary: dict) -> list[str]:
    """Say why a run's numbers cannot stand beside published ones."""
    settings = summary["settings"]
    short = settings["num_epoch"] < 50 or settings["max_steps"]
    reasons = {
        summary["method"]: summary["method"] != "full",
        f"{summary['image_size']} px": summary["image_size"] != FIELD_PX,
        f"field of {settings['field']} px": settings["field"] != FIELD_PX,
        "not pretrained": settings["pretrained"] == "none",
        f"{summary['step']} steps": short,
    }
    return [text for key, text in MARKS.items() if summary[key]] + [text for text, holds in reasons.items() if holds]


def to_markdown(tables: Sequence[Table]) -> str:
    """Return each table with its title and notes."""
    blocks = []
    for table in tables:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        rows = ["| " + " | ".join(str(entry).replace("|", r"\|") for entry in line) + " |" for line in lines]
        blocks += [f"**{table.title}**", "\n".join(rows), *table.notes]
    return "\n\n".join(blocks) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """Return a line per entry, numbers unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "sd", "low", "high", "remark"])
    for table in tables:
        for name, *row in table.rows:
            for column, entry in zip(table.header[1:], row, strict=True):
                cell = entry if isinstance(entry, Cell) else Cell(entry)
                writer.writerow([table.title, name, column, *cell[:2], *(cell.ci95 or ("", "")), cell.remark])
    return file.getvalue()


def to_latex(tables: Sequence[Table]) -> str:
    r"""Return each table in LaTeX, shrunk to the line where it is wider."""
    lines = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}"]
    for table in tables:
        caption = " ".join([f"{table.title}.", *table.notes]).translate(LATEX)
        header, *rows = (" & ".join(str(cell).translate(LATEX) for cell in row) for row in (table.header, *table.rows))
        lines += [
            r"\begin{table}\centering\footnotesize\setlength{\tabcolsep}{3pt}", rf"\caption{{{caption}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'c' * (len(table.header) - 1)}}}", r"\toprule", rf"{header} \\", r"\midrule",
            *(rf"{row} \\" for row in rows), r"\bottomrule", r"\end{tabular}}", r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 scan", "2 scans"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
