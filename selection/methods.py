"""One interface to every offline method: reward curves in, a Selection out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from plumbline.selection import baselines, lim


@dataclass(frozen=True)
class Method:
    """How a method scores and what it keeps unless told otherwise.

    Attributes:
        score: curves [N, K] -> scores [N]; None for lim and random, which need more than the curves.
        label: of the score, for axes.
        low, high: scores kept by default, both ends included; None where the method only ranks, so that a number must
            be given.
        rule: in words.
    """

    score: Callable[[np.ndarray], np.ndarray] | None
    label: str
    low: float | None
    high: float | None
    rule: str


METHODS = {
    "lim": Method(None, "LIM score", 0.6, None, "reward curve close to the average learning curve"),
    "random": Method(None, "random order", None, None, "drawn at random"),
    "linear": Method(baselines.linear_scores, "LINEAR score", 0.7, None, "reward rises steadily over epochs"),
    "pass_rate": Method(baselines.pass_rates, "first success rate", 0.2, 0.8, "neither too easy nor too hard at first"),
    "variance": Method(baselines.success_variance, "variance of success", None, None, "success changes most"),
    "p(1-p)": Method(baselines.bernoulli_variance, "p (1 - p)", None, None, "success rate nearest one half"),
    "guess": Method(baselines.guess_scores, "1 - share guessed", 1.0, None, "never guessed without reasoning"),
}


@dataclass(frozen=True)
class Selection:
    """What a method made of the samples.

    Attributes:
        method, rule: its name, and what it kept in words.
        sample_ids: [N].
        scores: [N], NaN = no score, and then never kept.
        kept: [N] bool.
        low, high: scores kept, ends included; None where a number was asked for.
        curves: [N, K] that were scored, gaps treated.
        average: [K] over complete curves; None if there is none.
        incomplete: [N] bool, samples that lacked an epoch before gaps were treated.
    """

    method: str
    rule: str
    sample_ids: list[str]
    scores: np.ndarray
    kept: np.ndarray
    low: float | None
    high: float | None
    curves: np.ndarray
    average: np.ndarray | None
    incomplete: np.ndarray

    @property
    def ids(self) -> list[str]:
        """Kept sample ids, in the order of sample_ids."""
        return [self.sample_ids[place] for place in np.flatnonzero(self.kept)]

    @property
    def label(self) -> str:
        """Of the scores, for axes and tables."""
        return METHODS[self.method].label


def method_named(name: str) -> Method:
    """Raises ValueError with the nearest name for one that is not there."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown selection method {name!r}; {hint}there are {', '.join(METHODS)}")
    return METHODS[name]


def arm_name(method: str) -> str:
    """A method's name in paths and keys: of its arm's folder and run, and of its figures in summary.json."""
    return method.replace("(", "").replace(")", "")


def curve_value(method: str, variant: str) -> str:
    """What the method's curves measure, of curves.VALUES."""
    return "reward" if method == "lim" and variant == "paper" else "correct"


def select_samples(
    method: str,
    sample_ids: Sequence[str],
    curves: np.ndarray,
    *,
    threshold: float | None = None,
    high: float | None = None,
    count: int | None = None,
    share: float | None = None,
    seed: int = 0,
    variant: lim.Variant = "limr",
) -> Selection:
    """Score and choose.

    Args:
        method: a name in METHODS.
        sample_ids: [N], unique.
        curves: [N, K] from history.curves; NaN = epoch missing. Success rates, but for lim's `paper` variant rewards.
        threshold, high: keep scores from `threshold` to `high`, both included; None takes the method's own.
        count: keep the so many highest scores instead.
        share: keep this share of the samples instead, 0 < share <= 1.
        seed: of random, and of the order among equal scores.
        variant: of lim.

    Returns:
        Selection; it may keep nothing.

    Raises:
        ValueError: unknown method, ids that do not fit the curves, more than one of threshold / count / share, a
            ranking method without count or share, or a count no method could give.
    """
    how = method_named(method)
    ids = list(sample_ids)
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0 or len(ids) != len(values):
        raise ValueError(f"{len(ids)} sample ids do not fit curves of shape {values.shape}")
    if len(set(ids)) != len(ids):
        raise ValueError("sample ids must be unique; average the curves of a sample that stands there twice")
    given = [
        name for name, value in (("threshold", threshold), ("count", count), ("share", share)) if value is not None
    ]
    if len(given) > 1 or (high is not None and (count is not None or share is not None)):
        raise ValueError(f"give one of threshold, count and share, not {' and '.join(given)}")
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be over 0 and at most 1, got {share}")
        count = max(1, round(share * len(ids)))
    incomplete = np.asarray(np.isnan(values).any(axis=1))
    average = values[~incomplete].mean(axis=0) if not incomplete.all() else None
    if method == "lim":
        if incomplete.any():
            values = lim.fill_gaps(values, variant)
        scores, average = lim.lim_scores(values)
    elif method == "random":
        scores = baselines.random_scores(len(ids), seed)
    else:
        assert how.score is not None
        scores = how.score(values)
    if count is not None:
        rule = f"{how.rule}: {count:,}" if method == "random" else f"{how.rule}: the {count:,} highest"
        kept = _top(scores, count, seed)
        return Selection(method, rule, ids, scores, kept, None, None, values, average, incomplete)
    low = threshold if threshold is not None else how.low
    top = high if high is not None else how.high
    if low is None:
        raise ValueError(f"{method} only ranks samples: say how many to keep, with count or share")
    kept = lim.select(scores, low)
    rule = f"{how.rule}: {how.label} >= {low:g}"
    if top is not None:
        kept &= scores <= top
        rule += f" and <= {top:g}"
    return Selection(method, rule, ids, scores, kept, low, top, values, average, incomplete)


def _top(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[N] bool: the highest scores; equal ones in random order, lest the order of the file decide."""
    known = np.flatnonzero(~np.isnan(scores))
    if not 1 <= count <= len(known):
        raise ValueError(f"cannot keep {count:,} of {len(known):,} samples that have a score")
    ties = np.random.default_rng([seed, 0x71E5]).random(len(known))
    kept = np.zeros(len(scores), dtype=bool)
    kept[known[np.lexsort((ties, -scores[known]))[:count]]] = True
    return kept
