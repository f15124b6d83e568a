"""Saving and loading what a run must not lose: atomic, with checksums, never unpickling code."""

import hashlib
import json
import os
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from utils.errors import UserError, naming
from utils.files import atomic_write

DIGEST_SIZE = 32  # bytes of a SHA-256
NOT_OURS = "is damaged or not of this project"
PACKAGES = ("torch", "torchvision", "timm", "monai", "numpy", "nibabel", "scikit-image")


def save_checkpoint(folder: Path, state: dict) -> None:
    """Save `state` as last.pt; the checkpoint before it stays as previous.pt."""
    last, previous = folder / "last.pt", folder / "previous.pt"
    with atomic_write(last) as temporary:
        problem = f"cannot be written, with {shutil.disk_usage(folder).free / 1e9:.1f} GB free"
        remedy = "; the earlier state is intact. Make room, and the same command goes on from there"
        with naming(last, problem, errors=RuntimeError, remedy=remedy):  # by a full disk
            torch.save(state, temporary)
        _seal(temporary)
        if last.exists():
            os.replace(last, previous)


def _seal(path: Path) -> None:
    """Append its SHA-256 to a file of torch.save, as the comment of that ZIP archive.

    PyTorch verifies no checksums, and ZIP's do not cover the directory.
    """
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(DIGEST_SIZE.to_bytes(2, "little"))  # length of the comment
        file.seek(0)
        file.write(hashlib.file_digest(file, "sha256").digest())


def _check_seal(path: Path) -> None:
    content = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(content[:-DIGEST_SIZE]).digest() != content[-DIGEST_SIZE:].tobytes():
        raise ValueError("its checksum is wrong")


def load_checkpoint(folder: Path) -> dict | None:
    """Load last.pt, or else previous.pt; None without both, UserError when none can be read."""
    problems = []
    for path in filter(Path.exists, (folder / "last.pt", folder / "previous.pt")):
        try:
            with naming(path, "is damaged or no checkpoint"):
                _check_seal(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
        except UserError as error:
            if isinstance(error.__cause__, PermissionError):  # not damaged
                raise
            problems.append(str(error))
        else:
            for problem in problems:
                print(f"warning: {problem}; resuming from {path}")
            return state
    if problems:
        raise UserError("; ".join(problems) + ". Begin anew with --restart")
    return None


def save_networks(path: Path, nets: list[nn.Module], metadata: dict) -> None:
    """Save both networks' weights, keys prefixed "0." and "1.", with `metadata` as JSON."""
    tensors = {key: value.cpu().contiguous() for key, value in nn.ModuleList(nets).state_dict().items()}
    text = json.dumps(metadata)
    with atomic_write(path) as temporary, naming(path, "cannot be written", errors=SafetensorError):
        save_file(tensors, temporary, metadata={"semidg": text, "sha256": _digest(text, tensors)})


def read_networks(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return metadata and tensors of `save_networks`; UserError if missing, damaged or not ours."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the run has not ended its first epoch, or the folder is no run's")
    with naming(path, NOT_OURS):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        if metadata["sha256"] != _digest(metadata["semidg"], tensors):
            raise ValueError("its checksum is wrong")
        return json.loads(metadata["semidg"]), tensors


def read_metadata(path: Path) -> dict:
    """Return what was saved beside the weights; raises as `read_networks`."""
    return read_networks(path)[0]


def load_networks(path: Path, nets: list[nn.Module]) -> None:
    """Load what `save_networks` wrote; raises as `read_networks`, also for other networks."""
    tensors = read_networks(path)[1]
    with naming(path, NOT_OURS):
        nn.ModuleList(nets).load_state_dict(tensors)


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].reshape(-1).numpy())
    return digest.hexdigest()


def provenance() -> dict:
    """Return the code's git commit ("+" where it was changed since) and the packages' versions."""
    describe, commit = ["git", "describe", "--always", "--dirty=+"], None
    with suppress(OSError, subprocess.CalledProcessError):  # no git here, or no repository
        here = {"cwd": Path(__file__).resolve().parent, "stderr": subprocess.DEVNULL}
        commit = subprocess.check_output(describe, text=True, **here).strip()
    return {"git_commit": commit, "versions": {name: version(name) for name in PACKAGES}}


def run_metadata(dataset, config: dict, reference: torch.Tensor | None, data_info: dict, **facts) -> dict:
    """Return what is saved beside the weights of a run.

    `dataset` is its DatasetInfo, `reference` the (256,) quantile curve that histograms are matched to,
    `data_info` of the prepared data, {} where unknown. Facts are "selection" (the rule that chose the
    weights), their "step", beta then ("cps_weight"), "seen" (the patients that they have learnt from, by
    checksum of a frame) and "labeled" (the domain of each labelled one).
    """
    return {
        "dataset": dataset.key,
        "class_names": list(dataset.class_names),
        "spacing_mm": dataset.spacing,
        "reference": None if reference is None else reference.tolist(),
        "config": config,
        "content_hash": data_info.get("content_hash"),
        "phantom": data_info.get("phantom", False),
        **facts,
        **provenance(),
    }
