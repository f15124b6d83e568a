"""The objective against a plain reading of the equations, and a whole step against the released code's numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, FIXTURES, seeded_weights
from torch import nn

from config import MMS
from network import build_network
from utils.device import autocast_context
from utils.method.objective import UnlabeledViews, cross_pseudo_supervision, training_step


def float32():
    return autocast_context(CPU, "fp32")


def plain_dice(nets, image, mask, classes):
    """L_s written out."""
    loss = 0
    for net in nets:
        probability = net(image).softmax(1)
        for c in classes:
            p, g = probability[:, c], (mask == c).float()
            loss += 1 - (2 * (p * g).sum() + 0.1) / (p.sum() + g.sum() + 0.1)
    return loss


def plain_objective(nets, image, mask, u0, u1, f0, f1, s0, s1, box, mode, beta):
    """L = L_s + beta L_cacps written out as the paper says it, for networks without randomness.

    Labels come from u and f; what is learnt on is s, which is u in the paper.
    """
    with torch.no_grad():
        labels = []
        for net in nets:
            logits0, logits1 = (net(u0) + net(f0)) / 2, (net(u1) + net(f1)) / 2
            labels.append(torch.where(box > 0, logits1, logits0).argmax(1))
    plain, fourier = torch.where(box > 0, s1, s0), torch.where(box > 0, f1, f0)
    outputs = [(net(plain), net(fourier)) for net in nets]
    loss = 0
    for (o, f), (student, _), label in zip(outputs, outputs[::-1], labels, strict=True):
        p_o, p_f = o.softmax(1), f.softmax(1)
        v = (p_f * (p_f / p_o).log()).sum(1)
        log_probability = student.log_softmax(1)
        ce = -log_probability.gather(1, label[:, None])[:, 0]
        loss += {"pixel": (torch.exp(-v) * ce + v).mean(), "scalar": (torch.exp(-v) * ce.mean() + v).mean(),
                 "plain": ce.mean()}[mode]  # fmt: skip
    return plain_dice(nets, image, mask, range(4)) + beta * loss


@pytest.mark.parametrize(("mode", "weight"), [("pixel", 0), ("scalar", 0), ("plain", 0.5)])
def test_step_equals_the_equations(build_tiny, mode, weight):
    torch.manual_seed(0)
    nets = [build_tiny(4).double().eval() for _ in range(2)]  # eval: no dropout, fixed BatchNorm
    image, *views = torch.rand(7, 3, 1, 16, 16, dtype=torch.double)
    mask, box = torch.randint(0, 4, (3, 16, 16)), torch.randint(0, 2, (3, 1, 16, 16)).double()
    expected = plain_objective(nets, image, mask, *views, box, mode, 3.0)
    expected -= weight * sum(net(image).softmax(1).gather(1, mask[:, None]).log().mean() for net in nets)
    reference = torch.autograd.grad(expected, [p for net in nets for p in net.parameters()])
    scalars = training_step(
        nets, image, mask, UnlabeledViews(views[:2], views[2:4], views[4:], box),
        dice_classes=slice(0, None), cps_loss=mode, cps_weight=3.0, autocast=float32, loss_scale=0.5,
        cfg=replace(MMS, cross_entropy=weight),
    )  # fmt: skip
    gradients = [2 * p.grad for net in nets for p in net.parameters()]
    assert torch.allclose(scalars["loss"], expected.float(), rtol=1e-5)
    for ours, theirs in zip(gradients, reference, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    assert (scalars["variance"] > 0) == (mode != "plain")


def test_supervised_loss_of_scgm_counts_grey_matter_only(build_tiny):
    nets = [build_tiny(2).eval() for _ in range(2)]
    image, mask = torch.rand(2, 1, 16, 16), torch.randint(0, 2, (2, 16, 16))
    scalars = training_step(
        nets, image, mask, None, dice_classes=slice(1, None), cps_loss="pixel", cps_weight=0.0, autocast=float32
    )
    assert torch.allclose(scalars["loss"], plain_dice(nets, image, mask, [1]))


@pytest.fixture(scope="module")
def released_step():
    """The fixture of the released code's step, our networks after the same step, and the step's scalars."""
    with np.load(FIXTURES / "step.npz") as file:
        released = dict(file)
    shapes = {key: tuple(shape) for key, shape in json.loads((FIXTURES / "network_keys.json").read_text()).items()}
    seed, nets = int(released["seed"]), []
    for i in range(2):
        net = build_network(4)
        state = seeded_weights(shapes, seed + i)
        # The released classes are LV, MYO, RV, background; ours are background, LV, MYO, RV.
        net.load_state_dict({key: v.roll(1, 0) if key.startswith("classifier.") else v for key, v in state.items()})
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout2d):
                module.p = 0.0
        nets.append(net.train())
    image = {name: torch.from_numpy(released[name]) for name in ("x_l", "x_u0", "x_u1", "x_a0", "x_a1", "box")}
    scalars = training_step(
        nets, image["x_l"], torch.from_numpy((released["labels"].astype(np.int64) + 1) % 4),
        UnlabeledViews(*([image[f"x_{kind}{i}"] for i in (0, 1)] for kind in "uau"), image["box"]),
        dice_classes=slice(0, None), cps_loss="scalar", cps_weight=3.0, autocast=float32,
    )  # fmt: skip
    return released, nets, scalars


def test_loss_of_a_step_is_the_released_one(released_step):
    released, _, scalars = released_step
    assert float(scalars["loss"]) == pytest.approx(float(released["total"]), rel=1e-6)
    assert float(scalars["supervised"]) == pytest.approx(float(released["sup_l"] + released["sup_r"]), rel=1e-6)
    assert float(3 * scalars["cps"]) == pytest.approx(float(released["cps"]), rel=1e-5)


@pytest.mark.parametrize("side", [0, 1])
def test_gradients_and_statistics_of_a_step_are_the_released_ones(released_step, side):
    released, nets, _ = released_step
    letter, parameters = "lr"[side], dict(nets[side].named_parameters())
    assert set(released[f"names_{letter}"]) == set(parameters)
    for i, name in enumerate(released[f"names_{letter}"]):
        gradient = parameters[name].grad
        norm = float(released[f"norm_{letter}"][i])
        assert norm >= 0
        if name.startswith("classifier."):
            gradient = gradient.roll(-1, 0)  # back to the released order
        flat = gradient.flatten().double().numpy()
        direction = np.random.default_rng([int(released["seed"]), 7, i]).normal(size=flat.size).astype(np.float32)
        assert np.linalg.norm(flat) == pytest.approx(norm, rel=0.02), name
        assert abs(flat @ direction - float(released[f"probe_{letter}"][i])) <= 0.02 * norm, name
    state = nets[side].state_dict()
    norms = [float(value.norm()) for key, value in state.items() if key.endswith("running_mean")]
    assert norms == pytest.approx(released[f"mean_{letter}"].tolist(), rel=1e-3)  # of BatchNorm


def test_the_loss_gets_the_logits_behind_the_pseudo_label_and_the_settings(monkeypatch):
    """What any other weighting needs: for each student the other network's mixed mean logits."""
    seen, settings = [], object()

    def loss(logits, pseudo_label, variance, mode, *, teacher_logits, cfg):
        seen.append((pseudo_label, teacher_logits, cfg))
        return logits.mean() + variance.mean()

    monkeypatch.setattr("utils.method.objective.cross_pseudo_loss", loss)
    nets = [nn.Conv2d(1, 3, 1) for _ in range(2)]
    u0, u1, z0, z1 = torch.rand(4, 2, 1, 4, 4)
    box_mask = (torch.rand(2, 1, 4, 4) > 0.5).float()
    cross_pseudo_supervision(nets, UnlabeledViews((u0, u1), (z0, z1), (u0, u1), box_mask), "pixel", float32, settings)
    for (label, logits, cfg), teacher in zip(seen, nets, strict=True):
        expected = torch.where(box_mask > 0, (teacher(u1) + teacher(z1)) / 2, (teacher(u0) + teacher(z0)) / 2)
        assert torch.allclose(logits, expected, atol=1e-6) and not logits.requires_grad
        assert torch.equal(label, logits.argmax(1)) and cfg is settings
