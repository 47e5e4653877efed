"""From a finished group to its verdicts and rewards."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from plumbline.errors import InputError
from plumbline.rewards import shaping
from plumbline.rewards.trl_interop import call_trl_reward
from plumbline.rewards.verdict import Verdict
from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Group
from plumbline.rl.config import RunConfig

# Rewards of a group's completions from their verdicts.
Shaping = Callable[[Group, list[Verdict]], list[float]]
NAMES = ("binary", "limr", "dapo_overlong")


def load_shaping(config: RunConfig) -> Shaping:
    """The shaping that reward.shaping names.

    `binary`, `limr`, `dapo_overlong`, or `package.module:function`. Such a function either takes (verdict, response,
    truncated) and returns a number, or has TRL's signature (a parameter named `completions`) and returns a number for
    each of a group's completions.

    Raises:
        InputError: none of these, or it cannot be imported.
    """
    settings = config.reward
    name = settings.shaping
    if name == "dapo_overlong":
        longest, buffer = config.rollout.max_new_tokens, config.overlong_buffer_tokens
        return lambda group, verdicts: [
            shaping.dapo_overlong(verdict, len(completion.token_ids), longest, buffer)
            for verdict, completion in zip(verdicts, group.completions, strict=True)
        ]
    if name in NAMES:
        return _each(getattr(shaping, name))
    function = _imported(name)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise InputError(f"reward.shaping {name!r} is no function with a readable signature") from None
    if "completions" in parameters:
        return _trl(function, name, settings.conversational)
    return _each(function)


def _imported(name: str) -> Callable[..., Any]:
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(f"unknown reward.shaping {name!r}; use {', '.join(NAMES)} or package.module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"reward.shaping {name!r} cannot be imported: {error}") from None


def _each(function: Callable[[Verdict, str, bool], float]) -> Shaping:
    return lambda group, verdicts: [
        float(function(verdict, completion.text, completion.truncated))
        for verdict, completion in zip(verdicts, group.completions, strict=True)
    ]


def _trl(function: Callable[..., Any], name: str, conversational: bool) -> Shaping:
    """A reward written for TRL. The data set's columns are problem, answer, and solution (the answer, boxed)."""

    def rewards(group: Group, verdicts: list[Verdict]) -> list[float]:
        n = len(group.completions)
        prompts: list[Any] = [group.prompt.text] * n
        completions: list[Any] = [completion.text for completion in group.completions]
        if conversational:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        columns: dict[str, list[Any]] = {
            "completion_ids": [completion.token_ids for completion in group.completions],
            "problem": [group.prompt.text] * n,
            "answer": [group.prompt.gold] * n,
            "solution": [f"\\boxed{{{group.prompt.gold}}}"] * n,
        }
        return call_trl_reward(function, name, prompts, completions, columns)

    return rewards


binary: Shaping = _each(shaping.binary)


def grade_group(group: Group, grader: Grader, shape: Shaping) -> Group:
    """Fill in verdicts and rewards of a group's completions."""
    verdicts = grader.grade_many([(completion.text, group.prompt.gold) for completion in group.completions])
    group.correct = [verdict.correct for verdict in verdicts]
    group.reasons = [verdict.reason for verdict in verdicts]
    group.answers = [verdict.answer for verdict in verdicts]
    group.rewards = shape(group, verdicts)
    return group
