"""The equations against the released numbers (fixtures/losses.npz), loops and values computed by hand."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FIXTURES, ROOT

from utils.method.losses import cross_pseudo_loss, dice_loss, kl_variance


@pytest.fixture(scope="module")
def released():
    with np.load(FIXTURES / "losses.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def test_released_variance_and_cross_pseudo_loss(released):
    variance = kl_variance(released["student"], released["augmented"])
    torch.testing.assert_close(variance, released["variance"], rtol=0, atol=1e-5)
    for mode in ("pixel", "scalar"):
        loss = cross_pseudo_loss(released["student"], released["pseudo_label"], variance, mode)
        torch.testing.assert_close(loss, released[f"{mode}_loss"], rtol=0, atol=1e-5)


def test_released_dice(released):
    probability = released["student"].softmax(1)
    for target in (released["pseudo_label"], torch.eye(4)[released["pseudo_label"]].permute(0, 3, 1, 2)):
        loss = dice_loss(probability, target).double()
        torch.testing.assert_close(loss, released["dice_per_class"], rtol=0, atol=1e-5)


def test_variance_is_the_divergence_from_the_fourier_view():
    plain, fourier = torch.randn(2, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = F.kl_div(plain.log_softmax(1), fourier.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert torch.allclose(kl_variance(plain, fourier), expected, atol=1e-6)
    assert not torch.allclose(kl_variance(fourier, plain), expected, atol=1e-2)  # KL is not symmetric


def test_variance_is_zero_for_equal_logits_and_never_negative():
    torch.manual_seed(0)
    logits = 20 * torch.randn(2, 4, 16, 16)
    assert kl_variance(logits, logits).abs().max() == 0
    assert kl_variance(logits, logits + 5).abs().max() < 1e-5  # softmax does not see a constant
    variance = kl_variance(logits, 20 * torch.randn(2, 4, 16, 16))
    assert variance.min() > -1e-6 and variance.max() > 1  # up to rounding


def test_variance_stays_finite_for_certain_networks():
    sure, contrary = torch.tensor([[1000.0, -1000.0]]), torch.tensor([[-1000.0, 1000.0]])
    assert kl_variance(sure.view(1, 2, 1, 1), contrary.view(1, 2, 1, 1)).item() == pytest.approx(2000)


@pytest.mark.parametrize("mode", ["pixel", "scalar"])
def test_variance_carries_gradient_to_both_views(mode):
    torch.manual_seed(0)
    other, plain, fourier = (torch.randn(2, 3, 4, 5, dtype=torch.float32, requires_grad=True) for _ in range(3))
    label = torch.randint(3, (2, 4, 5))
    cross_pseudo_loss(other, label, kl_variance(plain, fourier), mode).backward()
    for logits in (other, plain, fourier):
        assert logits.grad.abs().sum() > 0
    # d/dV of mean(exp(-V) CE + V), by a finite difference of the whole in float64
    step = torch.zeros(2, 3, 4, 5)
    step[1, 2, 3, 4] = 1e-2
    with torch.no_grad():
        up, down = (cross_pseudo_loss(other, label, kl_variance(plain, fourier + s), mode) for s in (step, -step))
    assert fourier.grad[1, 2, 3, 4].item() == pytest.approx((up - down).item() / 2e-2, abs=2e-4)


@pytest.mark.parametrize(("mode", "expected"), [
    ("pixel", (1 * math.log(2) + 0.5 * math.log(4) + math.log(2)) / 2),
    ("scalar", (1 + 0.5) / 2 * 1.5 * math.log(2) + math.log(2) / 2),
    ("plain", 1.5 * math.log(2)),
])  # fmt: skip
def test_cross_pseudo_loss_by_hand(mode, expected):
    """Of two pixels: cross entropies ln 2 and ln 4, variances 0 and ln 2."""
    logits = torch.tensor([[0.5, 0.75], [0.5, 0.25]]).log().view(1, 2, 1, 2)
    label, variance = torch.tensor([[[0, 1]]]), torch.tensor([[[0.0, math.log(2)]]])
    for given in (variance, None) if mode == "plain" else (variance,):
        assert cross_pseudo_loss(logits, label, given, mode).item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="unknown mode 'pixels'"):
        cross_pseudo_loss(logits, label, variance, "pixels")


def test_losses_are_computed_in_float32_from_half_precision_logits():
    torch.manual_seed(0)
    plain, fourier = (torch.randn(1, 4, 8, 8).bfloat16() for _ in range(2))
    variance = kl_variance(plain, fourier)
    assert variance.dtype == torch.float32
    torch.testing.assert_close(variance, kl_variance(plain.float(), fourier.float()))
    assert cross_pseudo_loss(plain, torch.zeros(1, 8, 8, dtype=torch.long), variance, "pixel").dtype == torch.float32


def test_dice_loss_pools_the_batch_and_knows_empty_classes():
    """By hand: class 2 is empty in both, so has no loss; class 3 is absent but predicted."""
    label = torch.tensor([[[1, 1]], [[0, 0]]])
    probability = torch.tensor([[[0.0, 0.9], [0.8, 0.0], [0.0, 0.0], [0.2, 0.1]],
                                [[1.0, 0.7], [0.0, 0.0], [0.0, 0.0], [0.0, 0.3]]])[:, :, None]  # fmt: skip
    expected = [1 - 3.5 / 4.7, 1 - 1.7 / 2.9, 0, 1 - 0.1 / 0.7]
    np.testing.assert_allclose(dice_loss(probability, label), expected, atol=1e-6)


def test_the_idea_of_the_docs_is_one_function_and_one_setting():
    """docs/new_idea.md as it stands: the lines put into the function, the setting read from the config."""
    page = (ROOT / "docs" / "new_idea.md").read_text()
    lines = re.search(r"```python\n(    if mode == .*?)```", page, re.DOTALL)[1]
    source = (ROOT / "utils" / "method" / "losses.py").read_text()
    module = {}
    exec(source.replace('    raise ValueError(f"unknown mode', f'{lines}    raise ValueError(f"unknown mode'), module)
    logits, label, variance = torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 2, dtype=torch.long), torch.zeros(1, 1, 2)
    teacher = torch.tensor([0.95, 0.85]).log().view(1, 1, 1, 2)
    teacher = torch.cat([teacher, (1 - teacher.exp()).log()], dim=1)
    cfg = SimpleNamespace(threshold=0.9)
    loss = module["cross_pseudo_loss"](logits, label, variance, "threshold", teacher_logits=teacher, cfg=cfg)
    assert loss.item() == pytest.approx(np.log(2) / 2)  # of two pixels the sure one
