"""Several runs in one table over held-out domains; methods compared by patient."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import sha256
from itertools import chain, product
from pathlib import Path
from statistics import fmean, pstdev, stdev

import numpy as np
from scipy.stats import wilcoxon

from config import FIELD_PX, ROBUST, RUNTIME_SETTINGS
from utils.data.dataset import DatasetInfo
from utils.data.prepared import NO_DOMAIN
from utils.errors import UserError
from utils.evaluation.metrics import METRICS, holm, mean_std_interval, two_level_interval
from utils.evaluation.runs import method_name
from utils.evaluation.tables import Cell, Table, count, incomparable, published_rows, to_csv, to_latex, to_markdown
from utils.files import OutputFolder
from utils.run.folder import DEFAULTS

FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
COMPARISON_FILES = [f"{n}.{f}" for n in ("leave_one_domain_out", "own_scans", "comparison") for f in FORMATS]
VARYING = {"seed", "test_domain", "init_from"}  # in which the runs of a row may differ
METHOD_SETTINGS = {"cps_loss", "fourier_aug", "fourier_mode", "cutmix"}  # named by the method
Runs = dict[str, list[dict]]  # one method's summary.json in order of trainings, by evaluated domain


def name_rows(
    folders: Sequence[Path], metadata: Sequence[dict], labels: Sequence[str], *, same_data: bool, own=False
) -> list[str]:
    """Return names of rows, by labels or methods and settings; UserError if runs do not fit."""
    settings = []
    for run in metadata:
        config, content = DEFAULTS | run["config"], run["content_hash"] or "unknown"
        settings.append(config | {"data": content[:8], "init_from": bool(config["init_from"])})
    names = list(labels) or _names_by_settings([method_name(run) for run in metadata], settings)
    if len(names) != len(folders):
        raise UserError(f"--label: {len(names)} names for {len(folders)} runs: give one per --run")
    problems, places = [], defaultdict(list)  # of method, domain and seed
    for folder, name, values in zip(folders, names, settings, strict=True):
        places[name, values["test_domain"], values["seed"]].append(str(folder))
        if values["test_domain"] == NO_DOMAIN and not own:
            problems.append(f"{folder} held out no domain: it has no place in the table")
    for key, remedy in {"ratio": "", "data": "; --data-root names data for all"}.items():
        if len({values[key] for values in settings}) > 1 and not (same_data and key == "data"):
            each = [f"{f}: {values[key]}" for f, values in zip(folders, settings, strict=True)]
            problems.append(f"one table takes one {key}, not {', '.join(each)}{remedy}")
    for same in places.values():
        if len(same) > 1:
            problems.append(f"{', '.join(same)}: one method, domain and seed: use --label")
    if problems:
        raise UserError("\n".join(problems))
    return names


def _names_by_settings(methods: Sequence[str], settings: Sequence[dict]) -> list[str]:
    """Return each run's method and the settings in which the runs differ."""
    texts, hidden = [], RUNTIME_SETTINGS | METHOD_SETTINGS | {"seed", "test_domain", "robust"}
    if len({tuple(values[key] for key in ROBUST) for values in settings}) == len({v["robust"] for v in settings}):
        hidden |= {*ROBUST}  # the name says it
    for values in settings:
        idle = () if values["cps_weight"] else ("cps_", "fourier_")  # without effect
        shown = sorted(key for key in values.keys() - hidden if not key.startswith(idle))
        texts.append({key: f"{key} {values[key]}".removesuffix(".0") for key in shown})
    choices = Counter(key for key, _ in set().union(*(text.items() for text in texts)))
    named = [[text for key, text in each.items() if choices[key] > 1] for each in texts]
    return [", ".join([method, *each]) for method, each in zip(methods, named, strict=True)]


def by_method(summaries: Sequence[dict], names: Sequence[str], dataset: DatasetInfo) -> dict[str, Runs]:
    """Return summaries by rows' names and evaluated domain, in order of seeds and held-out domains."""
    methods: dict[str, Runs] = {name: {domain: [] for domain in dataset.domains} for name in names}
    for name, summary in sorted(zip(names, summaries, strict=True), key=lambda one: _training(one[1])):
        methods[name][summary["test_domain"]].append(summary)
    return methods


def _training(summary: dict) -> tuple[int, str]:
    """Return what tells the trainings of one method apart; of two methods, those alike are paired."""
    return summary["seed"], summary["settings"]["test_domain"]


def leave_one_domain_out(methods: dict[str, Runs], dataset: DatasetInfo) -> list[Table]:
    """Return tables of the paper's and of the pooled Dice, each with its published rows, and one per structure.

    A data set of one domain, the user's scans, has no published rows.
    """
    summaries = [summary for runs in methods.values() for summary in chain(*runs.values())]
    ratio, data = summaries[0]["ratio"], summaries[0]["data"]
    checkpoints = {f"{s['checkpoint'].split(',')[0]}, selection: {s['selection']}" for s in summaries}
    several = len(dataset.domains) > 1
    turns = f"each {dataset.domain_kind} held out in turn, average ± population SD of the means"
    setting = (
        f"{dataset.name}, data {data}, {turns if several else 'own scans'}; {100 * ratio:g} % labelled. "
        f"Checkpoint: {'; '.join(sorted(checkpoints))}."
    )
    sources = [_sources(*item) for item in methods.items()]
    reasons = {name: dict.fromkeys(chain.from_iterable(map(incomparable, chain(*runs.values()))))
               for name, runs in methods.items()}  # fmt: skip
    marked = "; ".join(f"{name} ({', '.join(texts)})" for name, texts in reasons.items() if texts)
    header, tables = ["", *dataset.domains, *["average"] * several, "± over"], []
    for kind, title, note in (
        ("paper", "Paper protocol", "Dice (%), structures pooled per slice, mean per patient"),
        ("pooled", "Pooled over the list", "Dice (%) of sums over all slices, mean over structures"),
    ):
        published, notes = published_rows(dataset.key, ratio, kind) if several else ([], [])
        rows = [[f"this implementation, {name}", *_cells(runs, kind), "as noted"]
                for name, runs in methods.items()]  # fmt: skip
        rows += [[row.method, *(row.dice[d] for d in dataset.domains), row.average, row.over, row.chosen_on]
                 for row in published]  # fmt: skip
        notes += [f"Not comparable with published rows: {marked}."] if notes and marked else []
        notes = [f"{note}, {FIELD_PX} px grid. {setting}", *sources, *notes]
        tables.append(Table(title, [*header, "checkpoint chosen on"], rows, notes))
    notes = [f"In the scans' own grid; a miss: Dice 0, distances of the diagonal. {setting}", *sources]
    for structure in summaries[0]["volumetric"]:
        rows = [[f"{title}, {name}", *_cells(runs, key, structure)]
                for (key, title), (name, runs) in product(METRICS.items(), methods.items())]  # fmt: skip
        tables.append(Table(f"Volumetric, {structure}", header, rows, notes))
    return tables


def _cells(runs: Runs, kind: str, structure: str = "") -> list:
    """Return a cell per domain and their average, of a kind of Dice or a structure's metric, and what ± is over."""
    cells, over = [], set()
    for seeds in runs.values():
        numbers = [_figure(summary, kind, structure) for summary in seeds]
        noun = "seed" if len({summary["seed"] for summary in seeds}) == len(seeds) else "training"
        cells.append(numbers[0] if len(numbers) == 1 else _average(numbers, stdev, noun))
        over |= {f"{noun}s" if len(numbers) > 1 else "patients"} if cells[-1].std is not None else set()
    average = [_average(cells, pstdev, "domain")] if len(cells) > 1 else []
    return [*cells, *average, " or ".join(sorted(over)) or "–"]


def _figure(summary: dict, kind: str, structure: str) -> Cell:
    if structure:
        return Cell(summary["volumetric"][structure][kind], summary["volumetric"][structure][f"{kind}_std"])
    if kind == "pooled":
        return Cell(summary["pooled"]["mean"])
    return Cell(summary["paper_protocol"]["mean"], summary["paper_protocol"]["std"])


def _average(cells: Sequence[Cell], deviation, noun: str) -> Cell:
    """Return mean and deviation of the known means; remark their number where it is not plain."""
    known = [cell.mean for cell in cells if cell.mean is not None]
    remark = count(len(known), noun) if noun != "domain" or len(known) < len(cells) else ""
    spread = deviation(known) if len(known) > 1 else None
    return Cell(fmean(known) if known else None, spread, remark=remark)


def _sources(method: str, runs: Runs) -> str:
    runs = list(chain(*runs.values()))
    sources = [f"{s['settings']['test_domain']} seed {s['seed']}{s['unfinished']}, n = {s['patients']}, labelled "
               f"{s['labeled']}, {s['step']} steps" for s in runs]  # fmt: skip
    first, *others = [run["settings"] for run in runs]
    differ = [k for k in sorted(first.keys() - VARYING) if any(s[k] != first[k] for s in others)]
    text = f"Runs, {method}, pretrained {first['pretrained']}: {'; '.join(sources)}."
    return f"{text} They differ in {', '.join(differ)}." if differ else text


def compare_methods(methods: dict[str, Runs]) -> Table:
    """Compare methods with the first, by domain and patient; the last notes are warnings."""
    reference, *others = methods
    rows, warnings = [], []
    places = [*methods[reference]]
    for domain in [*places, "all"] if len(places) > 1 else places:
        domains, differences, by_seed = [domain] if domain != "all" else places, {}, {}
        for method in others:
            matrices = [_differences(methods[method].get(d, []), methods[reference].get(d, [])) for d in domains]
            by_seed[method] = [matrix for matrix in matrices if matrix.size]
            if by_seed[method] or domain == "all":  # by patient, in points of Dice
                differences[method] = sorted(chain.from_iterable(m.mean(0).tolist() for m in by_seed[method]))
        # Without zeros, which the versions of scipy treat differently.
        unequal = [[value for value in values if value] for values in differences.values()]
        p_values = [wilcoxon(values).pvalue if values else 1.0 for values in unequal]
        for n, (method, values) in enumerate(differences.items()):
            row, figures = f"{method}, {domain}", mean_std_interval(values)
            cells = Cell(figures["mean"], ci95=figures["ci95"]), f"{p_values[n]:.3g}", f"{holm(p_values)[n]:.3g}"
            rows.append([row, len(values), *cells, Cell(figures["std"]), *_over_seeds(by_seed[method])])
            if len(unequal[n]) < 6:  # the test's least p is 2 / 2^number
                differ = count(len(unequal[n]), "patient")
                warnings.append(f"{row}: {differ} differ, too few for p < 0.05.")
            ours, theirs = (methods[name].get(domain, []) for name in (method, reference))
            ours, theirs = ([(_training(s), {*s["paper_dice"]}) for s in seeds] for seeds in (ours, theirs))
            if ours != theirs:
                warnings.append(f"{row}: other trainings or patients than {reference}.")
    note = (
        f"Mean difference from {reference} in points of the paper's Dice, paired by patient (mean over trainings) "
        "[95 % bootstrap interval over patients]; two-sided Wilcoxon signed-rank p, and by Holm over methods. "
        "Of several trainings: the SD of their differences, and the interval over patients and trainings."
    )
    header = ["", "patients", "difference", "p", "p (Holm)", "SD of patients", "SD of trainings", "over both"]
    return Table("Comparison", header, rows, [note, *(f"Warning: {text}" for text in warnings)])


def _differences(ours: list[dict], theirs: list[dict]) -> np.ndarray:
    """Return differences (seeds, patients) of patients that all runs have; one row of means for unequal seeds."""
    runs = [summary["paper_dice"] for summary in (*ours, *theirs)]
    patients = sorted(set.intersection(*map(set, runs))) if ours and theirs else []
    first, second = (np.array([[s["paper_dice"][p] for p in patients] for s in seeds]) for seeds in (ours, theirs))
    if not patients or [*map(_training, ours)] == [*map(_training, theirs)]:
        return first - second if patients else np.empty((0, 0))
    return first.mean(0, keepdims=True) - second.mean(0, keepdims=True)


def _over_seeds(differences: list[np.ndarray]) -> tuple[Cell, Cell]:
    """Return the SD of the seeds' mean differences (mean over domains), and the mean with `two_level_interval`."""
    if not differences or min(map(len, differences)) < 2:
        return Cell(None), Cell(None)
    spread = fmean(float(matrix.mean(1).std(ddof=1)) for matrix in differences)
    mean = float(np.concatenate([matrix.mean(0) for matrix in differences]).mean())
    return Cell(spread), Cell(mean, ci95=two_level_interval(differences))


def comparison_folder(parent: Path, names: Sequence[str], facts) -> Path:
    """Return the folder for tables over runs, named by their rows and a hash of `facts`."""
    title = re.sub(r"[^\w.]+", "-", "_vs_".join(dict.fromkeys(names)))[:80]
    digest = sha256(repr((facts, names)).encode()).hexdigest()
    return parent / "comparisons" / f"{title}_{digest[:6]}"


def write_comparison(methods: dict[str, Runs], dataset: DatasetInfo, folder: Path) -> None:
    """Write the tables and the methods' comparison; print the first of each."""
    outputs = OutputFolder(folder)
    name = "leave_one_domain_out" if len(dataset.domains) > 1 else "own_scans"
    written = {name: leave_one_domain_out(methods, dataset)}
    if len(methods) > 1:
        written["comparison"] = [compare_methods(methods)]
    for name, tables in written.items():
        for suffix, text in FORMATS.items():
            outputs.claim(f"{name}.{suffix}").write_text(text(tables), encoding="utf-8")
        print(f"\n{to_markdown(tables[:1])}")
    print(f"tables in {folder}: {', '.join(written)} as .md, .csv and .tex")
