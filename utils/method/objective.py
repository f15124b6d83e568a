"""The training objective, in the symbols of the paper (Yao, Hu and Li, AAAI 2022, section 3; docs/method.md).

| paper | here |
|---|---|
| P_O, P_F: predictions on X and Z | `plain`, `fourier` logits in `cross_pseudo_supervision` |
| Y = argmax P_E, P_E = (P_O + P_F) / 2: pseudo label | `pseudo_label` (the mean of the logits, as released) |
| V = KL(P_F, P_O): uncertainty per pixel | `losses.kl_variance` |
| L_a, L_b: one network learns from the other | `losses.cross_pseudo_loss` |
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import Config
from utils.method.losses import cross_pseudo_loss, dice_loss, kl_variance

Autocast = Callable[[], AbstractContextManager]  # makes the context of forward passes
Network = Callable[[torch.Tensor], torch.Tensor]  # image (B, 1, H, W) -> logits (B, K, H, W)


class UnlabeledViews(NamedTuple):
    """Views of the unlabelled batch: u0 and, with CutMix, its partners u1. (B, 1, H, W) each."""

    plain: Sequence[torch.Tensor]  # (u0,) or (u0, u1)
    fourier: Sequence[torch.Tensor] | None  # as plain; None without Fourier augmentation
    student: Sequence[torch.Tensor]  # what is learnt on: `plain`, changed by `intensity_aug`
    box_mask: torch.Tensor | None  # (B, 1, H, W), 1 where u1 shows

    def mix(self, pair: Sequence[torch.Tensor]) -> torch.Tensor:
        """CutMix a pair of (B, C, H, W), or return the first when there is no partner."""
        return pair[0] if self.box_mask is None else torch.lerp(pair[0], pair[1], self.box_mask)


@torch.no_grad()
def pseudo_label(net: Network, views: UnlabeledViews) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pseudo label Y of the mixed batch, (B, H, W) int64, and the logits (B, K, H, W) that it is argmax of.

    The logits are the mean of both views' logits, as released, mixed by CutMix.
    """
    logits = [net(image).float() for image in views.plain]
    if views.fourier is not None:
        logits = [(plain + net(image)) / 2 for plain, image in zip(logits, views.fourier, strict=True)]
    mixed = views.mix(logits)
    return mixed.argmax(1), mixed


def cross_pseudo_supervision(
    nets: Sequence[Network], views: UnlabeledViews, mode: str, autocast: Autocast, cfg: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L_cacps and the mean variance: each network learns the other's pseudo labels, weighed by its confidence.

    Args:
        nets: both networks, in train mode also as teachers, so that their BatchNorm statistics move, as released.
        views: of the unlabelled batch.
        mode: of `cross_pseudo_loss`. In mode "plain" there is no variance: 0.
        cfg: handed on to the loss.
    """
    with autocast():
        lessons = [pseudo_label(net, views) for net in nets]
    with autocast():  # a context of its own: the teachers' bf16 copies of the weights carry no gradient
        plain = [net(views.mix(views.student)).float() for net in nets]
        variances = [None, None]
        if mode != "plain":
            fourier = [net(views.mix(views.fourier)).float() for net in nets]
            variances = [kl_variance(*pair) for pair in zip(plain, fourier, strict=True)]
    loss = 0
    for student, teacher in ((1, 0), (0, 1)):
        label, logits = lessons[teacher]
        loss += cross_pseudo_loss(plain[student], label, variances[teacher], mode, teacher_logits=logits, cfg=cfg)
    return loss, torch.zeros_like(loss) if mode == "plain" else torch.stack(variances).mean().detach()


def training_step(
    nets: Sequence[Network],
    image: torch.Tensor,
    mask: torch.Tensor,
    views: UnlabeledViews | None,
    *,
    dice_classes: slice,
    cps_loss: str,
    cps_weight: float,
    autocast: Autocast,
    loss_scale: float = 1.0,
    cfg: Config | None = None,
) -> dict[str, torch.Tensor]:
    """Add the gradient of L = L_s + beta L_cacps to the networks' parameters.

    The labelled batch comes last, as released: running BatchNorm statistics weigh the last forward most. Parts that
    share no graph are backpropagated one by one: the same gradient, without all activations at once.

    Args:
        nets: the two networks, in train mode.
        image, mask: labelled (B, 1, H, W) float32 and (B, H, W) int64.
        views: of the unlabelled batch; None while there is no pseudo supervision.
        dice_classes: the classes that the supervised loss sums.
        cps_loss: mode of `cross_pseudo_loss`.
        cps_weight: beta at this step.
        autocast: of the forward passes; losses are float32.
        loss_scale: factor of the gradient, for a step that averages several batches.
        cfg: the run's settings, for `cross_entropy` and what a loss of your own needs (docs/new_idea.md).

    Returns:
        Detached scalars for the log: loss (the whole objective), supervised, cps, variance.
    """
    cps = variance = torch.zeros((), device=image.device)
    if views is not None:
        cps, variance = cross_pseudo_supervision(nets, views, cps_loss, autocast, cfg)
        (loss_scale * cps_weight * cps).backward()
        cps = cps.detach()
    supervised = torch.zeros((), device=image.device)
    for net in nets:
        with autocast():
            logits = net(image).float()
        loss = dice_loss(logits.softmax(1), mask)[dice_classes].sum()
        if cfg and cfg.cross_entropy:
            loss = loss + cfg.cross_entropy * F.cross_entropy(logits, mask)
        (loss_scale * loss).backward()
        supervised = supervised + loss.detach()
    return {"loss": supervised + cps_weight * cps, "supervised": supervised, "cps": cps, "variance": variance}
