"""Nothing of the user's is deleted or overwritten: only what this program noted as its own."""

import errno
import os
from dataclasses import replace

import pytest
from helpers import MMS, load, train

import config
from utils.data import commands
from utils.errors import UserError, clear_errors
from utils.evaluation.evaluate import evaluate_run
from utils.evaluation.runs import open_data
from utils.files import OutputFolder, folder_lock


def test_only_what_was_claimed_is_overwritten_and_removed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    first = OutputFolder(tmp_path)
    for name in ("a.txt", "maps/b.txt"):
        first.claim(name).write_text("ours")
    with pytest.raises(UserError, match=r"mine\.txt is there, and .* is not overwritten"):
        first.claim("mine.txt")
    again = OutputFolder(tmp_path)
    again.claim("a.txt").write_text("new")
    again.remove_stale()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".semidg-files", "a.txt", "mine.txt"]
    assert OutputFolder(tmp_path).made == {"a.txt"}


def test_record_with_a_way_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "out/.semidg-files").write_text(f"../precious.txt\n{tmp_path}/precious.txt\n")
    OutputFolder(tmp_path / "out").remove_stale()
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EAGAIN, errno.EACCES])
def test_file_systems_without_locks_are_served(tmp_path, monkeypatch, capsys, number):
    """As some Lustre and NFS mounts answer; "in use" is said only when it is."""

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    if number in (errno.EAGAIN, errno.EACCES):
        with pytest.raises(UserError, match="in use by another process"), folder_lock(tmp_path):
            pass
    else:
        with folder_lock(tmp_path):
            assert "no locks on its disk" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EFBIG, errno.EIO, errno.ESTALE])
def test_limits_and_failing_disks_are_a_message(number):
    with pytest.raises(SystemExit, match=r"error: scan\.nii: .*what was saved before is intact"), clear_errors():
        raise OSError(number, os.strerror(number), "scan.nii")


def test_demo_leaves_raw_data_of_the_user_alone(tmp_path):
    (tmp_path / "heart_raw").mkdir()
    (tmp_path / "heart_raw/scan.nii.gz").write_bytes(b"years of work")
    small = replace(MMS, demo_phantom={"patients": 1, "frames": 2})
    commands.make_demo_data(str(tmp_path / "heart"), small)
    assert (tmp_path / "heart_raw/scan.nii.gz").read_bytes() == b"years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heart", "heart_raw"]


def test_results_of_the_user_stay(mms_config, tmp_path):
    trained, out = load(train(mms_config, max_steps=1)), tmp_path / "out"
    for name in ("predictions/corrected.nii.gz", "overlays/figure1.png"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(b"by hand")

    def evaluate(**options):
        evaluate_run(trained, MMS, open_data(trained, None, MMS)[0], out, domain="D", title="D", **options)

    evaluate(save_predictions=True)
    assert len(list((out / "predictions").glob("*_E?.nii.gz"))) == 8
    evaluate(save_predictions=False)
    assert [path.name for path in (out / "predictions").iterdir()] == ["corrected.nii.gz"]
    assert (out / "overlays/figure1.png").read_bytes() == b"by hand"
    (out / ".semidg-files").unlink()
    with pytest.raises(UserError, match=r"summary\.json is there"):
        evaluate(save_predictions=False)


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_that_was_never_a_run_keeps_its_content(mms_config, restart):
    folder = mms_config.folder
    for name in ("results/D/table.csv", "samples/epoch_001.png", "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of the user")
    cfg = replace(mms_config, max_steps=1, restart=restart)
    with pytest.raises(UserError, match=r"config\.json is there"):
        train(cfg)
    (folder / "config.json").unlink()
    (folder / "samples/epoch_001.png").rename(folder / "samples/mine.png")
    train(cfg)
    train(cfg, restart=True)
    assert (folder / "results/D/table.csv").read_text() == "of the user"
    assert (folder / "samples/mine.png").read_text() == "of the user"
    assert (folder / "samples/epoch_001.png").stat().st_size > 1000


def test_preview_overwrites_nothing_and_leaves_nothing_but_the_picture(mms_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "photo.png").write_bytes(b"holiday")
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "preview.pdf"):
        monkeypatch.setattr("sys.argv", ["x", "preview", "--data", str(mms_root), "--out", name])
        with pytest.raises(SystemExit, match=f"{name}: expected the name of a .png file that is not there yet"):
            commands.run_data_command(MMS, config.MMS)
    assert (tmp_path / "photo.png").read_bytes() == b"holiday"
    monkeypatch.setattr("sys.argv", ["x", "preview", "--data", str(mms_root), "--out", "p.png"])
    commands.run_data_command(MMS, config.MMS)
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert not list(tmp_path.glob(".*"))
