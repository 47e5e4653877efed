"""Figures of a selection, as matplotlib Figures: labelled axes, no global state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

EXAMPLES = 3
AVERAGE, HIGH, LOW, BAR = "#222222", "#2a7f62", "#c8553d", "#4c78a8"


def average_learning_curve(curves: np.ndarray, sample_ids: Sequence[str], scores: np.ndarray) -> Figure:
    """The average learning trajectory with the curves of the highest and lowest scored samples.

    Args:
        curves: [N, K] rewards of scored samples.
        sample_ids: [N].
        scores: [N], NaN allowed.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    epochs = np.arange(1, curves.shape[1] + 1)
    known = np.flatnonzero(~np.isnan(scores))
    order = known[np.argsort(scores[known], kind="stable")]
    low, high = order[:EXAMPLES], order[::-1][:EXAMPLES]
    for rows, colour, name in ((high, HIGH, "tracks the average"), (low, LOW, "does not")):
        for place, row in enumerate(rows):
            label = f"{name}, e.g. {sample_ids[row]} ({scores[row]:.2f})" if place == 0 else None
            axes.plot(
                epochs, curves[row], color=colour, alpha=0.75, linewidth=1.2, marker="o", markersize=3, label=label
            )
    complete = curves[~np.isnan(curves).any(axis=1)]
    axes.plot(
        epochs,
        complete.mean(axis=0),
        color=AVERAGE,
        linewidth=2.6,
        marker="o",
        label=f"average of {len(complete)} samples",
    )
    axes.set_xlabel("epoch of the pre-run")
    axes.set_ylabel("mean reward of a sample's rollouts")
    axes.set_xticks(epochs)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def score_histogram(scores: np.ndarray, threshold: float) -> Figure:
    """How many samples have which score; the tail below -2 is gathered in the first bar."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    known = scores[~np.isnan(scores)]
    floor = -2.0
    axes.hist(np.clip(known, floor, 1.0), bins=np.linspace(floor, 1.0, 31).tolist(), color=BAR)
    axes.axvline(
        threshold, color=LOW, linewidth=1.6, label=f"threshold {threshold:g}: {int((known >= threshold).sum())} kept"
    )
    axes.set_xlabel(f"LIM score (scores below {floor:g} are counted at {floor:g})")
    axes.set_ylabel("samples")
    axes.legend(fontsize=8)
    return figure
