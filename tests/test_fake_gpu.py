"""A tensor left on the wrong device, found without a GPU: fake tensors compute devices, types and shapes alone.

The backward pass, the optimiser and generators need a real GPU: see test_gpu.py.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from config import MMS
from network import build_network
from utils.evaluation.predict import Predictor, predict_scans
from utils.method import augment, losses
from utils.method.objective import UnlabeledViews, cross_pseudo_supervision, pseudo_label

CUDA, SIZE = torch.device("cuda", 0), 64


class Generator(torch.Generator):
    """A CPU's generator that says it is a GPU's: a fake tensor draws nothing from it."""

    device = CUDA


@pytest.fixture(autouse=True)
def fake_gpu():
    with FakeTensorMode():
        yield


@pytest.fixture
def nets():
    with CUDA:
        return [build_network(4).train() for _ in range(2)]


def canvases(count, dtype=torch.float16):
    return torch.zeros(count, 1, augment.CANVAS_PX, augment.CANVAS_PX, dtype=dtype, device=CUDA)


@pytest.mark.parametrize("mode", ["AS", "AM"])
def test_augmentation(mode):
    cfg = replace(MMS, image_size=SIZE, fourier_mode=mode)
    cfg = replace(cfg, field=200, intensity_aug=0.5) if mode == "AM" else cfg
    augmentation = augment.Augmentation(cfg, torch.zeros(9, 256, device=CUDA), 4)
    quantiles, mask = torch.zeros(4, 256, device=CUDA), canvases(4, torch.uint8)
    made = [*augmentation.labeled(canvases(4), mask, quantiles, Generator())]
    made += augmentation.unlabeled(canvases(4), quantiles, Generator())
    made.append(augment.cutmix_mask(4, SIZE, generator=Generator()))
    assert [x.device for x in made] == [CUDA] * 5
    assert {x.shape[-2:] for x in made} == {(SIZE, SIZE)}


@pytest.mark.parametrize("mode", ["pixel", "scalar", "plain"])
def test_objective_of_both_networks(nets, mode):
    image = torch.zeros(2, 1, SIZE, SIZE, device=CUDA)
    views = UnlabeledViews((image, image), (image, image), (image, image), image)
    assert pseudo_label(nets[0], views)[0].device == CUDA
    loss, variance = cross_pseudo_supervision(nets, views, mode, nullcontext)
    supervised = losses.dice_loss(nets[0](image).softmax(1), torch.zeros_like(image[:, 0]).long())
    assert [x.device for x in (loss, variance, supervised)] == [CUDA] * 3 and loss.requires_grad


def numpy_of_a_fake(tensor):
    assert tensor.device.type == "cpu", "a tensor of a GPU has no NumPy array"
    return np.zeros(tensor.shape, int)


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation(nets, tta, monkeypatch):
    monkeypatch.setattr(FakeTensor, "numpy", numpy_of_a_fake, raising=False)
    read = {"image": canvases(3).cpu(), "quantiles": torch.zeros(3, 256), "mask": canvases(3, torch.uint8).cpu()}
    read["row"] = torch.zeros(3).long()
    data = SimpleNamespace(index={"patient": ["A"], "phase": ["ED"]})
    config, reference = replace(MMS, image_size=SIZE, field=200), torch.zeros(256, device=CUDA)
    predictor = Predictor([net.eval() for net in nets], reference, config, nullcontext, tta)
    (scan,) = predict_scans(predictor, [read], data, confidence=True)
    assert [x.device for x in (scan.image, scan.probability, scan.agreement, scan.confidence)] == [CUDA] * 4
    assert scan.probability.shape == (3, 4, SIZE, SIZE)


def test_fake_tensors_find_a_tensor_on_the_wrong_device(monkeypatch):
    """What the other tests rely on: here the rows of a Fourier basis stay on the CPU."""
    basis = augment._fourier_basis
    monkeypatch.setattr(augment, "_fourier_basis", lambda size, half, device: basis(size, half, torch.device("cpu")))
    image = torch.zeros(2, 1, SIZE, SIZE, device=CUDA)
    with pytest.raises(RuntimeError, match="device"):
        augment.amplitude_swap(image, image, 0.05, 1.0)
