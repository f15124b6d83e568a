"""The pictures are read back: colours must lie where the arrays say, not merely exist."""

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from helpers import ROOT
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from utils import plots
from utils.evaluation import charts
from utils.evaluation.metrics import agreement_limits
from utils.files import OutputFolder

NAMES = ("LV", "MYO", "RV")
CONTOURS = np.array([to_rgb(colour) for colour in plots.STRUCTURE_COLOURS])
FILLS = CONTOURS * plots.FILL_ALPHA  # on a black image; the legend's ground is another grey

pytestmark = pytest.mark.filterwarnings("error")


def places(picture, colour):
    """(n, 2) rows and columns of the pixels of `picture` (rows, columns, RGBA in [0, 1]) in this colour."""
    return np.argwhere(np.abs(picture[..., :3] - colour).max(axis=-1) < 0.012)


@pytest.fixture
def labels():
    """(1, 60, 50): RV at small, LV at large axis 0, both at small axis 1; MYO below LV, at large axis 1."""
    array = np.zeros((1, 60, 50), dtype=np.uint8)
    array[0, 5:15, 5:15], array[0, 40:50, 5:15], array[0, 40:50, 30:45] = 3, 1, 2
    return array


@pytest.fixture
def figures(monkeypatch):
    """The figures saved during a test, for what pixels cannot tell: curves and texts."""
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    return saved


def draw_case(path, labels, **changes):
    nothing, half = np.zeros_like(labels), np.full(labels.shape, 0.5)
    arrays = {"image": np.zeros(labels.shape), "truth": nothing, "prediction": labels, "agreement": half}
    options = {"letters": "RLAP", "spacing": 1.0, "title": "case"}
    plots.plot_case(path, **(arrays | options | changes), slices=[0], class_names=NAMES)
    return imread(path)


def test_import_needs_no_pyplot():
    code = "import sys, utils.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_case_is_drawn_upright_in_the_structure_colours(tmp_path, labels):
    picture = draw_case(tmp_path / "new" / "folder" / "case.png", labels)
    centres = [places(picture, colour).mean(axis=0) for colour in FILLS]  # fails if a colour is absent
    (lv_row, lv_column), (myo_row, myo_column), (rv_row, rv_column) = centres
    assert rv_column + 30 < lv_column and abs(rv_row - lv_row) < 2  # axis 0 runs to the right
    assert lv_row + 30 < myo_row and abs(lv_column - myo_column) < 2  # axis 1 runs down


def test_truth_is_a_white_line_in_a_black_one_and_prediction_a_fill(tmp_path, labels):
    """So that both can be seen where they lie on each other, and on white blood."""
    for brightness in (0, 1):
        image, nothing = np.full(labels.shape, float(brightness)), np.zeros_like(labels)
        image[:, 20:35] = 1 - brightness  # where no structure is
        pictures = [
            draw_case(tmp_path / f"{i}.png", labels, image=image, prediction=prediction, truth=truth)
            for i, (prediction, truth) in enumerate([(labels, nothing), (labels, labels), (nothing, labels)])
        ]
        fills = CONTOURS * plots.FILL_ALPHA + brightness * (1 - plots.FILL_ALPHA)
        for fill in fills:
            alone, both, none = (len(places(picture, fill)) for picture in pictures)
            assert alone > both > 400 > none
        contrast = [(np.abs(picture[..., :3] - (1 - brightness)) < 0.5).all(-1).sum() for picture in pictures]
        assert min(contrast[1:]) > contrast[0] + 100


LINEAR_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
# Of Machado, Oliveira and Fernandes (2009), for linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def seen(colour, vision):
    """CIE L*a*b* of sRGB colours (..., 3) as someone with this vision sees them."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.transpose(VISION[vision]), 0, 1) @ LINEAR_TO_XYZ.T / LINEAR_TO_XYZ.sum(1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@pytest.mark.parametrize("vision", VISION)
def test_colour_blind_readers_tell_the_structures_apart(vision):
    """On any grey below them; a distance of 10 in L*a*b* is seen at a glance."""
    greys = np.linspace(0, 1, 21)[:, None] * np.ones(3)
    fills = [seen(plots.FILL_ALPHA * c + (1 - plots.FILL_ALPHA) * greys, vision) for c in CONTOURS]
    for one, other in combinations([*fills, seen(greys, vision)], 2):
        assert np.linalg.norm(one[:, None] - other, axis=-1).min() > 15


def test_agreement_map_runs_from_zero_to_one(tmp_path, labels):
    """Here of a case without structures or contrast."""
    nothing, ends = np.zeros_like(labels), {0.0: (0.267, 0.005, 0.329), 1.0: (0.993, 0.906, 0.144)}
    for value, colour in ends.items():
        picture = draw_case(tmp_path / "c.png", nothing, agreement=np.full(labels.shape, value))
        assert len(places(picture, colour)) > 10_000 > len(places(picture, ends[1 - value]))
        assert not any(len(places(picture, fill)) for fill in FILLS)


def test_training_samples_show_each_networks_label_and_the_box(tmp_path, labels):
    path, image = tmp_path / "samples.png", np.zeros(labels.shape)
    box = np.zeros(labels.shape)
    box[:, 45:58, 20:45] = 1  # right of LV, so that it lies left of `lv.min()` only in a column before it
    pseudo_labels = np.stack([labels == 1, 3 * (labels == 3)])  # network 1 sees LV only, network 2 RV only
    arrays = {
        "plain": image,
        "fourier": image,
        "mixed": image,
        "pseudo_labels": pseudo_labels,
        "confidence": np.ones((2, *labels.shape)),
    }
    drawn = []
    for mask_box in (box, np.ones_like(box)):  # the second has no edge
        plots.plot_training_samples(path, **arrays, mask_box=mask_box, class_names=NAMES, title="samples")
        drawn.append(imread(path))
    lv, rv = (places(drawn[0], FILLS[label])[:, 1] for label in (0, 2))
    assert len(lv) > 500 and len(rv) > 500 and lv.max() < rv.min()  # columns of network 1, then network 2
    outline = (drawn[0] - drawn[1])[..., :3].min(axis=-1) > 0.5
    assert outline.sum() > 100 and np.argwhere(outline)[:, 1].max() < lv.min()


def test_preview_difference_is_symmetric_and_contours_are_of_what_there_is(tmp_path, labels, figures):
    images, mask = np.full((2, *labels.shape[1:]), 0.5), labels[0]
    fourier = images + np.array([0.25, -0.1])[:, None, None]
    plots.plot_preview(
        tmp_path / "preview.png",
        images=images,
        masks=[np.zeros_like(mask), mask],
        fourier=fourier,
        mixed=images,
        titles=["row one", "row two"],
        letters=["RLAP", ""],
        spacing=1.0,
        class_names=NAMES,
        title="data mms (phantom data)",
    )
    axes = np.array(figures[0].axes[:10]).reshape(2, 5)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["row one", "row two"]
    assert [len(ax.collections) for ax in axes[:, 1]] == [0, 3]
    assert axes[0, 3].images[0].get_clim() == (-0.25, 0.25)
    assert figures[0].get_suptitle() == "data mms (phantom data)"


def test_edges_and_scale_of_a_picture(tmp_path, labels, figures):
    """The letters stand at the edges that they name, and the bar is as long as it says."""
    for spacing, length in ((1.0, 20), (0.15, 2)):  # the window has 60 px
        draw_case(tmp_path / "case.png", labels, spacing=spacing)
        ax = figures.pop().axes[0]
        *letters, bar_text = ax.texts
        places = {text.get_text(): text.get_position() for text in letters}
        assert places["R"][0] < 0.1 < 0.9 < places["L"][0] and places["P"][1] < 0.1 < 0.9 < places["A"][1]
        assert bar_text.get_text() == f"{length} mm"
        (bar,) = ax.lines
        assert np.ptp(bar.get_xdata()) * np.ptp(ax.get_xlim()) * spacing == pytest.approx(length)


def test_curves(tmp_path, figures):
    points = [
        {"step": 10, "loss": 2.0, "supervised": 1.5, "variance": 0.0},
        {"step": 20, "loss": float("nan")},
        {"step": 30, "loss": 1.0, "supervised": 0.7, "variance": 1.0},
    ]
    epochs = {"epochs": [{"step": 17, "val_dice": 60.0}], "validated": "training images", "selected_step": 17}
    for number in (3, 1):
        plots.plot_curves(tmp_path / "curves.png", points=points[:number], **epochs, title="run")
        figure = figures.pop()
        axes = figure.axes
        curves = {line.get_label(): line for ax in axes[:2] for line in ax.lines}
        expected = {"L = L_s + β L_cacps": [2, np.nan, 1], "β L_cacps": [0.5, np.nan, 0.3], "mean of patients": [60]}
        for name, values in expected.items():
            np.testing.assert_allclose(curves[name].get_ydata(), values[:number])
            assert curves[name].get_marker() == "o"  # a lone point has no line to show it
        np.testing.assert_allclose(axes[3].lines[0].get_ydata(), [1, np.nan, np.exp(-1)][:number])
        assert list(curves["β L_cacps"].get_xdata()) == [10, 20, 30][:number]
        assert list(curves["kept: step 17"].get_xdata()) == [17, 17]
        assert figure.get_suptitle() == "run" and "training images" in axes[1].get_title()


def test_many_points_are_drawn_as_means_of_neighbours(tmp_path, figures):
    points = [{"step": 10 * i, "loss": float(i)} for i in range(1, 1001)]
    nothing = {"epochs": [], "validated": "", "title": ""}
    plots.plot_curves(tmp_path / "curves.png", points=points, **nothing)
    line = figures[0].axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), np.arange(1, 1001).reshape(200, 5).mean(1))
    np.testing.assert_allclose(line.get_xdata(), 10 * line.get_ydata())
    assert [text.get_text() for ax in figures[0].axes[2:] for text in ax.texts] == 2 * ["no pseudo supervision so far"]


def test_dice_names_the_worst_and_knows_any_number_of_phases(tmp_path, figures):
    rows = [{"patient": f"P{i}", "structure": "LV", "phase": f"frame{i:02d}", "dice": 90.0 - i} for i in range(12)]
    charts.plot_dice_per_case(tmp_path / "dice.png", rows, NAMES, title="Dice", num_named=2)
    (ax,) = figures[0].axes
    assert {text.get_text() for text in ax.texts} == {"P11 frame11", "P10 frame10"}
    points = [line.get_ydata()[0] for line in ax.lines if line.get_marker() in set(charts.MARKERS)]
    assert sorted(points) == [row["dice"] for row in reversed(rows)]
    assert len(places(imread(tmp_path / "dice.png"), CONTOURS[0])) > 100
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == [*NAMES, *(row["phase"] for row in rows)]


def test_bland_altman_numbers(tmp_path, figures):
    pairs = {"EDV": ([100.0, 120.0, 140.0, np.nan], [101.0, 122.0, 143.0, 5.0]), "EF": ([50.0], [48.0])}
    agreement = {
        "EDV": agreement_limits(*pairs["EDV"]) | {"unit": "ml"},
        "EF": agreement_limits(*pairs["EF"]) | {"unit": "%"},
    }
    pairs["mass"] = ([np.nan], [3.0])
    agreement["mass"] = agreement_limits(*pairs["mass"]) | {"unit": "g"}
    charts.plot_bland_altman(tmp_path / "agreement.png", pairs, agreement, title="data")
    titles = [ax.get_title() for ax in figures[0].axes]
    assert [text.get_text() for ax in figures[0].axes for text in ax.texts] == ["no patient has both"]
    # differences 1, 2, 3: mean 2, sample standard deviation 1, limits 2 -+ 1.96
    assert titles == ["EDV (n = 3)\nbias +2.0 ml, limits +0.0 to +4.0", "EF (n = 1)\nbias -2.0 %", "mass (n = 0)"]


def test_names_are_never_read_as_formulas(tmp_path, labels, figures):
    """Which `$x_{$` would not be."""
    odd = "$x_{$"
    draw_case(tmp_path / "case.png", labels, title=odd)
    rows = [{"patient": odd, "structure": odd, "phase": odd, "dice": 90.0}]
    charts.plot_dice_per_case(tmp_path / "dice.png", rows, (odd,), title=odd)
    charts.plot_differences(
        tmp_path / "differences.png", [(odd, [1.0, 2.0], 1.5, (1.0, 2.0)), ("b", [], None, None)], title=odd
    )
    ones = np.ones(1)
    charts.plot_risk_coverage(
        tmp_path / "risk.png", {"slices": {"agreement": ones}, "patients": {"random": ones}}, title=odd
    )
    assert len(figures) == 4


def test_preview_in_a_notebook(mms_root, tmp_path):
    """Its kernel hands its own backend on to the scripts that it starts."""
    command = [sys.executable, ROOT / "mms_dataloader.py", "preview", "--data", mms_root, "--out", tmp_path / "p.png"]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_names_and_colours_for_viewers(tmp_path):
    plots.write_label_names(OutputFolder(tmp_path), ("background", *NAMES))
    slicer = [line.split() for line in (tmp_path / "labels.ctbl").read_text().splitlines()]
    assert slicer[0] == ["0", "background", "0", "0", "0", "0"]
    snap = [line.split(maxsplit=7) for line in (tmp_path / "labels.txt").read_text().splitlines()]
    for label, (name, colour) in enumerate(zip(NAMES, CONTOURS, strict=True), start=1):
        rgb = [str(round(255 * part)) for part in colour]
        assert slicer[label] == [str(label), name, *rgb, "255"]
        assert snap[label] == [str(label), *rgb, "1", "1", "1", f'"{name}"']
