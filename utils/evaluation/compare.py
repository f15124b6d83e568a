"""Several runs in one table over held-out domains; methods compared by patient."""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import sha256
from itertools import chain, product, zip_longest
from pathlib import Path
from statistics import fmean, pstdev, stdev

from scipy.stats import wilcoxon

from config import FIELD_PX, RUNTIME_SETTINGS
from utils.data.dataset import DatasetInfo
from utils.data.prepared import NO_DOMAIN
from utils.errors import UserError
from utils.evaluation.metrics import METRICS, holm, mean_std_interval
from utils.evaluation.runs import is_other, method_name
from utils.evaluation.tables import MARKS, Cell, Table, count, to_csv, to_latex, to_markdown
from utils.files import OutputFolder
from utils.run.folder import DEFAULTS

FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
COMPARISON_FILES = [f"{n}.{f}" for n in ("leave_one_domain_out", "comparison") for f in FORMATS]
VARYING = {"seed", "test_domain", "init_from"}  # in which the runs of a row may differ
METHOD_SETTINGS = {"cps_loss", "fourier_aug", "fourier_mode", "cutmix"}  # named by the method
SELECTION_NOTE = "Published checkpoints may be chosen on the held-out domain; ours never are."
Runs = dict[str, list[dict]]  # one method's summary.json in order of seeds, by held-out domain


def name_rows(
    folders: Sequence[Path], metadata: Sequence[dict], labels: Sequence[str], *, same_data: bool
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
        if values["test_domain"] == NO_DOMAIN:
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
    texts, hidden = [], RUNTIME_SETTINGS | METHOD_SETTINGS | {"seed", "test_domain"}
    for values in settings:
        idle = () if values["cps_weight"] else ("cps_", "fourier_")  # without effect
        shown = sorted(key for key in values.keys() - hidden if not key.startswith(idle))
        texts.append({key: f"{key} {values[key]}".removesuffix(".0") for key in shown})
    choices = Counter(key for key, _ in set().union(*(text.items() for text in texts)))
    named = [[text for key, text in each.items() if choices[key] > 1] for each in texts]
    return [", ".join([method, *each]) for method, each in zip(methods, named, strict=True)]


def published_rows(dataset: str, ratio: float) -> tuple[list[list], str]:
    """Return the rows published for a ratio, and a note on later ones."""
    rows, note = [], ""
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if (line["dataset"], float(line["ratio"])) == (dataset, ratio):
                numbers = zip_longest(line["dice"].split(), line["std"].split())
                cells = [Cell(float(dice), float(std) if std else None) for dice, std in numbers]
                rows.append([line["method"], *cells, Cell(float(line["average"]))])
                note += line["note"]
    return rows, note


def by_method(summaries: Sequence[dict], names: Sequence[str], dataset: DatasetInfo) -> dict[str, Runs]:
    """Return summaries by rows' names and held-out domain, in order of seeds."""
    methods: dict[str, Runs] = {name: {domain: [] for domain in dataset.domains} for name in names}
    for name, summary in sorted(zip(names, summaries, strict=True), key=lambda one: one[1]["seed"]):
        methods[name][summary["test_domain"]].append(summary)
    return methods


def leave_one_domain_out(methods: dict[str, Runs], dataset: DatasetInfo) -> list[Table]:
    """Return a table by the paper's protocol, with published rows, and one per structure."""
    summaries = [summary for runs in methods.values() for summary in chain(*runs.values())]
    ratio, data = summaries[0]["ratio"], summaries[0]["data"]
    checkpoints = {f"{s['checkpoint'].split(',')[0]}, selection: {s['selection']}" for s in summaries}
    setting = (
        f"{dataset.name}, data {data}, each {dataset.domain_kind} held out in turn, "
        f"{100 * ratio:g} % labelled. Mean ± SD over patients, of several seeds over their means; "
        f"average ± population SD of the means. Checkpoint: {'; '.join(sorted(checkpoints))}."
    )
    sources = [_sources(*item) for item in methods.items()]
    header = ["", *dataset.domains, "average"]
    rows = [[f"this implementation, {name}", *_cells(runs, "paper_protocol", "mean", "std")]
            for name, runs in methods.items()]  # fmt: skip
    notes = [f"Dice (%), structures pooled per slice, {FIELD_PX} px grid. {setting}", *sources]
    published, later = published_rows(dataset.key, ratio)
    if published:
        rows += published
        notes += [*_not_comparable(methods), SELECTION_NOTE, later]
    tables = [Table("Paper protocol", header, rows, notes)]
    notes = [f"In the scans' own grid; a miss: Dice 0, distances of the diagonal. {setting}", *sources]
    for structure in summaries[0]["volumetric"]:
        rows = [[f"{title}, {name}", *_cells(runs, "volumetric", key, f"{key}_std", structure)]
                for (key, title), (name, runs) in product(METRICS.items(), methods.items())]  # fmt: skip
        tables.append(Table(f"Volumetric, {structure}", header, rows, notes))
    return tables


def _cells(runs: Runs, kind: str, mean: str, std: str, structure: str = "") -> list[Cell]:
    """Return a cell per domain and their average, of two keys of figures."""
    cells = []
    for seeds in runs.values():
        figures = [summary[kind][structure] if structure else summary[kind] for summary in seeds]
        numbers = [Cell(each[mean], each[std]) for each in figures]
        cells.append(numbers[0] if len(numbers) == 1 else _average(numbers, stdev, "seed"))
    return [*cells, _average(cells, pstdev, "domain")]


def _average(cells: Sequence[Cell], deviation, noun: str) -> Cell:
    """Return mean and deviation of the known means; remark their number where it is not plain."""
    known = [cell.mean for cell in cells if cell.mean is not None]
    remark = count(len(known), noun) if noun == "seed" or len(known) < len(cells) else ""
    spread = deviation(known) if len(known) > 1 else None
    return Cell(fmean(known) if known else None, spread, remark=remark)


def _sources(method: str, runs: Runs) -> str:
    runs = list(chain(*runs.values()))
    sources = [f"{s['test_domain']} seed {s['seed']}{s['unfinished']}, n = {s['patients']}" for s in runs]
    first, *others = [run["settings"] for run in runs]
    differ = [k for k in sorted(first.keys() - VARYING) if any(s[k] != first[k] for s in others)]
    text = f"Runs, {method}: {'; '.join(sources)}."
    return f"{text} They differ in {', '.join(differ)}." if differ else text


def _not_comparable(methods: dict[str, Runs]) -> list[str]:
    """Say in a note which methods cannot stand beside published ones, and why."""
    texts = []
    for method, runs in methods.items():
        summaries = list(chain(*runs.values()))
        reasons = [text for key, text in MARKS.items() if any(s[key] for s in summaries)]
        reasons += {"data not its training's" for s in summaries if is_other(s["trained_by"], s)}
        reasons += sorted({s["method"] for s in summaries} - {"full"})
        reasons += [f"{px} px" for px in sorted({s["image_size"] for s in summaries} - {FIELD_PX})]
        if reasons:
            texts.append(f"{method} ({', '.join(reasons)})")
    return [f"Not comparable with the published rows: {'; '.join(texts)}."] if texts else []


def compare_methods(methods: dict[str, Runs]) -> Table:
    """Compare methods with the first, by domain and patient; the last notes are warnings."""
    reference, *others = methods
    dice = {method: _patient_dice(runs) for method, runs in methods.items()}
    rows, warnings = [], []
    for domain in [*methods[reference], "all"]:
        differences = {}  # by patient, in points of Dice
        for method in others:
            ours, theirs = dice[method], dice[reference]
            both = [key for key in ours.keys() & theirs.keys() if domain in (key[0], "all")]
            if both or domain == "all":
                differences[method] = sorted(ours[key] - theirs[key] for key in both)
        # Without zeros, which the versions of scipy treat differently.
        unequal = [[value for value in values if value] for values in differences.values()]
        p_values = [wilcoxon(values).pvalue if values else 1.0 for values in unequal]
        for n, (method, values) in enumerate(differences.items()):
            row, mean = f"{method}, {domain}", Cell(**mean_std_interval(values))._replace(std=None)
            rows.append([row, len(values), mean, f"{p_values[n]:.3g}", f"{holm(p_values)[n]:.3g}"])
            if len(unequal[n]) < 6:  # the test's least p is 2 / 2^number
                differ = count(len(unequal[n]), "patient")
                warnings.append(f"{row}: {differ} differ, too few for p < 0.05.")
            ours, theirs = (methods[name].get(domain, []) for name in (method, reference))
            ours, theirs = ([(s["seed"], {*s["paper_dice"]}) for s in seeds] for seeds in (ours, theirs))
            if ours != theirs:
                warnings.append(f"{row}: other seeds or patients than {reference}.")
    note = (
        f"Mean difference from {reference} in points of the paper's Dice, paired by patient (mean over "
        "seeds) [95 % bootstrap interval]; two-sided Wilcoxon signed-rank p, and by Holm over methods."
    )
    header = ["", "patients", "difference", "p", "p (Holm)"]
    return Table("Comparison", header, rows, [note, *(f"Warning: {text}" for text in warnings)])


def _patient_dice(runs: Runs) -> dict[tuple[str, str], float]:
    return {
        (domain, patient): fmean(run["paper_dice"][patient] for run in seeds)
        for domain, seeds in runs.items()
        for patient in (seeds[0]["paper_dice"] if seeds else ())
        if all(patient in run["paper_dice"] for run in seeds)
    }


def comparison_folder(parent: Path, names: Sequence[str], facts) -> Path:
    """Return the folder for tables over runs, named by their rows and a hash of `facts`."""
    title = re.sub(r"[^\w.]+", "-", "_vs_".join(dict.fromkeys(names)))[:80]
    digest = sha256(repr((facts, names)).encode()).hexdigest()
    return parent / "comparisons" / f"{title}_{digest[:6]}"


def write_comparison(methods: dict[str, Runs], dataset: DatasetInfo, folder: Path) -> None:
    """Write the tables and the methods' comparison; print the first of each."""
    outputs = OutputFolder(folder)
    written = {"leave_one_domain_out": leave_one_domain_out(methods, dataset)}
    if len(methods) > 1:
        written["comparison"] = [compare_methods(methods)]
    for name, tables in written.items():
        for suffix, text in FORMATS.items():
            outputs.claim(f"{name}.{suffix}").write_text(text(tables), encoding="utf-8")
        print(f"\n{to_markdown(tables[:1])}")
    print(f"tables in {folder}: {', '.join(written)} as .md, .csv and .tex")
