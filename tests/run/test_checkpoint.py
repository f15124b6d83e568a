"""Checkpoints: damaged ones are noticed, hostile ones never executed, and a failed write costs nothing."""

import io
import os
import pickle
import subprocess
import zipfile

import pytest
import torch
from torch import nn

from utils.errors import UserError, clear_errors
from utils.files import folder_lock, require_space, write_json
from utils.run.checkpoint import (
    load_checkpoint,
    load_networks,
    provenance,
    read_metadata,
    save_checkpoint,
    save_networks,
)


def state(step):
    return {"step": step, "networks": [{"weight": torch.full((1000,), float(step))}], "name": "x"}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    return tmp_path


def test_last_and_previous_are_kept_whatever_a_killed_save_left(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        (tmp_path / ".tmp-last.pt").write_bytes(b"half a checkpoint")
        save_checkpoint(tmp_path, state(step))
        assert load_checkpoint(tmp_path)["step"] == step
        if step > 1:
            assert torch.load(tmp_path / "previous.pt", weights_only=True)["step"] == step - 1
            assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]
    (tmp_path / ".tmp-last.pt").write_bytes(b"half a checkpoint")
    assert load_checkpoint(tmp_path)["step"] == 3


def hostile(content):
    evil = type("Evil", (), {"__reduce__": lambda self: (os.system, ("touch executed",))})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"step": evil()}, protocol=2))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def flipped(content, mark, offset, bit):
    content = bytearray(content)
    content[content.index(mark) + offset] ^= bit
    return content


WEIGHT = torch.full((1000,), 2.0)
DAMAGES = {
    "truncated": lambda content: content[:-500],
    "empty": lambda content: b"",
    "hostile": hostile,
    # A bit of the weights, which PyTorch alone would load without a word.
    "weights": lambda content: flipped(content, WEIGHT.numpy().tobytes(), 1234, 4),
    # An offset in the archive's directory, which no checksum of ZIP covers: PyTorch would load other values.
    "directory": lambda content: flipped(content, b"PK\x01\x02", 42, 16),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_last_falls_back_to_previous(folder, kind, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "last.pt").write_bytes(DAMAGES[kind]((folder / "last.pt").read_bytes()))
    if kind == "weights":
        assert not torch.equal(torch.load("last.pt", weights_only=True)["networks"][0]["weight"], WEIGHT)
    assert load_checkpoint(folder)["step"] == 1
    out = capsys.readouterr().out
    assert f"{folder / 'last.pt'} is damaged" in out and f"resuming from {folder / 'previous.pt'}" in out
    (folder / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.pt is damaged.*previous\.pt is damaged.*--restart"):
        load_checkpoint(folder)
    assert not (folder / "executed").exists()


def test_full_disk_leaves_the_earlier_state(small_disk):
    save_checkpoint(small_disk, state(1))
    large = {"step": 2, "weight": torch.zeros(1_000_000)}
    with pytest.raises(UserError, match=r"last\.pt cannot be written"):
        save_checkpoint(small_disk, large)
    assert load_checkpoint(small_disk)["step"] == 1 and os.listdir(small_disk) == ["last.pt"]
    with pytest.raises(UserError, match=r"best\.safetensors:? cannot be written"):
        save_networks(small_disk / "best.safetensors", [nn.Linear(1000, 1000)], {})
    with pytest.raises(UserError, match="cannot be written"):
        write_json(small_disk / "config.json", "x" * 2_000_000)
    assert os.listdir(small_disk) == ["last.pt"]
    with pytest.raises(UserError, match=r"checkpoints take 0\.0 GB, only 0\.0 GB are free"):
        require_space(small_disk, 2_000_000)


def test_read_only_folder_is_named_and_its_state_loads(small_disk):
    save_checkpoint(small_disk, state(1))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"last\.pt: cannot be written"):
        save_checkpoint(small_disk, state(2))
    with pytest.raises(UserError, match=r"best\.safetensors:? cannot be written"):
        save_networks(small_disk / "best.safetensors", [nn.Linear(2, 2)], {})
    with pytest.raises(UserError, match="cannot be written"), folder_lock(small_disk):
        pass
    assert load_checkpoint(small_disk)["step"] == 1


def test_disk_that_refuses_is_a_message(small_disk, capsys):
    """Whatever writes: the log, a picture."""
    with pytest.raises(SystemExit, match=r"error: .*No space left on device"), clear_errors():
        (small_disk / "x").write_bytes(b"x" * 2_000_000)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SystemExit, match=r"error: .*y: Read-only file system"), clear_errors():
        (small_disk / "y").touch()


def test_networks_come_back(tmp_path):
    nets = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)) for _ in range(2)]
    save_networks(tmp_path / "best.safetensors", nets, {"classes": ["a", "b"], "reference": None})
    assert read_metadata(tmp_path / "best.safetensors") == {"classes": ["a", "b"], "reference": None}
    others = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)) for _ in range(2)]
    load_networks(tmp_path / "best.safetensors", others)
    for net, other in zip(nets, others, strict=True):
        for key, value in net.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])


def test_flipped_bits_of_the_networks_are_noticed(tmp_path):
    """Names, types, shapes, metadata (the voxel size, say) and weights: every byte of the file, three bits each."""
    path, nets = tmp_path / "best.safetensors", [nn.Linear(3, 2), nn.Linear(3, 2)]
    save_networks(path, nets, {"spacing_mm": 1.1, "config": {"image_size": 288}})
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(len(content)):
        for bit in (1, 4, 32):
            changed = bytearray(content)
            changed[position] ^= bit
            path.write_bytes(changed)
            with pytest.raises(UserError, match="." if position < header else "its checksum is wrong"):
                load_networks(path, nets)
    path.write_bytes(content.replace(b"1.1", b"1.3"))
    with pytest.raises(UserError, match="its checksum is wrong"):
        read_metadata(path)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_networks(tmp_path / "best.safetensors", [nn.Linear(2, 2)], {})
        save_checkpoint(tmp_path, state(1))
        write_json(tmp_path / "config.json", {})
    finally:
        os.umask(before)
    for name in ("best.safetensors", "last.pt", "config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_weights_of_another_user_are_not_called_damaged(tmp_path, monkeypatch):
    save_networks(tmp_path / "best.safetensors", [nn.Linear(2, 2)], {})

    def refuse(*args, **kwargs):  # the tests may run as root, who reads everything
        raise PermissionError(13, "Permission denied")

    save_checkpoint(tmp_path, state(1))
    monkeypatch.setattr("utils.run.checkpoint._check_seal", refuse)
    with pytest.raises(UserError, match=r"last\.pt: permission denied: ask its owner"):
        load_checkpoint(tmp_path)
    monkeypatch.setattr("utils.run.checkpoint.safe_open", refuse)
    with pytest.raises(UserError, match=r"best\.safetensors: permission denied: ask its owner"):
        read_metadata(tmp_path / "best.safetensors")


def test_provenance_names_packages_and_code_if_there_is_git(monkeypatch):
    found = provenance()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"git_commit", "versions"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance()["git_commit"] is None
