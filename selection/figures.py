"""Figures of a selection, as matplotlib Figures: labelled axes, no global state, legible when shrunk to a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

EXAMPLES = 3
# Apart for the colour-blind too, and each keeps its meaning through every figure.
AVERAGE, HIGH, LOW, NEUTRAL = "#222222", "#0072b2", "#d55e00", "#9aa3ad"
FONT = 12


def new_figure(width: float = 6.2, height: float = 4.0) -> tuple[Figure, Axes]:
    """One pair of axes in the style of every report. Sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Labels with their units, in the size of every report."""
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)


def average_learning_curve(
    curves: np.ndarray,
    sample_ids: Sequence[str],
    scores: np.ndarray,
    *,
    value: str = "mean reward of a sample's rollouts",
) -> Figure:
    """The average learning trajectory, with curves of high and low scored samples (arXiv 2502.11886, figure 2).

    Args:
        curves: [N, K] rewards, NaN = epoch missing.
        sample_ids: [N].
        scores: [N], NaN = not scored.
        value: what the curves measure, the label of the axis.
    """
    figure, axes = new_figure(height=4.4)
    epochs = np.arange(1, curves.shape[1] + 1)
    known = np.flatnonzero(~np.isnan(scores))
    order = known[np.argsort(scores[known], kind="stable")]
    # Few samples: no sample is an example of both.
    count = min(EXAMPLES, len(order) // 2) or len(order[:1])
    for rows, colour, name, mark in (
        (order[::-1][:count], HIGH, "high score", "o"),
        (order[:count], LOW, "low score", "s"),
    ):
        for place, row in enumerate(rows):
            label = f"{name}: {_short(sample_ids[row])}, score {scores[row]:.2f}" if place == 0 else None
            axes.plot(
                epochs, curves[row], color=colour, alpha=0.8, linewidth=1.3, marker=mark, markersize=4, label=label
            )
    complete = curves[~np.isnan(curves).any(axis=1)]
    if len(complete):
        label = f"average of {len(complete):,} samples"
        axes.plot(epochs, complete.mean(axis=0), color=AVERAGE, linewidth=3, label=label)
    label_axes(axes, "epoch (pass over the training set)", value)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", fontsize=FONT - 1, frameon=False)
    return figure


def score_histogram(
    scores: np.ndarray, threshold: float | None, *, name: str = "LIM score", floor: float = -2.0
) -> Figure:
    """How many samples have which score.

    Args:
        scores: [N], NaN = not scored, left out.
        threshold: drawn, and scores from it on coloured as kept; None draws none.
        name: label of the axis.
        floor: lower scores are counted in the first bar, so that a long tail does not flatten the rest.
    """
    figure, axes = new_figure(height=3.6)
    known = scores[~np.isnan(scores)]
    low = max(floor, float(known.min())) if len(known) else 0.0
    high = max(float(known.max()) if len(known) else 1.0, low + 1e-9)
    edges = np.linspace(low, high, 41)
    if threshold is not None and low < threshold < high:
        # A bar that spans the threshold would be half kept.
        edges = np.sort(np.append(edges[np.abs(edges - threshold) > (high - low) / 160], threshold))
    counts, _ = np.histogram(np.clip(known, low, high), edges)
    colours = [HIGH if threshold is not None and left >= threshold - 1e-12 else NEUTRAL for left in edges[:-1]]
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.4)
    if threshold is not None:
        kept = int((known >= threshold).sum())
        label = f"threshold {threshold:g}: {kept:,} of {len(known):,} scored samples reach it"
        axes.axvline(threshold, color=LOW, linewidth=1.8, label=label)
        figure.legend(loc="outside upper center", fontsize=FONT - 1, frameon=False)
    below = int((known < low).sum())
    label_axes(axes, name + (f" ({below:,} below {low:g} counted at {low:g})" if below else ""), "number of samples")
    return figure


def kept_by_group(groups: Sequence[str], kept: np.ndarray, *, name: str) -> Figure:
    """Kept and dropped samples of each group (level, source, length), one bar a group.

    Args:
        groups: [N] the group of each sample.
        kept: [N] bool.
        name: what the groups are.
    """
    order, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    total = np.bincount(index, minlength=len(order))
    inside = np.bincount(index[np.asarray(kept, dtype=bool)], minlength=len(order))
    figure, axes = new_figure(height=1.3 + 0.42 * len(order))
    places = np.arange(len(order))
    axes.barh(places, inside, color=HIGH, label="kept")
    axes.barh(places, total - inside, left=inside, color=NEUTRAL, label="dropped")
    for place, (part, whole) in enumerate(zip(inside, total, strict=True)):
        axes.text(whole, place, f" {part:,} of {whole:,} ({part / whole:.0%})", va="center", fontsize=FONT - 1)
    axes.set_yticks(places, [_short(group, 24) for group in order])
    axes.invert_yaxis()
    axes.set_xlim(0, total.max() * 1.45)
    axes.grid(visible=False, axis="y")
    label_axes(axes, "number of samples", name)
    figure.legend(loc="outside upper center", ncols=2, fontsize=FONT - 1, frameon=False)
    return figure


def overlap(selections: Mapping[str, Set[str]]) -> Figure:
    """How much of the one method's subset the other one keeps too: row's share found in column's, in percent."""
    names = list(selections)
    shares = np.array(
        [[100 * len(selections[a] & selections[b]) / max(len(selections[a]), 1) for b in names] for a in names]
    )
    figure, axes = new_figure(height=1.6 + 0.55 * len(names))
    axes.grid(visible=False)
    axes.imshow(shares, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for row in range(len(names)):
        for column in range(len(names)):
            colour = "white" if shares[row, column] > 60 else "black"
            axes.text(
                column, row, f"{shares[row, column]:.0f}%", ha="center", va="center", color=colour, fontsize=FONT - 1
            )
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), [f"{name} ({len(selections[name]):,})" for name in names])
    label_axes(axes, "…is also kept by", "share of what this method keeps (n)")
    return figure


def _short(text: str, width: int = 14) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
