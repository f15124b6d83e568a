"""Imports run one way, and importing does nothing."""

import ast

import pytest
from helpers import ROOT, run_python

SCRIPTS = {"mms_train", "scgm_train", "inference_mms", "inference_scgm", "utils.convert_released", "utils.benchmark"}
DATALOADERS = {"mms_dataloader", "scgm_dataloader"}
LEAVES = {"utils.errors"}  # these may be imported from everywhere
# What each part of the project may import, beside itself and the leaves.
BELOW = {
    "config": set(),
    "network": set(),
    "utils.errors": set(),
    "utils.files": set(),
    "utils.plots": {"utils.files"},
    "utils.device": set(),
    "utils.method": {"config"},
    "utils.data": {"utils.method.augment", "utils.files", "utils.plots", "config"},
    "utils.run": {"utils.files", "config"},
    "utils.evaluation": {"utils.data", "utils.method", "utils.run", "utils.files", "utils.plots", "utils.device",
                         "config"},
    "utils.trainer": {"utils.evaluation.predict", "utils.evaluation.confidence", "utils.method",
                      "utils.run", "utils.data", "utils.device", "utils.plots", "config"},
    "utils.engine": {"utils.trainer", "utils.evaluation.confidence", "utils.run", "utils.data.loaders", "utils.device",
                     "utils.plots", "config"},
    **{name: {"utils.data", "utils.files", "config"} for name in DATALOADERS},
}  # fmt: skip
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)
}


def imported_by(path):
    """Modules of this project that a file imports, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            names |= modules or {node.module}
    return {name for name in names if name in MODULES}


def within(name, part):
    return name == part or name.startswith(part + ".")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    imported = imported_by(MODULES[name])
    if name in SCRIPTS:
        assert not imported & {script for script in SCRIPTS if script != name}
        return
    part = max((part for part in BELOW if within(name, part)), key=len, default=None)
    if part is None:  # utils itself
        assert not imported
        return
    allowed = BELOW[part] | LEAVES | {part}
    assert {other for other in imported if not any(within(other, below) for below in allowed)} == set()


def test_no_import_goes_in_a_circle():
    graph = {name: imported_by(path) for name, path in MODULES.items()}
    finished = set()
    while ready := {name for name in graph.keys() - finished if graph[name] <= finished}:
        finished |= ready
    assert graph.keys() == finished


def test_importing_does_nothing(tmp_path):
    code = f"for name in {list(MODULES)!r}: __import__(name)\nimport torch; assert not torch.cuda.is_initialized()"
    done = run_python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_conda_environment_installs_the_requirements():
    assert "-r requirements.txt" in (ROOT / "semi_dg.yaml").read_text()
