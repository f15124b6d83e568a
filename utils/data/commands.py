"""The commands: phantom, check, prepare and preview of a data set, and training on it."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from utils.data.dataset import DatasetInfo
from utils.data.loaders import SliceDataset
from utils.data.prepare import check_dataset, prepare_dataset
from utils.data.prepared import PreparedData
from utils.data.volume import radiological, read_volume
from utils.errors import UserError, clear_errors
from utils.files import OutputFolder
from utils.method.augment import FIELD_PX, Augmentation, canvas_to_view, cutmix_mask
from utils.plots import plot_preview


def run_data_command(dataset: DatasetInfo) -> None:
    """Run the command that the command line names."""

    def check(raw: Positional[Path], /, workers: int = os.cpu_count() or 1) -> None:
        """Read every raw file and print every problem; exit status 1 if there is an error.

        Args:
            raw: the raw data set.
            workers: processes; each holds one scan in memory.
        """
        if not check_dataset(raw, dataset, workers=workers):
            sys.exit(1)

    def prepare(raw: Positional[Path], /, out: Path, workers: int = os.cpu_count() or 1) -> None:
        """Check a raw data set, then convert it for training.

        Args:
            raw: the raw data set.
            out: folder to write, with 180 kB per slice and 90 kB more where it has a mask.
            workers: processes; each holds one scan in memory.
        """
        prepare_dataset(raw, out, dataset, workers=workers)

    def preview(
        data: Path,
        out: Path = Path("preview.png"),
        images: int = 4,
        fourier_ratio: float = dataset.preview["fourier_ratio"],
        histogram_matching: bool = dataset.preview["histogram_matching"],
        seed: int = 0,
    ) -> None:
        """Draw what the network sees, without rotation, shift, flips and blur: plain, Fourier and CutMix views.

        Args:
            data: a prepared folder.
            out: the PNG file to write.
            images: how many, from as many domains as there are.
            fourier_ratio: lambda of the amplitude swap.
            histogram_matching: match the images' histograms to those of the first domain.
            seed: of the choice and of the augmentation.
        """
        if images < 2:
            raise UserError(f"--images {images}: a Fourier view takes another image's amplitude, so at least 2")
        if seed < 0 or not 0 <= fourier_ratio <= 1:
            raise UserError("--seed must not be negative, and --fourier-ratio must be in [0, 1]")
        if out.suffix != ".png":
            raise UserError(f"--out {out}: a picture's name ends in .png")
        draw_preview(
            dataset,
            data,
            OutputFolder(out.parent).claim(out.name),
            count=images,
            fourier_ratio=fourier_ratio,
            histogram_matching=histogram_matching,
            seed=seed,
        )

    with clear_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"phantom": dataset.write_phantom, "check": check, "prepare": prepare, "preview": preview}
        )


def make_demo_data(data_root: str, dataset: DatasetInfo) -> None:
    """Prepare a phantom in the folder `data_root` where there is none yet."""
    root = Path(data_root)
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}_raw_", dir=root.parent) as raw:
        dataset.write_phantom(Path(raw), **dataset.demo_phantom)
        prepare_dataset(Path(raw), root, dataset, workers=os.cpu_count() or 1)


def draw_preview(
    dataset: DatasetInfo,
    root: Path,
    out: Path,
    *,
    count: int,
    fourier_ratio: float,
    histogram_matching: bool,
    seed: int,
) -> None:
    """Draw labelled slices of all domains of a prepared folder, and the views that training takes of them."""
    data = PreparedData.open(root, dataset)
    rng = np.random.default_rng(seed)
    masks = np.asarray(data.index["mask"])
    filled = np.array([row for row in np.flatnonzero(masks >= 0) if data.masks[masks[row]].any()])
    domains = sorted(set(data.index["domain"][filled]))
    rows = np.array(
        [rng.choice(filled[data.index["domain"][filled] == domains[i % len(domains)]]) for i in range(count)]
    )
    batch = SliceDataset(data, rows, with_mask=True)[list(range(count))]
    reference = torch.from_numpy(data.quantiles[data.index["domain"] == domains[0]])
    augmentation = Augmentation(
        size=FIELD_PX, rotation=0, max_shift=0, flip=False, blur=False,
        fourier_mode="AS", fourier_window=0.01, fourier_ratio=fourier_ratio, fourier_alpha=0.3,
        reference=reference if histogram_matching else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    mask = canvas_to_view(batch["mask"], FIELD_PX)[:, 0]
    plain, fourier = augmentation.unlabeled(batch["image"], batch["quantiles"], generator, fourier=True)
    boxes = cutmix_mask(count, FIELD_PX, generator=generator)
    mixed = torch.where(boxes > 0, plain.roll(1, 0), plain)
    places = zip(data.index["patient"][rows], data.index["phase"][rows], strict=True)
    scans = [read_volume(data.truth_path(*place), 3) for place in places]
    maps = {"images": plain[:, 0], "masks": mask, "fourier": fourier[:, 0], "mixed": mixed[:, 0]}
    plot_preview(
        out,
        **{
            name: [radiological(*pair) for pair in zip(views.numpy(), scans, strict=True)]
            for name, views in maps.items()
        },
        titles=[
            f"{dataset.domain_kind} {domain}\n{patient} {phase} slice {number}"
            for domain, patient, phase, number in zip(
                *(data.index[name][rows] for name in ("domain", "patient", "phase", "slice")), strict=True
            )
        ],
        class_names=dataset.class_names[1:],
    )
    print(out)
