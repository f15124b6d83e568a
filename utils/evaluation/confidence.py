"""Calibration of the networks, and how well a score knows their errors."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.loaders import SliceDataset
from utils.data.prepared import PreparedData, Split
from utils.errors import UserError
from utils.evaluation.metrics import SCORES
from utils.evaluation.predict import Predictor, ScanPrediction, mean_dice, paper_dice
from utils.method.augment import canvas_to_view, random_partner, repeatable_fourier_view
from utils.method.losses import kl_variance

BINS = 15
MONITORED = 64  # slices at most, as many of each source domain


def ranked_risk(score: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """Return risks (N,) from the highest score down; equal scores share their mean risk."""
    _, group, counts = np.unique(-score, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, risk) / counts, counts)


def risk_areas(scores: Mapping[str, np.ndarray], risk: np.ndarray) -> dict[str, float]:
    """Return AURC by score: the mean over n of the risk of the n of N cases that score highest."""
    scores = {**scores, "best possible": -risk, "random": np.zeros_like(risk)}  # the limits
    ranked = {name: ranked_risk(score, risk).cumsum() for name, score in scores.items()}
    return {name: float((sums / np.arange(1, len(risk) + 1)).mean()) for name, sums in ranked.items()}


def auroc(score: np.ndarray, wrong: np.ndarray) -> float | None:
    """Return the probability that a right case scores above a wrong one; None without both."""
    risk = ranked_risk(score, wrong)
    right = 1 - risk
    pairs = risk.sum() * right.sum()
    return float((risk * (right.cumsum() - right / 2)).sum() / pairs) if pairs else None


def calibration_sums(probability: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """Return (3, BINS) sums over N pixels, softmax (N, K): number, maximum, right ones."""
    maximum, label = probability.double().max(1)
    number = (maximum * BINS).long().clamp_max(BINS - 1).numpy()
    weights = None, maximum.numpy(), (label == truth).numpy()
    return np.array([np.bincount(number, weight, BINS) for weight in weights])


def calibration_error(sums: np.ndarray) -> float | None:
    """Return the expected calibration error (percent) of `calibration_sums`, or None."""
    count, maximum, right = sums
    return 100 * float(np.abs(maximum - right).sum() / count.sum()) if count.any() else None


class Uncertainty:
    """Calibration and risk of an evaluation, scan by scan."""

    def __init__(self) -> None:
        self.sums = {"field of view": np.zeros((3, BINS)), "foreground": np.zeros((3, BINS))}
        self.slices = {name: [] for name in ("risk", *SCORES)}  # as `mean_dice` takes them

    def add(self, scan: ScanPrediction) -> None:
        """Add a scan that was predicted with its confidence, on the network's grid."""
        truth, probability = scan.truth.long().cpu(), scan.probability.float().cpu()
        (maximum, label), pixels = probability.max(1), probability.movedim(1, -1)
        for name, area in (("field of view", truth >= 0), ("foreground", (label > 0) | (truth > 0))):
            self.sums[name] += calibration_sums(pixels[area], truth[area])
        # Of predicted structures, or a slice without any.
        areas = [area if area.any() else torch.ones_like(area) for area in label > 0]
        self.slices["risk"].append((scan.patient, scan.phase, (1 - scan.slice_dice).tolist()))
        for name, score in zip(SCORES, (scan.confidence, scan.agreement, maximum), strict=True):
            score = score.float().cpu()
            values = [float(one[area].mean()) for one, area in zip(score, areas, strict=True)]
            self.slices[name].append((scan.patient, scan.phase, values))

    def summary(self) -> dict:
        """Return "calibration" by pixels, and "risk": `risk_areas` of 100 - Dice (percent)."""
        values = {"slices": {}, "patients": {}}
        for name, scans in self.slices.items():
            values["slices"][name] = 100 * np.concatenate([scan[2] for scan in scans])
            values["patients"][name] = np.array([*mean_dice(scans).values()])
        calibration = {name: {"ece": calibration_error(sums)} for name, sums in self.sums.items()}
        risk = {kind: {"number": len(of["risk"])} | risk_areas(of, of.pop("risk")) for kind, of in values.items()}
        return {"calibration": calibration, "risk": risk}


def hidden_rows(data: PreparedData, split: Split) -> np.ndarray:
    """Return sampled rows of source slices whose masks neither loss nor selection sees."""
    rows = data.rows(sorted(set(split.unlabeled) - set(split.labeled)), with_mask=True)
    if len(rows) < 2:
        lack = f"{data.root} has no masks of unlabelled source patients"
        raise UserError(f"--monitor-pseudo-labels: {lack}: leave it out, or label fewer by --ratio")
    order = np.random.default_rng(0).permutation(rows)  # the same in every run on these patients
    domain = data.index["domain"][order]
    domains = np.unique(domain)
    return np.sort(np.concatenate([order[domain == d][: MONITORED // len(domains)] for d in domains]))


@torch.no_grad()
def monitor_pseudo_labels(predictor: Predictor, data: PreparedData, split: Split) -> dict:
    """Compare the pseudo labels of a fixed sample, not augmented, with the truth.

    Return "dice" (percent, paper protocol) by domain, "error" (percent of pixels), and `auroc` by
    score, of all pixels and of the foreground.
    """
    cfg, rows = predictor.config, hidden_rows(data, split)
    batch = SliceDataset(data, rows, with_mask=True)[:]
    image, mask, curve = (batch[name].to(predictor.device) for name in ("image", "mask", "quantiles"))
    views = [predictor.view(image, curve)]
    if cfg.fourier_aug:
        partner = random_partner(len(rows), torch.Generator().manual_seed(0))
        views.append(repeatable_fourier_view(views[0], predictor.crop(image[partner]), cfg))
    parts = [view.split(cfg.batch_size) for view in views]
    with predictor.autocast():
        logits = [[torch.cat([net(part).float() for part in view]) for view in parts] for net in predictor.nets]
    mean = torch.stack([sum(of_views) / len(views) for of_views in logits])  # (2, N, K, H, W)
    label = mean.argmax(2)  # as `pseudo_label` does
    truth = canvas_to_view(mask, cfg.image_size, field=cfg.field)[:, 0].long().expand_as(label)
    scores = {"agreement": torch.exp(-kl_variance(mean[1], mean[0])).expand_as(label)}
    scores["softmax maximum"] = mean.softmax(2).amax(2)
    if cfg.fourier_aug:
        scores["exp(−V)"] = torch.stack([torch.exp(-kl_variance(*pair)) for pair in logits])
    one_hot = F.one_hot(label, mean.shape[2]).movedim(-1, 2)
    dice = torch.stack([paper_dice(*pair) for pair in zip(one_hot, truth, strict=True)]).mean(0)
    wrong, foreground = (part.cpu().numpy() for part in (label != truth, (label > 0) | (truth > 0)))
    areas = {"auroc": np.ones_like(wrong), "auroc_foreground": foreground}
    domain, dice, figures = data.index["domain"][rows], dice.cpu().numpy(), {}
    for name, score in scores.items():
        score = score.cpu().double().numpy()
        figures[name] = {key: auroc(score[area], wrong[area]) for key, area in areas.items()}
    by_domain = {str(d): 100 * float(dice[domain == d].mean()) for d in np.unique(domain)}
    return {"dice": by_domain, "error": 100 * float(wrong.mean()), "scores": figures}
