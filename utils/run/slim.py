"""Free the disk of finished runs: what only resuming needs goes, the networks stay.

python -m utils.run.slim runs/A runs/B
"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from utils.errors import UserError, clear_errors
from utils.files import folder_lock
from utils.run.checkpoint import load_checkpoint, save_checkpoint
from utils.run.folder import unfinished


def slim(runs: Positional[tuple[Path, ...]], /) -> None:
    """Drop the optimisers' state of finished runs; --checkpoint best and last still work, going on does not.

    Args:
        runs: folders of the runs.
    """
    problems = [f"{run}: no last.pt there" for run in runs if not (run / "last.pt").exists()]
    problems += [f"{run}:{remark}" for run in runs if (remark := unfinished(run))]
    if problems or not runs:
        raise UserError("only finished runs are slimmed: " + ("; ".join(problems) or "name their folders"))
    for run in runs:
        with folder_lock(run):
            files = [run / "last.pt", run / "previous.pt"]
            before = sum(path.stat().st_size for path in files if path.exists())
            state = load_checkpoint(run)
            state.pop("optimizers", None)
            save_checkpoint(run, state)
            files[1].unlink()
            print(f"{run}: {(before - files[0].stat().st_size) / 1e9:.2f} GB freed")


if __name__ == "__main__":
    with clear_errors():
        tyro.cli(slim)
