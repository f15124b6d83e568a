"""Settings that cannot work are refused where they are made, by the name of their flag."""

from dataclasses import replace

import pytest

from config import FROM_SCRATCH, MMS, MMS_DEMO, ROBUST, SCGM, from_cli
from utils.errors import UserError


@pytest.mark.parametrize(("change", "message"), [
    ({"batch_size": 1}, "--batch-size must be at least 2"),
    ({"fourier_aug": False}, "every --cps-loss but plain needs --fourier-aug"),
    ({"ratio": 0}, "--ratio must be in"),
    ({"image_size": 512}, "--image-size must be"),
    ({"max_shift": 7}, "--max-shift must be"),
    ({"save_every": -1}, "--save-every must be at least 0"),
    ({"seed": -1}, "--seed must be at least 0"),
    ({"lr": float("inf")}, "--lr must be positive"),
    ({"run_name": ""}, "--run-name must name a folder of its own"),
    ({"image_size": 96, "fourier_window": 0.2}, "--fourier-window must be"),
    ({"cps_loss": "hard"}, "--cps-loss must be one of pixel, scalar, plain"),
    ({"fourier_mode": "AX"}, "--fourier-mode must be one of AS, AM"),
    ({"field": 300}, "--field must be 96 to 288"),
    ({"field": 201}, "--field must be even"),
    ({"fourier_ratio": 5.0}, "--fourier-ratio must be 0 to 1"),
])  # fmt: skip
def test_impossible_settings(change, message):
    with pytest.raises(UserError, match=message):
        replace(MMS, **change)


def test_flags_change_the_defaults_of_the_data_set(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--test-vendor", "A", "--ratio", "0.05", "--seed", "3", "--no-cutmix"])
    [cfg] = from_cli(MMS, MMS_DEMO)
    assert (cfg.test_domain, cfg.ratio, cfg.cutmix, cfg.cps_weight) == ("A", 0.05, False, 3.0)
    assert cfg.run_name == "mms_A_0.05_seed3"
    for name in ("{nonsense}", "{test_domain.x}", "{seed[0]}"):
        monkeypatch.setattr("sys.argv", ["x", "--run-name", name])
        with pytest.raises(UserError, match="only settings may stand in braces"):
            from_cli(MMS, MMS_DEMO)
    for flags, changes in (
        (["--image-size", "64"], {"image_size": 64}),
        (["--robust", "--field", "160"], ROBUST | {"field": 160}),
    ):
        monkeypatch.setattr("sys.argv", ["x", "--demo", *flags])
        assert from_cli(MMS, MMS_DEMO) == [replace(MMS_DEMO, **changes)]


def test_without_pretrained_weights_the_defaults_are_others(monkeypatch):
    for flags, changed in (
        (["--pretrained", "none"], {"pretrained": "none", **FROM_SCRATCH}),
        (["--pretrained", "none", "--lr", "2e-4", "--cps-warmup", "0"],
         {"pretrained": "none", **FROM_SCRATCH, "lr": 2e-4, "cps_warmup": 0}),
        (["--pretrained", "none", "--init-from", "runs/x"], {"pretrained": "none", "init_from": "runs/x"}),
        (["--pretrained", "x.pth"], {"pretrained": "x.pth"}),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["x", *flags])
        assert from_cli(SCGM, MMS_DEMO) == [replace(SCGM, run_name="scgm_4_0.2_seed0", **changed)]
    monkeypatch.setattr("sys.argv", ["x", "--demo", "--pretrained", "none"])  # the demo is from scratch anyway
    assert from_cli(MMS, MMS_DEMO) == [MMS_DEMO]


def test_every_seed_has_a_run_of_its_own(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--test-vendor", "A", "--seeds", "0", "2", "0", "--seed", "9"])
    runs = from_cli(MMS, MMS_DEMO)
    assert [(cfg.seed, cfg.run_name) for cfg in runs] == [(0, "mms_A_0.02_seed0"), (2, "mms_A_0.02_seed2")]
    assert runs[1] == replace(MMS, test_domain="A", seed=2, run_name="mms_A_0.02_seed2")
    monkeypatch.setattr("sys.argv", ["x", "--demo", "--seeds", "1"])
    assert [cfg.run_name for cfg in from_cli(MMS, MMS_DEMO)] == ["mms_demo_seed1"]
    monkeypatch.setattr("sys.argv", ["x", "--seeds", "0", "-1"])
    with pytest.raises(UserError, match="--seed must be at least 0"):
        from_cli(MMS, MMS_DEMO)


def test_settings_of_the_paper():
    assert (MMS.lr, MMS.weight_decay, MMS.num_epoch, MMS.batch_size, MMS.image_size) == (1e-4, 0.01, 50, 32, 288)
    assert (MMS.cps_weight, MMS.fourier_ratio, MMS.cps_warmup, MMS.dice_background) == (3.0, 1.0, 0, True)
    assert (SCGM.cps_weight, SCGM.fourier_ratio, SCGM.cps_warmup, SCGM.dice_background) == (1.5, 0.8, 4, False)
    assert (SCGM.flip, SCGM.blur, SCGM.histogram_matching, SCGM.ratio) == (False, False, False, 0.2)
