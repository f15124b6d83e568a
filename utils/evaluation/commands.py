"""The inference command: runs on the held-out domain, on new and on labelled scans."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
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
from utils.evaluation.runs import CHECKPOINT, TrainedRun, load_run, open_data, read_run
from utils.evaluation.segment import Center, segment_files
from utils.files import OutputFolder, folder_lock, require_writable


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """For the held-out domain, without --input."""

    data_root: Path | None = None  # Evaluate on these prepared data, not on the training's.
    out: Path | None = None  # Write here; by default into RUN/results/DOMAIN or "comparisons".
    # Name the rows of a table over runs, one name per --run; equal names share a row.
    label: tuple[str, ...] = ()


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
        if mode is flags.held_out:
            evaluate_runs(load, dataset, flags)
        elif mode is flags.labeled_scans:
            evaluate_user_scans(load(flags.run[0]), dataset, flags)
        else:
            options = vars(mode) | {"keep_largest": flags.keep_largest}
            with folder_lock(flags.output):
                segment_files(load(flags.run[0]), dataset, flags.input, flags.output, **options)


def check_flags(flags: Inference, mode, dataset: DatasetInfo) -> None:
    """Raise UserError that names all flags that do not belong together."""
    runs, groups = flags.run, (flags.held_out, flags.labeled_scans, flags.new_scans)
    held_out, _, new_scans = groups
    mistakes = {
        "--run takes runs, each once": not 0 < len({*map(Path.resolve, runs)}) == len(runs),
        "--input and --output belong together": bool(flags.input) != bool(flags.output),
        "--input takes one --run": flags.input and len(runs) > 1,
        "--label names rows of a table over several --run": held_out.label and len(runs) < 2,
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
    """Evaluate runs on their held-out domains; of several, write tables, too."""
    folders, root, out = flags.run, flags.held_out.data_root, flags.held_out.out
    several = len(folders) > 1
    if several:
        metadata = [read_run(folder, flags.checkpoint, dataset)[1] for folder in folders]
        names = compare.name_rows(folders, metadata, flags.held_out.label, same_data=root is not None)
        facts = (sorted(map(str, folders)), flags.checkpoint, flags.tta, flags.keep_largest, root)
        tables_at = out or compare.comparison_folder(folders[0].parent, names, facts)
        OutputFolder(tables_at).require_free(*compare.COMPARISON_FILES)
        require_writable(tables_at, "--out")
    summaries = []
    for folder in folders:
        run = load(folder)
        data, name, title = open_data(run, root, dataset)
        results = out if out and not several else folder / "results" / name
        options = {"domain": run.config.test_domain, "title": title}
        with memory_errors(folder):
            summaries.append(evaluate_run(run, dataset, data, results, **options, **_common(flags)))
    if several:
        compare.write_comparison(compare.by_method(summaries, names, dataset), dataset, tables_at)


def evaluate_user_scans(run: TrainedRun, dataset: DatasetInfo, flags: Inference) -> None:
    """Evaluate a run on the user's labelled scans, prepared as a data set."""
    source, scans = flags.input[0], flags.labeled_scans
    dataset = labeled(flags.input, scans.truth, scans.labels, dataset)
    with tempfile.TemporaryDirectory(prefix="semidg_") as folder, memory_errors(source):
        raw, prepared = source if source.is_dir() else source.parent, Path(folder) / source.resolve().name
        prepare_dataset(raw, prepared, dataset, workers=usable_cores())
        data = PreparedData.open(prepared, dataset)
        options = {"domain": data.index["domain"][0], "title": f"{dataset.name}, own scans"}
        options |= {"labels": scans.labels, **_common(flags)}
        evaluate_run(run, dataset, data, flags.output, **options)


def _common(flags: Inference) -> dict[str, bool]:
    return {name: getattr(flags, name) for name in ("save_predictions", "keep_largest")}
