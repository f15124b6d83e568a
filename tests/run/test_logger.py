"""The log and wandb: offline without an account, never a prompt, never at the run's expense."""

import json
import signal

import pytest
from helpers import run_python

from utils.files import OutputFolder
from utils.run.logger import Logger, read_log


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    with Logger(OutputFolder(tmp_path), since=0, total=9, use_wandb=False, config={}) as logger:
        for step in (10, 20, 30):
            logger.log({"step": step, "loss": step / 7})
            logger.point({"step": step, "loss": step / 3, "cps": 0.0})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # the process was killed while writing
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [10, 20, 30]
    with Logger(OutputFolder(tmp_path), since=20, total=9, use_wandb=False, config={}) as logger:
        assert logger.lines == [{"step": 10, "loss": 10 / 7}, {"step": 20, "loss": 20 / 7}]
        assert logger.points == [{"step": 10, "loss": 10 / 3, "cps": 0.0}, {"step": 20, "loss": 20 / 3, "cps": 0.0}]
    assert len(read_log(tmp_path / "log.jsonl")) == len(read_log(tmp_path / "steps.jsonl")) == 2


def test_damaged_line_costs_no_other(tmp_path, capsys):
    lines = ['{"step": 1}', '{"step": 2, \xff', '{"step": 3}', "null", '{"epoch": 4}', '{"step": 5}', '{"st']
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="latin-1")
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3, 5]
    printed = capsys.readouterr().out
    assert [number for number in range(1, 8) if f"line {number} is damaged" in printed] == [2, 4, 5]


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_wandb_without_account_writes_into_the_run_folder(tmp_path, no_account):
    folder = tmp_path / "run"
    folder.mkdir()
    for since in (0, 1):  # the second time resumes
        with Logger(OutputFolder(folder), since=since, total=9, use_wandb=True, config={"lr": 1}) as logger:
            assert logger.wandb_run is not None and logger.wandb_run.offline
            logger.log({"step": since + 1, "loss": 0.5})
    # offline-run-TIME-ID, with a number behind it when both began within one second
    identities = {path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")}
    assert identities == {(folder / "wandb_id").read_text()}
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_wandb_that_fails_does_not_cost_the_run(tmp_path, no_account, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no service")

    monkeypatch.setattr("wandb.init", broken)
    with Logger(OutputFolder(tmp_path), since=0, total=9, use_wandb=True, config={}) as logger:
        logger.log({"step": 1})
    assert "warning: wandb failed (no service)" in capsys.readouterr().out and len(logger.lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_wandb_service_that_dies_or_hangs_does_not_cost_the_run(tmp_path, no_account, number):
    """In a process of its own, which must also end."""
    code = f"""
import os, subprocess
from pathlib import Path
from utils.files import OutputFolder
from utils.run import logger
logger.WANDB_PATIENCE = 12
with logger.Logger(OutputFolder(Path({str(tmp_path)!r})), since=0, total=9, use_wandb=True, config={{}}) as log:
    log.log({{"step": 1}})
    assert log.wandb_run
    command = ["pgrep", "-f", f"wandb-core.*--pid {{os.getpid()}}"]
    (service,) = map(int, subprocess.run(command, capture_output=True, text=True).stdout.split())
    os.kill(service, {int(number)})
    for step in range(2, 5):
        log.log({{"step": step}})
if {int(number)} != 9:
    os.kill(service, 9)
print("the end")
"""
    done = run_python("-c", code, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("warning: wandb failed") == 1 and "the end" in done.stdout
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


def test_wandb_disabled_is_honoured_and_online_without_account_never_asks(tmp_path, no_account, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with Logger(OutputFolder(tmp_path), since=0, total=9, use_wandb=True, config={}) as logger:
        assert logger.wandb_run.offline
    monkeypatch.setenv("WANDB_DISABLED", "true")
    with Logger(OutputFolder(tmp_path), since=0, total=9, use_wandb=True, config={}) as logger:
        assert logger.wandb_run is None
