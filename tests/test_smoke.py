"""The real scripts with the real networks, as a user runs them: phantom, check, prepare, train, resume, evaluate."""

import json

import nibabel as nib
import pytest
from helpers import ROOT, run_python

pytestmark = pytest.mark.slow
SMALL = ["--image-size", "32", "--batch-size", "2", "--pretrained", "none", "--no-wandb", "--workers", "1",
         "--cps-warmup", "0", "--cps-ramp", "0", "--device", "cpu", "--run-name", "smoke"]  # fmt: skip


def script(folder, *command, code=0):
    done = run_python(ROOT / command[0], *command[1:], cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(("name", "domain", "flag", "structures"), [
    ("mms", "D", "--test-vendor", ["LV", "MYO", "RV"]), ("scgm", "4", "--test-domain", ["GM"]),
])  # fmt: skip
def test_from_nothing_to_the_table(name, domain, flag, structures, tmp_path):
    loader, train, inference = f"{name}_dataloader.py", f"{name}_train.py", f"inference_{name}.py"
    phantom = ["--patients", 4, *(["--frames", 2] if name == "mms" else [])]
    script(tmp_path, loader, "phantom", "raw", *phantom)
    assert "0 errors" in script(tmp_path, loader, "check", "raw")
    script(tmp_path, loader, "prepare", "raw", "--out", f"data/{name}")
    script(tmp_path, loader, "preview", "--data", f"data/{name}", "--out", "preview.png")
    assert (tmp_path / "preview.png").stat().st_size > 20_000
    steps = [2, 3] if name == "mms" else [2]  # resumes by itself
    for number in steps:
        script(tmp_path, train, *SMALL, flag, domain, "--max-steps", number)
    run = tmp_path / "runs/smoke"
    logged = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert logged == steps
    out = script(tmp_path, inference, "--run", "runs/smoke", "--device", "cpu")
    summary = json.loads((run / f"results/{domain}/summary.json").read_text())
    assert list(summary["volumetric"]) == structures and 0 <= summary["paper_protocol"]["mean"] <= 100
    assert f"{summary['paper_protocol']['mean']:.2f}" in out
    for path in (run / "curves.png", run / "samples/epoch_001.png", run / f"results/{domain}/report.html"):
        assert path.stat().st_size > 20_000
    scan = next((tmp_path / "raw").rglob("*_sa.nii.gz" if name == "mms" else "*-image.nii.gz"))
    out = script(tmp_path, inference, "--run", "runs/smoke", "--input", scan, "--output", "new", "--confidence")
    assert "for research use, not for clinical decisions" in out
    for kind in ("seg", "confidence", "agreement"):
        result = nib.load(tmp_path / "new" / scan.name.replace(".nii.gz", f"_{kind}.nii.gz"))
        assert result.shape == nib.load(scan).shape
    for path in run.glob("*.pt"):  # a gigabyte each
        path.unlink()


@pytest.mark.parametrize("name", ["mms", "scgm"])
def test_without_data_the_way_there_is_named(name, tmp_path):
    out = script(tmp_path, f"{name}_train.py", code=1)
    remedies = ("name it by --data-root", "registration", "prepare RAW", f"python {name}_train.py --demo")
    for expected in (f"data/{name}", *remedies):
        assert expected in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "message"), [
    (["mms_train.py", "--batch-size", "1"], "--batch-size must be at least 2"),
    (["mms_train.py", "--learning", "1"], "--learning"),
    (["mms_dataloader.py", "check", "nowhere"], "nowhere: no such folder"),
    (["inference_mms.py", "--run", "nowhere"], "nowhere: no such run"),
    (["inference_mms.py", "--run", "x", "--center", "5", "5"], "--center: For new scans: --input without --truth."),
])  # fmt: skip
def test_mistakes_are_named_without_a_traceback(arguments, message, tmp_path, monkeypatch):
    """Nor does the backend that a notebook hands on to scripts end them."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    code = 2 if "--learning" in arguments else 1
    assert message in script(tmp_path, *arguments, code=code)
