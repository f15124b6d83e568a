"""Pictures of a run, each one PNG: curves, training samples, previews, overlays.

Conventions shared by all: images are arrays as stored, (H, W) with H along NIfTI axis 0; structures
are the labels 1..K, named by `class_names` (label 1 first, no background); the truth is a line, a
prediction or pseudo label a translucent fill; `title` stands above all. Figures are built without
pyplot, so no display is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np

from utils.files import OutputFolder

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
LINE_STYLES = (("#000000", "-"), ("#0072B2", "--"), ("#009E73", ":"))  # Okabe-Ito colours
FILL_ALPHA = 0.5
MOST_POINTS = 200  # of a curve; more would hide each other
CASING = [withStroke(linewidth=2.4, foreground="black")]  # makes what is white visible on white


def plot_curves(
    path, *, points: list[dict], epochs: list[dict], validated: str, title: str, selected_step: int | None = None
) -> None:
    """Losses, variance, confidence, and Dice on the images that selected the weights.

    points: dicts with `step` and any of loss, supervised, variance (mean KL, >= 0), means over the
        steps since the
    point before; a missing, None or NaN value is a gap in its curve. Of many, the means of
    neighbours are drawn;
    epochs: dicts with `step` and `val_dice` (percent), of the images that `validated` names;
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
        "variance V (mean KL)": (steps, {"": variance}),
        "confidence exp(−mean V)": (steps, {"": np.exp(-variance)}),
    }
    monitored = [line for line in epochs if "pseudo_labels" in line]
    if monitored:
        at, figures = [line["step"] for line in monitored], [line["pseudo_labels"] for line in monitored]
        dice = {domain: [f["dice"][domain] for f in figures] for domain in figures[0]["dice"]}
        ranks = {name: [f["scores"][name]["auroc_foreground"] for f in figures] for name in figures[0]["scores"]}
        panels |= {"pseudo label Dice (%) by domain": (at, dice), "AUROC: pixel is right, foreground": (at, ranks)}
    marker_size = 3 if len(steps) <= 50 else 1
    figure = Figure(figsize=(9, 3 * len(panels) / 2), layout="constrained")
    axes = list(figure.subplots(len(panels) // 2, 2, sharex=True).flat)
    if selected_step is not None:
        axes[1].axvline(selected_step, color="grey", linestyle="--", label=f"kept: step {selected_step}")
    for ax, (name, (at, curves)) in zip(axes, panels.items(), strict=True):
        for (label, values), (colour, style) in zip(curves.items(), LINE_STYLES, strict=False):
            # The markers keep a lone point, such as one between two gaps, visible.
            ax.plot(at, values, color=colour, linestyle=style, marker="o", markersize=marker_size, label=label)
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
    for ax in axes[:2]:  # where no numbers of the steps stand below
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=8, frameon=False)
    for ax in axes[4:]:
        ax.legend(fontsize=8)
    if np.isnan(variance).all():
        for ax in axes[2:4]:
            ax.text(0.5, 0.5, "no pseudo supervision so far", ha="center", transform=ax.transAxes)
    axes[0].set_xlim(0, None)
    figure.supxlabel("step", fontsize=10)
    save(figure, path, title)


def plot_training_samples(
    path, *, plain, fourier, mixed, mask_box, pseudo_labels, confidence, class_names, title
) -> None:
    """What one unlabelled training step works with, a row per image (the first 4).

    plain, fourier, mixed: (N, H, W) in about [0, 1], `mixed` after CutMix; mask_box: (N, H, W), 1
        where the
    other image was pasted; pseudo_labels: (2, N, H, W) int, for the mixed image, and confidence:
    (2, N, H, W) exp(-V) in [0, 1], both per network.
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
    _finish(figure, path, title, [*_fills(class_names, "pseudo label"), box])


def plot_preview(path, *, images, masks, fourier, mixed, letters, spacing, titles, class_names, title) -> None:
    """What the networks see, a row per image.

    images, fourier, mixed: (N, H, W) in about [0, 1]; masks: N label maps (H, W);
    letters: N texts as in `plot_case`; spacing: mm per px; titles: N row names, such as "vendor A,
        P012 ED slice 4".
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
    _finish(figure, path, title, handles)


def plot_case(path, *, image, truth, prediction, agreement, slices, letters, spacing, class_names, title) -> None:
    """One held-out scan, a column per drawn slice.

    image: (S, H, W), any intensity scale; truth, prediction: (S, H, W) int; agreement: (S, H, W) in
        [0, 1];
    slices: the S numbers of the slices; letters: of the left, right, upper and lower edge, such as
        "RLAP", or "";
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
    _finish(figure, path, title, [*_fills(class_names, "prediction"), truth_line])


def structures_of(class_names):
    """Return (label, name, colour) of every structure."""
    return list(zip(range(1, len(class_names) + 1), class_names, STRUCTURE_COLOURS, strict=False))


def _upright(array):
    """(H, W, ...) as stored -> (rows, columns, ...): NIfTI axis 0 runs from left to right."""
    return array.swapaxes(0, 1)


def _show(ax, image, cmap="gray", limits=(0, 1)):
    return ax.imshow(_upright(image), cmap=cmap, vmin=limits[0], vmax=limits[1], origin="upper")


def _contour(ax, mask, colour, path_effects=None) -> None:
    if mask.any() and not mask.all():  # matplotlib warns about a contour that is nowhere
        contour = ax.contour(_upright(mask), levels=[0.5], colors=[colour], linewidths=1)
        contour.set_path_effects(path_effects)


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
    ax.imshow(_upright(overlay), origin="upper")


def _grid(num_rows, column_titles, row_titles=()):
    figure = Figure(figsize=(1.65 * len(column_titles) + 1, 1.65 * num_rows + 1), layout="compressed")
    axes = figure.subplots(num_rows, len(column_titles), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax, text in zip(axes[0], column_titles, strict=True):
        ax.set_title(text, fontsize=9)
    for ax, text in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(text, fontsize=8)
    return figure, axes


def _fills(class_names, meaning):
    """Entries of a legend, for what `_fill_structures` draws."""
    return [Patch(color=c, alpha=FILL_ALPHA, label=f"{name} {meaning}") for _, name, c in structures_of(class_names)]


def _finish(figure, path, title, handles) -> None:
    """Save a grid of images above a legend."""
    num_columns = figure.axes[0].get_gridspec().ncols
    # As dark as the images, so that the colours (one of them white) look as they do there.
    legend_below(figure, handles, min(len(handles), 2 * num_columns), facecolor="dimgrey", labelcolor="white")
    save(figure, path, title)


def legend_below(figure, handles=None, ncols=None, **style) -> None:
    """Put a legend below the axes: of `handles`, else of all labelled lines."""
    if handles is None:
        by_label = {line.get_label(): line for ax in figure.axes for line in ax.lines}
        handles = [line for label, line in by_label.items() if not label.startswith("_")]  # matplotlib's own
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols or len(handles), fontsize=8, **style)


def save(figure, path, title) -> None:
    """Write the PNG file with `title` above all; no text is read as a formula."""
    figure.suptitle(title, fontsize=10)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05)


def radiological(array: np.ndarray, like) -> np.ndarray:
    """Turn slices as a radiologist looks at them, if the scan says how its axes lie.

    (..., X, Y) in the voxel grid of `like` -> (..., X', Y'): X' from the patient's right to left
    (or front to back), Y' from front to back (or head to feet).
    """
    if not (like.header["sform_code"] or like.header["qform_code"]):
        return array
    axes = list(zip(nib.aff2axcodes(like.affine)[:2], (-2, -1), strict=True))
    axes.sort(key=lambda axis: "LRAPSI".index(axis[0]) // 2)
    array = np.flip(array, [axis for code, axis in axes if code in "RAS"])
    return array if axes[0][1] == -2 else array.swapaxes(-2, -1)


def edge_letters(like) -> str:
    """Return what the left, right, upper, lower edge of a `radiological` slice face: "RLAP".

    Oblique planes get the closest directions. Empty if the scan does not say how its axes lie.
    """
    if not (like.header["sform_code"] or like.header["qform_code"]):
        return ""
    codes = nib.aff2axcodes(like.affine)[:2]
    return "".join(pair for pair in ("RL", "AP", "SI") if set(pair) & set(codes))


def write_label_names(outputs: OutputFolder, class_names: Sequence[str], folder: str = ".") -> None:
    """Write names and colours of the structures, as in the pictures, into a folder in `outputs`.

    labels.txt is for ITK-SNAP, labels.ctbl for 3D Slicer.
    """
    snap = '0 0 0 0 0 0 0 "Clear Label"\n'  # index, red, green, blue, opacity, visible, mesh visible, name
    slicer = f"0 {class_names[0]} 0 0 0 0\n"
    for label, name, colour in structures_of(class_names[1:]):
        rgb = " ".join(map(str, bytes.fromhex(colour[1:])))
        snap += f'{label} {rgb} 1 1 1 "{name}"\n'
        slicer += f"{label} {name} {rgb} 255\n"
    for suffix, text in (("txt", snap), ("ctbl", slicer)):
        outputs.claim(str(Path(folder, f"labels.{suffix}"))).write_text(text)
