"""The pseudo labels against the hidden masks of unlabelled source scans, which neither loss nor selection sees."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config import Config
from utils.data.loaders import SliceDataset
from utils.data.prepared import PreparedData, Split
from utils.errors import UserError
from utils.evaluation.calibration import auroc, coverage_curve, ranked_risks
from utils.evaluation.metrics import paper_dice
from utils.evaluation.predict import prepare_view
from utils.evaluation.statistics_plots import plot_scores
from utils.evaluation.tables import Cell, Table
from utils.method.augment import canvas_to_view, random_partner, repeatable_fourier_view
from utils.method.losses import kl_variance
from utils.run.logger import read_log

SLICES = 64  # at most, as many of each source domain
THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99)


def hidden_rows(data: PreparedData, split: Split) -> np.ndarray:
    """Return the index rows of the sample: slices of unlabelled source patients whose masks training does not see.

    Raises:
        UserError: there are fewer than two.
    """
    rows = data.rows(sorted(set(split.unlabeled) - set(split.labeled)), with_mask=True)
    if len(rows) < 2:
        raise UserError(
            f"--monitor-pseudo-labels needs masks of source patients that are not labelled, and {data.root} has none: "
            "leave it out, or label fewer by --ratio"
        )
    domain = data.index["domain"]
    order = np.random.default_rng(0).permutation(rows)  # the same in every run on these patients
    domains = np.unique(domain[rows])
    return np.sort(np.concatenate([order[domain[order] == d][: SLICES // len(domains)] for d in domains]))


@torch.no_grad()
def monitor_pseudo_labels(
    path: Path,
    nets: Sequence[nn.Module],
    data: PreparedData,
    split: Split,
    cfg: Config,
    *,
    reference: torch.Tensor | None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    title: str,
) -> dict[str, Any]:
    """Compare pseudo labels of a fixed sample with the truth, draw the picture `path`, and return the figures.

    The views are plain ones without augmentation and, with `cfg.fourier_aug`, Fourier views with a fixed partner.

    Args:
        nets: both networks in eval mode, so that nothing of theirs changes.
        reference: (256,) mean quantile curve, or None.
        autocast: makes the context of the forward passes.

    Returns:
        "dice" (percent, paper protocol) by domain, "error" (percent of pixels), "thresholds", and by score "auroc",
        "auroc_foreground", "right_wrong" (mean score of the right and of the wrong pixels of the foreground), and at
        the thresholds the shares "kept" and "kept_error" (percent) of the pixels.
    """
    rows = hidden_rows(data, split)
    batch = SliceDataset(data, rows, with_mask=True)[list(range(len(rows)))]
    image, mask, quantiles = (batch[name].to(device) for name in ("image", "mask", "quantiles"))
    views = [prepare_view(image, quantiles, size=cfg.image_size, reference=reference)]
    if cfg.fourier_aug:
        other = canvas_to_view(image[random_partner(len(rows), torch.Generator().manual_seed(0))], cfg.image_size)
        views.append(repeatable_fourier_view(views[0], other, cfg))
    with autocast():
        logits = [[torch.cat([net(part).float() for part in view.split(cfg.batch_size)]) for view in views]
                  for net in nets]  # fmt: skip
    mean = torch.stack([sum(of) / len(of) for of in logits])  # (2, N, K, H, W)
    label = mean.argmax(2)  # as `pseudo_label` does
    truth = canvas_to_view(mask, cfg.image_size)[:, 0].long().expand_as(label)
    maps = {"exp(−V)": torch.stack([torch.exp(-kl_variance(*of)) for of in logits])} if cfg.fourier_aug else {}
    maps["agreement"] = torch.exp(-kl_variance(mean[1], mean[0])).expand_as(label)
    maps["softmax maximum"] = mean.softmax(2).amax(2)
    scores = {name: of.cpu().numpy() for name, of in maps.items()}
    one_hot = F.one_hot(label, mean.shape[2]).movedim(-1, 2)
    dice = torch.stack([paper_dice(*pair) for pair in zip(one_hot, truth, strict=True)]).mean(0).cpu().numpy()
    domain = data.index["domain"][rows]
    right, foreground = (label == truth).cpu().numpy(), ((label > 0) | (truth > 0)).cpu().numpy()
    areas = {"all pixels": np.ones_like(right), "foreground of either": foreground}
    ranked = {
        name: ranked_risks({score: of[area] for score, of in scores.items()}, 1.0 - right[area])
        for name, area in areas.items()
        if area.any()
    }
    _draw(path, ranked, list(scores), title)
    figures, parts = {}, (foreground & right, foreground & ~right)
    for score, of in scores.items():
        kept = [right[of >= threshold] for threshold in THRESHOLDS]
        everywhere, inside = (auroc(ranked[name][score]) if name in ranked else None for name in areas)
        figures[score] = {
            "auroc": everywhere,
            "auroc_foreground": inside,
            "right_wrong": [float(of[part].mean()) if part.any() else None for part in parts],
            "kept": [100 * part.size / right.size for part in kept],
            "kept_error": [100 * float(1 - part.mean()) if part.size else None for part in kept],
        }
    return {
        "dice": {str(d): 100 * float(dice[domain == d].mean()) for d in np.unique(domain)},
        "error": 100 * float(1 - right.mean()),
        "thresholds": THRESHOLDS,
        "scores": figures,
        "picture": f"{path.parent.name}/{path.name}",
    }


def _draw(path: Path, ranked: Mapping[str, Mapping[str, np.ndarray]], scores: Sequence[str], title: str) -> None:
    """Draw, by kind of pixels and score, the share of wrong pixels in tenths of the score and among those kept."""
    panels = {}
    for pixels, risks in ranked.items():
        tenths = {name: [100 * part.mean() for part in np.array_split(risks[name][::-1], 10)] for name in scores}
        panels[f"{pixels}: by tenth"] = ("tenths of the score, low to high (%)", "wrong (%)", tenths)
        curves = {name: 100 * coverage_curve(of) for name, of in risks.items()}
        panels[f"{pixels}: kept by score"] = ("coverage, highest scores first (%)", "wrong among the kept (%)", curves)
    plot_scores(path, panels, title=title)


def last_figures(folder: Path) -> dict[str, Any]:
    """Return the last "pseudo_labels" of a run's log, with its epoch; {} where it has none."""
    lines = [line for line in read_log(folder / "log.jsonl") if "pseudo_labels" in line]
    return {"pseudo_labels": lines[-1]["pseudo_labels"] | {"epoch": lines[-1]["epoch"]}} if lines else {}


def monitor_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the table of summary.json's "pseudo_labels", if it is there."""
    if "pseudo_labels" not in summary:
        return []
    of = summary["pseudo_labels"]
    dice = ", ".join(f"{domain} {value:.2f} %" for domain, value in of["dice"].items())
    note = (
        f"Against the hidden masks of at most {SLICES} slices of unlabelled source patients, after epoch "
        f"{of['epoch']}. Dice by domain: {dice}; {of['error']:.2f} % of the pixels are wrong. AUROC: the probability "
        "that a right pixel scores higher than a wrong one; foreground: structures in pseudo label or truth."
    )
    header = ["score", "AUROC", "AUROC, foreground", "mean of right, wrong foreground"]
    header += [f"kept at ≥ {threshold:g}: pixels, wrong (%)" for threshold in of["thresholds"]]
    rows = []
    for name, figures in of["scores"].items():
        kept = zip(figures["kept"], figures["kept_error"], strict=True)
        ranks = ["–" if figures[key] is None else f"{figures[key]:.3f}" for key in ("auroc", "auroc_foreground")]
        means = ", ".join("–" if mean is None else f"{mean:.3f}" for mean in figures["right_wrong"])
        rows.append([name, *ranks, means, *(f"{share:.1f}, {Cell(wrong)}" for share, wrong in kept)])
    return [Table("Pseudo labels", note, header, rows)]
