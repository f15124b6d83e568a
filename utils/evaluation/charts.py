"""Charts of an evaluation: Dice, clinical agreement, risk, differences; each is one PNG."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from utils.plots import Figure, Line2D, Patch, legend_below, save, structures_of

MARKERS = "o^sDvP*X"  # of phases; further ones begin anew
SCORE_STYLES = {  # Okabe-Ito colours; lines that are told apart without colour, too
    "exp(−V)": ("#0072B2", "-"),
    "agreement": ("#D55E00", "--"),
    "softmax maximum": ("#000000", "-."),
    "best possible": ("#009E73", ":"),
    "random": ("#999999", (0, (1, 3))),
}


def plot_dice_per_case(path, rows: list[dict], class_names, *, title, num_named: int = 3) -> None:
    """Dice of every case by structure, over a box of quartiles; the worst cases are named.

    rows: dicts with patient, structure (one of class_names), phase (such as "ED"; "" where there is
        none) and
    dice (percent).
    """
    rows = sorted(rows, key=lambda row: row["dice"])
    markers = dict(zip(sorted({row["phase"] for row in rows}), cycle(MARKERS), strict=False))
    lowest = rows[0]["dice"] if rows else 0
    span = max(100 - lowest, 1)
    figure = Figure(figsize=(2 + 2.2 * len(class_names), 4.5), layout="constrained")
    ax = figure.add_subplot()
    for x, name, colour in structures_of(class_names):
        cases = [row for row in rows if row["structure"] == name]
        dice = [row["dice"] for row in cases]
        ax.boxplot(dice, positions=[x], widths=0.5, showfliers=False, medianprops={"color": "black"})
        # Golden ratio steps spread neighbours in Dice apart, the same way each time.
        places = [(x + 0.36 * (i * 0.618 % 1 - 0.5), value) for i, value in enumerate(dice)]
        style = {"color": colour, "markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.5}
        for place, row in zip(places, cases, strict=True):
            ax.plot(*place, markers[row["phase"]], **style)
        text_y = np.inf
        line = {"arrowstyle": "-", "linewidth": 0.5}
        for place, row in reversed(list(zip(places, cases, strict=True))[:num_named]):
            text_y = min(row["dice"], text_y - 0.045 * span)  # names move down until they are apart
            text = f"{row['patient']} {row['phase']}"
            ax.annotate(text, place, (x + 0.3, text_y), fontsize=7, va="center", arrowprops=line)
    ax.set(xlim=(0.5, len(class_names) + 0.8), ylim=(lowest - 0.15 * span, 100 + 0.03 * span), ylabel="Dice (%)")
    ax.set_xticks(range(1, len(class_names) + 1), class_names)
    ax.grid(axis="y", alpha=0.3)
    handles = [Patch(facecolor=c, edgecolor="black", label=n) for _, n, c in structures_of(class_names)]
    handles += [Line2D([], [], color="grey", marker=m, ls="", label=p) for p, m in markers.items() if p]
    legend_below(figure, handles)
    save(figure, path, title)


def plot_bland_altman(path, pairs: dict, agreement: dict[str, dict], *, title: str) -> None:
    """Predicted against reference quantities: difference over mean, bias, limits of agreement.

    pairs: quantity -> (reference, predicted), two equally long sequences; a pair with a NaN is not
        drawn;
    agreement: quantity -> its n, bias, limits (None where there are none) and unit.
    """
    num_columns = min(len(pairs), 4)
    num_rows = -(-len(pairs) // num_columns)
    figure = Figure(figsize=(2.9 * num_columns + 0.6, 2.8 * num_rows + 0.4), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for ax, (quantity, values) in zip(axes, pairs.items(), strict=False):
        reference, predicted = np.asarray(values, dtype=float)
        n, bias, limits, unit = (agreement[quantity][key] for key in ("n", "bias", "limits", "unit"))
        text = f"{quantity} (n = {n})"
        ax.axhline(0, color="grey", linewidth=0.8, label="no difference")
        mean = (reference + predicted) / 2
        ax.plot(mean, predicted - reference, "o", color="#0072B2", markersize=4, alpha=0.7, label="one case")
        if bias is not None:
            ax.axhline(bias, color="black", label="bias")
            text += f"\nbias {bias:+.1f} {unit}"
        if limits is not None:
            for limit in limits:
                ax.axhline(limit, color="black", linestyle="--", label="bias ± 1.96 SD")
            text += f", limits {limits[0]:+.1f} to {limits[1]:+.1f}"
        ax.set_title(text, fontsize=8)
        ax.set_xlabel(f"mean of both ({unit})", fontsize=8)
        ax.set_ylabel(f"predicted − truth ({unit})", fontsize=8)
        ax.tick_params(labelsize=8)
        if not n:
            ax.set(xticks=[], yticks=[])
            ax.text(0.5, 0.6, "no patient has both", ha="center", fontsize=8, transform=ax.transAxes)
    for ax in axes[len(pairs) :]:
        ax.set_axis_off()
    legend_below(figure, ncols=4)
    save(figure, path, title)


def plot_risk_coverage(path, curves: Mapping[str, Mapping[str, Sequence[float]]], *, title: str) -> None:
    """Risk of the cases that are kept by a score, over their share, of slices and patients.

    curves: kind of case -> score -> N mean risks (percent) of the 1/N to N/N of the cases with the
        highest score.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for ax, (kind, by_score) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for score, values in by_score.items():
            colour, style = SCORE_STYLES[score]
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            marker = "o" if len(values) <= 30 else None  # keeps a lone point visible
            ax.plot(share, values, color=colour, linestyle=style, marker=marker, markersize=3, label=score)
        ax.set(xlim=(0, 102), ylim=(0, None), xlabel="coverage, highest scores first (%)")
        ax.set_ylabel("100 − Dice of the kept (%)")
        ax.set_title(kind, fontsize=10)
        ax.grid(alpha=0.3)
    legend_below(figure)
    save(figure, path, title)


def plot_differences(path: Path, rows: Sequence[tuple], *, title: str) -> None:
    """Forest plot of paired differences: each row's mean, its interval and its patients.

    rows: (name, differences in points of Dice by patient, mean, (low, high) or None), drawn from
        top to bottom;
    a row without patients is left empty.
    """
    figure = Figure(figsize=(7, 1.4 + 0.32 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    ax.axvline(0, color="grey", linewidth=0.8)
    for y, (_, values, mean, limits) in enumerate(rows):
        ax.plot(values, [y] * len(values), "|", color="#0072B2", markersize=7, alpha=0.6, label="one patient")
        if limits:
            ax.plot(limits, [y, y], color="black", linewidth=1.5, label="95 % interval of the mean")
        if mean is not None:
            ax.plot(mean, y, "D", color="black", markersize=5, label="mean")
    ax.set_yticks(range(len(rows)), [f"{name} (n = {len(values)})" for name, values, *_ in rows], fontsize=8)
    ax.set(ylim=(len(rows) - 0.5, -0.5))
    ax.set_xlabel("difference in Dice (points): left of 0 worse than the reference, right of it better", fontsize=8)
    ax.grid(axis="x", alpha=0.3)
    legend_below(figure)
    save(figure, path, title)
