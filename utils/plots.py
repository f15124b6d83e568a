"""Pictures of a run and of its evaluation, as PNG; no display is needed.

Images are arrays as stored, (H, W), drawn with axis 0 from left to right; `class_names` are of the
labels from 1. The truth is a line, a prediction a translucent fill.
"""

from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np

# A notebook's backend, which its scripts inherit, is refused outside of it.
with patch.dict("os.environ", MPLBACKEND="agg"):
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

# Of labels 1, 2, 3: as fills on any grey they differ to colour-blind eyes, too.
STRUCTURE_COLOURS = ("#D55E00", "#56B4E9", "#7A3CFF")
LINE_STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#000000", "-."))  # told apart without colour
FILL_ALPHA = 0.5
MOST_POINTS = 200  # of a curve; more would hide each other
CASING = [withStroke(linewidth=2.4, foreground="black")]  # shows white on white


def plot_curves(path, *, points, epochs, validated, title, selected_step=None) -> None:
    """Draw losses, Dice and, once there is pseudo supervision, its variance and confidence.

    Points are dicts of step, loss, supervised and variance (mean KL); a missing or NaN value is a gap,
    and of many, the means of neighbours are drawn. Epochs are dicts of step and val_dice (percent), of
    the images that `validated` names; `selected_step` is that of the kept weights.
    """

    def column(key):
        values = np.array([point.get(key) for point in points], dtype=float)  # None becomes NaN
        parts = np.array_split(values, min(len(values), MOST_POINTS))
        return np.array([part.mean() for part in parts])

    steps, loss, supervised, variance = map(column, ("step", "loss", "supervised", "variance"))
    losses = {"L = L_s + β L_cacps": loss, "L_s: labelled": supervised, "β L_cacps": loss - supervised}
    ends, dice = ([line[key] for line in epochs] for key in ("step", "val_dice"))
    panels = {  # the steps and the curves of each
        "loss, summed over both networks": (steps, losses),
        f"Dice (%) on {validated}": (ends, {"mean of patients": dice}),
    }
    if np.isfinite(variance).any():
        panels["variance of the pseudo labels"] = steps, {"V (mean KL)": variance}
        panels["confidence in the pseudo labels"] = steps, {"exp(−mean V)": np.exp(-variance)}
    figure = Figure((9, 3 * (len(panels) // 2) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels) // 2, 2, sharex=True).flatten()
    if selected_step is not None:
        axes[1].axvline(selected_step, color="grey", ls="--", label=f"kept: step {selected_step}")
    for ax, (name, (x, curves)) in zip(axes, panels.items(), strict=True):
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
        for (label, values), (colour, line) in zip(curves.items(), LINE_STYLES, strict=False):
            size = 3 if len(values) <= 50 else 1  # of markers, which show a lone point
            ax.plot(x, values, color=colour, ls=line, label=label, marker="o", markersize=size)
        ax.legend(fontsize=8)
    axes[0].set_xlim(0, None)
    figure.supxlabel("step", fontsize=10)
    _save(figure, path, title)


def plot_training_samples(
    path, *, plain, fourier, mixed, mask_box, pseudo_labels, confidence, class_names, title
) -> None:
    """Draw what one unlabelled training step works with, a row for each of the first 4 images.

    Plain, fourier and (after CutMix) mixed are (N, H, W) in about [0, 1], mask_box (N, H, W) is 1 where
    another image was pasted; (2, N, H, W) pseudo_labels and confidence exp(-V) are of both networks.
    """
    name = "CutMix image" if mask_box.any() else "plain image"  # which is pseudo-labelled
    titles = ["plain image", "Fourier view", name]
    titles += [f"{kind}\non {name}" for kind in ("label 1", "label 2", "confidence 1", "confidence 2")]
    figure, axes = _grid(min(len(plain), 4), titles)
    for n, row in enumerate(axes):
        for ax, images in zip(row, (plain, fourier, mixed, mixed, mixed), strict=False):
            _show(ax, images[n])
        _contour(row[2], mask_box[n], "white")
        for network in range(2):
            _fill_structures(row[3 + network], pseudo_labels[network, n])
            confidence_map = _show(row[5 + network], confidence[network, n], cmap="viridis")
    figure.colorbar(confidence_map, ax=axes, shrink=0.6, label="confidence exp(−V)")
    box = Line2D([], [], color="white", label="edge of pasted region")
    _save(figure, path, title, [*_fills(class_names, "pseudo label"), box])


def plot_preview(path, *, images, masks, fourier, mixed, letters, spacing, titles, class_names, title) -> None:
    """Draw what the networks see, a row per image: N titles, `edge_letters` and maps (H, W).

    Images, fourier and mixed lie in about [0, 1], masks hold labels; spacing is in mm per px.
    """
    difference = np.asarray(fourier, dtype=float) - images
    limit = max(np.abs(difference).max(), 1e-6)
    columns = ["plain", "truth", "Fourier view", "Fourier − plain", "CutMix"]
    figure, axes = _grid(len(images), columns, titles)
    for n, row in enumerate(axes):
        for column, image in ((0, images[n]), (1, images[n]), (2, fourier[n]), (4, mixed[n])):
            _show(row[column], image)
        _orient(row[0], letters[n], spacing)
        for label in (3, 2, 1):  # LV last: it shares its edge with MYO, which has an outer one, too
            _contour(row[1], masks[n] == label, STRUCTURE_COLOURS[label - 1])
        difference_map = _show(row[3], difference[n], cmap="RdBu_r", limits=(-limit, limit))
    figure.colorbar(difference_map, ax=axes, shrink=0.6, label="Fourier − plain")
    _save(figure, path, title, _fills(class_names, "truth", 1))


def plot_case(path, *, image, truth, prediction, agreement, slices, letters, spacing, class_names, title) -> None:
    """Draw one held-out scan with its `edge_letters`, a column per slice of the S numbers `slices`.

    Image (any scale), truth, prediction (labels), agreement (0 to 1) are (S, H, W); spacing in mm per px.
    """
    limits = np.percentile(image.astype(float), (1, 99))  # one grey scale, to compare slices
    rows = ["image", "prediction, truth", "agreement"]
    figure, axes = _grid(3, [f"slice {number}" for number in slices], rows)
    for s, column in enumerate(axes.T):
        for ax in column[:2]:
            _show(ax, image[s], limits=limits)
        _fill_structures(column[1], prediction[s])
        for label in (1, 2, 3):
            _contour(column[1], truth[s] == label, "white", CASING)
        agreement_map = _show(column[2], agreement[s], cmap="viridis")
    _orient(axes[0, 0], letters, spacing)
    figure.colorbar(agreement_map, ax=axes, shrink=0.6, label="networks' agreement exp(−KL)")
    truth_line = Line2D([], [], color="white", path_effects=CASING, label="truth")
    _save(figure, path, title, [*_fills(class_names, "prediction"), truth_line])


def _show(ax, image, cmap="gray", limits=(0, 1), **style):
    return ax.imshow(image.T, cmap=cmap, vmin=limits[0], vmax=limits[1], origin="upper", **style)


def _contour(ax, mask, colour, path_effects=None) -> None:
    if mask.any() and not mask.all():  # matplotlib warns about a contour that is nowhere
        lines = ax.contour(mask.T, levels=[0.5], colors=[colour], linewidths=1)
        lines.set_path_effects(path_effects)


def _orient(ax, letters, spacing) -> None:
    style = {"color": "white", "path_effects": CASING, "transform": ax.transAxes}
    for x, y, letter in zip((0.06, 0.93, 0.5, 0.5), (0.5, 0.5, 0.93, 0.07), letters, strict=False):
        ax.text(x, y, letter, ha="center", va="center", fontsize=8, weight="bold", **style)
    width = np.ptp(ax.get_xlim()) * spacing
    length = max(mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= max(width / 3, 1))
    ax.plot([0.05, 0.05 + length / width], [0.05, 0.05], linewidth=1.5, **style)
    ax.text(0.05, 0.08, f"{length} mm", fontsize=7, **style)


def _fill_structures(ax, labels) -> None:
    style = {"alpha": FILL_ALPHA, "interpolation": "nearest"}
    _show(ax, np.ma.masked_outside(labels, 1, 3), ListedColormap(STRUCTURE_COLOURS), (1, 3), **style)


def _fills(class_names, meaning, alpha=FILL_ALPHA):
    pairs = zip(class_names, STRUCTURE_COLOURS, strict=False)
    return [Patch(color=colour, alpha=alpha, label=f"{name} {meaning}") for name, colour in pairs]


def _grid(num_rows, column_titles, row_titles=()):
    figure = Figure((1.65 * len(column_titles) + 1, 1.65 * num_rows + 1), layout="compressed")
    bare = {"xticks": [], "yticks": []}
    axes = figure.subplots(num_rows, len(column_titles), squeeze=False, subplot_kw=bare)
    for ax, text in zip(axes[0], column_titles, strict=True):
        ax.set_title(text, fontsize=9)
    for ax, text in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(text, fontsize=8)
    return figure, axes


def _save(figure, path, title, handles=()) -> None:
    """Write the PNG file; no text is read as a formula."""
    if handles:
        columns = min(len(handles), 2 * figure.axes[0].get_gridspec().ncols + 1)
        place = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles=handles, fontsize=8, facecolor="dimgrey", labelcolor="white", **place)
    figure.suptitle(title, fontsize=10)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05)


def radiological(array: np.ndarray, like) -> np.ndarray:
    """Turn slices (..., X, Y) as radiologists see them, where the scan tells how its axes lie.

    X then runs from right to left (or front to back), Y from front to back (or head to feet).
    """
    first, second = _axis_codes(like) or "LP"
    array = np.flip(array, [axis for axis, code in ((-2, first), (-1, second)) if code in "RAS"])
    turned = "LRAPSI".index(first) // 2 > "LRAPSI".index(second) // 2
    return array.swapaxes(-2, -1) if turned else array


def edge_letters(like) -> str:
    """Return the left, right, upper, lower edge of a `radiological` slice: "RLAP", or ""."""
    codes = _axis_codes(like)
    return "".join(pair for pair in ("RL", "AP", "SI") if {*pair} & {*codes})


def _axis_codes(like) -> tuple[str, ...]:
    """Return where the first two axes point, such as ("L", "P"), or ()."""
    known = like.header["sform_code"] or like.header["qform_code"]
    return nib.aff2axcodes(like.affine)[:2] if known else ()
