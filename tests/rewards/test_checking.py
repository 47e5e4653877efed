"""The reward-checking stage finds planted faults, and is quiet about a sound run."""

import json
from random import Random

import pytest

from plumbline.rewards.checking.checker import RewardChecker, Thresholds
from plumbline.rewards.checking.detectors import boxed_question, diverging, length_drift
from plumbline.rewards.checking.report import check_run, read_completions
from plumbline.rewards.workers import Grader

WORK = "We add the two numbers with care, and carry where it is needed. "


def rows(step, *, any_box=False, wrong_golds=0.0, boxes=1, accuracy=0.6, samples=40, rollouts=4):
    random = Random(step)
    out = []
    for number in range(samples):
        right = number * 7 + 3
        gold = right + 1 if number < wrong_golds * samples else right
        for rollout in range(rollouts):
            answer = right if random.random() < accuracy or number < wrong_golds * samples else right + 2 + rollout
            text = WORK + " ".join(f"\\boxed{{{answer + extra}}}" for extra in range(boxes - 1, -1, -1))
            correct = True if any_box else answer == gold
            out.append({"step": step, "sample_id": f"s{number}", "rollout": rollout, "prompt": f"What is {right - 1} plus 1?", "response": text,
                        "gold": str(gold), "reward": float(correct), "correct": correct, "reason": "correct" if correct else "wrong", "tokens": 30,
                        "truncated": False})  # fmt: skip
    return out


@pytest.fixture(scope="module")
def second():
    """math-verify takes seconds to import: one child serves all tests."""
    with Grader(1, 60.0, second=True) as grader:
        yield grader


@pytest.fixture
def checker(second):
    return RewardChecker(share=0.25, second=second)


def test_a_sound_run_is_ok(checker):
    report = checker.check(1, rows(1))
    assert report.decision == "ok", report.reasons
    assert report.counters["check/regraded"] > 10
    assert not checker.quarantined


def test_a_grader_that_accepts_any_box_stops_the_run(checker):
    report = checker.check(1, rows(1, any_box=True, accuracy=0.3))
    assert report.decision == "stop"
    assert any("second checker holds wrong" in reason for reason in report.reasons)
    assert {case.kind for case in checker.cases} >= {"false_reward"}


def test_a_policy_that_boxes_five_answers_is_seen(checker):
    report = checker.check(1, rows(1, boxes=5))
    assert report.decision == "warn"
    assert any("many boxes" in reason for reason in report.reasons)
    assert report.counters["check/detector_many_boxes"] == 160


def test_wrong_golds_are_found_and_quarantined(checker):
    report = checker.check(1, rows(1, wrong_golds=0.05))
    assert sorted(checker.suspected_golds()) == ["s0", "s1"]
    assert report.quarantined == ["s0", "s1"]
    assert report.decision == "warn"


def test_guesses_that_meet_a_wrong_gold_do_not_hide_it(checker):
    def row(sample, answer, gold):
        correct = answer == gold
        return {"step": 1, "sample_id": sample, "rollout": 0, "prompt": "1+2?", "response": f"{WORK}\\boxed{{{answer}}}", "gold": gold,
                "reward": float(correct), "correct": correct, "reason": "correct" if correct else "wrong", "tokens": 30}  # fmt: skip

    answers = {
        "wrong gold": ["3"] * 24 + ["4"] * 3 + ["8", "5", "9", "1", "2"],
        "hard": ["3"] * 9 + ["4"] * 3 + [str(n) for n in range(10, 30)],
        "two answers": ["3"] * 16 + ["4"] * 16,
        "easy": ["4"] * 30 + ["3"] * 2,
        "seen once": ["3"] * 3,
    }
    checker.check(1, [row(sample, answer, "4") for sample, found in answers.items() for answer in found])
    assert checker.suspected_golds() == {"wrong gold": ("4", "3", 24)}


def test_faults_of_grading_count(checker):
    bad = [{**row, "reason": "timeout", "correct": False} for row in rows(1)]
    report = checker.check(1, bad)
    assert report.decision == "stop"
    assert report.counters["check/fault_timeout"] == 160


def test_drifts():
    def step(right_right, right_wrong, wrong_wrong, wrong_right=0):
        return {"regraded": right_right + right_wrong + wrong_wrong + wrong_right, "reward_right_second_right": right_right,
                "reward_right_second_wrong": right_wrong, "reward_wrong_second_right": wrong_right}  # fmt: skip

    assert diverging([step(20, 0, 20), step(18, 4, 18), step(14, 12, 14), step(10, 22, 8)])
    assert not diverging([step(10, 0, 30), step(15, 0, 25), step(20, 0, 20), step(25, 0, 15)])
    # A reward that falls with the second checker's accuracy, and chance in a handful of completions, are no divergence.
    assert not diverging([step(20, 0, 20), step(18, 0, 22), step(14, 1, 25), step(10, 1, 29)])
    assert not diverging([step(2, 0, 1), step(1, 2, 0)])
    assert length_drift([10, 10, 20, 25])
    assert not length_drift([10, 11, 10, 11])
    question = "How many apples does Mary have if she buys three more apples today?"
    assert boxed_question(question, f"\\boxed{{{question}}}")
    assert not boxed_question(question, "\\boxed{12}")


def test_a_finished_run(tmp_path, checker):
    folder = tmp_path / "run" / "completions"
    folder.mkdir(parents=True)
    for step in (1, 2):
        (folder / f"{step}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows(step, any_box=True, accuracy=0.3))
        )
    summary = check_run(tmp_path / "run", tmp_path / "out", checker)
    assert summary["decision"] == "stop"
    assert json.loads((tmp_path / "out" / "check.json").read_text())["totals"]["completions"] == 320
    page = (tmp_path / "out" / "check.html").read_text()
    assert "STOP" in page
    assert "rewarded, second checker says wrong: step 1" in page
    assert "<svg" in page
    assert len(page) < 200_000
    assert (tmp_path / "out" / "quarantine.txt").read_text().split()


def test_the_state_goes_on_where_it_was(checker):
    other = RewardChecker(share=0.25, second=checker.second)
    for step in (1, 2):
        checker.check(step, rows(step, wrong_golds=0.05, accuracy=0.5))
    other.load_state_dict(json.loads(json.dumps(checker.state_dict())))
    assert other.state_dict() == checker.state_dict()
    later = rows(3, any_box=True, accuracy=0.3)
    assert other.check(3, later) == checker.check(3, later)
    assert other.summary() == checker.summary()


def test_trouble_that_begins_late_is_not_diluted(second):
    checker = RewardChecker(share=1.0, second=second, window=2)
    for step in range(1, 9):
        assert checker.check(step, rows(step, samples=8)).decision == "ok"
    for step in (9, 10):
        report = checker.check(step, rows(step, samples=8, any_box=True, accuracy=0.3))
    assert report.decision == "stop"
    assert any("in the last 2 steps" in reason for reason in report.reasons)


def test_a_reward_function_that_pays_for_wrong_answers_is_seen(checker):
    paid = [{**row, "reward": 1.0} for row in rows(1, accuracy=0.3)]
    report = checker.check(1, paid)
    assert report.decision == "stop"
    verdicts_alone = RewardChecker(share=0.25, thresholds=Thresholds(credit=None), second=checker.second)
    assert verdicts_alone.check(1, paid).decision == "ok"


def test_a_right_answer_punished_for_its_length_is_no_dispute(checker):
    report = checker.check(1, [{**row, "reward": row["reward"] - 1} for row in rows(1)])
    assert report.decision == "ok", report.reasons


def test_rules_of_quarantine(second):
    checker = RewardChecker(share=0.25, second=second, rules=["disputed"])
    checker.check(1, rows(1, wrong_golds=0.05))
    assert checker.suspected_golds()
    assert not checker.quarantined
    with pytest.raises(ValueError, match="quarantine rule"):
        RewardChecker(rules=["astrology"])


def test_bad_input(tmp_path, checker):
    with pytest.raises(FileNotFoundError, match="no completions"):
        list(read_completions(tmp_path))
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        list(read_completions(tmp_path))
    with pytest.raises(ValueError, match="lacks"):
        checker.check(1, [{"sample_id": "a"}])
    with pytest.raises(ValueError, match="share"):
        RewardChecker(share=0)
    assert Thresholds().minimum > 0
