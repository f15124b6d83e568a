"""Plots of statistics: curves of scores and risks, paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.plots import Figure, legend_below, save

STYLES = {  # Okabe-Ito colours; lines that are told apart without colour, too
    "exp(−V)": ("#0072B2", "-"),
    "agreement": ("#D55E00", "--"),
    "softmax maximum": ("#000000", "-."),
    "best possible": ("#009E73", ":"),
    "random": ("#999999", (0, (1, 3))),
}
MOST_POINTS = 500


def plot_scores(
    path: Path, panels: Mapping[str, tuple[str, str, Mapping[str, Sequence[float]]]], *, title: str
) -> None:
    """Draw a panel per entry, of an even number: the labels of both axes, and the curves by score.

    A curve of N values stands at the N equal shares of the cases, 1/N to 1.
    """
    num_rows = len(panels) // 2
    figure = Figure(figsize=(9, 3.3 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, 2).flat
    for ax, (name, (x_label, y_label, curves)) in zip(axes, panels.items(), strict=True):
        for score, values in curves.items():
            colour, style = STYLES[score]
            places = np.unique(np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int))
            marker = "o" if len(places) <= 30 else None
            share = 100 * (places + 1) / len(values)
            values = np.asarray(values)[places]
            ax.plot(share, values, color=colour, linestyle=style, marker=marker, markersize=3, label=score)
        ax.set(xlabel=x_label, ylabel=y_label, xlim=(0, 102), ylim=(0, None))
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
    legend_below(figure)
    save(figure, path, title)


def plot_differences(path: Path, rows: Sequence[tuple], *, title: str) -> None:
    """Forest plot of paired differences: the mean of each row with its interval, and every patient behind it.

    rows: (name, differences in points of Dice by patient, mean, (low, high) or None), drawn from top to bottom;
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
