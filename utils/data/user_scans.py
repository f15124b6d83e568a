"""Scans of one's own: images paired with their masks by the names that people give them, or by a table."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.dataset import Case, DatasetInfo, RawDataset, label_values
from utils.data.volume import PROGRAM, frame_count, frame_slices, read_header, read_volume, whole_numbers
from utils.errors import UserError
from utils.files import file_stem, nifti_files, read_table

# A name as ours, public data sets and tools give it: the patient, then the view, phase, channel and kind of a map.
NAME = re.compile(
    r"""(?P<patient>.*?)
    ((^|[-_])(sa|4d|cine))*
    ((^|[-_])(frame[-_]?(?P<frame>\d+)|(?P<phase>ED|ES)))?
    ((^|[-_])(image|img)|(?P<channel>(^|[-_])000\d))?
    ((^|[-_])(?P<kind>(label-\w+_|gm_)?
        (gmseg|dseg|gt|labels?|seg|mask|manual|confidence|agreement)([-_]?manual)?)(?P<rater>-r\d+)?)?""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)


class ScanName(NamedTuple):
    """What a file's name says; an image and its mask agree in patient and phase."""

    patient: str  # the folder's name where the file's is empty: patient_1/ED.nii.gz
    phase: str  # "ED", "ES" or "frameNN", else ""
    kind: str  # ending of a label map, or of another map of ours, such as "gt"; "" of an image
    rater: str


def scan_name(path: Path, channels: str = "0") -> ScanName:
    """Read a scan's name; an ending _000N is a channel if N is among `channels`, else part of the patient's name."""
    part = NAME.fullmatch(file_stem(path)).groupdict("")
    number = "" if part["channel"][-1:] in channels else part["channel"]
    phase = f"frame{int(part['frame']):02d}" if part["frame"] else part["phase"].upper()
    patient = _plain(part["patient"] + number or path.absolute().parent.name)
    return ScanName(patient, phase, part["kind"].casefold(), part["rater"])


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text).lstrip(".")  # as part of a file's name


def with_unlabeled(folders: Sequence[Path], dataset: DatasetInfo) -> DatasetInfo:
    """Return the data set with every scan in `folders` as a patient without masks; a folder is a domain of its own."""
    return replace(dataset, find_cases=partial(_find_with_unlabeled, dataset, tuple(folders)))


def labeled(images: Sequence[Path], masks: Sequence[Path], labels: Sequence[str], dataset: DatasetInfo) -> DatasetInfo:
    """Return a data set of the user's labelled scans alone; UserError for `labels` that name no structure.

    `images` and `masks` are files and folders; or `images` is one table (CSV or XLSX): image, truth and, if known,
    patient, phase. `labels` say what the masks' values mean, as "1=RV", where they are not those of the data set.
    """
    dataset = replace(dataset, label_values=label_values(labels, dataset.class_names) if labels else None)
    return replace(dataset, find_cases=partial(_find_labeled, tuple(images), tuple(masks), dataset))


def _find_with_unlabeled(dataset: DatasetInfo, folders: tuple[Path, ...], raw: Path) -> RawDataset:
    known, cases, errors = dataset.find_cases(raw), [], []
    for folder in folders:
        domain = _plain(folder.resolve().name)
        scans = {path: scan_name(path)[:2] for path in nifti_files([folder]) if not scan_name(path).kind}
        if domain in {*dataset.domains, *(case.domain for case in cases)}:
            errors.append(f"{folder}: there is a {dataset.domain_kind} {domain} already: rename the folder")
        if not scans:
            errors.append(f"{folder}: no .nii or .nii.gz scan in it (subfolders are not searched)")
        taken, counts = {case.patient for case in [*known.cases, *cases]}, Counter(scans.values())
        for path, (patient, phase) in scans.items():
            if patient in taken or counts[patient, phase] > 1:
                errors.append(f"{path}: there is a patient {patient} already: rename it")
            cases.append(Case(patient, domain, domain, path, (), {}, own=True))
    return RawDataset(known.cases + cases, known.errors + errors, known.warnings)


def _find_labeled(images: tuple[Path, ...], masks: tuple[Path, ...], dataset: DatasetInfo, _raw: Path) -> RawDataset:
    is_table = len(images) == 1 and images[0].suffix.lower() in (".csv", ".xlsx")
    cases, errors, warnings = _read_pairs(images[0]) if is_table else _pair(images, masks, bool(dataset.consensus))
    if not cases and not errors:
        errors.append(f"no .nii or .nii.gz scan in {', '.join(map(str, images))}")
    for number, case in enumerate(cases):
        try:
            cases[number] = case._replace(phases=_labeled_frames(case))
        except UserError as error:
            errors.append(str(error))
    cases = _name_phases(cases, dataset, warnings)
    times = Counter(f"{case.patient} {phase}" for case in cases for phase in case.phases)
    errors += [f"several scans are called {name}: tell them apart in a table" for name, n in times.items() if n > 1]
    return RawDataset(cases, errors, warnings)


def _pair(inputs: Sequence[Path], truths: Sequence[Path], raters: bool) -> tuple[list[Case], list[str], list[str]]:
    """Pair images and masks, maybe of several raters, by name; return pairs, errors, and what is left out."""
    given, truth = nifti_files(inputs, deep=True), nifti_files(truths, deep=True)
    stems, truth_within, maps = {file_stem(path) for path in given}, {*truth} < {*given}, {}
    for path in truth:  # what is given as both is a mask where its folder, or its name, says so
        if truth_within or path not in given or scan_name(path).kind or f"{file_stem(path)}_0000" in stems:
            maps[path] = scan_name(path, channels="")
    masks = {path: name for path, name in maps.items() if not _is_ours(path)}
    warnings = [f"{path}: left out: a map that this program made is no truth" for path in maps if path not in masks]
    keys = {name[:2] for name in masks.values()}
    images: dict[tuple[str, str], list[Path]] = defaultdict(list)  # by patient and phase
    for path in (path for path in given if path not in maps and not scan_name(path).kind):
        exact, first, further = (scan_name(path, channels)[:2] for channels in ("", "0", "0123456789"))
        key = exact if exact in keys else first  # the exact name goes first: a number may be a patient's
        if key not in keys and (further in keys or (not key[1] and key[0] in dict(keys))):
            warnings.append(f"{path}: left out: a further channel, or all frames, of a scan that has a mask")
        else:
            images[key].append(path)
    # One evaluation takes one kind of mask, grey matter first: that of another kind may show another structure.
    paired = [mask for mask, name in masks.items() if name[:2] in images]
    model = min(paired, key=lambda mask: ("gm" not in masks[mask].kind, masks[mask].kind), default=None)
    masks_of, errors = defaultdict(list), []
    for mask, name in masks.items():
        # Of images that share a name it belongs to the one in the most similar folder, from the innermost.
        same = images.get(name[:2], [])
        alike = [len(os.path.commonprefix([path.parts[-2::-1], mask.parts[-2::-1]])) for path in same]  # noqa: RUF071
        nearest = [path for path, count in zip(same, alike, strict=True) if count == max(alike)]
        if model and name.kind != masks[model].kind:
            warnings.append(f"{mask}: left out: it is not of the kind of {model}")
        elif len(nearest) == 1:
            masks_of[nearest[0]].append(mask)
        else:
            errors.append(f"{mask}: a mask without its image" + "".join(f", or that of {path}" for path in nearest))
    cases, domain = [], _plain(inputs[0].resolve().name)
    shared = {patient for (patient, _), paths in images.items() if len(paths) > 1}  # told apart by their folders
    top = os.path.commonpath([path.absolute().parent for paths in images.values() for path in paths] or [""])
    for (patient, phase), path in [(key, path) for key, paths in images.items() for path in paths]:
        several = masks_of[path]
        if not several:
            kind = f" and of the kind of {model.name}" if model else ""
            errors.append(f"{path}: no mask of that name{kind}: leave it out, or name the pairs in a table")
        elif len(several) > 1 and not (raters and all(masks[mask].rater for mask in several)):
            errors.append(f"{path}: several masks, name one in a table: {', '.join(map(str, several))}")
        else:
            folder = "_".join(path.absolute().parent.relative_to(top).parts) if patient in shared else ""
            phases = {phase: 0} if phase else {}
            cases.append(Case(_plain(folder) or patient, domain, domain, path, tuple(several), phases, own=True))
    return cases, errors, warnings


def _is_ours(mask: Path) -> bool:
    with suppress(UserError):  # the scan's own check will say why
        return read_header(mask)[0]["descrip"].item().startswith(PROGRAM.encode())
    return False


def _read_pairs(path: Path) -> tuple[list[Case], list[str], list[str]]:
    """Read pairs from a table, whose paths are relative to it; return them, the files that are missing, and nothing."""
    columns, rows = read_table(path)
    if not {"image", "truth"} <= {name.casefold() for name in columns}:
        raise UserError(f"{path}: its columns are {', '.join(columns)}; expected image, truth (patient, phase)")
    domain, cases, errors = _plain(path.stem), [], []
    for row in rows:
        image, mask = (path.parent / row[name] for name in ("image", "truth"))
        missing, name = [file for file in (image, mask) if not file.is_file()], scan_name(image)
        errors += [f"{path}: {file}: no such file" for file in missing]
        patient, phase = _plain(row["patient"]) or name.patient, _plain(row["phase"]) or name.phase
        phases = {phase.upper() if phase.upper() in ("ED", "ES") else phase: 0} if phase else {}
        cases += [] if missing else [Case(patient, domain, domain, image, (mask,), phases, own=True)]
    return cases, errors, []


def _labeled_frames(case: Case) -> dict[str, int]:
    """Return the labelled frames by name: of a 3D mask what the file's name or the table says, of a 4D mask all."""
    mask = case.masks[0]
    if len(read_header(mask)[1]) == 3:
        return case.phases or {"scan": 0}
    volume = whole_numbers(read_volume(mask))
    frames = {f"frame{n:02d}": n for n in range(frame_count(volume)) if volume.array[..., n].any()}
    if not frames or case.phases:
        raise UserError(f"{mask}: {'a phase is that of a 3D file' if frames else 'no frame has a label'}")
    return frames


def _name_phases(cases: list[Case], dataset: DatasetInfo, warnings: list[str]) -> list[Case]:
    """Call numbered frames ED and ES: by ACDC's Info.cfg, or of two frames by the size of the left ventricle."""
    frames: dict[str, list[tuple[Case, str]]] = defaultdict(list)
    for case in cases:
        frames[case.patient] += [(case, phase) for phase in case.phases if phase.startswith("frame")]
    names, cavity = {}, [value for value, label in (dataset.label_values or {1: 1}).items() if label == 1]
    for patient, numbered in frames.items():
        infos = {case.image.with_name("Info.cfg") for case, _ in numbered if scan_name(case.image).phase}
        text = "".join(info.read_text(errors="replace") for info in infos if info.is_file())
        if by_table := re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE):
            names |= {(patient, f"frame{int(frame):02d}"): phase for phase, frame in by_table}
        elif len(numbered) == 2 and dataset.clinical:
            with suppress(UserError):  # the scan's own check will say why
                masks = [frame_slices(read_volume(case.masks[0]), case.phases[phase]) for case, phase in numbered]
                first, second = (np.isin(np.rint(mask), cavity).sum() for mask in masks)
                phases = ("ED", "ES") if first >= second else ("ES", "ED")
                names |= {(patient, frame): phase for (_, frame), phase in zip(numbered, phases, strict=True)}
                warnings.append(f"{patient}: ED and ES have the larger and the smaller {dataset.class_names[1]}")
    named = ({names.get((case.patient, phase), phase): n for phase, n in case.phases.items()} for case in cases)
    return [case._replace(phases=phases) for case, phases in zip(cases, named, strict=True)]
