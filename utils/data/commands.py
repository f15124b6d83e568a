"""Commands of a data set: phantom, check, prepare and preview; and the data of the demo."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from config import Config
from utils.data.dataset import DatasetInfo
from utils.data.loaders import usable_cores
from utils.data.prepare import check_dataset, prepare_dataset
from utils.data.preview import draw_preview
from utils.data.user_scans import with_unlabeled
from utils.errors import UserError, clear_errors
from utils.files import OutputFolder


def run_data_command(dataset: DatasetInfo, cfg: Config) -> None:
    """Run the command that the command line names; `cfg` holds the data set's default settings."""

    def check(raw: Positional[Path], /, workers: int = usable_cores()) -> None:
        """Read every raw file and print every problem; the exit status is 1 if there is an error.

        Args:
            raw: folder of the raw data set.
            workers: number of processes; each holds one scan in memory.
        """
        if not check_dataset(raw, dataset, workers=workers):
            sys.exit(1)

    def prepare(
        raw: Positional[Path],
        /,
        out: Path,
        unlabeled: tuple[Path, ...] = (),
        center: Literal["image", "auto"] = "image",
        workers: int = usable_cores(),
    ) -> None:
        """Check a raw data set, then convert it for training.

        Args:
            raw: folder of the raw data set.
            out: folder to write; a slice takes 180 kB, and 90 kB more where it has a mask.
            unlabeled: folders of scans of your own, 3D or 4D, without masks. Each folder becomes a domain that every
                training uses.
            center: put the canvas on the centre of the "image" (the paper's protocol), or with "auto" on the centre of
                mass of a patient's labels, for all its frames; patients without labels keep the image's centre.
            workers: number of processes; each holds one scan in memory.
        """
        prepare_dataset(raw, out, with_unlabeled(unlabeled, dataset), workers=workers, on_labels=center == "auto")

    def preview(
        data: Path,
        out: Path = Path("preview.png"),
        images: int = 4,
        fourier_ratio: float = cfg.fourier_ratio,
        histogram_matching: bool = cfg.histogram_matching,
        seed: int = 0,
    ) -> None:
        """Draw the plain, Fourier and CutMix views that the network sees, without rotation, shift, flips and blur.

        Args:
            data: folder of the prepared data.
            out: PNG file to write.
            images: number of images, at least 2, from as many domains as there are.
            fourier_ratio: share of the other image's amplitude in the Fourier view, 0 to 1.
            histogram_matching: match the images' histograms to those of the first domain.
            seed: seed of the choice of images and of the views, from 0.
        """
        if images < 2:
            raise UserError(f"--images {images}: a Fourier view takes another image's amplitude, so at least 2")
        if out.suffix != ".png":
            raise UserError(f"--out {out}: a picture's name ends in .png")
        settings = replace(cfg, fourier_ratio=fourier_ratio, histogram_matching=histogram_matching, seed=seed)
        draw_preview(data, OutputFolder(out.parent).claim(out.name), dataset, settings, count=images)
        print(out)

    with clear_errors():
        commands = {"phantom": dataset.write_phantom, "check": check, "prepare": prepare, "preview": preview}
        tyro.extras.subcommand_cli_from_dict(commands | dataset.more_commands)


def make_demo_data(data_root: str, dataset: DatasetInfo) -> None:
    """Prepare a phantom in the folder `data_root` if there is none yet."""
    root = Path(data_root)
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}_raw_", dir=root.parent) as raw:
        dataset.write_phantom(Path(raw), **dataset.demo_phantom)
        if not root.exists():  # another demo may have made it in the meantime
            prepare_dataset(Path(raw), root, dataset, workers=usable_cores())
