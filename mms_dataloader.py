"""M&Ms: the facts of the data set, and its commands.

python mms_dataloader.py phantom data/mms_phantom_raw          # synthetic data in the raw layout
python mms_dataloader.py check RAW                             # every problem of a raw data set; exit 1 if any
python mms_dataloader.py prepare RAW --out data/mms            # check, then convert
python mms_dataloader.py preview --data data/mms --out preview.png
"""

import csv
import io
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import openpyxl

from utils.commands import run_data_command
from utils.data import Case, DatasetFacts, RawScan, missing_or_outside
from utils.metrics import cardiac_figures
from utils.phantom import write_mms

PARTS = ("Training/Labeled", "Training/Unlabeled", "Validation", "Testing")
COLUMNS = ("External code", "Vendor", "Centre", "ED", "ES")
VENDORS = ("A", "B", "C", "D")
UNKNOWN = {"vendor": "unknown", "centre": "", "phases": {}}  # what a wrong or missing row says of a patient


def find_cases(raw: Path) -> RawScan:
    """Match the folders of OpenDataset with the info table; nothing is read but the table."""
    base = raw / "OpenDataset" if (raw / "OpenDataset").is_dir() else raw
    beside = raw.parent if raw.name == "OpenDataset" else raw
    tables = {path for place in (beside, base) for path in place.glob("*") if path.suffix.lower() in (".csv", ".xlsx")}
    table, errors = _read_table(sorted(tables), raw)
    warnings: list[str] = []
    folders: dict[str, list[Path]] = defaultdict(list)
    for part in PARTS:
        for folder in sorted((base / part).glob("*/")):
            folders[folder.name].append(folder)
    if not folders:
        errors.append(f"{base}: no patient folders in {', '.join(PARTS)}")
    cases = []
    for code, places in sorted(folders.items()):
        if len(places) > 1:
            errors.append(f"patient {code} is there {len(places)} times: {', '.join(map(str, places))}")
        elif table and code not in table:
            errors.append(f"{places[0]}: patient {code} is not in the info table")
        for folder in places:  # the files are checked whatever the table says, so that one pass names every problem
            case, problems = _case(folder, raw, **(table.get(code) or UNKNOWN))
            cases += [case] if case else []
            errors += problems
    missing = sorted(set(table) - set(folders))
    if missing:
        warnings.append(f"{len(missing)} patients of the info table are not on disk: {', '.join(missing[:10])}")
    return RawScan(cases, errors, warnings)


def _case(
    folder: Path, raw: Path, *, vendor: str, centre: str, phases: dict[str, int]
) -> tuple[Case | None, list[str]]:
    """The scan of a patient's folder, of the files that are there; None without an image."""
    image, mask = (folder / f"{folder.name}_sa{suffix}.nii.gz" for suffix in ("", "_gt"))
    labeled = folder.parent.name != "Unlabeled"
    files = [image, mask] if labeled else [image]  # the masks in Unlabeled are empty
    problems = {path: missing_or_outside(path, raw) for path in files}
    masks = tuple(path for path in files[1:] if not problems[path])
    # Vendor B stands in two centres, and labelled patients are counted in each.
    group = f"B{centre}" if vendor == "B" else vendor
    case = None if problems[image] else Case(folder.name, vendor, group, image, masks, phases if masks else {})
    return case, [problem for problem in problems.values() if problem]


def _read_table(paths: list[Path], raw: Path) -> tuple[dict[str, dict | None], list[str]]:
    """Read the info table by its header; a patient whose row is wrong maps to None."""
    found, others = {}, []
    for path in paths:
        rows = _table_rows(path)
        lacking = [name for name in COLUMNS if not rows or name not in rows[0]]
        if lacking:
            others.append(f"{path} (cannot be read or lacks {', '.join(lacking)})")
        else:
            found[path] = rows
    if len(found) != 1:
        names = ", ".join([*map(str, found), *others]) or "none"
        return {}, [
            f"{raw}: expected one info table (CSV or XLSX with the columns {', '.join(COLUMNS)}) beside or inside "
            f"OpenDataset, found {names}"
        ]
    ((path, rows),) = found.items()
    table: dict[str, dict | None] = {}
    errors = []
    for row in rows:
        code, vendor, centre = (row[name] for name in ("External code", "Vendor", "Centre"))
        problems = []
        if not re.fullmatch(r"[A-Za-z0-9_-]+", code):
            problems.append("the code must consist of letters, digits, _ and -")
        if code in table:
            problems.append("the patient is in the table twice")
        if vendor not in VENDORS:
            problems.append(f"unknown vendor {vendor!r}, expected one of {', '.join(VENDORS)}")
        if vendor == "B" and not re.fullmatch(r"\d+", centre):
            problems.append(f"vendor B needs a centre number, not {centre!r}")
        if not all(re.fullmatch(r"\d{1,4}", row[phase]) for phase in ("ED", "ES")):
            problems.append(f"ED {row['ED']!r} and ES {row['ES']!r} must be frame numbers from 0")
        elif int(row["ED"]) == int(row["ES"]):
            problems.append(f"ED and ES are both frame {row['ED']}")
        errors += [f"{path}: patient {code!r}: {problem}" for problem in problems]
        if problems:
            table[code] = None
        else:
            phases = {phase: int(row[phase]) for phase in ("ED", "ES")}
            table[code] = {"vendor": vendor, "centre": centre, "phases": phases}
    return table, errors


def _table_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV or XLSX file as text by column name; empty when it cannot be read."""
    try:
        if path.suffix.lower() == ".csv":
            text = path.read_text(encoding="utf-8-sig")
            delimiter = max(",;\t", key=text.split("\n")[0].count)  # spreadsheets of some countries write semicolons
            lines = list(csv.reader(io.StringIO(text), delimiter=delimiter))
        else:
            with open(path, "rb") as file:  # opened here, or a read-only workbook keeps it open
                lines = list(openpyxl.load_workbook(file, read_only=True, data_only=True).active.values)
    except Exception:  # openpyxl raises what zip and XML raise; a table that cannot be read is none
        return []
    header, *rows = [[_text(cell) for cell in line] for line in lines if any(map(_text, line))] or [[]]
    return [defaultdict(str, zip(header, row, strict=False)) for row in rows]


def _text(cell: object) -> str:
    if isinstance(cell, float) and cell.is_integer():  # spreadsheets keep whole numbers as floats
        cell = int(cell)
    return "" if cell is None else str(cell).strip()


def normalize(slices: np.ndarray) -> np.ndarray:
    """Clip every slice (Z, X, Y) to its 0.5 and 99.5 percentile and scale it to [0, 1]; constant ones become 0."""
    low, high = np.percentile(slices, [0.5, 99.5], axis=(1, 2), keepdims=True).astype(np.float32)
    return (slices.clip(low, high) - low) / np.where(high > low, high - low, 1)


def labeled_count(patients: int, ratio: float) -> int:
    """Labelled patients of a group: ceil(N * ratio + 1) (the protocol of DGNet, Liu et al. 2021)."""
    return math.ceil(round(patients * ratio + 1, 6))  # rounded, or 0.07 * 100 would count as more than 7


# fmt: off
FACTS = DatasetFacts(
    name="M&Ms", key="mms", domain_word="vendor", domains=VENDORS,
    class_names=("background", "LV", "MYO", "RV"),
    ndim=4, label_values=4, spacing=1.1,
    find_cases=find_cases, normalize=normalize, labeled_count=labeled_count, clinical=cardiac_figures,
    write_phantom=write_mms, demo_phantom={"patients": 6, "frames": 4},
    preview={"fourier_ratio": 1.0, "histogram_matching": True},
    how_to_get=(
        "M&Ms is free for research after registration at https://www.ub.edu/mnms (OpenDataset and its info table).\n"
        "Then prepare it once: python mms_dataloader.py prepare RAW --out data/mms   (RAW holds OpenDataset)"
    ),
)
# fmt: on

if __name__ == "__main__":
    run_data_command(FACTS)
