"""Description of a data set: its names, how files become cases, its geometry and intensities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError


class Case(NamedTuple):
    """Files of one scan in a raw data set."""

    patient: str
    domain: str
    group: str
    image: Path
    masks: tuple[Path, ...]  # one per rater; empty for a scan without truth
    phases: dict[str, int]  # labelled frames by name; empty for a scan without truth
    own: bool = False  # the user's own: if it has labelled frames, only these are prepared


class RawDataset(NamedTuple):
    """Scans found in a raw data set, and what is wrong with its table and file names."""

    cases: list[Case]
    errors: list[str]
    warnings: list[str]


def nifti_path(folder: Path, stem: str) -> Path:
    """Return the path of STEM.nii.gz in a folder, or of STEM.nii if only that is there."""
    packed, plain = folder / f"{stem}.nii.gz", folder / f"{stem}.nii"
    return plain if plain.exists() and not packed.exists() else packed


def missing_or_outside(path: Path, base: Path) -> str:
    """Return why a file below the folder `base` must not be read; "" where it may."""
    if not path.is_file():
        return f"{path}: missing"
    if path.suffix == ".gz" and path.with_suffix("").exists():
        return f"{path}: there is {path.stem}, too: remove one"
    inside = path.resolve().is_relative_to(base.resolve())
    return "" if inside else f"{path}: a link that leads out of {base}: put a copy in its place"


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Facts that tell one data set from another; settings stand in config.py."""

    name: str  # as in text: "M&Ms"
    key: str  # as in paths: "mms"
    domain_kind: str  # name of a domain: "vendor", "site"
    domains: tuple[str, ...]
    class_names: tuple[str, ...]  # by label value; the first is the background
    num_raw_labels: int  # values of a raw mask; those beyond class_names count as background
    spacing: float  # mm per px of the canvas
    find_cases: Callable[[Path], RawDataset]
    normalize: Callable[[np.ndarray], np.ndarray]  # slices (Z, X, Y) float32 -> float32 in [0, 1]
    labeled_count: Callable[[int, float], int]  # (patients of a group, ratio) -> labelled
    write_phantom: Callable[..., None]
    demo_phantom: dict[str, int]  # size of the demo's phantom, as arguments of write_phantom
    download_help: str  # where one gets the data and how one prepares them
    label_values: dict[int, int] | None = None  # label by value in a raw mask, where they differ
    consensus: Callable[[list[np.ndarray]], np.ndarray] | None = None  # of several raters
    clinical: Callable[[dict], dict] | None = None  # as `cardiac_metrics` of mms_dataloader
    more_commands: dict[str, Callable] = field(default_factory=dict)  # of its script, by name
    label_warnings: Callable[[dict], list[str]] | None = None  # of labels (Z, X, Y) by phase


def label_values(labels: Sequence[str], class_names: Sequence[str]) -> dict[int, int]:
    """Return the class by value in the masks, as "VALUE=NAME" says; 0 is the background."""
    names, values = [name.casefold() for name in class_names], {0: 0}
    for value, _, name in (text.casefold().partition("=") for text in labels):
        if not value.isdecimal() or int(value) in values or name not in names:
            expected = f"expected a new number above 0 and one of {', '.join(names)}"
            raise UserError(f"--labels {value}={name}: {expected}")
        values[int(value)] = names.index(name)
    if absent := [name for n, name in enumerate(class_names) if n not in values.values()]:
        print(f"warning: --labels name no value for {', '.join(absent)}: their truth is empty")
    return values
