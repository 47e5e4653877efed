"""Intervals against textbook values and by simulation."""

import numpy as np
import pytest

from plumbline.rl.stats import mean_interval, paired_difference


def test_wilson_values():
    interval = mean_interval(np.array([1.0] * 8 + [0.0] * 2))
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.4901625, abs=1e-6)
    assert interval.high == pytest.approx(0.9433178, abs=1e-6)
    assert mean_interval(np.zeros(20)).low == 0
    assert mean_interval(np.zeros(20)).high == pytest.approx(0.1611252, abs=1e-6)


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = rng.binomial(4, 0.3, 100) / 4
        interval = mean_interval(values, seed=trial, resamples=500)
        hits += interval.low <= 0.3 <= interval.high
    assert hits >= 180


def test_paired_difference_is_tighter_than_two_means():
    rng = np.random.default_rng(1)
    base = rng.random(200)
    difference = paired_difference(base, base + 0.1 + 0.01 * rng.standard_normal(200))
    assert difference.low > 0.09
    assert difference.high < 0.11


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval(np.array([]))
    with pytest.raises(ValueError, match="non-zero length"):
        paired_difference(np.zeros(2), np.zeros(3))
