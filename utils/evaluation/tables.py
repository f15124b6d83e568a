"""A table and the formats it is printed in: Markdown, CSV and LaTeX here, HTML by report.html."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

LATEX = str.maketrans(
    {character: rf"\{character}" for character in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    | {"|": r"\textbar{}", "±": r"$\pm$", "≥": r"$\geq$", "–": "--", "−": "$-$"}
)


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
        after = [text for text in (interval(self.ci95), f"({self.remark})" if self.remark else "") if text]
        return " ".join([f"{self.mean:.2f}{spread}", *after])


class Table(NamedTuple):
    """Rows under a header, between a title with a note and footnotes."""

    title: str
    note: str
    header: list[str]
    rows: list[list[Any]]  # texts, numbers and Cells; the first entry names the row
    footnotes: Sequence[str] = ()
    rules: Sequence[int] = ()  # rows that begin a new group


def interval(limits: Sequence[float] | None) -> str:
    """Return two limits in brackets; an empty text where there are none."""
    return f"[{limits[0]:.2f}, {limits[1]:.2f}]" if limits else ""


def to_markdown(tables: Sequence[Table]) -> str:
    """Return each table with its title and note above and its footnotes below."""
    blocks = []
    for table in tables:
        lines = [[str(entry).replace("|", r"\|") for entry in line] for line in (table.header, *table.rows)]
        lines.insert(1, ["---"] * len(table.header))
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks += [f"**{table.title}.** {table.note}".strip(), rows, *table.footnotes]
    return "\n\n".join(blocks) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """Return a line per entry, numbers unrounded; notes do not fit in."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "sd", "low", "high", "remark"])
    for table in tables:
        for name, *row in table.rows:
            for column, entry in zip(table.header[1:], row, strict=True):
                cell = entry if isinstance(entry, Cell) else Cell(entry)
                limits = cell.ci95 or (None, None)
                writer.writerow([table.title, name, column, cell.mean, cell.std, *limits, cell.remark])
    return file.getvalue()


def to_latex(tables: Sequence[Table]) -> str:
    r"""Return each table as a LaTeX table, shrunk to the width of a line where it is wider."""
    lines = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}"]
    for table in tables:
        caption = f"{table.title}. {table.note}".translate(LATEX)
        lines += [r"\begin{table}\centering\footnotesize\setlength{\tabcolsep}{3pt}", rf"\caption{{{caption}}}"]
        lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
        lines += [rf"\begin{{tabular}}{{l{'c' * (len(table.header) - 1)}}}", r"\toprule"]
        for number, row in enumerate([table.header, *table.rows], start=-1):
            lines += [r"\midrule"] if number in (0, *table.rules) else []
            lines.append(" & ".join(str(entry).translate(LATEX) for entry in row) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}"]
        lines += [*(rf"\par\raggedright {note.translate(LATEX)}" for note in table.footnotes), r"\end{table}", ""]
    return "\n".join(lines)
