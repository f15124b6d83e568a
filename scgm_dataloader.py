"""SCGM: the facts of the data set, and its commands, which python scgm_dataloader.py --help lists."""

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from config import SCGM
from utils.data.commands import run_data_command
from utils.data.dataset import Case, DatasetInfo, RawDataset, missing_or_outside, nifti_path
from utils.data.open_data import write_open_data
from utils.data.phantom import write_scgm

SITES = ("1", "2", "3", "4")
RATERS = (1, 2, 3, 4)
PHASE = "scan"  # the data have no phases: the one volume of a subject carries this name


def find_cases(raw: Path) -> RawDataset:
    """Find the subjects by the file names: in `train` with four raters each, in `test` without."""
    cases, errors = [], []
    for path in sorted(path for part in ("train", "test") for path in (raw / part).glob("[!.]*.nii*")):
        name = re.fullmatch(r"(site([1-4])-sc\d+)-(image|mask-r[1-4])\.nii(?:\.gz)?", path.name)
        if not name:
            errors.append(f"{path}: not a name like site1-sc01-image.nii.gz or site1-sc01-mask-r1.nii.gz")
        elif problem := missing_or_outside(path, path.parent):
            errors.append(problem)
        elif name[3] != "image":
            image = nifti_path(path.parent, f"{name[1]}-image")
            errors += [] if image.is_file() else [f"{path}: a mask without its image {image.name}"]
        else:
            subject, site, _ = name.groups()
            masks = [nifti_path(path.parent, f"{subject}-mask-r{rater}") for rater in RATERS]
            masks = masks if path.parent.name == "train" else []
            errors += [f"{mask}: missing; an image in train needs all raters" for mask in masks if not mask.exists()]
            masks = [mask for mask in masks if not missing_or_outside(mask, mask.parent)]
            cases.append(Case(subject, site, site, path, tuple(masks), {PHASE: 0} if masks else {}))
    times = Counter(case.patient for case in cases)
    errors += [f"subject {name} is there more than once" for name, n in times.items() if n > 1]
    if not any(case.masks for case in cases):
        errors.append(f"{raw}: no images with masks like train/site1-sc01-image.nii.gz")
    return RawDataset(sorted(cases, key=lambda case: case.patient), errors, [])


def majority(raters: list[np.ndarray]) -> np.ndarray:
    """Return 1 (GM) where more than half of the label maps say 1, else 2 where more than half see cord."""
    votes = np.stack(raters)
    grey, cord = (2 * np.count_nonzero(voted, axis=0) > len(raters) for voted in (votes == 1, votes > 0))
    return np.where(grey, 1, np.where(cord, 2, 0)).astype(np.uint8)


def normalize(slices: np.ndarray) -> np.ndarray:
    """Divide every slice (Z, X, Y) by its maximum; negative values and empty slices become 0."""
    slices = slices.clip(0)
    maximum = slices.max(axis=(1, 2), keepdims=True)
    return slices / np.where(maximum > 0, maximum, 1)


def labeled_count(subjects: int, ratio: float) -> int:
    """Return how many subjects of a site are labelled: ceil(n * ratio), so that no subject is half labelled."""
    return math.ceil(round(subjects * ratio, 6))


# fmt: off
DATASET = DatasetInfo(
    name="SCGM", key="scgm", domain_kind="site", domains=SITES,
    class_names=("background", "GM"),
    num_raw_labels=3, spacing=0.175,
    find_cases=find_cases, consensus=majority, normalize=normalize, labeled_count=labeled_count,
    write_phantom=write_scgm, more_commands={"open-data": write_open_data}, demo_phantom={"patients": 8},
    download_help=(
        "SCGM is free for research after registration at http://niftyweb.cs.ucl.ac.uk/challenge (train, test); scans\n"
        "like it are free for all: python scgm_dataloader.py open-data RAW\n"
        "Then prepare it once: python scgm_dataloader.py prepare RAW --out data/scgm   (RAW holds train and test)"
    ),
)
# fmt: on

if __name__ == "__main__":
    run_data_command(DATASET, SCGM)
