"""Commands of a data set: phantom, check, prepare and preview; and the data of the demo."""

import sys
import tempfile
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from config import FIELD_PX, Config
from utils.data.dataset import DatasetInfo
from utils.data.loaders import SliceDataset, usable_cores
from utils.data.prepare import check_dataset, prepare_dataset
from utils.data.prepared import PreparedData, split_patients
from utils.data.user_scans import with_unlabeled
from utils.data.volume import read_volume
from utils.errors import UserError, clear_errors
from utils.method.augment import Augmentation, canvas_to_view, cutmix_mask
from utils.plots import edge_letters, plot_preview, radiological


def run_data_command(dataset: DatasetInfo, cfg: Config) -> None:
    """Run the command that the command line names; `cfg` holds the default settings."""

    def check(raw: Positional[Path], /, workers: int = usable_cores()) -> None:
        """Read every raw file and print every problem; exit with 1 if there is an error.

        Args:
            raw: folder of the raw data set.
            workers: number of processes; each holds one scan in memory.
        """
        if not check_dataset(raw, dataset, workers=workers):
            sys.exit(1)

    def prepare(
        raw: Positional[Path], /, out: Path, unlabeled: tuple[Path, ...] = (), workers: int = usable_cores()
    ) -> None:
        """Check a raw data set, then convert it for training.

        Args:
            raw: folder of the raw data set.
            out: folder to write; a slice takes 180 kB, with a mask 270 kB.
            unlabeled: folders of your own scans without masks; each is a domain for every training.
            workers: number of processes; each holds one scan in memory.
        """
        prepare_dataset(raw, out, with_unlabeled(unlabeled, dataset), workers=workers)

    def split(
        data: Path,
        test_domain: Annotated[str, tyro.conf.arg(aliases=["--test-vendor"])] = cfg.test_domain,
        ratio: float = cfg.ratio,
    ) -> None:
        """Print the patients that a training labels, for --labeled-patients.

        Args:
            data: folder of the prepared data.
            test_domain: domain that the training holds out.
            ratio: share of labelled patients, in (0, 1].
        """
        settings = replace(cfg, test_domain=test_domain, ratio=ratio)
        print(*split_patients(PreparedData.open(data, dataset), dataset, settings).labeled, sep="\n")

    def preview(data: Path, out: Path = Path("preview.png"), seed: int = 0) -> None:
        """Draw the plain, Fourier and CutMix views of four images, not turned, moved or blurred.

        Args:
            data: folder of the prepared data.
            out: PNG file to write.
            seed: seed of the choice of images and of the views, from 0.
        """
        if out.suffix != ".png" or out.exists():
            raise UserError(f"--out {out}: expected the name of a .png file that is not there yet")
        draw_preview(data, out, dataset, replace(cfg, seed=seed))
        print(out)

    with clear_errors():
        commands = {"phantom": dataset.write_phantom, "check": check, "prepare": prepare}
        commands |= {"split": split, "preview": preview}
        tyro.extras.subcommand_cli_from_dict(commands | dataset.more_commands)


def draw_preview(root: Path, out: Path, dataset: DatasetInfo, cfg: Config) -> None:
    """Draw four labelled slices of the data in `root`, of all domains, as the PNG file `out`."""
    data, rng = PreparedData.open(root, dataset), np.random.default_rng(cfg.seed)
    masks, domain = data.index["mask"], data.index["domain"]
    labeled = np.array([row for row in np.flatnonzero(masks >= 0) if data.masks[masks[row]].any()])
    if not len(labeled):
        raise UserError(f"no slice in {data.root} has a label: there is nothing to show")
    domains = islice(cycle(np.unique(domain[labeled])), 4)
    rows = np.array([rng.choice(labeled[domain[labeled] == name]) for name in domains])
    reference = torch.from_numpy(data.quantiles[domain == min(domain)])
    cfg = replace(cfg, image_size=FIELD_PX, rotation=0, max_shift=0, flip=False, blur=False, fourier_aug=True)
    augmentation = Augmentation(cfg, reference if cfg.histogram_matching else None)
    generator = torch.Generator().manual_seed(cfg.seed)
    batch = SliceDataset(data, rows, with_mask=True)[:]
    plain, fourier = augmentation.unlabeled(batch["image"], batch["quantiles"], generator)
    mixed = torch.where(cutmix_mask(4, FIELD_PX, generator=generator) > 0, plain.roll(1, 0), plain)
    names = [data.index[name][rows] for name in ("domain", "patient", "phase", "slice")]
    scans = [read_volume(path, 3) for path in map(data.truth_path, *names[1:3])]
    mask = canvas_to_view(batch["mask"], FIELD_PX)
    views = {"images": plain, "masks": mask, "fourier": fourier, "mixed": mixed}
    arrays = {name: [*map(radiological, view[:, 0].numpy(), scans)] for name, view in views.items()}
    plot_preview(
        out, **arrays, letters=[edge_letters(scan) for scan in scans], spacing=dataset.spacing,
        titles=[*map(f"{dataset.domain_kind} {{}}\n{{}} {{}} slice {{}}".format, *names)],
        class_names=dataset.class_names[1:], title=f"data {data.name}",
    )  # fmt: skip


def make_demo_data(data_root: str, dataset: DatasetInfo) -> None:
    """Prepare a phantom in the folder `data_root` if it is not there yet."""
    if (root := Path(data_root)).exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}_raw_", dir=root.parent) as raw:
        dataset.write_phantom(Path(raw), **dataset.demo_phantom)
        if not root.exists():  # another demo may have made it in the meantime
            prepare_dataset(Path(raw), root, dataset, workers=usable_cores())
