"""Baselines against plain definitions, and the one interface to every method."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from plumbline.selection import baselines
from plumbline.selection.methods import METHODS, select_samples

nan = np.nan
CURVES = arrays(
    np.float64, st.tuples(st.integers(1, 8), st.integers(1, 6)), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, nan])
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CURVES)
def test_baselines_equal_plain_definitions(curves):
    for row, linear, variance, bernoulli, first in zip(
        curves,
        baselines.linear_scores(curves),
        baselines.success_variance(curves),
        baselines.bernoulli_variance(curves),
        baselines.pass_rates(curves),
        strict=True,
    ):
        epochs = np.flatnonzero(~np.isnan(row))
        seen = row[epochs]
        np.testing.assert_equal(first, row[0])
        if len(seen) == 0:
            assert np.isnan([linear, variance, bernoulli]).all()
            continue
        assert variance == pytest.approx(np.var(seen), abs=1e-12)
        assert bernoulli == pytest.approx(seen.mean() * (1 - seen.mean()), abs=1e-12)
        if len(seen) == 1:
            assert np.isnan(linear)
        elif np.ptp(seen) == 0:
            assert linear == 0
        else:
            assert linear == pytest.approx(np.corrcoef(epochs, seen)[0, 1], abs=1e-9)


def test_the_guess_filter_keeps_what_was_never_guessed():
    kept = select_samples("guess", list("abc"), np.array([[0.0], [0.125], [nan]]))
    assert kept.ids == ["a"]
    assert kept.scores[1] == 0.875


def world(n=60, k=6, seed=0):
    rng = np.random.default_rng(seed)
    return [f"s{i}" for i in range(n)], np.clip(rng.normal(0.5, 0.3, (n, k)), 0, 1).round(3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_number_asked_for(method):
    ids, curves = world()
    chosen = select_samples(method, ids, curves, count=17, seed=1)
    assert len(chosen.ids) == chosen.kept.sum() == 17
    assert chosen.scores[chosen.kept].min() >= chosen.scores[~chosen.kept].max()
    assert select_samples(method, ids, curves, count=17, seed=1).ids == chosen.ids
    assert len(select_samples(method, ids, curves, share=0.5).ids) == 30
    assert chosen.curves.shape == curves.shape
    assert chosen.average is not None
    assert ("random: 17" if method == "random" else "17 highest") in chosen.rule


def test_random_repeats_by_seed_and_differs_between_seeds():
    ids, curves = world()
    picks = [tuple(select_samples("random", ids, curves, count=10, seed=seed).ids) for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]


def test_default_thresholds_are_the_papers():
    ids, curves = world()
    assert select_samples("lim", ids, curves).low == 0.6
    assert select_samples("linear", ids, curves).low == 0.7
    band = select_samples("pass_rate", ids, curves)
    assert [i for i, p in zip(ids, curves[:, 0], strict=True) if 0.2 <= p <= 0.8] == band.ids
    narrow = select_samples("pass_rate", ids, curves, threshold=0.4, high=0.5)
    assert narrow.ids == [i for i, p in zip(ids, curves[:, 0], strict=True) if 0.4 <= p <= 0.5]
    assert "first success rate >= 0.4 and <= 0.5" in narrow.rule


def test_variants_treat_incomplete_samples_as_they_say():
    curves = np.array([[0, 0.5, 1], [0.1, 0.5, nan], [nan, 0.5, 1]])
    limr = select_samples("lim", list("abc"), curves)
    assert np.isnan(limr.scores).tolist() == [False, True, False]
    assert limr.incomplete.tolist() == [False, True, True]
    paper = select_samples("lim", list("ab"), curves[:2], variant="paper")
    assert not np.isnan(paper.scores).any()
    assert paper.incomplete.tolist() == [False, True]


def test_equal_scores_are_broken_by_the_seed_and_not_by_the_file():
    ids = [f"s{i}" for i in range(100)]
    curves = np.zeros((100, 2))
    picks = [set(select_samples("variance", ids, curves, count=10, seed=seed).ids) for seed in range(3)]
    assert picks[0] != picks[1]
    assert picks[0] != set(ids[:10])


def test_a_threshold_may_keep_nothing():
    ids, curves = world()
    assert select_samples("lim", ids, curves, threshold=2).ids == []


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("limm", {}, r"unknown selection method 'limm'; did you mean 'lim'\?"),
        ("variance", {}, "only ranks samples: say how many"),
        ("random", {}, "only ranks samples"),
        ("lim", {"count": 5, "share": 0.1}, "one of threshold, count and share, not count and share"),
        ("lim", {"share": 0}, "share must be over 0"),
        ("lim", {"count": 0}, "cannot keep 0 of 60"),
        ("lim", {"count": 61}, "cannot keep 61 of 60"),
    ],
)
def test_bad_requests(method, options, words):
    ids, curves = world()
    with pytest.raises(ValueError, match=words):
        select_samples(method, ids, curves, **options)


@pytest.mark.parametrize(
    ("ids", "curves", "words"),
    [
        (["a"], np.zeros((2, 2)), "do not fit"),
        (["a", "a"], np.zeros((2, 2)), "unique"),
        (["a"], np.zeros((1, 0)), "do not fit"),
    ],
)
def test_bad_curves(ids, curves, words):
    with pytest.raises(ValueError, match=words):
        select_samples("lim", ids, curves)
