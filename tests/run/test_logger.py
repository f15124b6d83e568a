"""The log and wandb: offline without an account, never a prompt, never at the run's expense."""

import json

import pytest

from utils.run.logger import Logger, read_log


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    with Logger(tmp_path, since=0, use_wandb=False, config={}) as logger:
        for step in (10, 20, 30):
            logger.log({"step": step, "loss": step / 7})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # the process was killed while writing
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [10, 20, 30]
    with Logger(tmp_path, since=20, use_wandb=False, config={}) as logger:
        assert logger.lines == [{"step": 10, "loss": 10 / 7}, {"step": 20, "loss": 20 / 7}]
    assert len(read_log(tmp_path / "log.jsonl")) == 2


def test_damaged_line_costs_no_other(tmp_path, capsys):
    lines = ['{"step": 1}', '{"step": 2, \xff', '{"step": 3}', "null", '{"epoch": 4}', '{"step": 5}', '{"st']
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="latin-1")
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3, 5]
    printed = capsys.readouterr().out
    assert [f"line {number} is damaged" in printed for number in range(1, 8)] == [
        False,
        True,
        False,
        True,
        True,
        False,
        False,
    ]


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
        with Logger(folder, since=since, use_wandb=True, config={"lr": 1}) as logger:
            assert logger.wandb_run is not None and logger.wandb_run.offline
            logger.log({"step": since + 1, "loss": 0.5})
    # offline-run-TIME-ID, with a number behind it when both began within one second
    identities = {path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")}
    assert identities == {(folder / "wandb_id").read_text()}
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_wandb_that_fails_does_not_cost_the_run(tmp_path, no_account, monkeypatch, capsys):
    import wandb

    def broken(*args, **kwargs):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    with Logger(tmp_path, since=0, use_wandb=True, config={}) as logger:
        logger.log({"step": 1})
    assert "wandb could not start (no service)" in capsys.readouterr().out and len(logger.lines) == 1
