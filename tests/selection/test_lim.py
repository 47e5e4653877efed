"""LIM against a plain float64 definition, LIMR's published scores, and every edge the docstring names."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from plumbline.selection.lim import UndefinedScores, fill_gaps, lim_scores, select

nan = np.nan
DATA = Path(os.environ.get("PLUMBLINE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def definition(curves):
    """The formula, one sample and one epoch at a time."""
    complete = [row for row in curves if not any(np.isnan(row))]
    average = [sum(row[k] for row in complete) / len(complete) for k in range(len(curves[0]))]
    scores = []
    for row in curves:
        seen = [k for k, r in enumerate(row) if not np.isnan(r)]
        top = sum((row[k] - average[k]) ** 2 for k in seen)
        bottom = sum((1 - average[k]) ** 2 for k in seen)
        scores.append(1 - top / bottom if bottom else nan)
    return np.array(scores), np.array(average)


# A loaded machine may be slow; that is no finding about the formula.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 9), st.integers(1, 7)),
        elements=st.sampled_from([0.0, 0.125, 0.5, 0.875, nan, -0.5]),
    )
)
def test_equal_to_the_definition(curves):
    curves[0] = np.nan_to_num(curves[0])
    scores, average = lim_scores(curves)
    expected, expected_average = definition(curves.tolist())
    np.testing.assert_allclose(average, expected_average, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


def test_many_rows_in_either_memory_order():
    rng = np.random.default_rng(0)
    curves = rng.random((40_000, 5))
    curves[rng.random(curves.shape) < 0.05] = nan
    expected, _ = definition(curves[:].tolist())
    for order in ("C", "F"):
        scores, _ = lim_scores(np.array(curves, order=order))
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


def test_published_code_fills_from_the_next_epoch_only():
    curves = np.array([[nan, 1, 1], [nan, nan, 1], [0, 1, nan], [0, nan, 1], [0, 0, 0.0]])
    filled = fill_gaps(curves, "limr")
    np.testing.assert_array_equal(filled, [[1, 1, 1], [nan] * 3, [nan] * 3, [0, 1, 1], [0, 0, 0]])
    scores, average = lim_scores(filled)
    np.testing.assert_allclose(average, [1 / 3, 2 / 3, 2 / 3])
    assert np.isnan(scores).tolist() == [False, True, True, False, False]


def test_filling_in_place_is_the_same():
    curves = np.random.default_rng(0).choice([0.0, 0.5, 1.0, nan], (200, 6))
    expected = fill_gaps(curves)
    other = np.zeros((200, 6))
    assert fill_gaps(curves, out=other) is other
    np.testing.assert_array_equal(other, expected)
    assert fill_gaps(curves, out=curves) is curves
    np.testing.assert_array_equal(curves, expected)


def test_paper_scores_incomplete_samples_on_the_epochs_they_have():
    curves = np.array([[0, 0.5, 1], [0, nan, 0.5], [nan, nan, nan]])
    filled = fill_gaps(curves, "paper")
    np.testing.assert_array_equal(filled, curves)
    filled[0, 0] = 9
    assert curves[0, 0] == 0
    with pytest.warns(UndefinedScores):
        # Epoch 2's average is 1 and adds nothing to the sums; a sample with that epoch alone has no score.
        scores, _ = lim_scores(np.array([[0, 0.5, 1], [0, nan, 0.5], [nan, nan, nan], [nan, nan, 0.5]]))
    np.testing.assert_allclose(scores, [1, 1 - 0.25 / 1, nan, nan])


def test_average_of_one_everywhere_is_undefined_and_said():
    with pytest.warns(UndefinedScores, match="1 at every epoch"):
        scores, average = lim_scores(np.ones((3, 4)))
    assert np.isnan(scores).all()
    assert (average == 1).all()
    assert not select(scores).any()


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ([[0.0, 0.5]], [1.0]),  # one sample is its own average
        ([[0.0], [0.5]], [1 - 0.0625 / 0.5625] * 2),  # one epoch
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0]),  # constant curves on a constant average
        ([[1.0, 1.0], [0.0, 0.0]], [0.0, 0.0]),  # constant curves off it
        (
            [[0.5, 1.0], [0.5, 1.0], [0.0, 0.5]],
            [1 - (1 / 36 + 1 / 36) / (4 / 9 + 1 / 36)] * 2 + [1 - (1 / 9 + 1 / 9) / (4 / 9 + 1 / 36)],
        ),
    ],
)
def test_edges(curves, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(lim_scores(np.array(curves))[0], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("curves", "words"),
    [
        (np.zeros(3), "samples, epochs"),
        (np.zeros((3, 0)), "samples, epochs"),
        (np.zeros((0, 3)), "none of the 0 curves"),
        (np.array([[0, nan], [nan, 0]]), "none of the 2 curves covers all 2 epochs"),
        (np.array([[0, np.inf]]), "infinite"),
    ],
)
def test_what_cannot_be_scored_is_refused(curves, words):
    with pytest.raises(ValueError, match=words):
        lim_scores(curves)


def test_unknown_variant():
    with pytest.raises(ValueError, match="limr or paper"):
        fill_gaps(np.zeros((1, 1)), "other")


def test_select_takes_the_threshold_itself_unless_strict():
    scores = np.array([0.6, 0.59, 0.61, nan, -3])
    assert select(scores).tolist() == [True, False, True, False, False]
    assert select(scores, strict=True).tolist() == [False, False, True, False, False]
    # Two published decimals, read as text, are the float 0.6 exactly.
    assert select(np.array([float("0.60")])).all()


@pytest.mark.skipif(not (DATA / "limr" / "scores.jsonl").is_file(), reason="LIMR's published scores are not here")
def test_published_scores_give_the_published_subset():
    def read(name):
        return [json.loads(line) for line in (DATA / "limr" / name).read_text(encoding="utf-8").split("\n") if line]

    published = read("scores.jsonl")
    scores = np.array([row["score"] for row in published])
    kept = {row["problem"].strip() for row, keep in zip(published, select(scores), strict=True) if keep}
    ids = (DATA / "limr" / "selected_ids.txt").read_text().split()
    text_of = {row["id"]: row["problem"].strip() for row in read("full.jsonl")}
    assert select(scores).sum() == 1389
    assert select(scores, strict=True).sum() == 1324
    assert len(ids) == 1389
    assert {text_of[i] for i in ids} == kept
