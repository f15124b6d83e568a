"""A table in Markdown, CSV and LaTeX; report.html prints it as HTML."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

MARKS = {"phantom": "phantom data", "tta": "test-time augmentation", "keep_largest": "largest components"}
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
