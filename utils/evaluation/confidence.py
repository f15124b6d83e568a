"""Calibration of the networks, and how well a score knows their errors: in an evaluation, in a training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.loaders import SliceDataset
from utils.data.prepared import PreparedData, Split
from utils.errors import UserError
from utils.evaluation.metrics import paper_dice
from utils.evaluation.predict import Predictor, ScanPrediction, mean_dice
from utils.method.augment import canvas_to_view, random_partner, repeatable_fourier_view
from utils.method.losses import kl_variance

BINS = 15
SCORES = ("exp(−V)", "agreement", "softmax maximum")
MONITORED = 64  # slices at most, as many of each source domain


def ranked_risk(score: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """Return (N,) risks from the highest score down; equal scores share their mean risk."""
    _, group, counts = np.unique(-score, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, risk) / counts, counts)


def coverage_curves(scores: Mapping[str, np.ndarray], risk: np.ndarray) -> dict[str, np.ndarray]:
    """Return by score, and for limits, (N,) mean risks of the 1 to N cases that score highest.

    The limits are the best possible order, and the mean of all random ones. A curve's mean is AURC.
    """
    ranked = {name: ranked_risk(score, risk) for name, score in scores.items()}
    ranked |= {"best possible": np.sort(risk), "random": np.full(len(risk), risk.mean())}
    return {name: values.cumsum() / np.arange(1, len(risk) + 1) for name, values in ranked.items()}


def auroc(score: np.ndarray, wrong: np.ndarray) -> float | None:
    """Return the probability that a right case scores higher than a wrong one; None without both."""
    risk = ranked_risk(score, wrong)
    right = 1 - risk
    pairs = risk.sum() * right.sum()
    return float((risk * (right.cumsum() - right / 2)).sum() / pairs) if pairs else None


class Reliability:
    """Running sums of calibration error and Brier score: no pixel is held after it was added."""

    def __init__(self) -> None:
        self.sums, self.squares = np.zeros((3, BINS)), 0.0  # by bin: number of pixels, softmax maximum, right pixels

    def add(self, probability: torch.Tensor, truth: torch.Tensor) -> None:
        """Add N pixels: softmax (N, K), integer labels (N,)."""
        maximum, label = probability.double().max(1)
        number = (maximum * BINS).long().clamp_max(BINS - 1).numpy()
        weights = (torch.ones_like(maximum), maximum, (label == truth).double())
        self.sums += [np.bincount(number, weight.numpy(), BINS) for weight in weights]
        true = probability.gather(1, truth[:, None]).double().sum()  # in sum_k (p_k - y_k)^2, y one-hot
        self.squares += float(probability.double().square().sum() - 2 * true + len(truth))

    def summary(self) -> dict[str, float | None]:
        """Return the expected calibration error "ece" (percent) and the "brier" score (0 to 2)."""
        count, maximum, right = self.sums
        if not count.sum():
            return {"ece": None, "brier": None}
        gap = np.abs(maximum - right).sum() / count.sum()
        return {"ece": 100 * float(gap), "brier": self.squares / float(count.sum())}


class Uncertainty:
    """Calibration and risk of an evaluation, gathered scan by scan."""

    def __init__(self) -> None:
        self.reliability = {"field of view": Reliability(), "foreground": Reliability()}
        self.slices = {name: [] for name in ("risk", *SCORES)}  # of every scan patient, phase, values of the slices

    def add(self, scan: ScanPrediction) -> None:
        """Add a scan that was predicted with its confidence, on the network's grid."""
        truth, probability = scan.truth.long().cpu(), scan.probability.float().cpu()
        (maximum, label), pixels = probability.max(1), probability.movedim(1, -1)
        self.reliability["field of view"].add(pixels.flatten(0, -2), truth.flatten())
        foreground = (label > 0) | (truth > 0)
        self.reliability["foreground"].add(pixels[foreground], truth[foreground])
        # Of the predicted structures; of the whole slice where there is none.
        areas = [area if area.any() else torch.ones_like(area) for area in label > 0]
        self.slices["risk"].append((scan.patient, scan.phase, (1 - scan.slice_dice).tolist()))
        for name, score in zip(SCORES, (scan.confidence.float(), scan.agreement.float(), maximum), strict=True):
            values = [float(one[area].mean()) for one, area in zip(score.cpu(), areas, strict=True)]
            self.slices[name].append((scan.patient, scan.phase, values))

    def curves(self) -> dict[str, dict[str, np.ndarray]]:
        """Return `coverage_curves` of 100 - Dice (percent), of slices and of patients."""
        slices = {name: 100 * np.concatenate([scan[2] for scan in scans]) for name, scans in self.slices.items()}
        patients = {name: np.array(list(mean_dice(scans).values())) for name, scans in self.slices.items()}
        return {kind: coverage_curves(scores, scores.pop("risk"))
                for kind, scores in {"slices": slices, "patients": patients}.items()}  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Return "calibration" by pixels and "risk", areas under the curves in points of Dice."""
        risk = {kind: {name: float(curve.mean()) for name, curve in curves.items()} | {"number": len(curves["random"])}
                for kind, curves in self.curves().items()}  # fmt: skip
        return {"calibration": {name: sums.summary() for name, sums in self.reliability.items()}, "risk": risk}


def hidden_rows(data: PreparedData, split: Split) -> np.ndarray:
    """Return the index rows of a sample of source slices whose masks neither loss nor selection sees."""
    rows = data.rows(sorted(set(split.unlabeled) - set(split.labeled)), with_mask=True)
    if len(rows) < 2:
        problem = f"--monitor-pseudo-labels needs masks of unlabelled source patients, and {data.root} has none"
        raise UserError(f"{problem}: leave it out, or label fewer by --ratio")
    domain = data.index["domain"]
    order = np.random.default_rng(0).permutation(rows)  # the same in every run on these patients
    domains = np.unique(domain[rows])
    return np.sort(np.concatenate([order[domain[order] == d][: MONITORED // len(domains)] for d in domains]))


@torch.no_grad()
def monitor_pseudo_labels(predictor: Predictor, data: PreparedData, split: Split) -> dict[str, Any]:
    """Compare the pseudo labels of a fixed sample, in views without augmentation, with the truth.

    Return "dice" (percent, paper protocol) by domain, "error" (percent of pixels), and by score
    `auroc` of all pixels and of the foreground.
    """
    cfg, rows = predictor.config, hidden_rows(data, split)
    batch = SliceDataset(data, rows, with_mask=True)[list(range(len(rows)))]
    image, mask, quantiles = (batch[name].to(predictor.device) for name in ("image", "mask", "quantiles"))
    views = [predictor.view(image, quantiles)]
    if cfg.fourier_aug:
        other = canvas_to_view(image[random_partner(len(rows), torch.Generator().manual_seed(0))], cfg.image_size)
        views.append(repeatable_fourier_view(views[0], other, cfg))
    with predictor.autocast():
        logits = [[torch.cat([net(part).float() for part in view.split(cfg.batch_size)]) for view in views]
                  for net in predictor.nets]  # fmt: skip
    mean = torch.stack([sum(of_views) / len(views) for of_views in logits])  # (2, N, K, H, W)
    label = mean.argmax(2)  # as `pseudo_label` does
    truth = canvas_to_view(mask, cfg.image_size)[:, 0].long().expand_as(label)
    scores = {"exp(−V)": torch.stack([torch.exp(-kl_variance(*pair)) for pair in logits])} if cfg.fourier_aug else {}
    scores["agreement"] = torch.exp(-kl_variance(mean[1], mean[0])).expand_as(label)
    scores["softmax maximum"] = mean.softmax(2).amax(2)
    one_hot = F.one_hot(label, mean.shape[2]).movedim(-1, 2)
    dice = torch.stack([paper_dice(*pair) for pair in zip(one_hot, truth, strict=True)]).mean(0).cpu().numpy()
    wrong, foreground = (label != truth).double().cpu().numpy(), ((label > 0) | (truth > 0)).cpu().numpy()
    domain, figures = data.index["domain"][rows], {}
    for name, score in scores.items():
        score = score.cpu().numpy()
        inside = auroc(score[foreground], wrong[foreground])
        figures[name] = {"auroc": auroc(score.ravel(), wrong.ravel()), "auroc_foreground": inside}
    by_domain = {str(d): 100 * float(dice[domain == d].mean()) for d in np.unique(domain)}
    return {"dice": by_domain, "error": 100 * float(wrong.mean()), "scores": figures}
