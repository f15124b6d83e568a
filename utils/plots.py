"""Pictures of a run and of its evaluation, each one PNG.

Conventions shared by all: images are arrays as stored, (H, W), drawn with axis 0 from left to right;
structures are the labels 1..K, named by `class_names` (label 1 first, no background); the truth is a
line, a prediction or pseudo label a translucent fill; `title` stands above all. Figures are built
without pyplot, so no display is needed.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np

# A notebook's backend, which its scripts inherit, is refused outside of it; pictures here need none.
with patch.dict("os.environ", MPLBACKEND="agg"):
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

# Colours of the labels 1, 2, 3. To colour-blind eyes, too, these three as fills on whatever grey, white blood among
# it, look neither grey nor like each other.
STRUCTURE_COLOURS = ("#D55E00", "#56B4E9", "#7A3CFF")  # M&Ms: LV, MYO, RV; SCGM: GM
# Okabe-Ito colours, and lines that are told apart without colour, too.
LINE_STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#000000", "-."), ("#009E73", ":"), ("#999999", (0, (1, 3))))
FILL_ALPHA = 0.5
MOST_POINTS = 200  # of a curve; more would hide each other
CASING = [withStroke(linewidth=2.4, foreground="black")]  # makes what is white visible on white
DARK = {"facecolor": "dimgrey", "labelcolor": "white"}  # ground of a legend on which colours look as in the images


def plot_curves(path, *, points, epochs, validated: str, title: str, selected_step: int | None = None) -> None:
    """Draw losses, Dice and, once there is pseudo supervision, its variance and confidence.

    Args:
        points: dicts with `step` and any of loss, supervised and variance (mean KL); a missing or
            NaN value is a gap. Of many points, the means of neighbours are drawn.
        epochs: dicts with `step` and `val_dice` (percent), of the images that `validated` names.
        selected_step: the step whose weights were kept.
    """

    def column(key):
        values = np.array([point.get(key) for point in points], dtype=float)  # None becomes NaN
        return np.array([part.mean() for part in np.array_split(values, min(len(values), MOST_POINTS))])

    steps, loss, supervised, variance = map(column, ("step", "loss", "supervised", "variance"))
    losses = {"L = L_s + β L_cacps": loss, "L_s: Dice loss": supervised, "β L_cacps": loss - supervised}
    ends, dice = ([line[key] for line in epochs] for key in ("step", "val_dice"))
    panels = {  # the steps and the curves of each
        "loss, summed over both networks": (steps, losses),
        f"Dice (%) on {validated}": (ends, {"mean of patients": dice}),
    }
    if np.isfinite(variance).any():
        panels["variance of the pseudo labels"] = steps, {"V (mean KL)": variance}
        panels["confidence in the pseudo labels"] = steps, {"exp(−mean V)": np.exp(-variance)}
    figure, axes = _panels(panels, 2, sharex=True)
    if selected_step is not None:
        axes[1].axvline(selected_step, color="grey", linestyle="--", label=f"kept: step {selected_step}")
    for ax, (at, curves) in zip(axes, panels.values(), strict=True):
        _lines(ax, at, curves)
        ax.legend(fontsize=8)
    axes[0].set_xlim(0, None)
    figure.supxlabel("step", fontsize=10)
    _save(figure, path, title)


def plot_training_samples(
    path, *, plain, fourier, mixed, mask_box, pseudo_labels, confidence, class_names, title
) -> None:
    """Draw what one unlabelled training step works with, a row per image (the first 4).

    Args:
        plain, fourier, mixed: (N, H, W) in about [0, 1], `mixed` after CutMix.
        mask_box: (N, H, W), 1 where the other image was pasted.
        pseudo_labels, confidence: (2, N, H, W) per network, for the mixed image; int and exp(-V).
    """
    name = "CutMix image" if mask_box.any() else "plain image"  # the one that is pseudo-labelled
    titles = ["plain image", "Fourier view", name]
    titles += [f"{kind} {network}\non {name}" for kind in ("pseudo label", "confidence") for network in (1, 2)]
    figure, axes = _grid(min(len(plain), 4), titles)
    for n, row in enumerate(axes):
        for ax, image in zip(row, (plain[n], fourier[n], mixed[n], mixed[n], mixed[n]), strict=False):
            _show(ax, image)
        _contour(row[2], mask_box[n], "white")
        for network in range(2):
            _fill_structures(row[3 + network], pseudo_labels[network, n], class_names)
            confidence_map = _show(row[5 + network], confidence[network, n], cmap="viridis")
    figure.colorbar(confidence_map, ax=axes, shrink=0.6, label="confidence exp(−V)")
    box = Line2D([], [], color="white", label="edge of pasted region")
    _save(figure, path, title, [*_fills(class_names, "pseudo label"), box], **DARK)


def plot_preview(path, *, images, masks, fourier, mixed, letters, spacing, titles, class_names, title) -> None:
    """Draw what the networks see, a row per image.

    Args:
        images, fourier, mixed: (N, H, W) in about [0, 1]; masks: N label maps (H, W).
        letters, titles: N `edge_letters` and names; spacing: mm per px.
    """
    difference = np.asarray(fourier, dtype=float) - images
    limit = max(np.abs(difference).max(), 1e-6)
    figure, axes = _grid(len(images), ["plain", "truth", "Fourier view", "Fourier − plain", "CutMix"], titles)
    for n, row in enumerate(axes):
        for column, image in ((0, images[n]), (1, images[n]), (2, fourier[n]), (4, mixed[n])):
            _show(row[column], image)
        _orient(row[0], letters[n], spacing)
        # LV last: its edge is also the inner edge of MYO, which stays recognisable by its outer one.
        for label, _, colour in reversed(structures_of(class_names)):
            _contour(row[1], masks[n] == label, colour)
        difference_map = _show(row[3], difference[n], cmap="RdBu_r", limits=(-limit, limit))
    figure.colorbar(difference_map, ax=axes, shrink=0.6, label="Fourier − plain")
    handles = [Line2D([], [], color=colour, label=f"{name} truth") for _, name, colour in structures_of(class_names)]
    _save(figure, path, title, handles, **DARK)


def plot_case(path, *, image, truth, prediction, agreement, slices, letters, spacing, class_names, title) -> None:
    """Draw one held-out scan, a column per slice.

    Args:
        image, truth, prediction, agreement: (S, H, W); of any scale, int, int, in [0, 1].
        slices: S numbers.
        letters: `edge_letters`.
        spacing: mm per px.
    """
    limits = np.percentile(image.astype(float), (1, 99))  # one grey scale, so that slices can be compared
    figure, axes = _grid(3, [f"slice {number}" for number in slices], ["image", "prediction, truth", "agreement"])
    for s, column in enumerate(axes.T):
        for ax in column[:2]:
            _show(ax, image[s], limits=limits)
        _fill_structures(column[1], prediction[s], class_names)
        for label, *_ in structures_of(class_names):
            _contour(column[1], truth[s] == label, "white", CASING)
        agreement_map = _show(column[2], agreement[s], cmap="viridis")
    _orient(axes[0, 0], letters, spacing)
    figure.colorbar(agreement_map, ax=axes, shrink=0.6, label="agreement exp(−KL) of the two networks")
    truth_line = Line2D([], [], color="white", path_effects=CASING, label="truth")
    _save(figure, path, title, [*_fills(class_names, "prediction"), truth_line], **DARK)


def plot_dice_per_case(path, dice: Mapping[str, Sequence[float]], *, title: str) -> None:
    """Draw the Dice (percent) of every scan, by structure, over a box of quartiles."""
    figure, [ax] = _panels([""], 1)
    for x, name, colour in structures_of(dice):
        values = np.sort(dice[name])
        ax.boxplot(values, positions=[x], widths=0.5, showfliers=False, medianprops={"color": "black"})
        # Golden ratio steps spread neighbours in Dice apart, the same way each time.
        places = x + 0.36 * (np.arange(len(values)) * 0.618 % 1 - 0.5)
        ax.plot(places, values, "o", color=colour, markersize=5, markeredgecolor="black", markeredgewidth=0.5)
    ax.set(xticks=range(1, len(dice) + 1), xticklabels=dice, ylabel="Dice (%)")
    _save(figure, path, title)


def plot_bland_altman(path, pairs: Mapping[str, Sequence], agreement: Mapping[str, dict], *, title: str) -> None:
    """Draw differences of predicted and true quantities over their mean, with bias and limits.

    Args:
        pairs: truths and predictions by quantity; a pair with a NaN is not drawn.
        agreement: by quantity "n", "bias" and "limits" (None where unknown) and "unit".
    """
    figure, axes = _panels([f"{quantity} (n = {agreement[quantity]['n']})" for quantity in pairs], min(len(pairs), 4))
    for ax, (quantity, values) in zip(axes, pairs.items(), strict=True):
        truth, predicted = np.asarray(values, dtype=float)
        bias, limits, unit = (agreement[quantity][key] for key in ("bias", "limits", "unit"))
        ax.axhline(0, color="grey", linewidth=0.8, label="no difference")
        ax.plot((truth + predicted) / 2, predicted - truth, "o", color="#0072B2", markersize=4, label="one case")
        if bias is not None:
            ax.axhline(bias, color="black", label="bias")
        for limit, label in zip(limits or (), ("bias ± 1.96 SD", None), strict=False):
            ax.axhline(limit, color="black", linestyle="--", label=label)
        ax.set(xlabel=f"mean of both ({unit})", ylabel=f"predicted − truth ({unit})")
    _save(figure, path, title, axes[0].get_legend_handles_labels()[0])


def plot_risk_coverage(path, curves: Mapping[str, Mapping[str, Sequence[float]]], *, title: str) -> None:
    """Draw by kind of case and score the mean risk (percent) of the first 1 to N of N cases."""
    figure, axes = _panels(curves, len(curves))
    for ax, by_score in zip(axes, curves.values(), strict=True):
        number = len(next(iter(by_score.values())))
        _lines(ax, 100 * np.arange(1, number + 1) / number, by_score)
        ax.set(xlim=(0, 102), ylim=(0, None), xlabel="cases kept (%)", ylabel="100 − Dice of the kept (%)")
    _save(figure, path, title, axes[0].get_legend_handles_labels()[0])


def structures_of(class_names):
    """Return (label, name, colour) of every structure."""
    return list(zip(range(1, len(class_names) + 1), class_names, STRUCTURE_COLOURS, strict=False))


def _show(ax, image, cmap="gray", limits=(0, 1)):
    return ax.imshow(image.T, cmap=cmap, vmin=limits[0], vmax=limits[1], origin="upper")


def _contour(ax, mask, colour, path_effects=None) -> None:
    if mask.any() and not mask.all():  # matplotlib warns about a contour that is nowhere
        ax.contour(mask.T, levels=[0.5], colors=[colour], linewidths=1).set_path_effects(path_effects)


def _orient(ax, letters, spacing) -> None:
    """Write the letters of the edges and a scale bar into an image that `_show` has drawn."""
    style = {"color": "white", "path_effects": CASING, "transform": ax.transAxes}
    for x, y, letter in zip((0.05, 0.95, 0.5, 0.5), (0.5, 0.5, 0.94, 0.05), letters, strict=False):
        ax.text(x, y, letter, ha="center", va="center", fontsize=8, **style)
    width = np.ptp(ax.get_xlim()) * spacing
    length = max(mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= max(width / 3, 1))
    ax.plot([0.05, 0.05 + length / width], [0.05, 0.05], linewidth=1.5, **style)
    ax.text(0.05, 0.08, f"{length} mm", fontsize=7, **style)


def _fill_structures(ax, labels, class_names) -> None:
    overlay = np.zeros((*labels.shape, 4))
    for label, _, colour in structures_of(class_names):
        overlay[labels == label] = (*to_rgb(colour), FILL_ALPHA)
    ax.imshow(overlay.swapaxes(0, 1), origin="upper")


def _fills(class_names, meaning):
    """Entries of a legend, for what `_fill_structures` draws."""
    return [Patch(color=c, alpha=FILL_ALPHA, label=f"{name} {meaning}") for _, name, c in structures_of(class_names)]


def _grid(num_rows, column_titles, row_titles=()):
    """Return a figure and its axes (rows, columns) for images."""
    figure = Figure(figsize=(1.65 * len(column_titles) + 1, 1.65 * num_rows + 1), layout="compressed")
    axes = figure.subplots(num_rows, len(column_titles), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax, text in zip(axes[0], column_titles, strict=True):
        ax.set_title(text, fontsize=9)
    for ax, text in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(text, fontsize=8)
    return figure, axes


def _panels(titles, num_columns, **shared):
    """Return a figure and its axes for curves or points, one of each title."""
    num_rows = -(-len(titles) // num_columns)
    figure = Figure(figsize=(max(2.9 * num_columns, 9), 3 * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **shared).flatten()
    for ax, text in zip(axes, titles, strict=False):
        ax.set_title(text, fontsize=10)
        ax.grid(alpha=0.3)
    for ax in axes[len(titles) :]:
        ax.remove()
    return figure, axes[: len(titles)]


def _lines(ax, x, curves) -> None:
    """Draw curves by name; their markers keep a lone point, such as one between two gaps, visible."""
    for (label, values), (colour, style) in zip(curves.items(), cycle(LINE_STYLES), strict=False):
        size = 3 if len(values) <= 50 else 1
        ax.plot(x, values, color=colour, linestyle=style, marker="o", markersize=size, label=label)


def _save(figure, path, title, handles=(), **style) -> None:
    """Write the PNG file, `title` above all, a legend of `handles` below; no text is read as a formula."""
    if handles:
        columns = min(len(handles), 2 * figure.axes[0].get_gridspec().ncols + 1)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, **style)
    figure.suptitle(title, fontsize=10)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05)


def radiological(array: np.ndarray, like) -> np.ndarray:
    """Turn slices (..., X, Y) of a scan as a radiologist looks at them, if it says how its axes lie.

    X then runs from the patient's right to left (or front to back), Y from front to back (or head
    to feet).
    """
    if not (like.header["sform_code"] or like.header["qform_code"]):
        return array
    axes = list(zip(nib.aff2axcodes(like.affine)[:2], (-2, -1), strict=True))
    axes.sort(key=lambda axis: "LRAPSI".index(axis[0]) // 2)
    array = np.flip(array, [axis for code, axis in axes if code in "RAS"])
    return array if axes[0][1] == -2 else array.swapaxes(-2, -1)


def edge_letters(like) -> str:
    """Return what the left, right, upper, lower edge of a `radiological` slice face, such as "RLAP", or ""."""
    if not (like.header["sform_code"] or like.header["qform_code"]):
        return ""
    codes = nib.aff2axcodes(like.affine)[:2]
    return "".join(pair for pair in ("RL", "AP", "SI") if set(pair) & set(codes))
