"""Trained runs at work: evaluation on the held-out domain, one table over the domains, and new scans."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import nn

from utils.data.dataset import DatasetInfo
from utils.data.loaders import usable_cores
from utils.data.own import labeled
from utils.data.prepare import prepare_dataset
from utils.data.prepared import PreparedData
from utils.distributed import choose_device
from utils.errors import UserError, clear_errors
from utils.evaluation.domains import leave_one_domain_out
from utils.evaluation.results import evaluate_run
from utils.evaluation.runs import load_run, open_data, require_run, runs_table
from utils.evaluation.segment import OUT_OF_MEMORY, Segmenter, is_out_of_memory, segment_files
from utils.evaluation.tables import to_csv, to_latex, to_markdown
from utils.files import OutputFolder


def run_inference(dataset: DatasetInfo, build_network: Callable[..., nn.Module]) -> None:
    """Run what the command line asks for."""

    def inference(
        run: tuple[Path, ...] = (),
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
        confidence: bool = False,
        center: tuple[float, float] | None = None,
        slice_axis: Literal[1, 2, 3] | None = None,
        tta: bool = False,
        keep_largest: bool = False,
        batch_size: int = 8,
        device: str = "auto",
        precision: Literal["auto", "bf16", "fp32"] = "fp32",
    ) -> None:
        """Evaluate trained runs on the domains that their training never saw, or segment new scans.

        Args:
            run: folders of trained runs to evaluate. Several runs also give one table over their held-out domains.
            list_runs: folder whose runs are listed with their best scores, instead of an evaluation.
            data_root: folder of prepared data to evaluate on; by default the data of the training.
            checkpoint: weights to use: "best" by source validation, or "last" of the training.
            save_predictions: write every prediction as a NIfTI label map in its scan's own grid.
            out: folder for the results; by default RUN/results/DOMAIN, for a table the folder that the runs lie in.
            input: new scans to segment instead of evaluating: 3D or 4D NIfTI files, or folders of them.
            output: folder for the label maps of new scans, or with their truth for the results.
            truth: label maps of the scans in --input, or folders of them: the scans are evaluated. A CSV file as
                --input (columns image, truth and, if known, patient, phase, group) names both.
            labels: what the values in the truth mean, as 1=RV 2=MYO 3=LV; by default as in the data set.
            overwrite: replace maps of new scans that are in the output folder already.
            confidence: also write maps, in [0, 1], of the confidence exp(-V) and of the networks' agreement, for new
                scans.
            center: the organ's centre in new scans, in voxels along the two axes of a slice, counted from 0; by
                default the image's centre.
            slice_axis: axis of the file, 1 to 3, along which the slices of new scans follow one another; by default the
                third, and a scan whose voxels are largest along one of the others is refused.
            tta: average the prediction over the 8 flips and right-angle rotations, in 8 times the time.
            keep_largest: keep only the largest connected component of every structure, in the scan's own grid.
            batch_size: slices of new scans that are predicted at a time, at least 1; fewer take less memory.
            device: where to compute: "cpu", "cuda", "cuda:NUMBER", or "auto" for a GPU where there is one.
            precision: "fp32" for float32, "bf16" for bf16 autocast, or "auto" for bf16 where the device has it.
        """
        if list_runs:
            return print(to_markdown([runs_table(list_runs, dataset)]))
        if not run:
            raise UserError("--run names the trained run, --list-runs the folder whose runs are listed")
        where = choose_device(device)
        if bool(input) != bool(output):
            raise UserError("--input and --output belong together: new scans, and the folder for their label maps")
        if (center or confidence or slice_axis) and not input:
            raise UserError("--center, --confidence and --slice-axis are for new scans: --input names them")
        if input and len(run) > 1:
            raise UserError("scans of your own are segmented or evaluated by one --run")
        evaluated = bool(truth) or [path.suffix.lower() for path in input] == [".csv"]  # of the user's own
        if ((truth or labels) and not input) or (labels and not evaluated):
            raise UserError(
                "--truth and --labels belong to --input: --input IMAGES --truth MASKS, or --input TABLE.csv"
            )
        if evaluated and (center or confidence or slice_axis or overwrite):
            raise UserError("--center, --confidence, --slice-axis and --overwrite are for new scans without --truth")
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: at least 1 slice at a time")
        options = {"precision": precision, "tta": tta, "keep_largest": keep_largest}
        if evaluated:
            trained = load_run(run[0], checkpoint, dataset, build_network, where)
            name, own = input[0].resolve().name, labeled(input, truth, labels, dataset)
            with tempfile.TemporaryDirectory(prefix="semidg_") as folder:  # TMPDIR says where
                source = input[0] if input[0].is_dir() else input[0].parent
                prepare_dataset(source, Path(folder) / name, own, workers=usable_cores())
                data = PreparedData.open(Path(folder) / name, dataset)
                title = f"{dataset.name} run {run[0].name}, own scans: {name}"
                files = {"out": output, "save_predictions": save_predictions, "title": title}
                evaluate_run(trained, dataset, data=data, domain=data.index["domain"][0], **files, **options)
            return None
        if input:
            trained = load_run(run[0], checkpoint, dataset, build_network, where)
            maps = {"batch_size": batch_size, "confidence": confidence, "center": center, "slice_axis": slice_axis}
            segmenter = Segmenter(run=trained, dataset=dataset, **maps, **options)
            return segment_files(segmenter, input, output, overwrite=overwrite)
        if len({folder.resolve() for folder in run}) < len(run):
            raise UserError("--run names a run twice")
        for folder in run:  # before the first of them is evaluated
            require_run(folder, dataset)
        summaries = []
        for folder in run:
            trained = load_run(folder, checkpoint, dataset, build_network, where)
            data, others = open_data(trained, data_root, dataset)
            domain, title = trained.config.test_domain, f"{dataset.name}, held-out {dataset.domain_kind} "
            place = f"{domain}@{data.root.resolve().name}" if others else domain
            title += f"{domain} of other data than the training's: {data.root.resolve().name}" if others else domain
            results = out if out and len(run) == 1 else folder / "results" / place
            files = {"data": data, "out": results, "save_predictions": save_predictions}
            try:
                summaries.append(evaluate_run(trained, dataset, domain=domain, title=title, **files, **options))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(f"{folder}: {OUT_OF_MEMORY}") from error
        if len(run) > 1:
            write_table(summaries, dataset, out or run[0].parent)

    with clear_errors():
        tyro.cli(inference)


def write_table(summaries: list[dict[str, Any]], dataset: DatasetInfo, folder: Path) -> None:
    """Write and print the leave-one-domain-out table of several evaluations, as Markdown, CSV and LaTeX."""
    tables = leave_one_domain_out(summaries, dataset)
    outputs = OutputFolder(folder)
    for suffix, form in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
        outputs.claim(f"leave_one_domain_out.{suffix}").write_text(form(tables), encoding="utf-8")
    print(to_markdown(tables))
    print(f"table in {folder / 'leave_one_domain_out.md'}, .csv and .tex")
