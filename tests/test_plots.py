"""The pictures are read back: colours must lie where the arrays say, not merely exist."""

import numpy as np
import pytest
from helpers import run_python
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from utils import plots

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


def test_case_is_drawn_upright_in_the_structure_colours(tmp_path, labels, figures):
    """Under a title that, read as a formula, would be an error."""
    picture = draw_case(tmp_path / "new" / "folder" / "case.png", labels, title="$x_{$")
    centres = [places(picture, colour).mean(axis=0) for colour in FILLS]  # fails if a colour is absent
    (lv_row, lv_column), (myo_row, myo_column), (rv_row, rv_column) = centres
    assert rv_column + 30 < lv_column and abs(rv_row - lv_row) < 2  # axis 0 runs to the right
    assert lv_row + 30 < myo_row and abs(lv_column - myo_column) < 2  # axis 1 runs down
    # The letters stand at the edges that they name, and the bar is as long as it says.
    for spacing, length in ((1.0, 20), (0.15, 2)):  # the window has 60 px
        draw_case(tmp_path / "case.png", labels, spacing=spacing)
        ax = figures.pop().axes[0]
        *letters, bar_text = ax.texts
        at = {text.get_text(): text.get_position() for text in letters}
        assert at["R"][0] < 0.1 < 0.9 < at["L"][0] and at["P"][1] < 0.1 < 0.9 < at["A"][1]
        assert bar_text.get_text() == f"{length} mm"
        (bar,) = ax.lines
        assert np.ptp(bar.get_xdata()) * np.ptp(ax.get_xlim()) * spacing == pytest.approx(length)


def test_training_samples_show_each_networks_label_and_the_box(tmp_path, labels):
    path, image = tmp_path / "samples.png", np.zeros(labels.shape)
    box = np.zeros(labels.shape)
    box[:, 45:58, 20:45] = 1  # right of LV, so that it lies left of `lv.min()` only in a column before it
    pseudo_labels = np.stack([labels == 1, 3 * (labels == 3)])  # network 1 sees LV only, network 2 RV only
    arrays = dict.fromkeys(("plain", "fourier", "mixed"), image)
    arrays |= {"pseudo_labels": pseudo_labels, "confidence": np.ones((2, *labels.shape))}
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
    arrays = {"images": images, "masks": [np.zeros_like(mask), mask], "fourier": fourier, "mixed": images}
    texts = {"titles": ["row one", "row two"], "letters": ["RLAP", ""], "class_names": NAMES, "title": "data mms"}
    plots.plot_preview(tmp_path / "preview.png", **arrays, **texts, spacing=1.0)
    axes = np.array(figures[0].axes[:10]).reshape(2, 5)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["row one", "row two"]
    assert [len(ax.collections) for ax in axes[:, 1]] == [0, 3]
    assert axes[0, 3].images[0].get_clim() == (-0.25, 0.25)
    assert figures[0].get_suptitle() == "data mms"


def test_curves(tmp_path, figures):
    points = [
        {"step": 10, "loss": 2.0, "supervised": 1.5, "variance": 0.0},
        {"step": 20, "loss": float("nan")},
        {"step": 30, "loss": 1.0, "supervised": 0.7, "variance": 1.0},
    ]
    epochs = {"epochs": [{"step": 17, "val_dice": 60.0}], "validated": "training images", "selected_step": 17}
    for number in (3, 1):
        plots.plot_curves(tmp_path / "curves.png", points=points[:number], **epochs, title="run")
        axes = figures.pop().axes
        curves = {line.get_label(): line for ax in axes for line in ax.lines}
        expected = {"L = L_s + β L_cacps": [2, np.nan, 1], "β L_cacps": [0.5, np.nan, 0.3], "mean of patients": [60]}
        for name, values in (expected | {"exp(−mean V)": [1, np.nan, np.exp(-1)]}).items():
            np.testing.assert_allclose(curves[name].get_ydata(), values[:number])
            assert curves[name].get_marker() == "o"  # a lone point has no line to show it
        assert list(curves["β L_cacps"].get_xdata()) == [10, 20, 30][:number]
        assert list(curves["kept: step 17"].get_xdata()) == [17, 17] and "training images" in axes[1].get_title()
    # Of many points, the means of neighbours.
    points = [{"step": 10 * i, "loss": float(i)} for i in range(1, 1001)]
    odd = {"validated": "$x_{$", "title": "$x_{$"}  # formulas would be errors
    plots.plot_curves(tmp_path / "curves.png", points=points, epochs=[], **odd)
    line = figures[0].axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), np.arange(1, 1001).reshape(200, 5).mean(1))
    np.testing.assert_allclose(line.get_xdata(), 10 * line.get_ydata())
    assert len(figures[0].axes) == 2  # no pseudo supervision, nothing of it


def test_import_in_a_notebook_and_without_pyplot():
    """A notebook's kernel hands its own backend on to the scripts that it starts."""
    code = "import sys, utils.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert run_python("-c", code, MPLBACKEND="module://matplotlib_inline.backend_inline").returncode == 0
