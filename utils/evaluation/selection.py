"""What the selection rule cost: held-out Dice of the best, the last and the kept epochs of one run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.data.dataset import DatasetInfo
from utils.data.loaders import scan_loader
from utils.errors import UserError
from utils.evaluation.predict import mean_dice, predict_scans
from utils.evaluation.results import held_out_patients
from utils.evaluation.runs import load_run, unfinished
from utils.evaluation.statistics import mean_std_interval
from utils.evaluation.tables import Cell, Table
from utils.run.folder import KEPT_EPOCHS


def selection_cost(
    folder: Path,
    dataset: DatasetInfo,
    build_network: Callable[..., nn.Module],
    device: torch.device,
    *,
    data_root: Path | None,
    precision: str,
    tta: bool,
) -> Table:
    """Evaluate the best, the last and every kept epoch of a finished run by the paper's protocol; nothing is written.

    Raises:
        UserError: the run is not finished, has kept no epochs, or cannot be evaluated.
    """
    kept = sorted(f"epochs/{path.stem}" for path in folder.glob(KEPT_EPOCHS))
    if not kept or unfinished(folder):
        raise UserError(f"{folder} has kept no epochs, or is not finished: train it to its end with --keep-epochs N")
    rows: list[list[Any]] = []
    for name in ("best", "last", *kept):
        run = load_run(folder, name, dataset, build_network, device)
        data, patients = held_out_patients(run, dataset, data_root)
        options = {"size": run.config.image_size, "reference": run.reference, "device": device}
        scans = predict_scans(run.nets, scan_loader(data, patients), data, **options, precision=precision, tta=tta)
        dice = mean_dice((scan.patient, scan.phase, scan.slice_dice.tolist()) for scan in scans)
        found = mean_std_interval(list(dice.values()))
        rows.append([name, run.metadata["step"], Cell(found["mean"], found["std"])])
    name, step, highest = max(rows[2:], key=lambda row: row[2].mean)
    rows = [*rows[:2], [f"NOT FOR REPORTING: chosen on the held-out domain, {name}", step, highest]]
    cost = highest.mean - rows[0][2].mean
    note = f"Held-out Dice (%) by the paper's protocol, mean ± standard deviation over {len(dice)} patients."
    foot = (
        f"Of {len(kept)} kept epochs, the one that the held-out domain would choose is {cost:+.2f} points off the best."
    )
    return Table(f"Selection, {folder}", note, ["weights", "step", "Dice (%)"], rows, [foot])
