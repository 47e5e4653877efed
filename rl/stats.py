"""Numbers with their intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval over n independent units."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


def mean_interval(values: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """95% interval of the mean of one value a problem.

    Zeros and ones (one completion a problem): Wilson's score interval. Other values (means of several completions):
    percentile bootstrap over problems.

    Args:
        values: [n] float.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        z = 1.959963984540054
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return Interval(mean, max(0.0, centre - half), min(1.0, centre + half), n)
    low, high = _bootstrap(values, seed, resamples)
    return Interval(mean, low, high, n)


def paired_difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """Mean of b - a over the same problems with a 95% percentile bootstrap interval over problems.

    Args:
        a, b: [n] float, aligned by problem.

    Raises:
        ValueError: lengths differ or are zero.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired values must be of one non-zero length, got {len(a)} and {len(b)}")
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    low, high = _bootstrap(difference, seed, resamples)
    return Interval(float(difference.mean()), low, high, len(difference))


def _bootstrap(values: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """2.5% and 97.5% quantiles of the mean of resamples with replacement."""
    rng = np.random.default_rng(seed)
    n = len(values)
    # About a million draws at a time: fast, and little memory for a large benchmark.
    rows = max(1, min(resamples, 1_000_000 // n))
    means = [
        values[rng.integers(0, n, (min(rows, resamples - first), n))].mean(axis=1)
        for first in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
