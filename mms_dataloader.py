"""M&Ms: the facts of the data set, and its commands, which python mms_dataloader.py --help lists."""

import math
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_fill_holes

from config import MMS
from utils.data.commands import run_data_command
from utils.data.dataset import Case, DatasetInfo, RawDataset, missing_or_outside, nifti_path
from utils.data.phantom import write_mms
from utils.errors import UserError
from utils.files import read_table

PARTS = ("Training/Labeled", "Training/Unlabeled", "Validation", "Testing")
COLUMNS = ("External code", "Vendor", "Centre", "ED", "ES")
VENDORS = ("A", "B", "C", "D")
CODE = re.compile(r"[A-Za-z0-9_-]+")  # of a patient: it becomes part of file names


class TableRow(NamedTuple):
    """One patient of the info table; a problem matters only where the patient is used."""

    vendor: str = "unknown"
    group: str = "unknown"
    phases: dict[str, int] = {}  # noqa: RUF012  empty where ED and ES are not two frame numbers
    problems: tuple[str, ...] = ()


def find_cases(raw: Path) -> RawDataset:
    """Match the folders of OpenDataset with the info table; nothing is read but the table."""
    base = raw / "OpenDataset" if (raw / "OpenDataset").is_dir() else raw
    beside = raw.absolute().parent if raw.absolute().name == "OpenDataset" else raw
    table, errors, warnings = _read_table(beside, base)
    folders_of: dict[str, list[Path]] = defaultdict(list)
    for folder in (folder for part in PARTS for folder in sorted((base / part).glob("[!.]*/"))):
        folders_of[folder.name].append(folder)
    if not folders_of:
        errors.append(f"{base}: no patient folders in {', '.join(PARTS)}")
    cases = []
    for code, folders in sorted(folders_of.items()):
        if len(folders) > 1:
            errors.append(f"patient {code} is there {len(folders)} times: {', '.join(map(str, folders))}")
        elif table and code not in table:
            errors.append(f"{folders[0]}: patient {code} is not in the info table")
        for folder in folders:  # checked whatever the table says: one pass names every problem
            row, labeled = table.get(code, TableRow()), folder.parent.name != "Unlabeled"
            image, mask = (nifti_path(folder, f"{code}_sa{suffix}") for suffix in ("", "_gt"))
            # The masks of unlabelled patients are empty.
            problems = {path: missing_or_outside(path, base) for path in (image, mask)[: 1 + labeled]}
            masks = (mask,) if problems.get(mask) == "" else ()
            if not problems[image]:
                cases.append(Case(code, row.vendor, row.group, image, masks, row.phases if masks else {}))
            errors += [*filter(None, problems.values()), *row.problems]
            if code in table and labeled and not row.phases:
                errors.append(f"patient {code!r} has masks and needs ED and ES in the info table, two frames from 0")
    if missing := sorted({*table} - {*folders_of}):
        warnings.append(f"{len(missing)} patients of the info table are not on disk: {', '.join(missing[:10])}")
    return RawDataset(cases, errors, warnings)


def _read_table(*folders: Path) -> tuple[dict[str, TableRow], list[str], list[str]]:
    """Read the info table by its header; return its rows by patient code, errors and warnings."""
    files = sorted({path for folder in folders for path in folder.glob("[!.]*")})
    tables = {}
    for path in (path for path in files if path.suffix.lower() in (".csv", ".xlsx")):
        with suppress(UserError):  # one that cannot be read is none
            columns, rows = read_table(path)
            if {*map(str.casefold, COLUMNS)} <= {*map(str.casefold, columns)}:
                tables[path] = rows
    if len(tables) != 1:
        expected = f"expected one info table (CSV or XLSX with {', '.join(COLUMNS)})"
        return {}, [f"{folders[0]}: {expected}, there are: {', '.join(map(str, tables)) or 'none'}"], []
    ((path, rows),) = tables.items()
    table, warnings = {}, []
    for row in rows:
        code, vendor, centre, *frames = (row[name.casefold()] for name in COLUMNS)
        vendor = vendor.upper()
        if not CODE.fullmatch(code):
            warnings.append(f"{path}: patient {code!r} is left out: letters, digits, _ and - make a code")
            continue
        faults = {
            "is in the table twice": code in table,
            f"has the unknown vendor {vendor!r}, not one of {', '.join(VENDORS)}": vendor not in VENDORS,
            f"of vendor B needs a centre number, not {centre!r}": vendor == "B" and not centre.isdecimal(),
        }
        problems = tuple(f"{path}: patient {code!r} {text}" for text, holds in faults.items() if holds)
        phases = {phase: int(n) for phase, n in zip(("ED", "ES"), frames, strict=True) if n.isdecimal()}
        group = f"B{centre}" if vendor == "B" else vendor  # its two centres are counted apart
        table[code] = TableRow(vendor, group, phases if len({*phases.values()}) == 2 else {}, problems)
    return table, [], warnings


def normalize(slices: np.ndarray) -> np.ndarray:
    """Clip slices (Z, X, Y) to their 0.5 and 99.5 percentile, scale to [0, 1]; constant ones become 0."""
    ordered = np.sort(slices.reshape(len(slices), -1))  # the bits of np.percentile, in a third of its time
    position = (ordered.shape[1] - 1) * np.array([0.005, 0.995])
    lower, upper = (ordered[:, bound(position).astype(int)].astype(float) for bound in (np.floor, np.ceil))
    low, high = (lower + (upper - lower) * (position % 1)).astype(np.float32).T[..., None, None]
    return (slices.clip(low, high) - low) / np.where(high > low, high - low, 1)


def label_warnings(truth: dict[str, np.ndarray]) -> list[str]:
    """Return what labels (Z, X, Y) by phase have exchanged: LV and RV, or ED and ES."""
    texts = []
    for phase, labels in truth.items():
        ring = labels == 2
        within = np.stack([binary_fill_holes(plane) for plane in ring]) & ~ring
        left, right = (np.count_nonzero(labels[within] == label) for label in (1, 3))
        if right > left:
            texts.append(f"{phase}: the blood in the ring of MYO is RV: are LV and RV exchanged?")
    cavity = {phase: np.count_nonzero(labels == 1) for phase, labels in truth.items()}
    if cavity.get("ES", 0) > cavity.get("ED", math.inf):
        texts.append("LV is larger at ES than at ED: are ED and ES exchanged?")
    return texts


def labeled_count(patients: int, ratio: float) -> int:
    """Return how many patients of a group are labelled: ceil(N * ratio + 1) (DGNet, Liu et al. 2021)."""
    return math.ceil(round(patients * ratio + 1, 6))  # 0.07 * 100 is no more than 7


def cardiac_metrics(volumes: dict[tuple[str, str], float]) -> dict[str, tuple[float, str]]:
    """Return clinical quantities, (value, unit) by name, of a heart's ml by (phase, structure).

    A ventricle that is empty in a phase was not found there: its ejection fraction is NaN.
    """
    quantities = {}
    for name in ("LV", "RV"):
        full, least = volumes["ED", name], volumes["ES", name]
        ejected = 100 * (1 - least / full) if full and least else math.nan
        quantities |= {f"{name} EDV": (full, "ml"), f"{name} ESV": (least, "ml"), f"{name} EF": (ejected, "%")}
    return quantities | {"MYO mass": (1.05 * volumes["ED", "MYO"], "g")}  # 1.05 g/ml


# fmt: off
DATASET = DatasetInfo(
    name="M&Ms", key="mms", domain_kind="vendor", domains=VENDORS,
    class_names=("background", "LV", "MYO", "RV"),
    num_raw_labels=4, spacing=1.1,
    find_cases=find_cases, normalize=normalize, labeled_count=labeled_count, clinical=cardiac_metrics,
    label_warnings=label_warnings,
    write_phantom=write_mms, demo_phantom={"patients": 6, "frames": 4},
    download_help=(
        "M&Ms is free for research after registration at https://www.ub.edu/mnms (OpenDataset, info table).\n"
        "Then prepare it once: python mms_dataloader.py prepare RAW --out data/mms   (RAW holds OpenDataset)"
    ),
)
# fmt: on

if __name__ == "__main__":
    run_data_command(DATASET, MMS)
