"""README and docs point at what is there."""

import ast
import re
from itertools import pairwise

import pytest
from helpers import ROOT

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
