"""What the selection rule cost: held-out Dice of the best, the last and the kept epochs of one run."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from utils.data.dataset import DatasetInfo
from utils.data.loaders import scan_loader
from utils.errors import UserError
from utils.evaluation.predict import mean_dice, predict_scans
from utils.evaluation.runs import load_run, open_data, patients_to_evaluate
from utils.evaluation.statistics import mean_std_interval
from utils.evaluation.tables import Cell, Table
from utils.run.folder import KEPT_EPOCHS, unfinished


def selection_cost(
    folder: Path, dataset: DatasetInfo, build_network: Callable[..., nn.Module], device: torch.device, *,
    data_root: Path | None, precision: str, tta: bool,
) -> Table:  # fmt: skip
    """Evaluate the best, the last and every kept epoch of a finished run by the paper's protocol; write nothing.

    Raises:
        UserError: the run has kept no epochs, is not finished, or cannot be evaluated.
    """
    kept = sorted(f"epochs/{path.stem}" for path in folder.glob(KEPT_EPOCHS))
    if not kept or unfinished(folder):
        raise UserError(f"{folder} has kept no epochs, or is not finished: train it to its end with --keep-epochs N")
    rows = []
    for name in ("best", "last", *kept):
        run = load_run(folder, name, dataset, build_network, device)
        data, *_ = open_data(run, data_root, dataset)
        patients = patients_to_evaluate(run, data, run.config.test_domain, dataset)
        loader, how = scan_loader(data, patients), {"precision": precision, "tta": tta}
        scans = predict_scans(run.members, loader, data, device=run.device, **how)
        dice = mean_std_interval([*mean_dice((s.patient, s.phase, s.slice_dice.tolist()) for s in scans).values()])
        rows.append([name, run.metadata["step"], Cell(dice["mean"], dice["std"])])
    name, step, highest = max(rows[2:], key=lambda row: row[2].mean)
    rows[2:] = [[f"not for reporting: {name}, as the held-out domain would choose", step, highest]]
    note = f"Held-out Dice (%) by the paper's protocol, mean ± standard deviation over {len(patients)} patients."
    cost = (
        f"{highest.mean - rows[0][2].mean:+.2f} points, if the held-out domain chose among the {len(kept)} kept epochs."
    )
    return Table(f"Selection, {folder}", note, ["weights", "step", "Dice (%)"], rows, [cost])
