"""README and docs point at what is there."""

import ast
import re
import shlex
import subprocess
from itertools import pairwise

import pytest
from helpers import ROOT

from config import MMS, MMS_DEMO, SCGM, SCGM_DEMO, from_cli

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# A function named beside its place, in two cells of a table: | `Trainer.train_step` | `utils/trainer.py:111` |
PLACES = re.findall(r"`([\w.]+)` \| `([\w/]+\.py):(\d+)`", (ROOT / "docs" / "method.md").read_text())
CHAIN = ["main", "fit", "Trainer.train_step", "training_step", "cross_pseudo_supervision", "cross_pseudo_loss"]


def definitions(path):
    """Return the functions and classes of a file by name, a method as `Class.method`."""
    found = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            members = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            found |= {f"{node.name}.{member.name}": member for member in members}
    return found


def test_the_call_chain_is_there():
    assert [name for name, *_ in PLACES[: len(CHAIN)]] == CHAIN


@pytest.mark.parametrize(("name", "path", "line"), PLACES)
def test_a_function_stands_where_the_docs_say(name, path, line):
    assert f"{path}:{definitions(path)[name].lineno}" == f"{path}:{line}"


@pytest.mark.parametrize(("caller", "callee"), [*pairwise(PLACES[: len(CHAIN)])])
def test_each_function_of_the_chain_calls_the_next(caller, callee):
    calls = [node.func for node in ast.walk(definitions(caller[1])[caller[0]]) if isinstance(node, ast.Call)]
    names = {func.id if isinstance(func, ast.Name) else getattr(func, "attr", "") for func in calls}
    assert callee[0].rpartition(".")[2] in names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def training_commands():
    """Return the data set and the flags of every training that the pages and `make demo-real` tell to start."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "new_idea.md")  # which adds choices
    text += subprocess.run(["make", "-n", "demo-real"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = re.sub(
        r"\$flags|\$common", "", text.replace("\\\n", " ")
    )  # shell variables: the first hold flags, the others words
    text = re.sub(r"\$\{?\w+\}?", "1", text)
    return [(key, shlex.split(flags)) for key, flags in re.findall(r"python (mms|scgm)_train\.py([^\n#|;&`>]*)", text)]


@pytest.mark.parametrize(("key", "flags"), [pair for pair in training_commands() if not {"--help", "..."} & {*pair[1]}])
def test_the_flags_of_a_training_command_are_known(key, flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", *flags])
    assert from_cli(*{"mms": (MMS, MMS_DEMO), "scgm": (SCGM, SCGM_DEMO)}[key])
