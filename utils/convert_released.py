"""The method's released checkpoints, pickled modules, as a run folder (docs/method.md).

A pickle is a program: it is read only if it names nothing but networks' classes and their values.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tyro.conf import Positional

import mms_dataloader
import scgm_dataloader
from config import MMS, SCGM
from network import build_network
from utils.data.loaders import build_loaders
from utils.errors import UserError, clear_errors, first_line
from utils.files import OutputFolder, write_json
from utils.run.checkpoint import run_metadata, save_networks

# What a released network names, as "module name": classes, each read as a StandIn, and what
# torch.load makes itself. It would make more, and whatever libraries have allowed it.
CLASSES = {f"{module} {name}" for module, names in {
    "network.deeplabv3p": "SingleNetwork Head ASPP Normalize", "network.resnet": "ResNet Bottleneck",
    "torch.nn.modules.activation": "LeakyReLU ReLU", "torch.nn.modules.batchnorm": "BatchNorm2d SyncBatchNorm",
    "torch.nn.modules.container": "ModuleList Sequential", "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.dropout": "Dropout2d", "torch.nn.modules.loss": "CrossEntropyLoss",
    "torch.nn.modules.pooling": "MaxPool2d", "torch.nn.parallel.data_parallel": "DataParallel",
}.items() for name in names.split()}  # fmt: skip
VALUES = {
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage", "torch HalfStorage",
    "torch LongStorage", "torch Size", "torch device", "collections OrderedDict", "__builtin__ set",
}  # fmt: skip


class StandIn:
    """Stands for every class: takes no arguments, keeps its attributes, does nothing."""


def read_released(path: Path) -> dict[str, torch.Tensor]:
    """Return a pickled module's or state dict's tensors by name, on the CPU; else raise UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give both networks of a release, l_NAME.pt and r_NAME.pt")
    try:
        content = torch.PyTorchFileReader(str(path)).get_record("data.pkl")  # as torch.load
        names = {value for opcode, value, _ in pickletools.genops(content) if opcode.name == "GLOBAL"}
        if others := names - CLASSES - VALUES:
            raise ValueError(f"it names {min(others).replace(' ', '.')}")
        with torch.serialization.safe_globals([(StandIn, name.replace(" ", ".")) for name in CLASSES]):
            root = torch.load(path, map_location="cpu", weights_only=True)
        state = root if isinstance(root, dict) else dict(_named_tensors(root))
        tensors = {key.removeprefix("module."): value.detach() for key, value in state.items()}  # by DataParallel
        if not tensors or not all(key.isprintable() for key in tensors):
            raise ValueError("it does not map names to tensors")
    except Exception as error:  # damaged files raise a dozen kinds
        # One sentence: the next may advise weights_only=False. ASCII: the file could steer the terminal.
        reason = f"{type(error).__name__}: {first_line(error).split('. ')[0][:200]!a}"
        raise UserError(f"{path}: refused, damaged or no released network ({reason}); nothing in it was run") from error
    return tensors


def _named_tensors(module: StandIn, prefix: str = "") -> Iterator:
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(module)[kind].items():
            if isinstance(value, StandIn):
                yield from _named_tensors(value, f"{prefix}{name}.")
            elif value is not None:
                yield f"{prefix}{name}", value


def convert_released(
    left: Positional[Path], right: Positional[Path], /, out: Path, dataset: Literal["mms", "scgm"], test_domain: str,
    ratio: float | None = None, data: Path | None = None,
) -> None:  # fmt: skip
    """Turn the method's released checkpoints into a run folder that inference accepts.

    Args:
        left: file of one network.
        right: file of the other.
        out: run folder to make.
        dataset: data set of their training.
        test_domain: domain that their training never saw.
        ratio: share of the patients that was labelled; by default 0.02 (mms) or 0.2 (scgm).
        data: prepared folder, for the source domains' quantile curve; without, histogram matching is off.
    """
    base, info = (MMS, mms_dataloader.DATASET) if dataset == "mms" else (SCGM, scgm_dataloader.DATASET)
    if test_domain not in info.domains:
        raise UserError(f"--test-domain {test_domain}: {info.name} has {', '.join(info.domains)}")
    if any((out / name).exists() for name in ("config.json", "best.safetensors", "last.pt")):
        raise UserError(f"{out} holds a run: choose another --out")
    cfg = replace(base, test_domain=test_domain, ratio=base.ratio if ratio is None else ratio)
    cfg = replace(cfg, data_root=str(data or base.data_root), histogram_matching=bool(data and base.histogram_matching))
    # No batch is read; even a small folder has one of this size.
    loaders = build_loaders(replace(cfg, batch_size=2, workers=0), info) if data else None
    nets = [build_network(len(info.class_names)) for _ in range(2)]
    for net, path in zip(nets, (left, right), strict=True):
        try:
            net.load_state_dict(read_released(path))
        except RuntimeError as error:
            raise UserError(f"{path} does not fit the network; is --dataset right?\n{str(error)[:2000]}") from error
        if not all(value.isfinite().all() for value in net.state_dict().values()):
            raise UserError(f"{path} is damaged: its weights are not all finite numbers")
        for parameter in net.classifier.parameters():
            parameter.data = parameter.data.roll(1, 0)  # the background comes last there
    config = asdict(cfg) | {"run_name": out.name, "out_root": str(out.parent)}
    reference = torch.from_numpy(loaders.reference).mean(0) if cfg.histogram_matching else None
    selection = "the method's released weights, converted: neither trained nor selected here"
    origin = {"selection": selection, "step": "unknown", "cps_weight": cfg.cps_weight, "seen": {}, "labeled": {}}
    metadata = run_metadata(info, config, reference, loaders.data.info if loaders else {}, **origin)
    outputs = OutputFolder(out)
    save_networks(outputs.claim("best.safetensors"), nets, metadata)
    write_json(outputs.claim("config.json"), config)
    if base.histogram_matching and data is None:
        print("histogram matching is off: it needs the source data's quantile curve, give their folder by --data")
    print(f"{out}: python inference_{dataset}.py --run {out} --data-root {cfg.data_root}")


if __name__ == "__main__":
    with clear_errors():
        tyro.cli(convert_released)
