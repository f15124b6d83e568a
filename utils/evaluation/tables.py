"""A table and the formats it is printed in: Markdown, CSV and LaTeX here, HTML by report.html."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LATEX = str.maketrans(
    {character: rf"\{character}" for character in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    | {"|": r"\textbar{}", "±": r"$\pm$", "–": "--", "−": "$-$", "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$"}
)


class Cell(NamedTuple):
    """A number of a table with its spread; None where there is none."""

    mean: float | None
    std: float | None = None
    remark: str = ""  # over how many seeds or domains, where that is not one seed or every domain
    differences: str = ""  # why it is not comparable with the published numbers; marked †
    ci95: Sequence[float] | None = None

    def __str__(self) -> str:
        if self.mean is None or math.isnan(self.mean):
            return "–"
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        mark = "†" if self.differences else ""
        after = [text for text in (interval(self.ci95), f"({self.remark})" if self.remark else "") if text]
        return " ".join([f"{self.mean:.2f}{spread}{mark}", *after])


class Table(NamedTuple):
    """Rows under a header, between a title with a note and footnotes."""

    title: str
    note: str
    header: list[str]
    rows: list[list[Any]]  # texts, numbers and Cells; the first entry names the row
    footnotes: Sequence[str] = ()
    rules: Sequence[int] = ()  # rows that begin a new group
    citations: Mapping[str, str] = {}  # BibTeX keys by the names of their rows, for LaTeX


def interval(limits: Sequence[float] | None) -> str:
    """Return two limits in brackets; an empty text where there are none."""
    return f"[{limits[0]:.2f}, {limits[1]:.2f}]" if limits else ""


def _texts(row: Sequence[Any]) -> list[str]:
    """Return the entries of a row as printed; a mark that all its numbers bear stands at its name instead."""
    numbers = [entry for entry in row if isinstance(entry, Cell) and entry.mean is not None]
    if numbers and all(cell.differences for cell in numbers):
        row = [f"{row[0]} †", *(entry._replace(differences="") for entry in row[1:])]
    return [str(entry) for entry in row]


def to_markdown(tables: Sequence[Table]) -> str:
    """Return each table with its title and note above and its footnotes below."""
    blocks = []
    for table in tables:
        lines = [[text.replace("|", r"\|") for text in _texts(line)] for line in (table.header, *table.rows)]
        lines.insert(1, ["---"] * len(table.header))
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks += [f"**{table.title}.** {table.note}".strip(), rows, *table.footnotes]
    return "\n\n".join(blocks) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """Return a line per entry, numbers unrounded; notes do not fit in."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "sd", "low", "high", "remark", "not_comparable"])
    for table in tables:
        for label, *row in table.rows:
            for column, entry in zip(table.header[1:], row, strict=True):
                cell = entry if isinstance(entry, Cell) else Cell(entry)
                numbers = (cell.mean, cell.std, *(cell.ci95 or (None, None)))
                writer.writerow([table.title, label, column, *numbers, cell.remark, cell.differences])
    return file.getvalue()


def to_latex(tables: Sequence[Table]) -> str:
    r"""Return each table as a LaTeX table, shrunk to the width of a line where it is wider."""
    bibliography = r"; cites published.bib: \bibliography{published}" if any(t.citations for t in tables) else ""
    lines = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}" + bibliography]
    for table in tables:
        caption = f"{table.title}. {table.note}".translate(LATEX)
        lines += [r"\begin{table}\centering\footnotesize\setlength{\tabcolsep}{3pt}", rf"\caption{{{caption}}}"]
        lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
        lines += [rf"\begin{{tabular}}{{l{'c' * (len(table.header) - 1)}}}", r"\toprule"]
        for number, row in enumerate([table.header, *table.rows], start=-1):
            lines += [r"\midrule"] if number in (0, *table.rules) else []
            name, *texts = [text.translate(LATEX) for text in _texts(row)]
            key = table.citations.get(row[0])
            lines.append(" & ".join([rf"{name}~\cite{{{key}}}" if key else name, *texts]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}"]
        lines += [*(rf"\par\raggedright {note.translate(LATEX)}" for note in table.footnotes), r"\end{table}", ""]
    return "\n".join(lines)
