"""The labelled pairs: every convention of docs/rewards.md, both directions, and whole responses.

Rows marked `silent` are ones that the conventions do not decide; their label is what a careful teacher would say.

Pairs that need the grading child are compared here in this process, by the same code and without its time limit: a loaded
machine must not change a verdict (it once did: a child that took longer than its 20 seconds to start made a `timeout`).
test_workers.py covers the children.
"""

import json
from pathlib import Path

import pytest

from plumbline.rewards.equivalence import compare
from plumbline.rewards.verdict import Verdict
from plumbline.rewards.verifier import settle

RESPONSES = Path(__file__).parent / "responses.jsonl"
FILES = sorted((Path(__file__).parent / "labelled").glob("*.jsonl"))


def test_at_least_600_pairs_in_both_directions():
    rows = [json.loads(line) for file in FILES for line in file.read_text(encoding="utf-8").splitlines()]
    right = sum(row["correct"] for row in rows)
    assert len(rows) >= 600
    assert min(right, len(rows) - right) >= 250


def graded(response, gold):
    found = settle(response, gold, boxed_only=True)
    if isinstance(found, Verdict):
        return found.correct, found.reason
    return compare(*found, deep=True) is True, "compared"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_labelled(file):
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    wrong = []
    for row in rows:
        correct, reason = graded(f"So the answer is $\\boxed{{{row['answer']}}}$.", row["gold"])
        assert reason in ("correct", "wrong", "malformed", "compared"), (row, reason)
        if correct != row["correct"]:
            wrong.append((row["answer"], row["gold"], correct))
    assert wrong == []


def test_labelled_responses():
    rows = [json.loads(line) for line in RESPONSES.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 300
    assert [row for row in rows if graded(row["response"], row["gold"])[0] != row["correct"]] == []
