"""Figures against their definitions."""

import itertools

import numpy as np
import pytest

from plumbline.rewards.workers import Grader
from plumbline.rl.evaluation.scores import majority_share, pass_at_k, summarise, votes


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (6, 6), (6, 0), (8, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c):
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_of_many_completions_does_not_overflow():
    assert pass_at_k(4096, 1, 2048) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(4, 1, 5)


def test_votes_follow_equivalence_and_not_spelling(grader):
    answers = ["0.5", "\\frac{1}{2}", None, "2", "\\frac{4}{2}", "3", "2.0", "\\sqrt{9}"]
    correct = [True, True, False, False, False, False, False, False]
    assert votes(answers, correct, grader) == [0, 0, None, 1, 1, 2, 1, 2]


def test_majority_and_ties():
    assert majority_share([0, 0, 1], [True, True, False]) == 1
    assert majority_share([0, 1, 1], [True, False, False]) == 0
    assert majority_share([0, 1], [True, False]) == 0.5
    assert majority_share([0, 1, 2], [True, False, False]) == pytest.approx(1 / 3)
    assert majority_share([None, 0], [False, True]) == 1
    assert majority_share([None, None], [False, False]) == 0


def row(sample_id, correct, vote=0, *, reason=None, tokens=10, truncated=False, **about):
    reason = reason or ("correct" if correct else "wrong")
    return {"sample_id": sample_id, "correct": correct, "reason": reason, "vote": vote, "tokens": tokens} | {
        "truncated": truncated,
        **about,
    }


def test_a_summary_worked_out_by_hand():
    rows = [
        row("a", True, 0, tokens=10, level="1", subject="Algebra"),
        row("a", True, 0, tokens=20, level="1", subject="Algebra"),
        row("b", False, 0, tokens=30, level="2", subject="Algebra"),
        row("b", True, 1, tokens=40, level="2", subject="Algebra"),
        row("c", False, None, reason="no_answer", tokens=90, truncated=True, level="2", subject="Geometry"),
        row("c", False, 0, reason="timeout", tokens=50, level="2", subject="Geometry"),
    ]
    found = summarise("x", rows, 3.0)
    assert found.completions == 2
    assert found.accuracy.mean == pytest.approx(0.5)
    assert found.accuracy.n == 3
    assert {k: interval.mean for k, interval in found.pass_at.items()} == {
        1: pytest.approx(0.5),
        2: pytest.approx(2 / 3),
    }
    assert found.majority.mean == pytest.approx((1 + 0.5 + 0) / 3)
    assert {k: v.mean for k, v in found.by_level.items()} == {"1": 1, "2": 0.25}
    assert {k: v.n for k, v in found.by_subject.items()} == {"Algebra": 2, "Geometry": 1}
    assert found.truncated.mean == pytest.approx(1 / 6)
    assert found.no_answer.mean == pytest.approx(1 / 6)
    assert found.grader_faults.mean == pytest.approx(1 / 6)
    assert found.tokens == {
        "mean": 40,
        "median": 35,
        "p95": pytest.approx(80),
        "max": 90,
        "mean_right": pytest.approx(70 / 3),
        "mean_wrong": pytest.approx(170 / 3),
    }


def test_unequal_numbers_of_completions_are_refused():
    with pytest.raises(ValueError, match="same number"):
        summarise("x", [row("a", True), row("a", True), row("b", True)], 0.0)
    with pytest.raises(ValueError, match="same number"):
        summarise("x", [], 0.0)


def test_lengths_that_a_server_does_not_tell():
    assert summarise("x", [row("a", True, tokens=None)], 0.0).tokens == {}
