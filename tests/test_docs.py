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
CONFIGS = {"mms": (MMS, MMS_DEMO), "scgm": (SCGM, SCGM_DEMO)}
# A function named beside its file, in two cells of a table: | `Trainer.train_step` | [utils/trainer.py](...) |
FUNCTIONS = re.findall(r"`([\w.]+)` \| \[([\w/]+\.py)\]", (ROOT / "docs" / "method.md").read_text())
CHAIN = ["main", "fit", "Trainer.train_step", "training_step", "cross_pseudo_supervision", "cross_pseudo_loss"]


def definition(name, path):
    """Return the syntax tree of a function or class of a file, of a method by `Class.method`."""
    node = ast.parse((ROOT / path).read_text())
    for part in name.split("."):
        node = next(inner for inner in node.body if getattr(inner, "name", "") == part)
    return node


@pytest.mark.parametrize(("name", "path"), FUNCTIONS)
def test_a_named_function_is_in_the_named_file(name, path):
    assert definition(name, path)


def test_each_function_of_the_chain_calls_the_next():
    chain = FUNCTIONS[: len(CHAIN)]
    assert [name for name, _ in chain] == CHAIN
    for caller, (callee, _) in pairwise(chain):
        calls = [node.func for node in ast.walk(definition(*caller)) if isinstance(node, ast.Call)]
        assert callee.split(".")[-1] in {getattr(func, "attr", getattr(func, "id", "")) for func in calls}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], anchor


def test_the_example_of_three_dices_prints_what_the_page_says(capsys):
    page = (ROOT / "docs/comparing.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert f"prints `{capsys.readouterr().out.strip()}`" in page


def training_commands():
    """Return the data set and the flags of every training that the pages and `make demo-real` tell to start."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "new_idea.md")  # which adds choices
    text += subprocess.run(["make", "-n", "demo-real"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"\$flags|\$common", "", text.replace("\\\n", " "))  # shell variables that hold flags
    text = re.sub(r"\$\{?\w+\}?", "1", text)
    return [(key, shlex.split(flags)) for key, flags in re.findall(r"python (mms|scgm)_train\.py([^\n#|;&`>]*)", text)]


@pytest.mark.parametrize(("key", "flags"), [pair for pair in training_commands() if not {"--help", "..."} & {*pair[1]}])
def test_the_flags_of_a_training_command_are_known(key, flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", *flags])
    assert from_cli(*CONFIGS[key])
