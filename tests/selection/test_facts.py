"""Grader health and lengths out of the history, and the selection report built on them."""

from __future__ import annotations

import numpy as np
import pytest

from plumbline.selection.facts import sample_facts
from plumbline.selection.history import HistoryWriter
from plumbline.selection.methods import select_samples
from plumbline.selection.selection_report import compared, group_rows, health_rows, sections


def row(sample_id, reason, tokens, epoch=0):
    correct = reason == "correct"
    return {
        "step": 1,
        "epoch": epoch,
        "sample_id": sample_id,
        "rollout": 0,
        "policy_version": 0,
        "reward": float(correct),
        "correct": correct,
        "reason": reason,
        "tokens": tokens,
        "truncated": False,
        "mean_logprob": None,
    }


@pytest.fixture
def history(tmp_path):
    with HistoryWriter(tmp_path, "rank0") as one, HistoryWriter(tmp_path, "rank1") as two:
        one.append([row("a", "correct", 10), row("b", "bad_gold", None), row("b", "wrong", 30)])
        two.append([row("c", None, 5), row("a", "timeout", 20), row("a", "wrong", 30)])
    return tmp_path


def test_facts_of_several_runs_read_as_one(history):
    facts = sample_facts(history, ["rank0", "rank1"])
    assert facts.sample_ids == ["a", "b", "c"]
    assert facts.rollouts.tolist() == [3, 2, 1]
    assert facts.faults.tolist() == [1, 1, 0]
    assert facts.correct.tolist() == [1, 0, 0]
    assert facts.tokens.tolist() == [20, 30, 5]
    assert facts.reasons == {"wrong": 2, "correct": 1, "bad_gold": 1, "timeout": 1, "not recorded": 1}
    assert facts.rows == 6
    assert facts.suspect().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="holds 2 runs"):
        sample_facts(history)


def test_health_counts_kept_and_dropped(history):
    facts = sample_facts(history, ["rank0", "rank1"])
    chosen = select_samples("pass_rate", ["a", "b", "stranger"], np.array([[0.5], [0.1], [0.5]]))
    rows = {cells[0]: cells[1:] for cells in health_rows(facts, chosen)}
    assert rows["verdict: wrong"] == ["2", "6", "33.3%"]
    assert rows["samples mostly ungradable, kept"] == ["0", "2", "0.0%"]
    assert rows["samples mostly ungradable, dropped"] == ["1", "1", "100.0%"]
    assert rows["samples never right, dropped"] == ["1", "1", "100.0%"]


def test_group_shares():
    kept = np.array([True, False, True, True])
    assert group_rows(["1", "1", "2", "2"], kept, "level")[1:] == [
        ["1", "1", "2", "50%", "33%", "50%"],
        ["2", "2", "2", "100%", "67%", "50%"],
    ]


def test_the_report_compares_methods_at_the_same_size():
    rng = np.random.default_rng(0)
    chosen = select_samples("lim", [f"s{i}" for i in range(60)], rng.random((60, 4)), threshold=0.5)
    others = compared(chosen, seed=0)
    assert set(others) == {"lim", "linear", "pass_rate", "variance", "p(1-p)", "random"}
    assert {len(ids) for ids in others.values()} == {len(chosen.ids)}
    titles = [section["title"] for section in sections(chosen, value="share correct", source="a test")]
    assert titles == ["What was kept", "Learning curves", "Scores", "Overlap with other methods", "Samples"]
