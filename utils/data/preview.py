"""A picture of prepared data: labelled slices of all domains, and the views that training takes of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from config import FIELD_PX, Config
from utils.data.dataset import DatasetInfo
from utils.data.loaders import SliceDataset
from utils.data.prepared import PreparedData
from utils.data.volume import read_volume
from utils.errors import UserError
from utils.method.augment import Augmentation, canvas_to_view, cutmix_mask
from utils.plots import edge_letters, plot_preview, radiological


def draw_preview(root: Path, out: Path, dataset: DatasetInfo, cfg: Config, *, count: int) -> None:
    """Draw `count` labelled slices of the prepared data in `root` into the PNG file `out`.

    The views keep the geometry of the scans and are not blurred; intensities change as `cfg` says.
    """
    data = PreparedData.open(root, dataset)
    rows = _choose_rows(data, count, np.random.default_rng(cfg.seed))
    index = {name: column[rows] for name, column in data.index.items()}
    first_domain = data.index["domain"] == min(index["domain"])
    reference = torch.from_numpy(data.quantiles[first_domain]) if cfg.histogram_matching else None
    cfg = replace(cfg, image_size=FIELD_PX, rotation=0, max_shift=0, flip=False, blur=False, fourier_aug=True)
    generator = torch.Generator().manual_seed(cfg.seed)
    batch = SliceDataset(data, rows, with_mask=True)[list(range(count))]
    mask = canvas_to_view(batch["mask"], FIELD_PX)[:, 0]
    plain, fourier = Augmentation(cfg, reference).unlabeled(batch["image"], batch["quantiles"], generator)
    boxes = cutmix_mask(count, FIELD_PX, generator=generator)
    mixed = torch.where(boxes > 0, plain.roll(1, 0), plain)
    columns = {"images": plain[:, 0], "masks": mask, "fourier": fourier[:, 0], "mixed": mixed[:, 0]}
    names = list(zip(*(index[name] for name in ("domain", "patient", "phase", "slice")), strict=True))
    scans = [read_volume(data.truth_path(patient, phase), 3) for _, patient, phase, _ in names]
    arrays = {name: list(map(radiological, images.numpy(), scans)) for name, images in columns.items()}
    titles = [f"{dataset.domain_kind} {domain}\n{patient} {phase} slice {z}" for domain, patient, phase, z in names]
    where = {"letters": [edge_letters(scan) for scan in scans], "spacing": dataset.spacing}
    plot_preview(out, **arrays, **where, titles=titles, class_names=dataset.class_names[1:], title=f"data {data.name}")


def _choose_rows(data: PreparedData, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw index rows of slices that have a label, from one domain after the other: (count,)."""
    mask_of = data.index["mask"]
    labeled = np.array([row for row in np.flatnonzero(mask_of >= 0) if data.masks[mask_of[row]].any()])
    if not len(labeled):
        raise UserError(f"no slice in {data.root} has a label: there is nothing to show")
    domain = data.index["domain"][labeled]
    domains = sorted(set(domain))
    return np.array([rng.choice(labeled[domain == domains[i % len(domains)]]) for i in range(count)])
