"""The inference command: runs on the held-out domain, on new and on labelled scans."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from utils.data.dataset import DatasetInfo
from utils.data.loaders import usable_cores
from utils.data.prepare import prepare_dataset
from utils.data.prepared import PreparedData
from utils.data.user_scans import labeled
from utils.device import autocast_context, choose_device
from utils.errors import UserError, clear_errors, memory_errors
from utils.evaluation import compare
from utils.evaluation.evaluate import evaluate_run
from utils.evaluation.runs import CHECKPOINT, load_run, open_data, read_run
from utils.evaluation.segment import Center, segment_files
from utils.files import OutputFolder, folder_lock, require_writable


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """For the held-out domain, without --input."""

    data_root: Path | None = None  # Evaluate on these prepared data, not on the training's.
    out: Path | None = None  # Write here; by default into RUN/results/DOMAIN or "comparisons".


@dataclass(frozen=True, kw_only=True)
class LabeledScans:
    """For labelled scans of one's own: --input IMAGES --truth MASKS, or --input TABLE.csv."""

    truth: tuple[Path, ...] = ()  # Evaluate the scans by these label maps, or folders of them.
    # Name the values in the truth, as 1=RV 2=MYO 3=LV; by default as in the data set.
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NewScans:
    """For new scans: --input without --truth."""

    overwrite: bool = False  # Replace label maps that are there already.
    volumes: bool = False  # Write volumes.csv, the clinical quantities of 4D scans of the heart.
    confidence: bool = False  # Write maps in [0, 1] of confidence exp(-V) and agreement, too.
    # Look around this voxel of a slice, not its centre; auto: around what the networks find.
    center: Center = None
    batch_size: int = 8  # Predict so many slices at a time (at least 1); fewer take less memory.


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Evaluate trained runs on the domains that their training never saw, or segment new scans."""

    # Load these folders of trained runs; of several, also write tables that compare them.
    run: tuple[Path, ...]
    # Name the rows of a table over runs, one name per --run; equal names share a row.
    label: tuple[str, ...] = ()
    input: tuple[Path, ...] = ()  # Read these NIfTI files or folders, or a table of such files.
    output: Path | None = None  # Write what comes of --input into this folder.
    checkpoint: str = "best"  # Load the best by source validation, the last, or epochs/epoch_007.
    tta: bool = False  # Average over 8 flips and rotations, in 8 times the time.
    keep_largest: bool = False  # Keep only the largest connected component of every structure.
    save_predictions: bool = False  # Write an evaluation's predictions, in their scans' own grids.
    device: str = "auto"  # Compute on "cpu", "cuda", "cuda:NUMBER", or (auto) a GPU if there is one.
    precision: Literal["auto", "bf16", "fp32"] = "fp32"  # Take auto for bf16 where it is faster.
    held_out: HeldOut = field(default_factory=HeldOut)
    labeled_scans: LabeledScans = field(default_factory=LabeledScans)
    new_scans: NewScans = field(default_factory=NewScans)


def run_inference(dataset: DatasetInfo, build_network: Callable) -> None:
    """Run what the command line asks for."""
    with clear_errors():
        flags = tyro.cli(Inference, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
        mode = flags.held_out
        if flags.input:
            is_table = [path.suffix.lower() for path in flags.input] in ([".csv"], [".xlsx"])
            is_labeled = flags.labeled_scans.truth or is_table
            mode = flags.labeled_scans if is_labeled else flags.new_scans
        check_flags(flags, mode, dataset)
        device = choose_device(flags.device)
        load = partial(
            load_run, checkpoint=flags.checkpoint, dataset=dataset, build_network=build_network,
            device=device, autocast=partial(autocast_context, device, flags.precision), tta=flags.tta,
        )  # fmt: skip
        if mode is flags.new_scans:
            options = vars(mode) | {"keep_largest": flags.keep_largest}
            with folder_lock(flags.output):
                segment_files(load(flags.run[0]), dataset, flags.input, flags.output, **options)
        else:
            evaluate_runs(load, dataset, flags)


def check_flags(flags: Inference, mode, dataset: DatasetInfo) -> None:
    """Raise UserError that names all flags that do not belong together."""
    runs, new_scans = flags.run, flags.new_scans
    groups, names = (flags.held_out, flags.labeled_scans, new_scans), {path.resolve().name for path in runs}
    mistakes = {
        "--run takes runs, each once": not 0 < len({*map(Path.resolve, runs)}) == len(runs),
        "--input and --output belong together": bool(flags.input) != bool(flags.output),
        "--input without --truth takes one --run": mode is new_scans and len(runs) > 1,
        "--input takes runs of different names": flags.input and len(names) < len(runs),
        "--label names rows of a table over several --run": flags.label and len(runs) < 2,
        "--checkpoint: best, last or as epochs/epoch_007": not CHECKPOINT.fullmatch(flags.checkpoint),
        f"--volumes: {dataset.name} has none": new_scans.volumes and not dataset.clinical,
        f"--batch-size {new_scans.batch_size}: at least 1 slice": new_scans.batch_size < 1,
    }
    for group in groups:
        for flag in fields(group):
            rule = f"--{flag.name.replace('_', '-')}: {group.__doc__}"
            mistakes[rule] = group is not mode and getattr(group, flag.name) != flag.default
    if made := [mistake for mistake, is_made in mistakes.items() if is_made]:
        raise UserError("\n".join(made))


def evaluate_runs(load: Callable, dataset: DatasetInfo, flags: Inference) -> None:
    """Evaluate runs on the domains that they held out, or on the user's scans; of several, write tables, too."""
    folders, root, out = flags.run, flags.held_out.data_root, flags.held_out.out or flags.output
    several, summaries = len(folders) > 1, []
    metadata = [read_run(folder, flags.checkpoint, dataset)[1] for folder in folders]
    if several:
        options = {"same_data": bool(root or flags.input), "own": bool(flags.input)}
        names = compare.name_rows(folders, metadata, flags.label, **options)
        facts = (sorted(map(str, folders)), flags.checkpoint, flags.tta, flags.keep_largest, root)
        tables_at = out or compare.comparison_folder(folders[0].parent, names, facts)
        OutputFolder(tables_at).require_free(*compare.COMPARISON_FILES)
        require_writable(tables_at, "--out or --output")
    with own_scans(dataset, flags) if flags.input else nullcontext((dataset, None)) as (dataset, own):
        for folder in folders:
            run = load(folder)
            if own:
                data, title = own, f"{dataset.name}, own scans"
                domain, results = dataset.domains[0], out / folder.resolve().name
            else:
                data, name, title = open_data(run, root, dataset)
                domain, results = run.config.test_domain, folder / "results" / name
            options = {"domain": domain, "title": title, "labels": flags.labeled_scans.labels}
            options |= {name: getattr(flags, name) for name in ("save_predictions", "keep_largest")}
            results = out if out and not several else results
            with memory_errors(folder):
                summaries.append(evaluate_run(run, dataset, data, results, **options))
    if several:
        compare.write_comparison(compare.by_method(summaries, names, dataset), dataset, tables_at)


@contextmanager
def own_scans(dataset: DatasetInfo, flags: Inference) -> Iterator[tuple[DatasetInfo, PreparedData]]:
    """Prepare the user's labelled scans, and yield them as a data set of one domain."""
    source, scans = flags.input[0], flags.labeled_scans
    dataset = labeled(flags.input, scans.truth, scans.labels, dataset)
    with tempfile.TemporaryDirectory(prefix="semidg_") as folder, memory_errors(source):
        raw, prepared = source if source.is_dir() else source.parent, Path(folder) / source.resolve().name
        prepare_dataset(raw, prepared, dataset, workers=usable_cores())
        data = PreparedData.open(prepared, dataset)
        yield replace(dataset, domains=(data.index["domain"][0],)), data
