"""Reasons, extraction, shaping, TRL's signature, and random text."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbline.rewards import shaping
from plumbline.rewards.trl_interop import as_trl_reward, run_trl_reward
from plumbline.rewards.verdict import Verdict
from plumbline.rewards.verifier import check_gold, grade

CASES = [
    ("\\boxed{5}", "5", "correct"),
    ("\\boxed{6}", "5", "wrong"),
    ("the answer is 5", "5", "no_answer"),
    ("\\boxed{5} and then \\boxed{6", "5", "no_answer"),
    ("\\boxed{5", "5", "no_answer"),
    ("\\boxed{5} no, \\boxed{6}", "5", "wrong"),
    ("\\boxed{6} no, \\boxed{5}", "5", "correct"),
    ("\\boxed{}", "5", "malformed"),
    ("\\boxed{ }", "5", "malformed"),
    ("\\boxed{5, 6}", "5", "malformed"),
    ("\\boxed{5 \\text{ or } 6}", "5", "malformed"),
    ("5 \\boxed{6}", "5", "wrong"),
    ("\\boxed{What is 2+3?}", "5", "wrong"),
    ("\\boxed{4 < x < 6}", "5", "wrong"),
    ("\\boxed{5}", "", "bad_gold"),
    ("\\boxed{}", "", "bad_gold"),
    ("", "5", "no_answer"),
    ("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "correct"),
    ("\\boxed{\\text{a \\} b}}", "5", "wrong"),
    ("\\fbox{5}", "5", "correct"),
    ("\\boxed{__import__('os').system('true')}", "5", "wrong"),
    ("\\boxed{5}", "\\frac{1", "bad_gold"),
]


@pytest.mark.parametrize(("response", "gold", "reason"), CASES)
def test_reasons(response, gold, reason):
    verdict = grade(response, gold)
    assert verdict.reason == reason
    assert verdict.correct == (reason == "correct")
    assert 0 <= verdict.seconds < 2.5


def test_final_phrase_only_when_asked():
    assert grade("So the final answer is 5.", "5", boxed_only=False).correct
    assert not grade("So the final answer is 5.", "5").correct
    assert not grade("The answer is 5. \\boxed{6}", "5", boxed_only=False).correct


def test_check_gold():
    assert check_gold("\\frac{1}{2}") is None
    assert "empty" in check_gold(" ")
    assert "braces" in check_gold("\\frac{1}{2")
    assert "backslash" in check_gold("r\\")
    assert check_gold("r\\\\") is None


PIECES = ["\\frac", "{", "}", "1", "22", "x", "^", "_", "\\sqrt", "(", ")", "[", "]", ",", "\\boxed{", "+", "-", "*", "/", "!", "\\pm", "=", "<", "\\le",
          "\\text{or}", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", ":", "0.", "\\overline", "\\cup", "\\infty", "\\pi", "e", "i", "\\sin", "|",
          "\\{", "\\}", " ", "\\%", "^\\circ", "\\$", "9^9^9^9", "\\log_", "\\binom", "...", "\\in", "\\mathbb{R}", "\\setminus", "\\left", "\\ne"]  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(PIECES), max_size=25), st.lists(st.sampled_from(PIECES), min_size=1, max_size=12))
def test_random_latex_never_raises(answer, gold):
    verdict = grade("\\boxed{" + "".join(answer) + "}", "".join(gold))
    assert verdict.reason != "error"
    assert verdict.seconds < 2.5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=60), st.text(max_size=30))
def test_random_text_never_raises(answer, gold):
    assert grade("\\boxed{" + answer + "}", gold).reason != "error"
    assert grade(answer, gold, boxed_only=False).reason != "error"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(-999, 999), st.integers(1, 99), st.integers(-999, 999), st.integers(1, 99))
def test_fractions_agree_exactly_when_equal(a, b, c, d):
    assert grade(f"\\boxed{{\\frac{{{a}}}{{{b}}}}}", f"{c}/{d}").correct == (a * d == c * b)


VERDICTS = {
    reason: Verdict(reason == "correct", reason, "5", 0.0) for reason in ("correct", "wrong", "no_answer", "malformed")
}


def test_limr_shaping():
    assert shaping.limr(VERDICTS["correct"], "so \\boxed{5}", False) == 1.0
    assert shaping.limr(VERDICTS["wrong"], "so \\boxed{6}", False) == -0.5
    assert shaping.limr(VERDICTS["no_answer"], "so 5", False) == -1.0
    assert shaping.limr(VERDICTS["correct"], "so \\boxed{5}", True) == -1.0
    assert shaping.limr(VERDICTS["correct"], "\\boxed{5} " * 5, False) == -1.0
    assert shaping.limr(VERDICTS["correct"], "again and again " * 100 + "\\boxed{5}", False) == -1.0
    assert shaping.limr(VERDICTS["correct"], "a \ufffd b \\boxed{5}", False) == -1.0


def test_overlong_penalty():
    assert [shaping.overlong_penalty(n, 100, 20) for n in (50, 80, 90, 100, 120)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="buffer"):
        shaping.overlong_penalty(5, 10, 0)


def test_ours_in_trl():
    reward = as_trl_reward(shaping.limr)
    talk = [[{"role": "assistant", "content": "so \\boxed{5}"}], "so \\boxed{6}", "none"]
    assert reward(prompts=["p"] * 3, completions=talk, completion_ids=None, answer=["5", "5", "5"]) == [1.0, -0.5, -1.0]
    with pytest.raises(ValueError, match="answer"):
        reward(completions=["x"], solution=["5"])


def test_trl_reward_runs_here(tmp_path, monkeypatch):
    (tmp_path / "their_reward.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run_trl_reward("their_reward:length", ["p", "p"], ["ab", "abc"], answer=["1", "2"]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="names no reward function"):
        run_trl_reward("their_reward:missing", ["p"], ["a"])


def test_verdicts_are_plain_data():
    verdict = grade("\\boxed{5}", "5")
    assert json.loads(json.dumps(verdict.__dict__))["reason"] == "correct"
