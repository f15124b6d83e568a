"""Turn the method's released checkpoints, whole pickled modules, into a run folder that inference accepts.

python -m utils.convert_released L.pt R.pt --out runs/released_D --dataset mms --test-domain D --data data/mms

A pickle is a program. This reader runs none of it: it knows the few instructions that `torch.save` writes, and every
name that a released network holds becomes a stand-in that only keeps what it is given. Any other name is refused
(https://docs.python.org/3/library/pickle.html#restricting-globals).
"""

import io
import pickle
import re
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from utils.run.checkpoint import provenance, save_networks

DATASETS = {"mms": (MMS, mms_dataloader.DATASET), "scgm": (SCGM, scgm_dataloader.DATASET)}
SELECTION = "the method's released weights, converted: neither trained nor selected here"
FILE_LIMIT = 1 << 30  # bytes; a released network has 162 MB
PICKLE_LIMIT = 1 << 20  # bytes of the file's pickle, which holds no weights; a released network has 0.1 MB
DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
          "LongStorage": torch.int64}  # fmt: skip
GLOBALS = frozenset({
    ("network.deeplabv3p", "SingleNetwork"), ("network.deeplabv3p", "Head"), ("network.deeplabv3p", "ASPP"),
    ("network.deeplabv3p", "Normalize"), ("network.resnet", "ResNet"), ("network.resnet", "Bottleneck"),
    ("torch.nn.modules.activation", "LeakyReLU"), ("torch.nn.modules.activation", "ReLU"),
    ("torch.nn.modules.batchnorm", "BatchNorm2d"), ("torch.nn.modules.batchnorm", "SyncBatchNorm"),
    ("torch.nn.modules.container", "ModuleList"), ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.conv", "Conv2d"), ("torch.nn.modules.dropout", "Dropout2d"),
    ("torch.nn.modules.loss", "CrossEntropyLoss"), ("torch.nn.modules.pooling", "MaxPool2d"),
    ("torch.nn.parallel.data_parallel", "DataParallel"), ("torch", "device"), ("torch", "Size"),
    ("torch", "FloatStorage"), ("torch", "DoubleStorage"), ("torch", "HalfStorage"), ("torch", "LongStorage"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"), ("builtins", "set"), ("__builtin__", "set"),  # protocol 2 says it as Python 2
})  # fmt: skip
OPCODES = (  # of protocol 2, as far as torch.save writes them
    "PROTO STOP MARK GLOBAL REDUCE BUILD NEWOBJ BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT "
    "BINGET LONG_BINGET"
)


class Inert:
    """Stands for whatever the pickle names: keeps arguments and state, does nothing."""

    path = ""
    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any):
        if len(args) > 7:  # what a tensor takes; a long tuple given again and again would fill the memory
            raise ValueError(f"{self.path} with {len(args)} arguments")
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertDict(dict):
    """Stands for dict and OrderedDict. Simple keys only: hashing a deeply nested tuple would overflow the C stack."""

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int):
            raise ValueError(f"a dictionary's key of type {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """State dicts carry version numbers of their modules: not needed."""


STAND_INS = {pair: type(pair[1], (Inert,), {"path": ".".join(pair)}) for pair in GLOBALS}
STAND_INS["collections", "OrderedDict"] = InertDict


class Storage(NamedTuple):
    """Where a tensor's numbers lie in the file."""

    dtype: torch.dtype
    key: str
    numel: int


# Python's own implementation, not the C one: its instructions can be chosen, and a huge memo index takes no memory.
class Reader(pickle._Unpickler):
    """Reads one pickle into plain values and stand-ins."""

    def _refuse(self) -> None:
        raise ValueError("an instruction that torch.save does not write")

    dispatch = dict.fromkeys(range(256), _refuse)
    dispatch |= {code: pickle._Unpickler.dispatch[code] for name in OPCODES.split() for code in getattr(pickle, name)}
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(InertDict())

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in GLOBALS:
            raise ValueError(f"it names {f'{module}.{name}'[:80]!a}")
        return STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", type() as kind, str(key), str(), int(numel)):
                return Storage(DTYPES[kind.__name__], key, numel)
        raise ValueError("a reference to something else than a storage")


def read_released(path: Path) -> dict[str, torch.Tensor]:
    """The parameters and buffers, by name, of a pickled module or of a plain state dict.

    Reads the zip format (torch.serialization._save). The release trains with torch.cuda.amp, which came with it in
    PyTorch 1.6. Tensors are views of what the file holds: no shape that it declares takes memory before it is copied.

    Raises:
        UserError: the file is missing, damaged or anything else. Nothing was executed, nothing written.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give both networks of a release, l_NAME.pt and r_NAME.pt")
    try:
        content = _read_archive(path)
        state = {key: _tensor(record, content) for key, record in _flatten(_read_pickle(content)).items()}
        if not state:
            raise ValueError("no tensors in it")
    except Exception as error:  # damaged files raise a dozen kinds
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{path}: refused, damaged or no released network ({type(error).__name__}: {reason}); nothing in it was run"
        ) from error
    wrapped = all(key.startswith("module.") for key in state)  # by DataParallel
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}


def _read_archive(path: Path) -> dict[str, bytearray]:
    """Records of the archive by name below its one folder; nothing is unpacked to the disk."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        names = [re.fullmatch(r"([^/\\]+)/(data\.pkl|version|byteorder|\.?data/\w+|\.\w+)", f.filename) for f in files]
        if not all(names) or len({name[1] for name in names}) != 1:
            raise ValueError("other files than torch.save writes")
        # Records that are packed, or lie over one another, would unfold to more than the file's size.
        if sum(f.file_size for f in files) > min(path.stat().st_size, FILE_LIMIT):
            raise ValueError("compressed or too large")
        return {name[2]: bytearray(archive.read(file)) for name, file in zip(names, files, strict=True)}


def _read_pickle(content: dict[str, bytearray]) -> Any:
    if len(content["data.pkl"]) > PICKLE_LIMIT or content.get("byteorder", b"little") != b"little":
        raise ValueError("too large a pickle, or big-endian numbers")
    return Reader(io.BytesIO(content["data.pkl"])).load()


def _flatten(root: Any) -> dict[str, Any]:
    """Parameters and buffers by dotted name of a tree of stand-ins for modules; a state dict as it is."""
    if isinstance(root, InertDict):
        return {_key("", name): value for name, value in root.items()}
    found, modules, seen = {}, [("", root)], set()
    while modules:
        prefix, module = modules.pop()
        if id(module) in seen:  # a tree that shares its branches may be too large to walk
            raise ValueError("a module in two places")
        seen.add(id(module))
        members = module.state
        modules += [(_key(prefix, name) + ".", m) for name, m in members["_modules"].items() if m is not None]
        for kind in ("_parameters", "_buffers"):
            found |= {_key(prefix, name): value for name, value in members[kind].items() if value is not None}
    return found


def _key(prefix: str, name: str) -> str:
    if not re.fullmatch(r"[\w.]{1,200}", key := f"{prefix}{name}"):
        raise ValueError("no names of parameters")
    return key


def _tensor(record: Any, content: dict[str, bytearray]) -> torch.Tensor:
    """The tensor that a stand-in for its rebuilding describes, as a view of its storage."""
    if isinstance(record, Inert) and record.path == "torch._utils._rebuild_parameter":
        record = record.args[0]
    if not isinstance(record, Inert) or record.path != "torch._utils._rebuild_tensor_v2":
        raise ValueError("it does not map names to tensors")
    storage, offset, size, stride = record.args[:4]
    numbers = content[f"data/{storage.key}"]
    if len(numbers) != storage.numel * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key!a} is of another size than declared")
    return torch.frombuffer(numbers, dtype=storage.dtype).as_strided(size, stride, offset)  # which checks the bounds


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
    metadata = {  # as Trainer.metadata
        "dataset": info.key,
        "class_names": list(info.class_names),
        "spacing_mm": info.spacing,
        "reference": torch.from_numpy(loaders.reference).mean(0).tolist() if cfg.histogram_matching else None,
        "config": config,
        "selection": SELECTION,
        "step": "unknown",
        "cps_weight": cfg.cps_weight,
        "content_hash": loaders.data.info["content_hash"] if loaders else None,
        "phantom": bool(loaders and loaders.data.info["phantom"]),
        **provenance(),
    }
    with folder_lock(out):
        require_space(out, sum(p.numel() * p.element_size() for net in nets for p in net.parameters()))
        outputs = OutputFolder(out)
        save_networks(outputs.claim("best.safetensors"), nets, metadata)
        write_json(outputs.claim("config.json"), config)
    if base.histogram_matching and not cfg.histogram_matching:
        print("histogram matching is off: it needs the quantile curve of the source data, give their folder by --data")
    print(f"{out}: python inference_{dataset}.py --run {out} --data-root {cfg.data_root}")


if __name__ == "__main__":
    with clear_errors():
        tyro.cli(convert_released)
