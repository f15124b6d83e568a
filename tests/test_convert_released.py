"""Released checkpoints: read as what they are, and never run."""

import copy
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from torch import nn

import mms_dataloader
import scgm_dataloader
from config import MMS
from network import build_network
from utils import convert_released as converter
from utils.data.loaders import build_loaders
from utils.device import Process
from utils.errors import UserError
from utils.evaluation.runs import load_run
from utils.run.checkpoint import read_metadata
from utils.trainer import Trainer

CPU = torch.device("cpu")
RELEASED = {
    name: type(name, (nn.Module,), {"__module__": module})
    for module, names in {
        "network.deeplabv3p": ("SingleNetwork", "Head", "ASPP", "Normalize"),
        "network.resnet": ("ResNet", "Bottleneck"),
    }.items()
    for name in names
}
CLASSES = RELEASED | {name: RELEASED["SingleNetwork"] for name in ("TinyNetwork", "DeepLabV3Plus")}


@pytest.fixture
def save(monkeypatch):
    """Saves a network of ours as the release would: its classes, its class order, its stray attributes."""

    def save(net, path, *, wrap=lambda net: net, **options):
        net = copy.deepcopy(net)
        for module in list(net.modules()):
            module._modules = {k: m for k, m in module._modules.items() if not isinstance(m, nn.Identity)}
            module.__class__ = CLASSES.get(
                type(module).__name__, nn.Conv2d if isinstance(module, nn.Conv2d) else type(module)
            )
            # As PyTorch 1.11, with which the release trained, keeps them.
            vars(module).update({k: OrderedDict(v) for k, v in vars(module).items() if type(v) is dict})
            module.shared = (1, 1)  # one literal, as the strides that the release takes from the last stage
        for parameter in net.classifier.parameters():
            parameter.data = parameter.data.roll(-1, 0)
        net.criterion, net.l2norm, net.maxpool = nn.CrossEntropyLoss(), RELEASED["Normalize"](), nn.MaxPool2d(18, 1)
        net.business_layer, net.device = [net.classifier], torch.device("cuda", 5)
        with monkeypatch.context() as patch:
            for name in ("network.deeplabv3p", "network.resnet"):
                fake = types.ModuleType(name)
                vars(fake).update({k: c for k, c in RELEASED.items() if c.__module__ == name})
                patch.setitem(sys.modules, name, fake)
            torch.save(wrap(net), path, **options)
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


def test_views_of_one_storage(tmp_path):
    whole = torch.arange(24.0)
    views = OrderedDict(a=whole[4:10].view(2, 3), b=whole.view(4, 6).t(), c=whole.half(), d=torch.tensor(7))
    torch.save(views, tmp_path / "views.pt")
    for key, value in converter.read_released(tmp_path / "views.pt").items():
        assert torch.equal(value, views[key]) and value.dtype == views[key].dtype


def test_classes_come_in_our_order(save, build_tiny, tmp_path):
    ours, converted = build_tiny(4), build_tiny(4)
    converter.load_released(converted, save(ours, tmp_path / "net.pt"))
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(converted.eval()(image), ours.eval()(image))


def convert(path, out, **options):
    converter.convert_released(path, path, **{"out": out, "dataset": "mms", "test_domain": "D"} | options)


def test_run_folder_says_what_a_trained_one_does(save, build_tiny, mms_config, mms_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(converter, "build_network", build_tiny)
    net, cfg = build_tiny(4), replace(MMS, data_root=str(mms_root))
    path, run = save(net, tmp_path / "net.pt"), tmp_path / "runs" / "released"
    convert(path, run, data=mms_root)
    assert "histogram matching is off" not in capsys.readouterr().out
    trainer = Trainer(mms_config, build_loaders(mms_config, mms_dataloader.DATASET), build_tiny, Process(CPU))
    metadata, trained = read_metadata(run / "best.safetensors"), trainer.metadata()
    of_a_training = {"seen_before", "quality"}  # what this program's training has seen, and found on source scans
    assert metadata.keys() == trained.keys() - of_a_training
    for key in metadata.keys() - {"config", "selection", "step", "cps_weight"}:
        assert metadata[key] == trained[key], key
    assert len(metadata["reference"]) == 256 and "released weights" in metadata["selection"]
    assert metadata["config"] == asdict(cfg) | {"run_name": "released", "out_root": str(tmp_path / "runs")}
    assert json.loads((run / "config.json").read_text()) == metadata["config"]
    loaded = load_run(run, "best", mms_dataloader.DATASET, build_tiny, CPU, autocast=nullcontext)
    for each in loaded.predictor.nets:
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in each.state_dict().items())
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match="holds a run: choose another --out"):
        convert(path, run)
    assert before == {path: path.read_bytes() for path in run.iterdir()}


def test_without_data_there_is_no_histogram_matching(save, build_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(converter, "build_network", build_tiny)
    convert(save(build_tiny(4), tmp_path / "mms.pt"), tmp_path / "mms", ratio=0.05)
    assert "histogram matching is off" in capsys.readouterr().out
    metadata = read_metadata(tmp_path / "mms" / "best.safetensors")
    assert metadata["reference"] is None and metadata["config"]["histogram_matching"] is False
    assert metadata["config"]["ratio"] == 0.05 and not metadata["phantom"]
    scgm = {"dataset": "scgm", "test_domain": "3"}
    convert(save(build_tiny(2), tmp_path / "scgm.pt"), tmp_path / "scgm", **scgm)
    assert "histogram matching" not in capsys.readouterr().out  # SCGM has none
    run = load_run(tmp_path / "scgm", "best", scgm_dataloader.DATASET, build_tiny, CPU, autocast=nullcontext)
    assert run.metadata["config"]["ratio"] == 0.2 and run.metadata["class_names"] == ["background", "GM"]


@pytest.mark.slow
def test_the_real_network_by_the_command_line(save, tmp_path):
    torch.manual_seed(0)
    net = build_network(4).eval()
    path, run = save(net, tmp_path / "l_deeplab_2%_D.pt"), tmp_path / "run"
    assert_same(converter.read_released(path), net)
    expected = json.loads((ROOT / "tests/fixtures/network_keys.json").read_text())
    assert {key: list(value.shape) for key, value in converter.read_released(path).items()} == expected
    command = [sys.executable, "-m", "utils.convert_released", path, path, "--dataset", "mms", "--test-domain", "D"]
    done = subprocess.run([*command, "--out", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "inference_mms.py --run" in done.stdout, done.stderr
    path.unlink()
    loaded = load_run(run, "best", mms_dataloader.DATASET, build_network, CPU, autocast=nullcontext)
    (run / "best.safetensors").unlink()
    image = torch.rand(1, 1, 64, 64)
    net = net.to(memory_format=torch.channels_last)  # as inference has them, for the same rounding
    with torch.no_grad():
        assert all(torch.equal(each(image), net(image)) for each in loaded.predictor.nets)
    torch.save(Call(os.system, f"touch {tmp_path}/pwned"), path)
    done = subprocess.run([*command, "--out", tmp_path / "none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {path}: refused" in done.stderr and "it names 'posix.system'" in done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, "run"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("classifier.weight"), "classifier.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (lambda state: state.update({"classifier.bias": torch.zeros(3)}), "classifier.bias"),
        (lambda state: state["features.0.weight"].fill_(float("nan")), "not all finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, named, build_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "build_network", build_tiny)
    state = build_tiny(4).state_dict()
    change(state)
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(UserError, match=named):
        convert(tmp_path / "net.pt", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mistakes_are_named(tmp_path, save, build_tiny, monkeypatch):
    monkeypatch.setattr(converter, "build_network", build_tiny)
    path = save(build_tiny(4), tmp_path / "net.pt")
    for options, message in (
        ({"test_domain": "E"}, "--test-domain E: M&Ms has A, B, C, D"),
        ({"dataset": "scgm", "test_domain": "4"}, "is --dataset right"),
        ({"data": tmp_path / "nowhere"}, "no prepared M&Ms data"),
    ):
        with pytest.raises(UserError, match=message):
            convert(path, tmp_path / "run", **options)
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        convert(tmp_path / "nowhere.pt", tmp_path / "run")
    assert [each.name for each in tmp_path.iterdir()] == ["net.pt"]


# --- hostile files ---


TOUCH = "touch pwned"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def archive(path, content, records=(), folder="archive", **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for record, data in {"version": b"3\n", "data.pkl": b"\x80\x02" + content + b".", **dict(records)}.items():
            file.writestr(f"{folder}/{record}", data)
    return path


def records_of(path):
    """The pickle of a saved file, without its first and last instruction, and the other records."""
    with zipfile.ZipFile(path) as file:
        records = {each.partition("/")[2]: file.read(each) for each in file.namelist()}
    return records.pop("data.pkl")[2:-1], records


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def declared(offset=0, size=(1,), stride=(1,)):
    """A tensor over a storage of one number, 3.5, with any other shape."""
    storage = torch.tensor([3.5])._typed_storage()  # the class that torch.save pickles; nothing public returns it
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


def refuse(path, message=None):
    """Reading it fails at once, with a clear error, and leaves no trace."""
    folder = path.parent
    before, began = sorted(folder.iterdir()), time.process_time()
    with pytest.raises(UserError, match=message) as error:
        converter.read_released(path)
    assert time.process_time() - began < 5 and str(path) in str(error.value) and len(str(error.value)) < 600
    assert str(error.value).isprintable() and "weights_only" not in str(error.value)
    assert sorted(folder.iterdir()) == before and not Path("pwned").exists()


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "named",
    [
        *("os system", "posix system", "subprocess getoutput", "torch.serialization.os system", "torch.hub load"),
        *("builtins eval", "__builtin__ eval", "builtins exec", "builtins getattr", "builtins __import__"),
        *("torch.utils.collect_env run", "torch classes.load_library", "torch load", "torch.jit load", "pickle loads"),
        *("functools partial", "copyreg _reconstructor", "numpy._core.multiarray scalar", "torch.nn.init normal_"),
        # other names of modules that it knows, and the names that it knows, cut elsewhere
        *("network.deeplabv3p build_network", "network.resnet load_pretrained", "utils.convert_released StandIn"),
        *("network resnet.ResNet", "network.resnet ResNet.__init__", " network.resnet.ResNet", "torch.nn.modules conv"),
        *("torch _utils._rebuild_tensor_v2", "torch._utils _rebuild_tensor_v2.__globals__", "torch.nn Conv2d"),
        # what torch.load(weights_only=True) would allow
        *("_codecs encode", "builtins bytearray", "collections Counter", "torch FloatTensor", "torch BFloat16Storage"),
        *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_wrapper_subclass", "torch Tensor"),
        *("torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter", "torch.storage UntypedStorage"),
        "\x1b[31m system",
    ],
)
def test_other_names_are_refused_and_named(named, tmp_path):
    content = name(*named.split(" ", 1)) + text(TOUCH) + b"\x85R"
    message = re.escape(f"it names {named.replace(' ', '.')!a}")
    refuse(archive(tmp_path / "evil.pt", content), message)
    refuse(archive(tmp_path / "evil.pt", b"}" + text("weight") + content + b"s"), message)
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02" + content + b".")  # and no archive
    refuse(tmp_path / "evil.pt", "not a zip file")


def test_a_pickle_that_runs_a_command(tmp_path):
    torch.save({"weight": Call(os.system, TOUCH)}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt", "it names '(posix|nt).system'")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert Path("pwned").exists()  # so the file does what the others would do


DICT, NET = name("collections", "OrderedDict"), name("network.deeplabv3p", "SingleNetwork")


def doubled(first, double, end):
    """60 objects, each of which holds the one before twice: 2 ** 60 when hashed or printed."""
    return first + b"q\x00" + b"".join(double.replace(b"?", b"%c" % i) + b"q%c" % (i + 1) for i in range(60)) + end


@pytest.mark.parametrize(
    "content",
    [
        text("os") + text("system") + b"\x93" + text(TOUCH) + b"\x85R",  # STACK_GLOBAL
        b"(ios\nsystem\n",  # INST
        b"(" + name("torch", "device") + text(TOUCH) + b"o",  # OBJ
        b"\x82\x01",  # EXT1
        b"Pos.system\n",  # PERSID
        b"(" + text("module") + NET + b"NNtQ",
        b"(" + text("storage") + NET + text("0") + text("cpu") + b"K\x01tQ",
        NET + b"(" + text(TOUCH) * 99 + b"tR",  # a stand-in takes no arguments, and no state but attributes
        NET + text(TOUCH) + b"\x85\x81",
        NET + b")\x81" + text("no state") + b"b",
        NET + b"}" + text("__setstate__") + NET + b"sb",  # BUILD on a class
        NET + b")\x81}" + text("__class__") + DICT + b"sb",
        DICT + b")R}" + text("items") + NET + b"sb",
        NET + b")\x81}" + text("_modules") + text("none") + b"sb",
        name("torch", "device") + text("\x1b[31m") + b"\x85R",
        *(b"", b".", b"N", b"h\x07"),
        b"\x96" + struct.pack("<Q", 1 << 34),  # BYTEARRAY8 of 16 GB
        b"\x8b" + struct.pack("<I", 0x7FFFFFFF),  # LONG4
        b"Nr\xf0\xff\xff\xff",  # a memo of 64 GB in C
        *(nest * 200_000 for nest in (b"}", b"(", b"]", b"N\x85")),
        b"}N" + b"\x85" * 200_000 + b"Ns",  # a key; hashing it would overflow the stack
        b"}N" + b"\x85" * 16_000 + b"Ns",
        doubled(b"]", b"](h?h?e", b")R"),  # a list as a function: torch.load would print it
        doubled(b"]", b"](h?h?e", b")\x81"),
        doubled(b"}N\x85", b"h?h?\x86", b"Ns"),  # a key
        doubled(DICT + b")\x81", DICT + b")\x81(K\x00h?K\x01h?u", b")R"),
        b"](" + text("a" * 100_000) + b"q\x00" + b"h\x00" * 50_000 + b"e)R",  # 5 GB when printed
        b" " * (2 << 20),
    ],
)
def test_other_instructions_are_refused(content, tmp_path):
    refuse(archive(tmp_path / "evil.pt", content, {"data/0": struct.pack("<f", 1)}))


@pytest.mark.parametrize(
    "value",
    [
        *("no tensor", torch.device("cpu"), [torch.ones(1)], torch.ones(1).to_sparse(), torch.ones(1, device="meta")),
        *(declared(offset=1), declared(offset=-1), declared(size=(2,)), declared(size=(2,), stride=(-1,))),
        *(declared(size=(1 << 62,)), declared(size=(-1,)), declared(size=(1, 1))),
    ],
)
def test_other_values_are_refused(value, tmp_path):
    torch.save({"weight": declared()}, tmp_path / "fine.pt")
    assert converter.read_released(tmp_path / "fine.pt")["weight"].tolist() == [3.5]
    torch.save({"weight": value}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt")


def test_storages_of_another_size_than_declared(tmp_path):
    torch.save({"weight": torch.ones(4)}, tmp_path / "net.pt")
    content, records = records_of(tmp_path / "net.pt")
    for length in (0, 15, 17, 32):
        refuse(archive(tmp_path / "other.pt", content, records | {"data/0": bytes(length)}), "size")
    del records["data/0"]
    refuse(archive(tmp_path / "none.pt", content, records), "data/0")


def test_a_tensor_gets_no_memory_of_its_own(tmp_path):
    """With () as its state torch.load gives a tensor a storage that grows to any size, and does not fill it."""
    torch.save({"weight": torch.ones(4)}, tmp_path / "net.pt")
    content, records = records_of(tmp_path / "net.pt")
    start, end = content.index(b"ctorch._utils"), content.rindex(b"R") + 1
    fresh = content[start:end] + b")b"
    grown = content[start:end] + b"(" + fresh + b"K\x00J" + struct.pack("<i", 1 << 30) + b"\x85K\x01\x85tb"
    for tensor in (fresh, grown):
        refuse(archive(tmp_path / "evil.pt", b"}" + text("weight") + tensor + b"s", records), "not in it")


def test_a_shape_without_memory_never_gets_any(build_tiny, tmp_path):
    """Stride 0: 4 bytes that claim to be exabytes. The view is free; the network's shape then refuses it."""
    torch.save({"classifier.weight": declared(size=(1 << 60,), stride=(0,))}, tmp_path / "huge.pt")
    with pytest.raises(UserError, match=r"classifier\.weight"):
        converter.load_released(build_tiny(4), tmp_path / "huge.pt")


def test_trees_too_large_to_walk(save, build_tiny, tmp_path):
    def shared(net):
        for _ in range(25):  # both children of each are the same: 2 ** 25 paths
            net = nn.Sequential(net, net)
        return net

    def cycle(net):
        net._modules["again"] = net
        return net

    def chain(net):
        for _ in range(60):
            net = nn.Sequential(net)
        return net

    refuse(save(build_tiny(4), tmp_path / "shared.pt", wrap=shared), "in two places")
    refuse(save(build_tiny(4), tmp_path / "cycle.pt", wrap=cycle), "in two places")
    refuse(save(build_tiny(4), tmp_path / "chain.pt", wrap=chain), "no names")
    torch.save({"\x1b[31m": torch.ones(1)}, tmp_path / "escape.pt")
    refuse(tmp_path / "escape.pt", "no names")


def test_classes_of_the_released_names_stay_untouched(save, build_tiny, tmp_path, monkeypatch):
    def trap(*_):
        Path("pwned").touch()

    path = save(net := build_tiny(4), tmp_path / "net.pt")
    fake = types.ModuleType("network.deeplabv3p")
    members = dict.fromkeys(("__new__", "__init__", "__setstate__", "__setattr__", "__getattr__"), trap)
    fake.SingleNetwork = type("SingleNetwork", (), members)
    fake.__getattr__ = trap
    monkeypatch.setitem(sys.modules, "network.deeplabv3p", fake)
    monkeypatch.setattr(nn.Conv2d, "__init__", trap)
    monkeypatch.setattr(nn.Module, "__setstate__", trap)
    allowed = set(torch.serialization.get_safe_globals())
    assert_same(converter.read_released(path), net)
    assert not Path("pwned").exists() and set(torch.serialization.get_safe_globals()) == allowed


def test_archives_of_other_kinds(tmp_path):
    torch.save({"weight": torch.ones(4)}, tmp_path / "net.pt")
    fine, records = records_of(tmp_path / "net.pt")
    assert converter.read_released(archive(tmp_path / "0.pt", fine, records))["weight"].tolist() == [1] * 4
    refuse(archive(tmp_path / "a.pt", fine, records, folder="../../evil"), "other files")
    refuse(archive(tmp_path / "b.pt", fine, records, folder=f"{tmp_path}/evil"), "other files")
    refuse(archive(tmp_path / "c.pt", fine, records | {"../../evil": b"x"}), "other files")
    refuse(archive(tmp_path / "d.pt", fine, records | {"code/__torch__.py": b"x"}), "other files")
    big = archive(tmp_path / "e.pt", fine, records | {"byteorder": b"big", "data/0": struct.pack(">4f", 1, 2, 3, 4)})
    assert converter.read_released(big)["weight"].tolist() == [1, 2, 3, 4]
    bomb = records | {"data/1": bytes(1 << 26)}
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        refuse(archive(tmp_path / "f.pt", fine, bomb, compression=method), "compressed")
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as file:
        file.writestr("a/data.pkl", b"N.")
        file.writestr("b/data.pkl", b"N.")
    refuse(tmp_path / "g.pt", "other files")
    (tmp_path / "h.pt").write_bytes(b"")
    refuse(tmp_path / "h.pt", "not a zip file")
    with pytest.raises(UserError, match="no such file"):
        converter.read_released(tmp_path)


def test_a_second_pickle_is_checked_too(tmp_path):
    """Readers of zip files differ in which of two records of one name they take."""
    torch.save({"weight": torch.ones(4)}, tmp_path / "net.pt")
    fine, records = records_of(tmp_path / "net.pt")
    path = archive(tmp_path / "two.pt", fine, records)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + name("os", "system") + text(TOUCH) + b"\x85R.")
    refuse(path, "it names 'os.system'")


def test_damaged_files(save, build_tiny, tmp_path):
    """Cut anywhere, or one byte changed anywhere: read unchanged (a byte that means nothing), or refused."""
    net, rng = build_tiny(4), random.Random(0)
    whole, path = save(net, tmp_path / "net.pt").read_bytes(), tmp_path / "damaged.pt"
    for _ in range(60):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        refuse(path)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            state = converter.read_released(path)
        except UserError:
            continue
        assert_same(state, net)


def test_damaged_pickles(save, build_tiny, tmp_path):
    """The same inside the pickle, where no checksum helps: a UserError or tensors, never anything else."""
    rng = random.Random(0)
    whole, records = records_of(save(build_tiny(4), tmp_path / "net.pt"))
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        try:
            state = converter.read_released(archive(tmp_path / "damaged.pt", bytes(damaged), records))
        except UserError:
            continue
        assert all(type(value) is torch.Tensor for value in state.values())
    assert not Path("pwned").exists()


def test_files_older_than_pytorch_16_are_refused(save, build_tiny, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        refuse(save(build_tiny(4), tmp_path / "old.pt", _use_new_zipfile_serialization=False), "not a zip file")
