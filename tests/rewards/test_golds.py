"""Golds of public sets: each agrees with itself, and with a digit changed it does not."""

import json
import os
from pathlib import Path
from random import Random

import pytest

from plumbline.rewards.verifier import check_gold, grade_many

DATA = Path(os.environ.get("PLUMBLINE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
SETS = ["limr/full", "math500", "aime24", "aime25", "amc23"]


def golds(name):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return [str(json.loads(line)["answer"]) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", SETS)
def test_identity(name):
    found = golds(name)
    unreadable = [gold for gold in found if check_gold(gold) is not None]
    assert all(not gold.strip() for gold in unreadable)
    kept = [gold for gold in found if gold.strip()]
    verdicts = grade_many([(f"\\boxed{{{gold}}}", gold) for gold in kept])
    assert [gold for gold, v in zip(kept, verdicts, strict=True) if not v.correct] == []


@pytest.mark.parametrize("name", SETS)
def test_another_digit_is_wrong(name):
    random = Random(0)
    pairs = []
    for gold in golds(name):
        places = [at for at, c in enumerate(gold) if c.isdigit()]
        if places:
            at = random.choice(places)
            digit = random.choice([d for d in "123456789" if d != gold[at]])
            pairs.append((f"\\boxed{{{gold[:at]}{digit}{gold[at + 1 :]}}}", gold))
    verdicts = grade_many(pairs, timeout=60.0)
    assert [pair for pair, v in zip(pairs, verdicts, strict=True) if v.correct] == []


@pytest.mark.parametrize("name", SETS)
def test_other_spelling_is_correct(name):
    def respell(gold):
        gold = gold.replace("\\dfrac", "\\frac").replace("\\frac", "\\tfrac")
        return f" $ {gold} $ ."

    kept = [gold for gold in golds(name) if gold.strip() and "$" not in gold]
    verdicts = grade_many([(f"\\boxed{{{respell(gold)}}}", gold) for gold in kept], timeout=60.0)
    assert [gold for gold, v in zip(kept, verdicts, strict=True) if not v.correct] == []
