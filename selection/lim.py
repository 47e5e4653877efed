"""LIM: learning impact measurement (arXiv 2502.11886, "LIMR: Less is More for RL Scaling").

A sample's score says how closely its reward curve follows the average learning trajectory:

    s_i = 1 - sum_k (r_i^k - avg^k)^2 / sum_k (1 - avg^k)^2

with r_i^k the reward of sample i at epoch k and avg the average over samples whose curve is complete. A sample that is
right at every epoch scores 0, one on the average scores 1, and one that stays wrong while others learn falls below 0.

The published code and the paper differ; both are here by name:

    `limr`   r is the share of rollouts graded correct; a gap takes the next epoch's value; still incomplete: no score
    `paper`  r is the mean reward; nothing is filled; an incomplete sample is scored on the epochs it has

Where the sums are not defined, the score is NaN and never selected: a sample without any epoch, and every sample when
the average is 1 at all the epochs that count. A set of one sample is its own average and scores 1 (unless it is always
right); so does a constant curve that equals a constant average, such as all zeros in a run that never got a reward. One
epoch is enough for a score, if not for a judgement. Duplicate rows of a sample in an epoch are averaged by
history.curves.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np

Variant = Literal["limr", "paper"]
VARIANTS = ("limr", "paper")
# Which column of the history each variant reads.
VALUE = {"limr": "correct", "paper": "reward"}
# Rows scored at a time: a million curves need no second copy of themselves.
CHUNK = 1 << 14


class UndefinedScores(UserWarning):
    """The average curve is 1 at every epoch: no sample can be told from another."""


def fill_gaps(curves: np.ndarray, mode: Variant = "limr", *, out: np.ndarray | None = None) -> np.ndarray:
    """Treat missing epochs (NaN) as one of the two definitions does.

    Args:
        curves: [N, K] rewards, NaN = epoch missing.
        mode: `limr`: a gap takes the value of the next epoch, if that one was observed; a sample that is still
            incomplete (a gap at the end, or before another gap) becomes NaN throughout, as the published code drops it.
            `paper`: nothing is filled.

        out: float64 array for the result; `curves` itself fills in place and spares a large table's second copy.

    Returns:
        [N, K] float64, a new array unless `out` is given.

    Raises:
        ValueError: another mode, or curves that are not 2-D with at least one epoch.
    """
    values = _checked(curves)
    if mode not in VARIANTS:
        raise ValueError(f"mode must be limr or paper, got {mode!r}")
    if out is None:
        filled = values.copy(order="K")
    else:
        filled = out
        if out is not curves:
            filled[...] = values
    if mode == "paper":
        return filled
    incomplete = np.isnan(values[:, -1])
    for k in range(values.shape[1] - 1):
        gap = np.isnan(values[:, k])
        if gap.any():
            filled[gap, k] = values[gap, k + 1]
            incomplete |= np.isnan(filled[:, k])
    filled[incomplete] = np.nan
    return filled


def lim_scores(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and the average curve.

    A sample with gaps is scored on the epochs it has (both sums run over those); call fill_gaps first for the published
    code's treatment.

    Args:
        curves: [N, K] rewards, NaN = epoch missing.

    Returns:
        (scores [N] float64, average [K] float64). A score is NaN for a sample without any epoch, and, with a warning
        UndefinedScores, where the average is 1 at every epoch that counts.

    Raises:
        ValueError: not 2-D with at least one epoch, infinite values, or no complete curve to average.
    """
    values = _checked(curves)
    count, epochs = values.shape
    total = np.zeros(epochs)
    complete = 0
    for start in range(0, count, CHUNK):
        part = values[start : start + CHUNK]
        whole = _complete(part)
        total += part.sum(axis=0) if whole.all() else part[whole].sum(axis=0)
        complete += int(whole.sum())
    if complete == 0:
        raise ValueError(
            f"none of the {count} curves covers all {epochs} epochs: fill gaps, leave out a last epoch that was cut "
            "short, or record more"
        )
    average = total / complete
    room = (1.0 - average) ** 2
    scores = np.full(count, np.nan)
    undefined = False
    for start in range(0, count, CHUNK):
        part = values[start : start + CHUNK]
        error = part - average
        reach = np.broadcast_to(room.sum(), len(part))
        some = np.ones(len(part), dtype=bool)
        if not _complete(part).all():
            seen = ~np.isnan(part)
            error[~seen] = 0.0
            reach, some = seen @ room, seen.any(axis=1)
        defined = reach > 0
        undefined |= bool((~defined & some).any())
        distance = np.einsum("nk,nk->n", error, error)
        scores[start : start + CHUNK][defined] = 1.0 - distance[defined] / reach[defined]
    if undefined:
        warnings.warn(
            "the average reward is 1 at every epoch that counts, so LIM scores are undefined (NaN)",
            UndefinedScores,
            stacklevel=2,
        )
    return scores, average


def select(scores: np.ndarray, threshold: float = 0.6, strict: bool = False) -> np.ndarray:
    """[N] bool: score >= threshold (strict: >). NaN is never selected."""
    scores = np.asarray(scores, dtype=np.float64)
    return np.greater(scores, threshold) if strict else np.greater_equal(scores, threshold)


def _complete(part: np.ndarray) -> np.ndarray:
    """[n] bool: rows without NaN. ValueError for infinity."""
    total = part.sum(axis=1)
    if np.isfinite(total).all():
        return np.ones(len(part), dtype=bool)
    if np.isinf(part).any():
        raise ValueError("curves hold infinite rewards")
    return ~np.isnan(total)


def _checked(curves: np.ndarray) -> np.ndarray:
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"curves must be [samples, epochs >= 1], got shape {values.shape}")
    return values
