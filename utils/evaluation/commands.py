"""Trained runs at work: evaluation on the held-out domain, one table over the domains, and new scans."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from utils.data.dataset import DatasetInfo
from utils.distributed import choose_device
from utils.errors import UserError, clear_errors
from utils.evaluation.predict import TrainedRun
from utils.evaluation.results import evaluate_run, runs_table
from utils.evaluation.segment import Segmenter, segment_files
from utils.evaluation.tables import combine, to_csv, to_latex, to_markdown
from utils.files import OutputFolder
from utils.run.checkpoint import load_checkpoint, load_networks, read_metadata


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
        overwrite: bool = False,
        confidence: bool = False,
        center: tuple[float, float] | None = None,
        tta: bool = False,
        keep_largest: bool = False,
        batch_size: int = 32,
        device: str = "auto",
        precision: Literal["auto", "bf16", "fp32"] = "fp32",
    ) -> None:
        """Evaluate trained runs on the domains that their training never saw, or segment new scans.

        Args:
            run: folders of runs; of several, one table over their held-out domains is written, too.
            list_runs: folder of runs, to list with their best scores instead.
            data_root: prepared data to evaluate on; by default those of the training.
            checkpoint: "best" by source validation, or "last".
            save_predictions: write every prediction as NIfTI in its scan's own grid.
            out: folder for the results; by default RUN/results/DOMAIN, for several runs the folder they lie in.
            input: new scans, 3D or 4D NIfTI files or folders of them, to segment instead of evaluating.
            output: folder for the label maps of new scans.
            overwrite: replace maps of new scans that are in the output folder already.
            confidence: with new scans, also write maps of exp(-V) and of the networks' agreement.
            center: with new scans, the organ's centre in voxels of the first two axes; by default the image's centre.
            tta: average over flips and rotations.
            keep_largest: keep the largest connected component of every structure (in native space).
            batch_size: slices at a time, with new scans.
            device: "cuda", "cpu", or "auto": a GPU where there is one.
            precision: bf16 autocast, or float32.
        """
        if list_runs:
            return print(runs_table(list_runs, dataset))
        if not run:
            raise UserError("--run names the trained run, --list-runs the folder whose runs are listed")
        where = choose_device(device)
        if bool(input) != bool(output):
            raise UserError("--input and --output belong together: new scans, and the folder for their label maps")
        if (center or confidence) and not input:
            raise UserError("--center and --confidence are for new scans: --input names them")
        if input and len(run) > 1:
            raise UserError("new scans are segmented by one --run")
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: at least 1 slice at a time")
        options = {"precision": precision, "tta": tta, "keep_largest": keep_largest}
        if input:
            trained = load_run(run[0], checkpoint, dataset, build_network, where)
            config = trained.metadata["config"]
            segmenter = Segmenter(
                nets=trained.nets,
                dataset=dataset,
                size=config["image_size"],
                reference=trained.reference,
                device=where,
                batch_size=batch_size,
                confidence=confidence,
                fourier_window=config["fourier_window"],
                fourier_ratio=config["fourier_ratio"],
                center=center,
                **options,
            )
            return segment_files(segmenter, input, output, overwrite=overwrite)
        if len({folder.resolve() for folder in run}) < len(run):
            raise UserError("--run names a run twice")
        for folder in run:  # before the first of them is evaluated
            require_run(folder, dataset)
        summaries = []
        for folder in run:
            trained = load_run(folder, checkpoint, dataset, build_network, where)
            place = folder / "results" / trained.metadata["config"]["test_domain"]
            summaries.append(
                evaluate_run(
                    trained,
                    dataset,
                    data_root=data_root,
                    out=out if out and len(run) == 1 else place,
                    save_predictions=save_predictions,
                    **options,
                )
            )
        if len(run) > 1:
            write_table(summaries, dataset, out or run[0].parent)

    with clear_errors():
        tyro.cli(inference)


def write_table(summaries: list[dict[str, Any]], dataset: DatasetInfo, folder: Path) -> None:
    """Write and print the leave-one-domain-out table of several evaluations, as Markdown, CSV and LaTeX."""
    table = combine(summaries, name=dataset.name, domain_kind=dataset.domain_kind, domains=dataset.domains)
    outputs = OutputFolder(folder)
    for suffix, form in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
        outputs.claim(f"leave_one_domain_out.{suffix}").write_text(form(table), encoding="utf-8")
    print(to_markdown(table))
    print(f"table in {folder / 'leave_one_domain_out.md'}, .csv and .tex")


def require_run(folder: Path, dataset: DatasetInfo) -> None:
    """Raise UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; train one first: python {dataset.key}_train.py --help")


def load_run(
    folder: Path, checkpoint: str, dataset: DatasetInfo, build_network: Callable[..., nn.Module], device: torch.device
) -> TrainedRun:
    """Load the networks of a run's "best" or "last" checkpoint; UserError when they are not there or do not fit."""
    require_run(folder, dataset)
    path, state = folder / "best.safetensors", None
    if checkpoint == "last":
        path, state = folder / "last.pt", load_checkpoint(folder)
        if state is None:
            raise UserError(f"{path}: no such file; the run has saved no state, or --run names no run's folder")
    metadata = read_metadata(path) if state is None else state["metadata"]
    if metadata["dataset"] != dataset.key:
        raise UserError(f"{path} was trained on {metadata['dataset']} data: use inference_{metadata['dataset']}.py")
    nets = [build_network(len(metadata["class_names"])) for _ in range(2)]
    if state is None:
        load_networks(path, nets)
    else:
        for net, weights in zip(nets, state["networks"], strict=True):
            net.load_state_dict(weights)
    nets = [net.to(device, memory_format=torch.channels_last).eval() for net in nets]
    reference = None if metadata["reference"] is None else torch.tensor(metadata["reference"], device=device)
    return TrainedRun(folder, checkpoint, nets, metadata, reference, device)
