"""The inference command: runs on the held-out domain, on new and on labelled scans."""

import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from torch import nn

from utils.data.dataset import DatasetInfo
from utils.data.loaders import usable_cores
from utils.data.prepare import prepare_dataset
from utils.data.prepared import PreparedData
from utils.data.user_scans import labeled
from utils.device import autocast_context, choose_device
from utils.errors import UserError, clear_errors, memory_errors
from utils.evaluation.compare import COMPARISON_FILES, by_method, comparison_folder, name_rows, write_comparison
from utils.evaluation.evaluate import evaluate_run
from utils.evaluation.runs import CHECKPOINT, TrainedRun, load_run, open_data, read_run
from utils.evaluation.segment import segment_files
from utils.files import OutputFolder


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Without --input, every run is evaluated on the domain that its training never saw.

    Args:
        data_root: Evaluate on the prepared data in this folder; by default on the data of the
            training.
        out: Write the results into this folder; by default into RUN/results/DOMAIN, and the table
            over several runs into a folder in "comparisons", beside the runs, that is named by what
            is compared.
        label: Name the rows of the table over several runs, one name for each --run; by default
            their methods and the settings in which they differ. Runs of one name are the seeds and
            domains of one row.
        save_predictions: Write every prediction of an evaluation, also of --truth, as a NIfTI label
            map in its scan's own grid.
    """

    data_root: Path | None = None
    out: Path | None = None
    label: tuple[str, ...] = ()
    save_predictions: bool = False


@dataclass(frozen=True, kw_only=True)
class OwnScans:
    """With --input, one run segments new scans; with --truth as well, it is evaluated on them.

    Args:
        input: Read these scans: 3D or 4D NIfTI files, or folders of them; or, for labelled scans,
            one CSV file with the columns image, truth and, if known, patient, phase and group.
        output: Write the label maps of new scans, or the results on labelled ones, into this
            folder.
        truth: Evaluate the scans in --input by these label maps, or folders of them.
        labels: Say what the values in the truth mean, as 1=RV 2=MYO 3=LV; by default they are those
            of the data set.
        overwrite: Replace label maps of new scans that are in the output folder already.
        volumes: Write volumes.csv, the clinical quantities of new 4D scans of the heart; ED and ES
            are the frames with the largest and the smallest left ventricle.
        confidence: Write two maps in [0, 1] beside each label map: the confidence exp(-V), and the
            networks' agreement.
        center: Look at the organ around this voxel of the two axes of a slice, counted from 0;
            "auto" lets the networks find it, in up to twice the time; by default the image's centre
            is taken.
        batch_size: Predict this many slices of new scans at a time, at least 1; fewer take less
            memory.
    """

    input: tuple[Path, ...] = ()
    output: Path | None = None
    truth: tuple[Path, ...] = ()
    labels: tuple[str, ...] = ()
    overwrite: bool = False
    volumes: bool = False
    confidence: bool = False
    center: tuple[float, float] | Literal["auto"] | None = None
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Evaluate trained runs on the domains that their training never saw, or segment new scans.

    Args:
        run: Load these folders of trained runs; several also give one table over their held-out
            domains, and several methods a comparison with the method of the first.
        checkpoint: Load these weights: "best" by source validation, "last" of the training, or a
            kept epoch, as epochs/epoch_007.
        tta: Average the prediction over the 8 flips and right-angle rotations, in 8 times the time.
        keep_largest: Keep only the largest connected component of every structure, in the scan's
            own grid.
        device: Compute on "cpu", "cuda", "cuda:NUMBER", or with "auto" on a GPU where there is one.
        precision: Compute in float32 ("fp32"), by bf16 autocast ("bf16"), or with "auto" in bf16
            where it is faster.
    """

    run: tuple[Path, ...]
    checkpoint: str = "best"
    tta: bool = False
    keep_largest: bool = False
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    held_out: HeldOut = field(default_factory=HeldOut)
    own_scans: OwnScans = field(default_factory=OwnScans)


def run_inference(dataset: DatasetInfo, build_network: Callable[..., nn.Module]) -> None:
    """Run what the command line asks for."""
    with clear_errors():
        flags = tyro.cli(Inference, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
        scans = flags.own_scans
        is_labeled = bool(scans.truth) or [path.suffix.lower() for path in scans.input] == [".csv"]
        check_flags(flags, dataset, is_labeled)
        device = choose_device(flags.device)
        load = partial(
            load_run, checkpoint=flags.checkpoint, dataset=dataset, build_network=build_network, device=device,
            autocast=partial(autocast_context, device, flags.precision), tta=flags.tta,
        )  # fmt: skip
        if not scans.input:
            evaluate_runs(load, dataset, flags)
        elif is_labeled:
            evaluate_user_scans(load(flags.run[0]), dataset, flags)
        else:
            segment_files(
                load(flags.run[0]), dataset, scans.input, scans.output, overwrite=scans.overwrite,
                volumes=scans.volumes, confidence=scans.confidence, center=scans.center,
                keep_largest=flags.keep_largest, batch_size=scans.batch_size,
            )  # fmt: skip


def check_flags(flags: Inference, dataset: DatasetInfo, is_labeled: bool) -> None:
    """Raise UserError, naming every mistake, for flags that do not belong together.

    Args:
        is_labeled: --input is evaluated by its truth.
    """
    runs, scans, held_out = flags.run, flags.own_scans, flags.held_out
    for_new_scans = scans.center or scans.confidence or scans.volumes or scans.overwrite
    mistakes = {
        "--run names no run": not runs,
        "--run names a run twice": len({folder.resolve() for folder in runs}) < len(runs),
        f"--checkpoint {flags.checkpoint}: choose best, last or a kept epoch such as epochs/epoch_007": (
            not CHECKPOINT.fullmatch(flags.checkpoint)
        ),
        "--input and --output belong together: scans of your own, and the folder for what is written": (
            bool(scans.input) != bool(scans.output)
        ),
        "--input takes one --run": scans.input and len(runs) > 1,
        "--truth and --labels belong to --input: --input IMAGES --truth MASKS, or --input TABLE.csv": (
            (scans.truth or scans.labels) and not (scans.input and is_labeled)
        ),
        "--center, --confidence, --volumes and --overwrite are for new scans: --input names them, without --truth": (
            for_new_scans and (is_labeled or not scans.input)
        ),
        "--data-root and --out are for an evaluation on the held-out domain, without --input": (
            scans.input and (held_out.data_root or held_out.out)
        ),
        f"--volumes: {dataset.name} has no clinical quantities": scans.volumes and not dataset.clinical,
        "--label names the rows of a table over several --run": held_out.label and len(runs) < 2,
        f"--batch-size {scans.batch_size}: at least 1 slice at a time": scans.batch_size < 1,
    }
    if made := [mistake for mistake, is_made in mistakes.items() if is_made]:
        raise UserError("\n".join(made))


def evaluate_runs(load: Callable[[Path], TrainedRun], dataset: DatasetInfo, flags: Inference) -> None:
    """Evaluate runs on their held-out domains; of several, write the tables over them, too."""
    folders, root, out = flags.run, flags.held_out.data_root, flags.held_out.out
    several = len(folders) > 1
    if several:  # before the first of them is evaluated
        metadata = [read_run(folder, flags.checkpoint, dataset)[1] for folder in folders]
        names = name_rows(folders, metadata, dataset, labels=flags.held_out.label, one_data=root is not None)
        facts = (sorted(map(str, folders)), flags.checkpoint, flags.tta, flags.keep_largest, root)
        tables_at = out or comparison_folder(folders[0].parent, names, facts)
        OutputFolder(tables_at).require_free(*COMPARISON_FILES)
    summaries = []
    for folder in folders:
        run = load(folder)
        data, name, title = open_data(run, root, dataset)
        results = out if out and not several else folder / "results" / name
        with memory_errors(folder):
            summaries.append(evaluate_run(
                run, dataset, data, results, domain=run.config.test_domain, title=title,
                save_predictions=flags.held_out.save_predictions, keep_largest=flags.keep_largest,
            ))  # fmt: skip
    if several:
        write_comparison(by_method(summaries, names, dataset), dataset, tables_at)


def evaluate_user_scans(run: TrainedRun, dataset: DatasetInfo, flags: Inference) -> None:
    """Evaluate a run on the user's labelled scans, prepared as those of a data set are."""
    dataset = labeled(flags.own_scans.input, flags.own_scans.truth, flags.own_scans.labels, dataset)
    source = flags.own_scans.input[0]  # whose name the results bear
    with tempfile.TemporaryDirectory(prefix="semidg_") as folder, memory_errors(source):  # in the folder TMPDIR
        prepared, said = Path(folder) / source.resolve().name, io.StringIO()
        try:
            with redirect_stdout(said):
                raw = source if source.is_dir() else source.parent
                prepare_dataset(raw, prepared, dataset, workers=usable_cores())
        finally:
            print("\n".join(line for line in said.getvalue().splitlines() if folder not in line))
        data = PreparedData.open(prepared, dataset)
        evaluate_run(
            run, dataset, data, flags.own_scans.output, domain=str(data.index["domain"][0]),
            title=f"{dataset.name}, scans of one's own", save_predictions=flags.held_out.save_predictions,
            keep_largest=flags.keep_largest,
        )  # fmt: skip
