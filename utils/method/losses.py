"""The equations of Yao, Hu and Li (AAAI 2022): Dice loss, KL variance, confidence-aware cross pseudo loss."""

import torch
import torch.nn.functional as F

from config import Config


def dice_loss(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the soft Dice loss per class, sums taken over the whole batch (the supervised loss).

    Args:
        probability: (B, K, ...) in [0, 1].
        target: (B, K, ...) one-hot truth, or (B, ...) integer labels in [0, K).

    Returns:
        (K,) vector: 1 - (2 sum(pg) + 0.1) / (sum(p) + sum(g) + 0.1).
    """
    if target.ndim == probability.ndim - 1:
        target = F.one_hot(target.long(), probability.shape[1]).movedim(-1, 1)
    target = target.to(probability.dtype)
    dims = [d for d in range(probability.ndim) if d != 1]
    intersection = (probability * target).sum(dims)
    return 1 - (2 * intersection + 0.1) / (probability.sum(dims) + target.sum(dims) + 0.1)


def kl_variance(logits: torch.Tensor, augmented_logits: torch.Tensor) -> torch.Tensor:
    """Return the uncertainty per pixel V = KL(P_F || P_O) between the Fourier and the plain view (section 3.2).

    Args:
        logits: (B, K, H, W) of the plain view (P_O).
        augmented_logits: (B, K, H, W) of the Fourier view (P_F).

    Returns:
        (B, H, W), at least 0; carries gradient to both.
    """
    log_plain = F.log_softmax(logits.float(), dim=1)
    log_augmented = F.log_softmax(augmented_logits.float(), dim=1)
    # Never below 0 but by rounding.
    return (log_augmented.exp() * (log_augmented - log_plain)).sum(dim=1).clamp_min(0)


def cross_pseudo_loss(
    logits: torch.Tensor,
    pseudo_label: torch.Tensor,
    variance: torch.Tensor | None,
    mode: str,
    *,
    teacher_logits: torch.Tensor | None = None,
    cfg: Config | None = None,
) -> torch.Tensor:
    """Return the loss of one network on the other's pseudo label, a scalar (L_a, section 3.2).

    Args:
        logits: (B, K, H, W), the learning network's prediction on the plain view.
        pseudo_label: (B, H, W) integer, given by the other network, without gradient.
        variance: (B, H, W), the other network's uncertainty V; not read in mode "plain".
        mode: "pixel": mean(exp(-V) * CE + V), the paper's equation; "scalar": the same with CE averaged before
            it is weighted, as in the released code; "plain": mean(CE), cross pseudo supervision alone.
        teacher_logits: (B, K, H, W), whose argmax the pseudo label is, without gradient; no mode reads them.
        cfg: the run's settings, for a mode with settings of its own (docs/new_idea.md).
    """
    cross_entropy = F.cross_entropy(logits.float(), pseudo_label, reduction="none")  # (B, H, W)
    if mode == "plain":
        return cross_entropy.mean()
    confidence = torch.exp(-variance)
    if mode == "pixel":
        return (confidence * cross_entropy + variance).mean()
    if mode == "scalar":
        return (confidence * cross_entropy.mean() + variance).mean()
    raise ValueError(f"unknown mode {mode!r} of the cross pseudo loss")
