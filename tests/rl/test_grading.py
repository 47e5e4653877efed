"""Rewards from verdicts: named shapings, functions of ours, and functions written for TRL."""

import pytest

from plumbline.errors import InputError
from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Completion, Group, Prompt
from plumbline.rl.config import parse_config
from plumbline.rl.grading import grade_group, load_shaping

TRL = '''
def length(completions, **kwargs):
    """The least that TRL asks for."""
    return [len(c) for c in completions]

def agreement(prompts, completions, completion_ids, answer, solution, **kwargs):
    assert all(len(column) == len(completions) for column in (prompts, completion_ids, answer, solution))
    return [1.0 if f"boxed{{{a}}}" in c and s == f"\\\\boxed{{{a}}}" else 0.25 for c, a, s in zip(completions, answer, solution)]

def spoken(completions, **kwargs):
    return [float("5" in completion[0]["content"]) for completion in completions]

def too_few(completions, **kwargs):
    return [1.0]

def undecided(completions, **kwargs):
    return [None for _ in completions]

def ours(verdict, response, truncated):
    return 2.0 * verdict.correct - truncated

nothing = 3
'''


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(TRL)
    monkeypatch.syspath_prepend(tmp_path)

    def of(shaping, **reward):
        tree = {"name": "t", "rollout": {"max_new_tokens": 100}, "reward": {"shaping": shaping, **reward}}
        texts = [("so \\boxed{5}", 10), ("so \\boxed{6}", 10), ("so \\boxed{5}", 90), ("so \\boxed{6}", 100)]
        done = [Completion([1] * tokens, [0.0] * tokens, text, tokens == 100) for text, tokens in texts]
        group = Group(Prompt(0, "s", [1], "What is 2+3?", "5"), done, 0)
        with Grader() as grader:
            return grade_group(group, grader, load_shaping(parse_config(tree))).rewards

    return of


def test_named(rewards):
    assert rewards("binary") == [1, 0, 1, 0]
    assert rewards("limr") == [1, -0.5, 1, -1]
    assert rewards("dapo_overlong") == [1, -1, 0.5, -2]
    assert rewards("dapo_overlong", overlong_buffer_tokens=10) == [1, -1, 1, -2]


def test_functions_of_ours(rewards):
    assert rewards("user_rewards:ours") == [2, 0, 2, -1]
    assert rewards("plumbline.rewards.shaping:limr") == [1, -0.5, 1, -1]


def test_functions_written_for_trl(rewards):
    assert rewards("user_rewards:length") == [12, 12, 12, 12]
    assert rewards("user_rewards:agreement") == [1, 0.25, 1, 0.25]
    assert rewards("user_rewards:spoken", conversational=True) == [1, 0, 1, 0]
    for name in ("too_few", "undecided"):
        with pytest.raises(ValueError, match="a number for each of 4"):
            rewards(f"user_rewards:{name}")


def test_trls_own_reward_runs_here(rewards):
    pytest.importorskip("trl.rewards")
    assert rewards("trl.rewards:accuracy_reward", conversational=True) == [1, 0, 1, 0]


def test_bad_names(rewards):
    for name, message in (
        ("best", "unknown reward.shaping"),
        ("user_rewards:missing", "cannot be imported"),
        ("no_such_module_here:f", "cannot be imported"),
        ("user_rewards:nothing", "no function"),
    ):
        with pytest.raises(InputError, match=message):
            rewards(name)
    with pytest.raises(InputError, match="overlong_buffer_tokens"):
        rewards("dapo_overlong", overlong_buffer_tokens=101)
