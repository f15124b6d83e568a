"""Scans of one's own: images paired with their masks by name, or by a table."""

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

# The patient, then the view, phase, channel and kind of a map, as public data sets and tools write.
NAME = re.compile(
    r"""(?P<patient>.*?)
    ((^|[-_])(sa|4d|cine))*
    ((^|[-_])(frame[-_]?(?P<frame>\d+)|(?P<phase>ED|ES)))?
    ((^|[-_])(sa|trans))*
    ((^|[-_])(image|img)|(?P<channel>(^|[-_])000\d))?
    ((^|[-_])(?P<kind>(label-\w+_|gm_)?
        (gmseg|dseg|gt|label(s|map)?|seg(mentation)?|mask|manual|confidence|agreement)([-_]?manual)?)(?P<rater>-r\d+)?)?""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)


class ScanName(NamedTuple):
    """What a file's name says; an image and its mask agree in patient and phase."""

    patient: str  # the folder's name where the file's is empty: patient_1/ED.nii.gz
    phase: str  # "ED", "ES" or "frameNN", else ""
    kind: str  # ending of a map, such as "gt"; "" of an image
    rater: str


def scan_name(path: Path, channels: str = "0") -> ScanName:
    """Read a name; an ending _000N is a channel if N is in `channels`, else part of the patient's."""
    part = NAME.fullmatch(file_stem(path)).groupdict("")
    number = "" if part["channel"][-1:] in channels else part["channel"]
    phase = f"frame{int(part['frame']):02d}" if part["frame"] else part["phase"].upper()
    patient = _plain(part["patient"] + number or path.absolute().parent.name)
    return ScanName(patient, phase, part["kind"].casefold(), part["rater"])


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text).lstrip(".")  # as part of a file's name


def with_unlabeled(folders: Sequence[Path], dataset: DatasetInfo) -> DatasetInfo:
    """Return the data set with the scans in `folders`, without masks; each folder is a domain."""
    return replace(dataset, find_cases=partial(_find_with_unlabeled, dataset, tuple(folders)))


def labeled(images: Sequence[Path], masks: Sequence[Path], labels: Sequence[str], dataset: DatasetInfo) -> DatasetInfo:
    """Return a data set of the user's labelled scans alone; UserError for `labels` of no structure.

    `images` and `masks` are files and folders, or `images` one table: image, truth (patient, phase).
    `labels` say what the masks' values mean, as "1=RV", where they are not those of the data set.
    """
    dataset = replace(dataset, label_values=label_values(labels, dataset.class_names) if labels else None)
    return replace(dataset, find_cases=partial(_find_labeled, tuple(images), tuple(masks), dataset))


def _find_with_unlabeled(dataset: DatasetInfo, folders: tuple[Path, ...], raw: Path) -> RawDataset:
    cases, errors, warnings = dataset.find_cases(raw)
    domains = {*dataset.domains}
    for folder in folders:
        domain, taken = _plain(folder.resolve().name), {case.patient for case in cases}
        scans = {path: scan_name(path)[:2] for path in nifti_files([folder]) if not scan_name(path).kind}
        counts = Counter(scans.values())
        if domain in domains:
            errors.append(f"{folder}: there is a {dataset.domain_kind} {domain} already: rename it")
        if not scans:
            errors.append(f"{folder}: no .nii or .nii.gz scan in it (subfolders are not searched)")
        for path, scan in scans.items():
            if scan[0] in taken or counts[scan] > 1:
                errors.append(f"{path}: there is a patient {scan[0]} already: rename it")
            cases.append(Case(scan[0], domain, domain, path, (), {}, own=True))
        domains.add(domain)
    return RawDataset(cases, errors, warnings)


def _find_labeled(images: tuple[Path, ...], masks: tuple[Path, ...], dataset: DatasetInfo, _raw: Path) -> RawDataset:
    is_table = len(images) == 1 and images[0].suffix.lower() in (".csv", ".xlsx")
    found = _read_pairs(images[0]) if is_table else _pair(images, masks, dataset)
    cases, errors, warnings = found
    if not cases and not errors:
        errors.append(f"no .nii or .nii.gz scan in {', '.join(map(str, images))}")
    for number, case in enumerate(cases):
        try:
            cases[number] = case._replace(phases=_labeled_frames(case))
        except UserError as error:
            errors.append(str(error))
    _name_phases(cases, dataset, warnings)
    times = Counter(f"{case.patient} {phase}" for case in cases for phase in case.phases)
    errors += [f"several scans are called {name}: name them in a table" for name, n in times.items() if n > 1]
    return found


def _pair(inputs: Sequence[Path], truths: Sequence[Path], dataset: DatasetInfo) -> RawDataset:
    """Pair images and masks by name; the warnings say what is left out."""
    given, truth = nifti_files(inputs, deep=True), nifti_files(truths, deep=True)
    stems, truth_within, maps = {file_stem(path) for path in given}, {*truth} < {*given}, {}
    for path in truth:  # what is given as both is a mask where its folder, or its name, says so
        if truth_within or path not in given or scan_name(path).kind or f"{file_stem(path)}_0000" in stems:
            maps[path] = scan_name(path, channels="")
    foreign = re.compile(rf"label-(?!({'|'.join(dataset.class_names[1:])})_)", re.IGNORECASE)
    long_axis = re.compile(r".*[-_]la" if dataset.clinical else r"(?!)", re.IGNORECASE)
    masks = {path: name for path, name in maps.items()
             if not (_is_ours(path) or foreign.match(name.kind) or long_axis.fullmatch(name.patient))}  # fmt: skip
    warnings = [f"{path}: left out: made by this program, of another structure or along the long axis"
                for path in maps if path not in masks]  # fmt: skip
    keys = {name[:2] for name in masks.values()}
    images: dict[tuple[str, str], list[Path]] = defaultdict(list)  # by patient and phase
    for path in (path for path in given if path not in maps and not scan_name(path).kind):
        exact, first, other = (scan_name(path, channels)[:2] for channels in ("", "0", "0123456789"))
        key = exact if exact in keys else first  # a number may be a patient's
        if long_axis.fullmatch(key[0]):
            warnings.append(f"{path}: left out: a long-axis view, by its name")
        elif key not in keys and (other in keys or (not key[1] and key[0] in dict(keys))):
            warnings.append(f"{path}: left out: a further channel, or all frames, of a paired scan")
        else:
            images[key].append(path)
    # One evaluation takes one kind of mask, grey matter first: another may show another structure.
    kinds = {name.kind for name in masks.values() if name[:2] in images}
    kind = min(kinds, key=lambda kind: ("gm" not in kind, "manual" not in kind, kind), default="")
    if kind.startswith("seg") and len(dataset.class_names) == 2:
        warnings.append(f"masks that end in {kind!r} are taken for {dataset.class_names[1]}: of the cord they are not")
    masks_of, errors = defaultdict(list), []
    for mask, name in masks.items():
        # Of images that share a name its own lies in the most similar folder, from the innermost.
        same = images.get(name[:2], [])
        alike = [len(os.path.commonprefix([path.parts[-2::-1], mask.parts[-2::-1]])) for path in same]  # noqa: RUF071
        nearest = [path for path, count in zip(same, alike, strict=True) if count == max(alike)]
        if kinds and name.kind != kind:
            warnings.append(f"{mask}: left out: its kind is not {kind!r}")
        elif len(nearest) == 1:
            masks_of[nearest[0]].append(mask)
        else:
            errors.append(f"{mask}: a mask without its image" + "".join(f", or that of {path}" for path in nearest))
    cases, domain = [], _plain(inputs[0].resolve().name)
    scans = [(*key, path) for key, paths in images.items() for path in paths]
    shared = {patient for (patient, _), paths in images.items() if len(paths) > 1}  # their folders tell them apart
    top = os.path.commonpath([path.absolute().parent for *_, path in scans] or [""])
    for patient, phase, path in scans:
        several = masks_of[path]
        if not several:
            of_kind = f" and of kind {kind!r}" if kind else ""
            errors.append(f"{path}: no mask of that name{of_kind}: leave it out, or name it in a table")
        elif len(several) > 1 and not (dataset.consensus and all(masks[mask].rater for mask in several)):
            errors.append(f"{path}: several masks, name one in a table: {', '.join(map(str, several))}")
        else:
            folder = "_".join(path.absolute().parent.relative_to(top).parts) if patient in shared else ""
            phases = {phase: 0} if phase else {}
            cases.append(Case(_plain(folder) or patient, domain, domain, path, tuple(several), phases, own=True))
    return RawDataset(cases, errors, warnings)


def _is_ours(mask: Path) -> bool:
    with suppress(UserError):  # the scan's own check will say why
        return read_header(mask)[0]["descrip"].item().startswith(PROGRAM.encode())
    return False


def _read_pairs(path: Path) -> RawDataset:
    """Read the pairs of a table, whose paths are relative to it."""
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
    return RawDataset(cases, errors, [])


def _labeled_frames(case: Case) -> dict[str, int]:
    """Return the labelled frames by name: all of a 4D mask; of a 3D mask what name or table say."""
    mask = case.masks[0]
    if len(read_header(mask)[1]) == 3:
        return case.phases or {"scan": 0}
    volume = whole_numbers(read_volume(mask))
    frames = {f"frame{n:02d}": n for n in range(frame_count(volume)) if volume.array[..., n].any()}
    if not frames or case.phases:
        raise UserError(f"{mask}: {'a phase is that of a 3D file' if frames else 'no frame has a label'}")
    return frames


def _name_phases(cases: list[Case], dataset: DatasetInfo, warnings: list[str]) -> None:
    """Call numbered frames ED and ES: by ACDC's Info.cfg, or of two frames by the size of the LV."""
    cavity = [value for value, label in (dataset.label_values or {1: 1}).items() if label == 1]
    frames: dict[str, list[tuple[Case, str]]] = defaultdict(list)
    for case in cases:
        frames[case.patient] += [(case, name) for name in case.phases if name.startswith("frame")]
    phase_of = {}  # by patient and frame
    for patient, numbered in frames.items():
        infos = {case.image.with_name("Info.cfg") for case, _ in numbered if scan_name(case.image).phase}
        text = "".join(info.read_text(errors="replace") for info in infos if info.is_file())
        if by_table := re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE):
            phase_of |= {(patient, f"frame{int(frame):02d}"): phase for phase, frame in by_table}
        elif len(numbered) == 2 and dataset.clinical:
            sizes = {}
            with suppress(UserError):  # the scan's own check will say why
                for case, name in numbered:
                    mask = frame_slices(read_volume(case.masks[0]), case.phases[name])
                    sizes[patient, name] = np.isin(np.rint(mask), cavity).sum()
                if len({*sizes.values()}) == 2:
                    phase_of |= zip(sorted(sizes, key=sizes.get, reverse=True), ("ED", "ES"), strict=True)
                    warnings.append(f"{patient}: ED and ES have the larger and the smaller LV")
    for number, case in enumerate(cases):
        phases = {phase_of.get((case.patient, name), name): n for name, n in case.phases.items()}
        cases[number] = case._replace(phases=phases)
