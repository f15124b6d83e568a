"""Released checkpoints: read as what they are, and never run."""

import contextlib
import copy
import os
import random
import re
import sys
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import load, run_python, tiny_trainer
from torch import nn

import scgm_dataloader
from config import MMS
from network import build_network
from utils import convert_released as converter
from utils.errors import UserError
from utils.files import read_json
from utils.run.checkpoint import read_metadata

TOUCH = "touch pwned"  # in the working directory, which is the test's own
NAMES = {"network.deeplabv3p": ("SingleNetwork", "Head", "ASPP"), "network.resnet": ("ResNet", "Bottleneck")}
RELEASED = {name: type(name, (nn.Module,), {"__module__": module}) for module in NAMES for name in NAMES[module]}
CLASSES = RELEASED | {name: RELEASED["SingleNetwork"] for name in ("TinyNetwork", "DeepLabV3Plus")}


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, build_tiny):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(converter, "build_network", build_tiny)


@pytest.fixture
def save(monkeypatch):
    """Saves a network of ours as the release would: its classes, its class order, its stray attributes."""

    def save(net, path, *, wrap=lambda net: net):
        net = copy.deepcopy(net)
        for module in list(net.modules()):
            module._modules = {k: m for k, m in module._modules.items() if not isinstance(m, nn.Identity)}
            kind = nn.Conv2d if isinstance(module, nn.Conv2d) else type(module)
            module.__class__ = CLASSES.get(type(module).__name__, kind)
            # As PyTorch 1.11, with which the release trained, keeps them.
            vars(module).update({k: OrderedDict(v) for k, v in vars(module).items() if type(v) is dict})
        for parameter in net.classifier.parameters():
            parameter.data = parameter.data.roll(-1, 0)
        net.criterion, net.maxpool, net.device = nn.CrossEntropyLoss(), nn.MaxPool2d(18, 1), torch.device("cuda", 5)
        net.business_layer, net.shared = [net.classifier], (1, 1)
        with monkeypatch.context() as patch:
            for name, released in RELEASED.items():
                patch.setattr(sys.modules[released.__module__], name, released, raising=False)
            torch.save(wrap(net), path)
        return path

    return save


def assert_same(state, net):
    expected = net.state_dict()
    assert set(state) == set(expected)
    for key, value in expected.items():
        value = value.roll(-1, 0) if key.startswith("classifier.") else value
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, lambda net: net.state_dict()])
def test_tensors_are_read_as_they_were_saved(wrap, save, build_tiny, tmp_path):
    net = build_tiny(4)
    net(torch.rand(2, 1, 8, 8))  # moves the running statistics
    assert_same(converter.read_released(save(net, tmp_path / "l_deeplab_2%_A.pt", wrap=wrap)), net)


def convert(path, out, **options):
    converter.convert_released(path, path, **{"out": out, "dataset": "mms", "test_domain": "D"} | options)


def test_run_folder_says_what_a_trained_one_does(save, build_tiny, mms_config, mms_root, tmp_path, capsys):
    net, cfg = build_tiny(4), replace(MMS, data_root=str(mms_root))
    path, run = save(net, tmp_path / "net.pt"), tmp_path / "runs" / "released"
    convert(path, run, data=mms_root)
    assert "histogram matching is off" not in capsys.readouterr().out
    metadata, trained = read_metadata(run / "best.safetensors"), tiny_trainer(mms_config).metadata()
    assert metadata.keys() == trained.keys() and metadata["seen"] == {}
    for key in metadata.keys() - {"config", "selection", "step", "cps_weight", "seen", "labeled"}:
        assert metadata[key] == trained[key], key
    assert len(metadata["reference"]) == 256 and "released weights" in metadata["selection"]
    assert metadata["config"] == asdict(cfg) | {"run_name": "released", "out_root": str(tmp_path / "runs")}
    assert read_json(run / "config.json") == metadata["config"]
    for each in load(run).predictor.nets:
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in each.state_dict().items())
    with pytest.raises(UserError, match="holds a run: choose another --out"):
        convert(path, run)


def test_without_data_there_is_no_histogram_matching(save, build_tiny, tmp_path, capsys):
    convert(save(build_tiny(4), tmp_path / "mms.pt"), tmp_path / "mms", ratio=0.05)
    assert "histogram matching is off" in capsys.readouterr().out
    metadata = read_metadata(tmp_path / "mms" / "best.safetensors")
    assert metadata["reference"] is None and metadata["config"]["ratio"] == 0.05
    assert metadata["config"]["histogram_matching"] is False
    convert(save(build_tiny(2), tmp_path / "scgm.pt"), tmp_path / "scgm", dataset="scgm", test_domain="3")
    assert "histogram matching" not in capsys.readouterr().out  # SCGM has none
    run = load(tmp_path / "scgm", dataset=scgm_dataloader.DATASET)
    assert run.metadata["config"]["ratio"] == 0.2 and run.metadata["class_names"] == ["background", "GM"]


@pytest.mark.slow
def test_the_real_network_by_the_command_line(save, tmp_path):
    net = build_network(4).eval()
    path, run = save(net, tmp_path / "l_deeplab_2%_D.pt"), tmp_path / "run"
    flags = ["--dataset", "mms", "--test-domain", "D", "--out", run]
    done = run_python("-m", "utils.convert_released", path, path, *flags)
    assert done.returncode == 0 and "inference_mms.py --run" in done.stdout, done.stderr
    loaded, image = load(run, build=build_network), torch.rand(1, 1, 64, 64)
    net = net.to(memory_format=torch.channels_last)  # as inference has them, for the same rounding
    with torch.no_grad():
        assert all(torch.equal(each(image), net(image)) for each in loaded.predictor.nets)


@pytest.mark.parametrize(("change", "options", "message"), [
    (lambda state: state.pop("classifier.weight"), {}, "classifier.weight"),
    (lambda state: state["features.0.weight"].fill_(float("nan")), {}, "not all finite"),
    (len, {"test_domain": "E"}, "--test-domain E: M&Ms has A, B, C, D"),
    (len, {"dataset": "scgm", "test_domain": "4"}, "is --dataset right"),
    (len, {"data": Path("nowhere")}, "no data in"),
])  # fmt: skip
def test_mistakes_are_named(change, options, message, build_tiny, tmp_path):
    state = build_tiny(4).state_dict()
    change(state)
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "net.pt", tmp_path / "run", **options)
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        convert(tmp_path / "nowhere.pt", tmp_path / "run")
    assert [each.name for each in tmp_path.iterdir()] == ["net.pt"]


# --- hostile files ---


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def archive(path, content):
    """Write a file as torch.save does, with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
    return path


def refuse(path, message=None):
    """Reading it fails with a clear error, and leaves no trace."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError, match=message) as error:
        converter.read_released(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 600
    assert str(error.value).isprintable() and "weights_only" not in str(error.value)
    assert sorted(path.parent.iterdir()) == before and not Path("pwned").exists()


CALL = text(TOUCH) + b"\x85R"
DICT, NET = name("collections", "OrderedDict"), name("network.deeplabv3p", "SingleNetwork")
OTHER_NAMES = (
    "os system", "torch.serialization.os system", "torch.hub load", "builtins eval", "__builtin__ eval", "torch load",
    "builtins getattr", "torch.utils.collect_env run", "torch classes.load_library", "functools partial",
    "torch._utils _rebuild_tensor_v2.__globals__", "network.deeplabv3p build_network", "\x1b[31m system",
    # what torch.load(weights_only=True) would allow, by itself or because a library says so
    "_codecs encode", "torch FloatTensor", "torch._tensor _rebuild_from_type_v2", "builtins SystemExit",
    "torch.distributed.device_mesh DeviceMesh",
)  # fmt: skip
OTHER_INSTRUCTIONS = (
    text("os") + text("system") + b"\x93" + CALL,  # STACK_GLOBAL
    b"(ios\nsystem\n",  # INST
    b"(" + name("torch", "device") + text(TOUCH) + b"o",  # OBJ
    b"(" + text("module") + NET + b"NNtQ",  # BINPERSID
    NET + CALL,  # a stand-in takes no arguments, and no state but attributes
    NET + text(TOUCH) + b"\x85\x81",
    NET + b"}" + text("__setstate__") + NET + b"sb",  # BUILD on a class
    NET + b")\x81}" + text("__class__") + DICT + b"sb",
    DICT + b")R}" + text("items") + NET + b"sb",
    name("torch", "device") + text("\x1b[31m") + b"\x85R",  # an error text or a key that steers the terminal
    b"}" + text("\x1b[31m") + b"Ns",
    b"}" + text("weight") + text("no tensor") + b"s",
    *(b"", b"N", b"h\x07"),
)


@pytest.mark.parametrize("named", OTHER_NAMES)
def test_other_names_are_refused_and_named(named, tmp_path):
    content = name(*named.split(" ", 1)) + CALL
    message = re.escape(f"it names {named.replace(' ', '.')}".encode("unicode_escape").decode())
    refuse(archive(tmp_path / "evil.pt", content), message)
    refuse(archive(tmp_path / "evil.pt", b"}" + text("weight") + content + b"s"), message)
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02" + content + b".")  # and no archive
    refuse(tmp_path / "evil.pt", "failed reading zip archive")


@pytest.mark.parametrize("content", OTHER_INSTRUCTIONS)
def test_other_instructions_are_refused(content, tmp_path):
    refuse(archive(tmp_path / "evil.pt", content))


def test_a_pickle_that_runs_a_command(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (TOUCH,)

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt", "it names (posix|nt).system")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert Path("pwned").exists()  # so the file does what the others would do


def test_classes_of_the_released_names_stay_untouched(save, build_tiny, tmp_path, monkeypatch):
    def trap(*_):
        Path("pwned").touch()

    path = save(net := build_tiny(4), tmp_path / "net.pt")
    members = dict.fromkeys(("__new__", "__init__", "__setstate__", "__setattr__", "__getattr__"), trap)
    monkeypatch.setattr("network.deeplabv3p.SingleNetwork", type("SingleNetwork", (), members), raising=False)
    monkeypatch.setattr(nn.Conv2d, "__init__", trap)
    monkeypatch.setattr(nn.Module, "__setstate__", trap)
    assert_same(converter.read_released(path), net)
    assert not Path("pwned").exists()


def test_damaged_files(save, build_tiny, tmp_path):
    """Cut, or with changed bytes: a UserError or tensors, never anything else."""
    rng, path = random.Random(0), tmp_path / "damaged.pt"
    whole = save(build_tiny(4), tmp_path / "net.pt").read_bytes()
    for _ in range(100):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        refuse(path)
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert all(isinstance(value, torch.Tensor) for value in converter.read_released(path).values())
