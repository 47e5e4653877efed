"""The labelled pairs: every convention of docs/rewards.md, both directions."""

import json
from pathlib import Path

import pytest

from plumbline.rewards.verifier import grade_many

FILES = sorted((Path(__file__).parent / "labelled").glob("*.jsonl"))


def test_at_least_600_pairs_in_both_directions():
    rows = [json.loads(line) for file in FILES for line in file.read_text(encoding="utf-8").splitlines()]
    right = sum(row["correct"] for row in rows)
    assert len(rows) >= 600
    assert min(right, len(rows) - right) >= 250


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_labelled(file):
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    verdicts = grade_many(
        [(f"So the answer is $\\boxed{{{row['answer']}}}$.", row["gold"]) for row in rows], timeout=20.0
    )
    wrong = [
        (row["answer"], row["gold"], v.reason)
        for row, v in zip(rows, verdicts, strict=True)
        if v.correct != row["correct"]
    ]
    assert wrong == []
    assert {v.reason for v in verdicts} <= {"correct", "wrong", "malformed"}
