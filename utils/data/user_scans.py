"""Scans of one's own: images paired with their masks by the names that people give them, or by a table."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np

from utils.data.dataset import ENDINGS, MAP, Case, DatasetInfo, RawDataset, plain_name, scan_identity, scan_name
from utils.data.volume import PROGRAM, frame_count, frame_slices, read_header, read_volume, whole_numbers
from utils.errors import UserError
from utils.files import file_stem, nifti_files, read_table

CHANNEL = re.compile(r"_000[1-9]$")  # beside the first, as nnU-Net names them
WHOLE_CYCLE = re.compile(r"[-_](4d|cine)$", re.IGNORECASE)  # a file beside those of its labelled frames
RATER = re.compile(r"-r\d+$", re.IGNORECASE)


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
        images: files and folders of scans, or a single table (CSV or XLSX): image, truth and, if known, patient,
            phase and group.
        masks: files and folders of their label maps; empty beside a table.
        labels: which structure a mask's value stands for, as "1=RV"; empty where values are those of the data set.

    Raises:
        UserError: `labels` name no structure, or one value twice.
    """
    dataset = replace(dataset, label_values=_label_values(labels, dataset) if labels else None)
    return replace(dataset, find_cases=partial(_find_labeled, tuple(images), tuple(masks), dataset))


def _find_with_unlabeled(dataset: DatasetInfo, folders: tuple[Path, ...], raw: Path) -> RawDataset:
    known = dataset.find_cases(raw)
    cases, errors = [], []
    for folder in folders:
        domain = plain_name(folder.resolve().name)
        images = [path for path in nifti_files([folder]) if not is_map(path)]
        if domain in {*dataset.domains, *(case.domain for case in cases)}:
            errors.append(f"{folder}: there is a {dataset.domain_kind} {domain} already: rename the folder")
        if not images:
            errors.append(f"{folder}: no .nii or .nii.gz scan in it (subfolders are not searched)")
        taken = {case.patient for case in [*known.cases, *cases]}
        identities = [scan_identity(path) for path in images]
        for path, identity in zip(images, identities, strict=True):
            if identity[0] in taken or identities.count(identity) > 1:
                errors.append(f"{path}: there is a patient {identity[0]} already: rename it")
            cases.append(Case(identity[0], domain, domain, path, (), {}, own=True))
    return RawDataset(known.cases + cases, known.errors + errors, known.warnings)


def _find_labeled(images: tuple[Path, ...], masks: tuple[Path, ...], dataset: DatasetInfo, _raw: Path) -> RawDataset:
    warnings: list[str] = []
    if len(images) == 1 and images[0].suffix.lower() in (".csv", ".xlsx"):
        pairs, errors = _read_pairs(images[0])
    else:
        pairs, errors = _pair(images, masks, warnings)
    if not pairs and not errors:
        errors.append(f"no .nii or .nii.gz scan in {', '.join(map(str, images))}")
    cases = []
    for case in pairs:
        if len(case.masks) > 1 and dataset.consensus is None:
            unused = ", ".join(mask.name for mask in case.masks[1:])
            warnings.append(f"{case.image}: of several raters only {case.masks[0].name} is the truth, not {unused}")
            case = case._replace(masks=case.masks[:1])
        try:
            cases.append(case._replace(phases=_labeled_frames(case)))
        except UserError as error:
            errors.append(str(error))
            cases.append(case)  # whose files are checked all the same
    cases = _name_phases(cases, dataset, warnings)
    times = Counter((case.patient, phase) for case in cases for phase in case.phases)
    twice = [f"{patient} {phase}" for (patient, phase), count in times.items() if count > 1]
    errors += [f"several scans are called {name}: tell them apart in a table of the pairs" for name in twice]
    return RawDataset(cases, errors, warnings)


def _pair(inputs: Sequence[Path], truths: Sequence[Path], warnings: list[str]) -> tuple[list[Case], list[str]]:
    """Pair images and masks by their names; return the pairs and what cannot be paired. Adds what is left out."""
    given, truth = nifti_files(inputs, deep=True), nifti_files(truths, deep=True)
    stems, truth_within = {file_stem(path) for path in given}, {*truth} < {*given}
    # What is given as both is a mask where its folder, or its name, says so.
    masks = {path for path in truth
             if truth_within or path not in given or is_map(path) or f"{file_stem(path)}_0000" in stems}  # fmt: skip
    made_here = {path for path in masks if _is_ours(path)}
    warnings += [f"{path}: left out: a map that this program made is no truth" for path in sorted(made_here)]
    # By the name that a mask shares with its image; "mask" and "image" alone stand for their folder.
    named = {mask: MAP.sub("", file_stem(mask)) or mask.parent.name for mask in sorted(masks - made_here)}
    names = set(named.values())
    images: dict[str, list[Path]] = defaultdict(list)
    for path in (path for path in given if path not in masks and not is_map(path)):
        stem = file_stem(path)
        if stem in names:  # the exact name goes first: a number may be a patient's
            images[stem].append(path)
        elif CHANNEL.search(stem) and CHANNEL.sub("", stem) in names:
            warnings.append(f"{path}: left out: a further channel of its image")
        elif WHOLE_CYCLE.search(stem) and any(WHOLE_CYCLE.sub("_", stem) in name for name in names):
            warnings.append(f"{path}: left out: its frames with masks have files of their own")
        else:
            images[scan_name(path) or path.parent.name].append(path)
    masks_of: dict[Path, list[Path]] = defaultdict(list)
    errors = []
    for mask, name in named.items():  # of images that share a name it belongs to the one in the most similar folder
        likeness = {image: _equal_folders(image, mask) for image in images[name]}
        nearest = [image for image, value in likeness.items() if value == max(likeness.values())]
        if len(nearest) == 1:
            masks_of[nearest[0]].append(mask)
        else:
            errors.append(f"{mask}: a mask without its image" + "".join(f", or that of {path}" for path in nearest))
    # One evaluation takes one kind of mask, the first in the order: that of another kind may show another structure.
    first = min((mask for paths in masks_of.values() for mask in paths), key=_kind, default=None)
    identities = {path: scan_identity(path, name) for name, paths in images.items() for path in paths}
    shared = {patient for (patient, _), count in Counter(identities.values()).items() if count > 1}
    domain, cases = plain_name(inputs[0].resolve().name), []
    for path, (patient, phase) in identities.items():
        if not masks_of[path]:
            places = ", ".join(map(str, truths))
            errors.append(f"{path}: no mask of that name in {places}: leave it out, or name the pairs in a table")
            continue
        order = {mask: (_kind(mask), -_equal_folders(path, mask)) for mask in masks_of[path]}
        best = min(order.values())
        chosen = [mask for mask in order if order[mask] == best]
        if best[0] != _kind(first):
            problem = f"{path}: has {chosen[0].name}, but no mask of the kind of {first}"
            errors.append(f"{problem}: name the pairs in a table")
            continue
        warnings += [f"{mask}: left out: {chosen[0].name} is the mask of {path.name}"
                     for mask in order if mask not in chosen]  # fmt: skip
        if len(chosen) > 1 and not all(RATER.search(file_stem(mask)) for mask in chosen):
            errors.append(f"{path}: several masks: {', '.join(map(str, chosen))}")
        if patient in shared:  # files of one name are told apart by their folders
            top = os.path.commonpath([other.absolute().parent for other in identities])
            patient = plain_name("_".join(path.absolute().parent.relative_to(top).parts)) or patient
        phases = {phase: 0} if phase else {}
        cases.append(Case(patient, domain, domain, path, tuple(chosen), phases, own=True))
    return cases, errors


def _is_ours(mask: Path) -> bool:
    try:
        return read_header(mask)[0]["descrip"].item().startswith(PROGRAM.encode())
    except UserError:
        return False  # the scan's own check will say why


def _kind(mask: Path) -> tuple[bool, int, str]:
    """Return a mask's ending, as a key that sorts names without any first, then grey matter, then by ENDINGS."""
    match = MAP.search(RATER.sub("", file_stem(mask)))
    if not match:
        return False, -1, ""
    text = match[0].casefold().strip("-_")
    return "gm" not in text, ENDINGS.index(match[1].casefold()), text


def _equal_folders(image: Path, mask: Path) -> int:
    """Count the folders above two files, from the innermost, that are called alike."""
    pairs = zip(reversed(image.absolute().parent.parts), reversed(mask.absolute().parent.parts), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _read_pairs(path: Path) -> tuple[list[Case], list[str]]:
    """Read pairs from a table, whose paths are relative to it; return them and the files that are missing."""
    columns, rows = read_table(path)
    if not {"image", "truth"} <= {name.casefold() for name in columns}:
        raise UserError(
            f"{path}: its columns are {', '.join(columns)}; expected image, truth and, if known, patient, phase, group"
        )
    domain, cases, errors = plain_name(path.stem), [], []
    for row in rows:
        image, mask = (path.parent / row[name] for name in ("image", "truth"))
        errors += [f"{path}: {file}: no such file" for file in (image, mask) if not file.is_file()]
        patient, phase = scan_identity(image)
        patient, phase = plain_name(row["patient"]) or patient, plain_name(row["phase"]) or phase
        phases = {phase.upper() if phase.upper() in ("ED", "ES") else phase: 0} if phase else {}
        cases.append(Case(patient, domain, row["group"] or domain, image, (mask,), phases, own=True))
    return cases, errors


def _labeled_frames(case: Case) -> dict[str, int]:
    """Return the labelled frames by name: of a 3D mask what the file's name or the table says, of a 4D mask all.

    Raises:
        UserError: no frame is labelled, or one phase is named for several frames.
    """
    mask = case.masks[0]
    try:
        if len(read_header(mask)[1]) == 3:
            return case.phases or {"scan": 0}
        volume = whole_numbers(read_volume(mask, 4))
    except UserError:
        return case.phases  # the scan's own check will say why
    frames = [n for n in range(frame_count(volume)) if volume.array[..., n].any()]
    if not frames:
        raise UserError(f"{mask}: no frame has a label")
    if case.phases:
        raise UserError(f"{mask}: the phase {', '.join(case.phases)} is that of a 3D file, this has several frames")
    return {f"frame{n:02d}": n for n in frames}


def _name_phases(cases: list[Case], dataset: DatasetInfo, warnings: list[str]) -> list[Case]:
    """Call numbered frames ED and ES: by ACDC's Info.cfg, or of two frames by the size of the left ventricle."""
    frames: dict[str, list[tuple[Case, str]]] = defaultdict(list)
    for case in cases:
        frames[case.patient] += [(case, phase) for phase in case.phases if phase.startswith("frame")]
    names: dict[tuple[str, str], str] = {}
    for patient, numbered in frames.items():
        infos = {case.image.with_name("Info.cfg") for case, _ in numbered if scan_identity(case.image)[1]}
        text = "".join(info.read_text(errors="replace") for info in infos if info.is_file())
        if by_table := re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE):
            names |= {(patient, f"frame{int(frame):02d}"): phase for phase, frame in by_table}
        elif len(numbered) == 2 and dataset.clinical:
            try:
                (_, es), (_, ed) = sorted(numbered[::-1], key=lambda frame: _cavity(*frame, dataset))
            except UserError:
                continue  # the scan's own check will say why
            names |= {(patient, ed): "ED", (patient, es): "ES"}
            structure = dataset.class_names[1]
            warnings.append(f"{patient}: ED and ES are the labelled frames of the larger and the smaller {structure}")
    return [case._replace(phases={names.get((case.patient, phase), phase): n for phase, n in case.phases.items()})
            for case in cases]  # fmt: skip


def _cavity(case: Case, phase: str, dataset: DatasetInfo) -> int:
    """Count the voxels of the first structure, which of a heart is largest at the end of diastole, in one frame."""
    first = [value for value, label in (dataset.label_values or {1: 1}).items() if label == 1]
    return np.count_nonzero(np.isin(frame_slices(whole_numbers(read_volume(case.masks[0])), case.phases[phase]), first))


def _label_values(labels: Sequence[str], dataset: DatasetInfo) -> dict[int, int]:
    """Return the class by value in the masks, as "VALUE=NAME" says; 0 is the background."""
    classes = {name.casefold(): number for number, name in enumerate(dataset.class_names)}
    values = {0: 0}
    for text in labels:
        value, _, name = text.partition("=")
        if not value.isdecimal() or int(value) == 0 or name.casefold() not in classes:
            raise UserError(
                f"--labels {text}: expected VALUE=NAME, a whole number above 0 and one of {', '.join(classes)}"
            )
        if int(value) in values:
            raise UserError(f"--labels {text}: the value {value} is named twice")
        values[int(value)] = classes[name.casefold()]
    if absent := [name for number, name in enumerate(dataset.class_names) if number not in values.values()]:
        print(f"warning: --labels name no value for {', '.join(absent)}: compared with an empty truth")
    return values
