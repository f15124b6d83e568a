"""Scans of one's own: images paired with their masks by the names that people give them, or by a table."""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from utils.data.dataset import Case, DatasetInfo, RawDataset
from utils.data.volume import frame_count, read_shape, read_volume, whole_numbers
from utils.errors import UserError
from utils.files import file_stem, nifti_files

# Endings of what lies beside scans and is none: ours, and those of public data sets and tools. Where several maps
# belong to an image, the ending that stands first here is its mask.
ENDINGS = ("gmseg", "dseg", "gt", "labels", "label", "seg", "mask", "manual", "confidence", "agreement")
MAP = re.compile(rf"(?:^|[-_])({'|'.join(ENDINGS)})(?:[-_]?manual)?(?:-r\d+)?(?:[-_]manual)?$", re.IGNORECASE)
IMAGE = re.compile(r"(?:^|[-_])(image|img|0000)$", re.IGNORECASE)  # 0000: the first channel, as nnU-Net names it
ACDC = re.compile(r"(.+)_frame(\d+)$")
UNNAMED = 255  # in a table of labels: a value that --labels does not name
TABLE_COLUMNS = ("image", "truth", "patient", "phase", "group")


def is_map(path: Path) -> bool:
    """Return True if a file is a label map, or another map of ours, by its name."""
    return bool(MAP.search(file_stem(path)))


def with_unlabeled(folders: Sequence[Path], dataset: DatasetInfo) -> DatasetInfo:
    """Return the data set with every scan in `folders`, 3D or 4D, as a patient without masks.

    A folder is a domain of its own, named after it, which training always uses.
    """
    return replace(dataset, find_cases=partial(_find_with_unlabeled, dataset, tuple(folders)))


def labeled(images: Sequence[Path], masks: Sequence[Path], labels: Sequence[str], dataset: DatasetInfo) -> DatasetInfo:
    """Return a data set that consists of the user's labelled scans alone.

    Args:
        images: files and folders of scans, or a single CSV file: image, truth and, if known, patient, phase and group.
        masks: files and folders of their label maps; empty beside a CSV file.
        labels: which structure a mask's value stands for, as "1=RV"; empty where values are those of the data set.

    Raises:
        UserError: `labels` name no structure, or one value twice.
    """
    table = _label_table(labels, dataset) if labels else None
    find = partial(_find_labeled, tuple(images), tuple(masks), table, dataset)
    if table is None:
        return replace(dataset, find_cases=find)
    return replace(dataset, find_cases=find, num_raw_labels=len(table), consensus=partial(_relabel, table, dataset))


def _find_with_unlabeled(dataset: DatasetInfo, folders: tuple[Path, ...], raw: Path) -> RawDataset:
    found = dataset.find_cases(raw)
    cases, errors = [], []
    for folder in folders:
        domain = _safe(folder.resolve().name)
        images = [path for path in nifti_files([folder]) if not is_map(path)]
        if domain in {*dataset.domains, *(case.domain for case in cases)}:
            errors.append(f"{folder}: there is a {dataset.domain_kind} {domain} already: rename the folder")
        if not images:
            errors.append(f"{folder}: no .nii or .nii.gz scan in it (subfolders are not searched)")
        cases += [Case(_safe(file_stem(path)), domain, domain, path, (), {}, own=True) for path in images]
    times = Counter(case.patient for case in [*found.cases, *cases])
    errors += [f"{case.image}: there is a patient {case.patient} already: rename it" for case in cases
               if times[case.patient] > 1]  # fmt: skip
    return RawDataset(found.cases + cases, found.errors + errors, found.warnings)


def _find_labeled(
    images: tuple[Path, ...], masks: tuple[Path, ...], table: np.ndarray | None, dataset: DatasetInfo, _raw: Path
) -> RawDataset:
    from_table = len(images) == 1 and images[0].suffix.lower() == ".csv"
    pairs, errors, warnings = _read_pairs(images[0]) if from_table else _pair(images, masks)
    cases = []
    for case in pairs:
        try:
            cases.append(_with_phases(case, table, dataset, warnings))
        except UserError as error:
            cases.append(case)  # whose files are checked all the same
            errors.append(str(error))
    times = Counter((case.patient, phase) for case in cases for phase in case.phases)
    twice = [f"{patient} {phase}" for (patient, phase), count in times.items() if count > 1]
    errors += [f"several scans are called {name}: tell them apart in a CSV file" for name in twice]
    if not cases and not errors:
        errors.append(f"no .nii or .nii.gz scan in {', '.join(map(str, images))}")
    return RawDataset(cases, errors, warnings)


def _pair(inputs: tuple[Path, ...], truths: tuple[Path, ...]) -> tuple[list[Case], list[str], list[str]]:
    """Pair images and masks by their names; return the pairs, what cannot be paired, and what is left out."""
    given, truth = nifti_files(inputs, deep=True), nifti_files(truths, deep=True)
    stems = {file_stem(path) for path in [*given, *truth]}
    masks: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))  # by name, then by ending
    images, warnings, errors = [], [], []
    for path in dict.fromkeys([*given, *truth]):
        found = MAP.search(file_stem(path))
        name = MAP.sub("", file_stem(path)) or path.parent.name
        if re.search(r"_000[1-9]$", file_stem(path)) and f"{file_stem(path)[:-1]}0" in stems:
            warnings.append(f"{path}: left out: a further channel of its image")
        elif file_stem(path).endswith("_4d") and any(s.startswith(f"{file_stem(path)[:-3]}_frame") for s in stems):
            warnings.append(f"{path}: left out: its frames with masks have files of their own")
        elif found:
            masks[name][ENDINGS.index(found[1].lower())].append(path)
        elif f"{file_stem(path)}_0000" in stems or path not in given:
            masks[name][len(ENDINGS)].append(path)
        else:
            images.append(path)
    domain, cases = _safe(inputs[0].resolve().name), []
    for path in images:
        name = IMAGE.sub("", file_stem(path)) or path.parent.name
        endings = masks.pop(name, {})
        if not endings:
            where = ", ".join(map(str, truths))
            errors.append(f"{path}: no mask of that name in {where}: leave it out, or name the pairs in a CSV file")
            continue
        chosen, *others = (sorted(endings[ending]) for ending in sorted(endings))
        if len(chosen) > 1 and not all(re.search(r"-r\d+$", file_stem(mask)) for mask in chosen):
            errors.append(f"{path}: several masks: {', '.join(map(str, chosen))}")
        warnings += [
            f"{mask}: left out: {chosen[0].name} is the mask of {path.name}" for more in others for mask in more
        ]
        cases.append(Case(_safe(name), domain, domain, path, tuple(chosen), {}, own=True))
    errors += [f"{path}: a mask without its image" for of in masks.values() for paths in of.values() for path in paths]
    return cases, errors, warnings


def _read_pairs(path: Path) -> tuple[list[Case], list[str], list[str]]:
    """Read pairs from a CSV file, whose paths are relative to it."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from error
    unknown = [name for name in header if name not in TABLE_COLUMNS]
    if unknown or not {"image", "truth"} <= set(header):
        raise UserError(
            f"{path}: its columns are {', '.join(header)}; expected image, truth and, if known, patient, phase, group"
        )
    cases, errors = [], []
    for number, row in enumerate(rows, start=2):
        image, mask = (path.parent / (row[name] or "") for name in ("image", "truth"))
        errors += [f"{path}, line {number}: {p}: no such file" for p in (image, mask) if not p.is_file()]
        patient = _safe(row.get("patient") or IMAGE.sub("", file_stem(image)))
        domain, phase = _safe(path.stem), _safe(row.get("phase") or "")
        group = row.get("group") or domain
        cases.append(Case(patient, domain, group, image, (mask,), {phase: 0} if phase else {}, own=True))
    return cases, errors, []


def _with_phases(case: Case, table: np.ndarray | None, dataset: DatasetInfo, warnings: list[str]) -> Case:
    """Return a pair with the names of its labelled frames; a guess is added to `warnings`.

    ACDC's Info.cfg names the end-diastolic and the end-systolic frame. A 4D mask with two labelled frames shows them
    itself: the cavity of the first structure, the left ventricle, is largest at the end of diastole.

    Raises:
        UserError: no frame is labelled, or a table names one phase for several frames.
    """
    if found := ACDC.match(file_stem(case.image)):
        info = case.image.with_name("Info.cfg")
        text = info.read_text(errors="replace") if info.is_file() else ""
        names = {int(frame): phase for phase, frame in re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE)}
        frame = int(found[2])
        return case._replace(patient=_safe(found[1]), phases={names.get(frame, f"frame{frame:02d}"): 0})
    try:
        if len(read_shape(case.masks[0], (3, 4))) == 3:
            return case._replace(phases=case.phases or {"scan": 0})
        mask = whole_numbers(read_volume(case.masks[0], 4))
    except UserError:
        return case  # the scan's own check will say why
    frames = [n for n in range(frame_count(mask)) if mask.array[..., n].any()]
    if not frames:
        raise UserError(f"{case.masks[0]}: no frame has a label")
    if case.phases:
        raise UserError(f"{case.masks[0]}: a phase in the table is for a 3D file, this has {frame_count(mask)} frames")
    if len(frames) != 2 or dataset.clinical is None:
        return case._replace(phases={f"frame{n:02d}": n for n in frames})
    first = 1 if table is None else np.flatnonzero(table == 1)
    cavity = {n: np.isin(mask.array[..., n], first).sum() for n in frames}
    smaller, larger = sorted(frames, key=lambda n: (cavity[n], -n))
    name = dataset.class_names[1]
    warnings.append(f"{case.image}: ED and ES are the labelled frames of the larger and the smaller {name}")
    return case._replace(phases={"ED": larger, "ES": smaller})


def _label_table(labels: Sequence[str], dataset: DatasetInfo) -> np.ndarray:
    """Return the class by value in the masks, UNNAMED where `labels` name none; 0 is the background."""
    classes = {name.casefold(): number for number, name in enumerate(dataset.class_names)}
    table = np.full(256, UNNAMED, np.uint8)
    table[0] = 0
    for text in labels:
        value, _, name = text.partition("=")
        if not value.isdecimal() or not 0 < int(value) < 256 or name.casefold() not in classes:
            raise UserError(
                f"--labels {text}: expected VALUE=NAME, a value of 1 to 255 and one of {', '.join(classes)}"
            )
        if table[int(value)] != UNNAMED:
            raise UserError(f"--labels {text}: the value {value} is named twice")
        table[int(value)] = classes[name.casefold()]
    if absent := [name for number, name in enumerate(dataset.class_names) if number not in table]:
        print(f"warning: --labels name no value for {', '.join(absent)}: compared with an empty truth")
    return table


def _relabel(table: np.ndarray, dataset: DatasetInfo, raters: list[np.ndarray]) -> np.ndarray:
    """Return the consensus of raters' maps (Z, X, Y) whose values `table` names; UserError for others."""
    if unknown := sorted({int(v) for rater in raters for v in np.unique(rater) if table[v] == UNNAMED}):
        raise UserError(f"--labels do not name its values {unknown[:5]}: add VALUE=STRUCTURE, or VALUE=background")
    return dataset.consensus([table[rater] for rater in raters])


def _safe(name: str) -> str:
    """Return a name as part of a file's name: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".")
