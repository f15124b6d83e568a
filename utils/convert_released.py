"""Turn the method's released checkpoints, whole pickled modules, into a run folder that inference accepts.

python -m utils.convert_released L.pt R.pt --out runs/released_D --dataset mms --test-domain D --data data/mms

A pickle is a program. Before `torch.load(weights_only=True)` reads one, every name in it is compared with the few
that a released network holds, and each class among them becomes a stand-in that only keeps its attributes.
"""

import io
import pickle
import pickletools
import re
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from tyro.conf import Positional

import mms_dataloader
import scgm_dataloader
from config import MMS, SCGM
from network import build_network
from utils.data.loaders import build_loaders
from utils.errors import UserError, clear_errors
from utils.files import OutputFolder, folder_lock, require_space, write_json
from utils.run.checkpoint import run_metadata, save_networks

DATASETS = {"mms": (MMS, mms_dataloader.DATASET), "scgm": (SCGM, scgm_dataloader.DATASET)}
SELECTION = "the method's released weights, converted: neither trained nor selected here"
FILE_LIMIT = 1 << 30  # bytes; a released network has 162 MB
PICKLE_LIMIT = 1 << 18  # bytes of the file's pickle, which holds no weights; a released network has 0.1 MB
TEXT_LIMIT = 100  # characters of a text in the pickle; a released network has 32
TUPLE_LIMIT = 1 << 14  # a released network has 2,200
MODULES = frozenset({  # "module name", without prefixes or patterns
    "network.deeplabv3p SingleNetwork", "network.deeplabv3p Head", "network.deeplabv3p ASPP",
    "network.deeplabv3p Normalize", "network.resnet ResNet", "network.resnet Bottleneck",
    "torch.nn.modules.activation LeakyReLU", "torch.nn.modules.activation ReLU",
    "torch.nn.modules.batchnorm BatchNorm2d", "torch.nn.modules.batchnorm SyncBatchNorm",
    "torch.nn.modules.container ModuleList", "torch.nn.modules.container Sequential",
    "torch.nn.modules.conv Conv2d", "torch.nn.modules.dropout Dropout2d", "torch.nn.modules.loss CrossEntropyLoss",
    "torch.nn.modules.pooling MaxPool2d", "torch.nn.parallel.data_parallel DataParallel",
})  # fmt: skip
VALUES = frozenset({  # torch.load makes these itself; it knows more names, which no released network holds
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage", "torch DoubleStorage",
    "torch HalfStorage", "torch LongStorage", "torch Size", "torch device", "collections OrderedDict", "builtins set",
    "__builtin__ set",  # as protocol 2 writes it
})  # fmt: skip


class StandIn:
    """Stands for every module: takes no arguments, keeps its attributes and does nothing."""


def read_released(path: Path) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers, by name, of a pickled module or of a plain state dict.

    The file has the zip format of PyTorch 1.6 or later, which torch.cuda.amp, used by the release, came with. Tensors
    are dense and on the CPU; those that shared a storage still do, so no shape takes memory before it is copied.

    Raises:
        UserError: the file is missing, damaged or anything else. Nothing was executed, nothing written.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give both networks of a release, l_NAME.pt and r_NAME.pt")
    try:
        archive = _checked_archive(path)
        with torch.serialization.safe_globals([(StandIn, name.replace(" ", ".")) for name in MODULES]):
            state = _flatten(torch.load(archive, map_location="cpu", weights_only=True))
        if not state or any(type(value) not in (torch.Tensor, nn.Parameter) for value in state.values()):
            raise ValueError("it does not map names to tensors")
        if any(value.untyped_storage().resizable() for value in state.values()):
            raise ValueError("a tensor whose numbers are not in it")  # but in fresh memory, as large as it declares
    except Exception as error:  # damaged files raise a dozen kinds
        reason = (str(error).splitlines() or [""])[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # whose text advises weights_only=False
            reason = "an instruction that torch.save does not write"
        reason = re.sub(r"[^ -~]", "?", reason)  # the file's own characters could steer the terminal
        raise UserError(
            f"{path}: refused, damaged or no released network ({type(error).__name__}: {reason}); nothing in it was run"
        ) from error
    wrapped = all(key.startswith("module.") for key in state)  # by DataParallel
    return {key.removeprefix("module.") if wrapped else key: value.detach() for key, value in state.items()}


def _checked_archive(path: Path) -> io.BytesIO:
    """Return the file's records after their check, packed anew: torch.load reads what was checked and nothing else."""
    checked = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
        files = archive.infolist()
        names = [re.fullmatch(r"([^/\\]+)/(data\.pkl|version|byteorder|\.?data/\w+|\.\w+)", f.filename) for f in files]
        if not all(names) or len({name[1] for name in names}) != 1:
            raise ValueError("other files than torch.save writes")
        # Records that are packed, or lie over one another, would unfold to more than the file's size.
        size = sum(file.file_size for file in files)
        if any(file.compress_type for file in files) or size > min(path.stat().st_size, FILE_LIMIT):
            raise ValueError("compressed or too large")
        for name, file in zip(names, files, strict=True):
            record = archive.read(file)
            if name[2] == "data.pkl":
                _check_pickle(record)
            copy.writestr(f"archive/{name[2]}", record)
    checked.seek(0)
    return checked


def _check_pickle(content: bytes) -> None:
    """Refuse names that a released network does not hold, and what torch.load would not bound.

    torch.load hashes or prints what it is given, so that deep tuples overflow the C stack, and containers or long texts
    which the pickle repeats unfold to more than memory and time allow. What cannot unfold may be repeated: names, short
    texts, tuples of few numbers (as a literal in the network's code), and modules, which print as an address.
    """
    if len(content) > PICKLE_LIMIT:
        raise ValueError("too large a pickle")
    names = MODULES | VALUES
    numbers = {"BININT", "BININT1", "BININT2", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"}
    memo, past, tuples = {}, ["", ""], 0  # past: what each instruction left on the stack; a name or a kind of object
    for opcode, value, _ in pickletools.genops(content):
        made = opcode.name
        if made.endswith("PUT"):
            memo[value] = past[-1]
            continue
        if made == "GLOBAL":
            made = value
            if value not in names:
                raise ValueError(f"it names {value.replace(' ', '.')[:80]!a}")
        elif made.endswith("GET"):
            made = memo[value]
            if made not in names and made not in ("BINUNICODE", "module", "numbers"):
                raise ValueError("it repeats an object")
        elif made == "NEWOBJ" and past[-1] == "EMPTY_TUPLE" and past[-2] in MODULES:
            made = "module"
        elif made in ("TUPLE1", "TUPLE2", "TUPLE3") and numbers.issuperset(past[-int(made[-1]) :]):
            made = "numbers"
        tuples += opcode.name.startswith("TUPLE")
        if tuples > TUPLE_LIMIT or len(str(value)) > TEXT_LIMIT:
            raise ValueError("more tuples or a longer text than a network has")
        past.append(made)


def _flatten(root: Any) -> dict[str, Any]:
    """Return parameters and buffers by dotted name of a tree of stand-ins for modules; a state dict as it is."""
    if isinstance(root, dict):
        return {_key("", name): value for name, value in dict.items(root)}
    found, modules, seen = {}, [("", root)], set()
    while modules:
        prefix, module = modules.pop()
        if id(module) in seen:  # a tree that shares its branches may be too large to walk
            raise ValueError("a module in two places")
        seen.add(id(module))
        # dict.items, as the file may have given a dictionary its own "items".
        children, *tensors = [dict.items(vars(module)[kind]) for kind in ("_modules", "_parameters", "_buffers")]
        modules += [(_key(prefix, name) + ".", child) for name, child in children if child is not None]
        found |= {_key(prefix, name): value for items in tensors for name, value in items if value is not None}
    return found


def _key(prefix: str, name: str) -> str:
    if not re.fullmatch(rf"[\w.]{{1,{TEXT_LIMIT}}}", key := f"{prefix}{name}"):
        raise ValueError("no names of parameters")
    return key


def load_released(net: nn.Module, path: Path) -> None:
    """Load a released file into `net`; UserError, naming the keys, when it does not fit."""
    try:
        net.load_state_dict(read_released(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network; is --dataset right?\n{str(error)[:2000]}") from error
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise UserError(f"{path} is damaged: its weights are not all finite numbers")
    for parameter in net.classifier.parameters():
        parameter.data = parameter.data.roll(1, 0)  # the background comes last there, and first here


def convert_released(
    left: Positional[Path],
    right: Positional[Path],
    /,
    out: Path,
    dataset: Literal["mms", "scgm"],
    test_domain: str,
    ratio: float | None = None,
    data: Path | None = None,
) -> None:
    """Turn the method's released checkpoints into a run folder that inference accepts.

    Args:
        left: file of one network.
        right: file of the other.
        out: run folder to make.
        dataset: what they were trained on.
        test_domain: the domain that their training never saw.
        ratio: share of the patients that was labelled; by default 0.02 (mms) or 0.2 (scgm).
        data: prepared folder for the source domains' quantile curve; without it histogram matching is off.
    """
    base, info = DATASETS[dataset]
    if test_domain not in info.domains:
        raise UserError(f"--test-domain {test_domain}: {info.name} has {', '.join(info.domains)}")
    if any((out / name).exists() for name in ("config.json", "best.safetensors", "last.pt")):
        raise UserError(f"{out} holds a run: choose another --out")
    ratio = base.ratio if ratio is None else ratio
    cfg = replace(base, test_domain=test_domain, ratio=ratio, data_root=str(data or base.data_root))
    # The smallest batch, as none is read: also a small folder has one.
    loaders = build_loaders(replace(cfg, batch_size=2, workers=0), info) if data else None
    cfg = replace(cfg, histogram_matching=cfg.histogram_matching and loaders is not None)
    nets = [build_network(len(info.class_names)) for _ in range(2)]
    for net, path in zip(nets, (left, right), strict=True):
        load_released(net, path)
    config = asdict(cfg) | {"run_name": out.name, "out_root": str(out.parent)}
    metadata = run_metadata(
        info,
        config,
        torch.from_numpy(loaders.reference).mean(0) if cfg.histogram_matching else None,
        loaders.data.info if loaders else {},
        selection=SELECTION,
        step="unknown",
        cps_weight=cfg.cps_weight,
    )
    with folder_lock(out):
        require_space(out, sum(p.nbytes for net in nets for p in net.parameters()))
        outputs = OutputFolder(out)
        save_networks(outputs.claim("best.safetensors"), nets, metadata)
        write_json(outputs.claim("config.json"), config)
    if base.histogram_matching and not cfg.histogram_matching:
        print("histogram matching is off: it needs the quantile curve of the source data, give their folder by --data")
    print(f"{out}: python inference_{dataset}.py --run {out} --data-root {cfg.data_root}")


if __name__ == "__main__":
    with clear_errors():
        tyro.cli(convert_released)
