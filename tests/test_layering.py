"""Imports run one way, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"mms_train", "scgm_train", "inference_mms", "inference_scgm", "convert_released", "benchmark"}
DATALOADERS = {"mms_dataloader", "scgm_dataloader"}
# Of utils: import nothing of ours but the errors.
LEAVES = {"errors", "losses", "augment", "metrics", "logger", "visualize", "tables", "report", "distributed", "outputs"}
# Of utils: what is left may import what is right of it, never the other way round.
LAYERS = ["commands", "inference", "results", "segment", "engine", "evaluate", "prepare", "data", "phantom", "volume"]
LAYERS += ["checkpoint"]
MODULES = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]


def ours(path):
    """Modules of this project that a file imports, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    top = {p.stem for p in ROOT.glob("*.py")} | {"utils", "network"}
    return {name for name in names if name.split(".")[0] in top}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    name, package, imported = path.stem, path.parent.name, ours(path)
    if name in SCRIPTS:
        assert not {module.split(".")[-1] for module in imported} & SCRIPTS
    elif name in DATALOADERS:
        assert all(module.startswith("utils.") for module in imported)
    elif name == "config":
        assert not imported
    elif package == "network":
        assert all(module.startswith("network") or module == "utils.errors" for module in imported)
    else:
        assert package == "utils"
        assert all(module.startswith("utils.") for module in imported)
        below = {module.removeprefix("utils.") for module in imported} - {"errors"}
        if name in LEAVES:
            assert not below
        elif name != "__init__":
            assert below <= LEAVES | set(LAYERS[LAYERS.index(name) + 1 :])


def test_importing_does_nothing(tmp_path):
    modules = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in MODULES]
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1])\n"
        f"for name in {modules!r}: __import__(name)\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_conda_environment_installs_the_requirements():
    assert "-r requirements.txt" in (ROOT / "semi_dg.yaml").read_text()
