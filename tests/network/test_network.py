"""The network against the released one (fixtures/network*), and its pretrained weights against files made here."""

import json
import os
import pickle

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FIXTURES, seeded_weights

from network import build_network
from network.resnet import AtrousConv2d
from utils.errors import UserError

STEM = "conv1.0.weight"


@pytest.fixture(scope="module")
def keys():
    return {key: tuple(shape) for key, shape in json.loads((FIXTURES / "network_keys.json").read_text()).items()}


@pytest.fixture(scope="module")
def released():
    with np.load(FIXTURES / "network.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def network(keys, released):
    """The 4-class network in eval mode, with the released fixture's weights."""
    network = build_network(4)
    network.load_state_dict(seeded_weights(keys, int(released["seed"])))
    return network.eval()


@pytest.fixture(scope="module")
def pretrained_state():
    """A resnet50_v1c state dict of an RGB network: random, but zeros of one stored element where nothing is read."""
    state = build_network(2).backbone.state_dict()
    torch.manual_seed(0)
    state = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    state |= {STEM: torch.randn(64, 3, 3, 3), "layer4.2.conv2.weight": torch.full((512, 512, 3, 3), 0.25)}
    return state | {"fc.weight": torch.zeros(1000, 1), "fc.bias": torch.zeros(1000)}


def save(path, state):
    torch.save(state, path)
    return str(path)


def test_state_dict_keys_and_shapes(network, keys):
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == keys
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 40.47


@torch.no_grad()
def test_released_logits(network, released):
    x = torch.from_numpy(released["x"])
    stages = network.backbone(x)
    for name, stage in zip(("layer1_mean", "layer4_mean"), stages, strict=True):
        mean = released[name]
        np.testing.assert_allclose(stage.mean((2, 3)), mean, rtol=0, atol=1e-3 * mean.std(), err_msg=name)
    np.testing.assert_allclose(network(x), released["logits"], rtol=0, atol=1e-3 * released["logits"].std())


@torch.no_grad()
def test_sizes_of_the_output_and_the_stages(network):
    assert network(torch.zeros(1, 1, 61, 50)).shape == (1, 4, 61, 50)
    stage1, stage4 = network.backbone(torch.zeros(1, 1, 32, 48))
    assert stage1.shape == (1, 256, 8, 12) and stage4.shape == (1, 2048, 2, 3)


def test_initialisation():
    network = build_network(3)
    weight = network.head.last_conv[0].weight
    assert weight.std().item() == pytest.approx(np.sqrt(2 / (304 * 9)), rel=0.01)  # Kaiming normal, fan_in, relu
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    head = [m for m in network.head.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in head)
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout2d)] == [0.1]


@pytest.mark.parametrize("rate", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 5), (6, 6), (4, 7), (7, 4), (13, 11), (1, 1), (25, 8)])
def test_atrous_convolution_equals_the_full_one(shape, rate):
    torch.manual_seed(0)
    conv = AtrousConv2d(3, 4, rate).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, *shape, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    y = conv(x)
    expected = F.conv2d(x, conv.weight, padding=rate, dilation=rate)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, conv.weight), direction)
    for gradient, full in zip(gradients, torch.autograd.grad(expected, (x, conv.weight), direction), strict=True):
        torch.testing.assert_close(gradient, full)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in (y, gradients[0]))  # as all others


def test_atrous_convolution_sums_in_float32():
    torch.manual_seed(0)
    conv, x = AtrousConv2d(512, 64, 2), torch.randn(8, 512, 4, 4)
    exact = F.conv2d(x.bfloat16().double(), conv.weight.bfloat16().double(), padding=2, dilation=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - exact).std() < 0.0027 * exact.std()  # 0.0017 with the products rounded once, 0.0032 summed in bf16


def test_pretrained_rgb_file_is_loaded_with_its_stem_summed(tmp_path, pretrained_state):
    path = save(tmp_path / "resnet50_v1c.pth", pretrained_state)
    own = build_network(2, pretrained=path).backbone.state_dict()
    expected = pretrained_state[STEM].numpy().sum(axis=1, keepdims=True)
    np.testing.assert_allclose(own[STEM], expected, atol=1e-6)
    for key in own.keys() - {STEM}:
        assert torch.equal(own[key], pretrained_state[key]), key


def test_pretrained_file_without_counters_of_batches_fits(tmp_path, pretrained_state):
    counters = {key for key in pretrained_state if key.endswith("num_batches_tracked")}  # absent in old files
    state = {key: value for key, value in pretrained_state.items() if key not in counters}
    path = save(tmp_path / "old.pth", {"state_dict": state})
    own = build_network(2, pretrained=path).backbone.state_dict()
    assert own.keys() >= counters and torch.equal(own["conv1.3.weight"], pretrained_state["conv1.3.weight"])


@pytest.mark.parametrize(("change", "named"), [
    (lambda s: s | {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "Unexpected key.*conv1.weight"),  # the stem of v1b
    (lambda s: {k: v for k, v in s.items() if not k.startswith("conv1.3")}, "Missing key.*conv1.3.weight"),
    (lambda s: {k: v for k, v in s.items() if k != "bn1.running_var"}, "Missing key.*bn1.running_var"),
    (lambda s: s | {"conv1.3.weight": torch.zeros(32, 32, 3, 3)}, r"(?s)conv1.3.weight: .*\[32, 32, 3, 3\]"),
    (lambda s: s | {STEM: torch.zeros(64, 4, 3, 3)}, r"(?s)conv1.0.weight: .*\[64, 4, 3, 3\]"),
], ids=["other stem", "missing layer", "missing key", "misshapen", "four channels"])  # fmt: skip
def test_pretrained_weights_that_do_not_fit_are_refused(tmp_path, pretrained_state, change, named):
    path = save(tmp_path / "other.pth", change(pretrained_state))
    with pytest.raises(UserError, match=named) as error:
        build_network(2, pretrained=path)
    assert path in str(error.value)
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        build_network(2, pretrained=str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("form", ["zip", "pickle", "text", "list"])
def test_pretrained_file_is_never_executed(tmp_path, form):
    path, created = tmp_path / "weights.pth", tmp_path / "created"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(created),)

    content = {"conv1.0.weight": Evil()}
    if form == "zip":
        torch.save(content, path)
    elif form == "list":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2) if form == "pickle" else b"weights")
    with pytest.raises(UserError, match=r"weights\.pth is not a plain PyTorch state dict"):
        build_network(2, pretrained=str(path))
    assert not created.exists()
    if form == "zip":  # the trap is a real one
        torch.load(path, weights_only=False)
        assert created.exists()


def test_pretrained_timm_without_network_or_cache_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable is read at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"--pretrained .*resnet50_v1c\.pth.*--pretrained none"):
        build_network(2, pretrained="timm")
