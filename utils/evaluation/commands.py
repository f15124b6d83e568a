"""Trained runs at work: evaluation on the held-out domain, one table over the domains, and new scans."""

import re
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import nn

from utils.data.dataset import DatasetInfo
from utils.data.loaders import usable_cores
from utils.data.prepare import prepare_dataset
from utils.data.prepared import PreparedData
from utils.data.user_scans import labeled
from utils.device import choose_device
from utils.errors import UserError, clear_errors, memory_errors
from utils.evaluation.comparison import compare_methods
from utils.evaluation.domains import Runs, by_method, leave_one_domain_out
from utils.evaluation.results import evaluate_run
from utils.evaluation.runs import TrainedRun, load_run, name_rows, open_data, runs_table
from utils.evaluation.runs import ensemble as mean_of
from utils.evaluation.segment import Segmenter, segment_files
from utils.evaluation.selection import selection_cost
from utils.evaluation.statistics_plots import plot_differences
from utils.evaluation.tables import to_csv, to_latex, to_markdown
from utils.files import OutputFolder

FORMATS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
COMPARISON_FILES = (
    *(f"{table}.{suffix}" for table in ("leave_one_domain_out", "comparison") for suffix in FORMATS),
    "comparison.png",
    "published.bib",
)


def run_inference(dataset: DatasetInfo, build_network: Callable[..., nn.Module]) -> None:
    """Run what the command line asks for."""

    def inference(
        run: tuple[Path, ...] = (),
        label: tuple[str, ...] = (),
        selection: bool = False,
        list_runs: Path | None = None,
        data_root: Path | None = None,
        checkpoint: Literal["best", "last"] = "best",
        save_predictions: bool = False,
        out: Path | None = None,
        input: tuple[Path, ...] = (),
        output: Path | None = None,
        truth: tuple[Path, ...] = (),
        labels: tuple[str, ...] = (),
        overwrite: bool = False,
        volumes: bool = False,
        confidence: bool = False,
        center: tuple[float, float] | Literal["auto"] | None = None,
        slice_axis: Literal[1, 2, 3] | None = None,
        ensemble: bool = False,
        tta: bool = False,
        keep_largest: bool = False,
        batch_size: int = 8,
        device: str = "auto",
        precision: Literal["auto", "bf16", "fp32"] = "fp32",
    ) -> None:
        """Evaluate trained runs on the domains that their training never saw, or segment new scans.

        Args:
            run: folders of trained runs to evaluate. Several runs also give one table over their held-out domains, and
                several methods a comparison with the method of the first.
            label: names for the rows of that table, one for each --run; by default the methods and the settings in
                which they differ. Runs of one name are seeds and domains of one row.
            selection: print what the choice of the checkpoint has cost, for finished runs that kept epochs
                (--keep-epochs), instead of an evaluation.
            list_runs: folder whose runs are listed with their best scores, instead of an evaluation.
            data_root: folder of prepared data to evaluate on; by default the data of the training.
            checkpoint: weights to use: "best" by source validation, or "last" of the training.
            save_predictions: write every prediction as a NIfTI label map in its scan's own grid.
            out: folder for the results; by default RUN/results/DOMAIN, for the table over several runs a folder in
                "comparisons", beside the runs, that is named by what is compared.
            input: new scans to segment instead of evaluating: 3D or 4D NIfTI files, or folders of them.
            output: folder for the label maps of new scans, or with their truth for the results.
            truth: label maps of the scans in --input, or folders of them: the scans are evaluated. A CSV file as
                --input (columns image, truth and, if known, patient, phase, group) names both.
            labels: what the values in the truth mean, as 1=RV 2=MYO 3=LV; by default as in the data set.
            overwrite: replace maps of new scans that are in the output folder already.
            volumes: also write volumes.csv, the clinical quantities of new 4D scans of the heart; ED and ES are the
                frames with the largest and the smallest left ventricle.
            confidence: also write maps, in [0, 1], of the confidence exp(-V) and of the networks' agreement, for new
                scans.
            center: the organ's centre in new scans, in voxels along the two axes of a slice, counted from 0, or "auto"
                to let the networks find it, in up to twice the time; by default the image's centre.
            slice_axis: axis of the file, 1 to 3, along which the slices of new scans follow one another; by default the
                third, and a scan whose voxels are largest along one of the others is refused.
            ensemble: average the softmax of the networks of all runs, for new scans and for an evaluation, which then
                needs --out.
            tta: average the prediction over the 8 flips and right-angle rotations, in 8 times the time.
            keep_largest: keep only the largest connected component of every structure, in the scan's own grid.
            batch_size: slices of new scans that are predicted at a time, at least 1; fewer take less memory.
            device: where to compute: "cpu", "cuda", "cuda:NUMBER", or "auto" for a GPU where there is one.
            precision: "fp32" for float32, "bf16" for bf16 autocast, or "auto" for bf16 where it is faster.
        """
        if list_runs:
            return print(to_markdown([runs_table(list_runs, dataset)]))
        with_truth = bool(truth) or [path.suffix.lower() for path in input] == [".csv"]
        for_new_scans = center or confidence or slice_axis or volumes or overwrite
        mistakes = {
            "--run names the trained run, --list-runs the folder whose runs are listed": not run,
            "--run names a run twice": len({folder.resolve() for folder in run}) < len(run),
            "--input and --output belong together: scans of your own, and the folder for what is written": (
                bool(input) != bool(output)
            ),
            "--truth and --labels belong to --input: --input IMAGES --truth MASKS, or --input TABLE.csv": (
                (truth or labels) and not (input and with_truth)
            ),
            "--center, --confidence, --slice-axis, --volumes and --overwrite are for new scans: --input names them, "
            "without --truth": for_new_scans and (with_truth or not input),
            f"--volumes: {dataset.name} has no clinical quantities": volumes and not dataset.clinical,
            "--input takes one --run, or the mean of several with --ensemble": input and len(run) > 1 and not ensemble,
            "--ensemble needs several --run, and for an evaluation --out, the folder of its results": (
                ensemble and (len(run) < 2 or not (input or out))
            ),
            "--label names the rows of a table over several --run": label and (len(run) < 2 or ensemble),
            f"--batch-size {batch_size}: at least 1 slice at a time": batch_size < 1,
        }
        if made := [mistake for mistake, is_made in mistakes.items() if is_made]:
            raise UserError("\n".join(made))
        where = choose_device(device)
        options = {"precision": precision, "tta": tta, "keep_largest": keep_largest}

        def load(folders: Sequence[Path]) -> TrainedRun:
            runs = [load_run(folder, checkpoint, dataset, build_network, where) for folder in folders]
            return mean_of(runs, evaluate=not input)

        if input and with_truth:
            own = labeled(input, truth, labels, dataset)
            return evaluate_own(load(run), own, input[0], output, save_predictions=save_predictions, **options)
        if input:
            options |= {"confidence": confidence, "center": center, "slice_axis": slice_axis, "batch_size": batch_size}
            segmenter = Segmenter(run=load(run), dataset=dataset, **options)
            return segment_files(segmenter, input, output, overwrite=overwrite, volumes=volumes)
        if selection:
            evaluation = {"data_root": data_root, "precision": precision, "tta": tta}
            tables = [selection_cost(folder, dataset, build_network, where, **evaluation) for folder in run]
            return print(to_markdown(tables))
        groups = [run] if ensemble else [(folder,) for folder in run]
        if len(groups) > 1:  # before the first of them is evaluated
            names = name_rows(run, checkpoint, dataset, labels=label, one_data=data_root is not None)
            facts = repr((sorted(map(str, run)), checkpoint, tta, keep_largest, data_root, names)).encode()
            title = re.sub(r"[^\w.]+", "-", "_vs_".join(dict.fromkeys(names)))[:80]
            tables_at = out or run[0].parent / "comparisons" / f"{title}_{sha256(facts).hexdigest()[:6]}"
            OutputFolder(tables_at).require_free(*COMPARISON_FILES)
        summaries = []
        for folders in groups:
            trained = load(folders)
            data, place, title = open_data(trained, data_root, dataset)
            results = out if out and len(groups) == 1 else trained.folder / "results" / place
            options |= {"domain": trained.config.test_domain, "title": title, "save_predictions": save_predictions}
            with memory_errors(trained.folder):
                summaries.append(evaluate_run(trained, dataset, data=data, out=results, **options))
        if len(groups) > 1:
            write_comparison(by_method(summaries, names, dataset), dataset, tables_at)

    with clear_errors():
        tyro.cli(inference)


def evaluate_own(run: TrainedRun, dataset: DatasetInfo, source: Path, output: Path, **options: Any) -> None:
    """Evaluate a run on the user's labelled scans, which are prepared for it as those of a data set are.

    Args:
        dataset: that of `utils.data.user_scans.labeled`.
        source: its first file or folder, whose name the results bear.
        options: of `evaluate_run`.
    """
    name = source.resolve().name
    with tempfile.TemporaryDirectory(prefix="semidg_") as folder:  # TMPDIR says where
        prepared = Path(folder) / name
        prepare_dataset(source if source.is_dir() else source.parent, prepared, dataset, workers=usable_cores())
        data = PreparedData.open(prepared, dataset)
        options |= {"domain": str(data.index["domain"][0]), "title": f"{dataset.name}, scans of one's own"}
        with memory_errors(source):
            evaluate_run(run, dataset, data=data, out=output, **options)


def write_comparison(methods: dict[str, Runs], dataset: DatasetInfo, folder: Path) -> None:
    """Write and print the leave-one-domain-out tables and, of several methods, their comparison with the first."""
    outputs = OutputFolder(folder)
    written = {"leave_one_domain_out": leave_one_domain_out(methods, dataset)}
    bibliography = Path(__file__).with_name("published.bib").read_text(encoding="utf-8")
    outputs.claim("published.bib").write_text(bibliography, encoding="utf-8")
    if len(methods) > 1:
        table, differences = compare_methods(methods)
        written["comparison"] = [table]
        rows = [(row[0], d.values, row[2].mean, row[2].ci95) for row, d in zip(table.rows, differences, strict=True)]
        phantom = any(summary["phantom"] for runs in methods.values() for found in runs.values() for summary in found)
        title = f"{dataset.name}{', phantom' if phantom else ''}: difference from {next(iter(methods))}"
        plot_differences(outputs.claim("comparison.png"), rows, title=title)
    for name, tables in written.items():
        for suffix, form in FORMATS.items():
            outputs.claim(f"{name}.{suffix}").write_text(form(tables), encoding="utf-8")
        print(to_markdown(tables))
    print(f"tables in {folder}: {', '.join(written)} as .md, .csv and .tex")
