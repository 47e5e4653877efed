"""From a finished group to its verdicts and rewards."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from plumbline.errors import InputError
from plumbline.rewards import shaping
from plumbline.rewards.verdict import Verdict
from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Group

Shaping = Callable[[Verdict, str, bool], float]
NAMED: dict[str, Shaping] = {"binary": shaping.binary, "limr": shaping.limr}


def load_shaping(name: str) -> Shaping:
    """`binary`, `limr`, or `package.module:function` of (verdict, response, truncated) -> float. InputError if neither."""
    if name in NAMED:
        return NAMED[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(f"unknown reward.shaping {name!r}; use {', '.join(NAMED)} or package.module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"reward.shaping {name!r} cannot be imported: {error}") from None
    return found


def grade_group(group: Group, grader: Grader, shape: Shaping, *, max_tokens: int = 0, buffer: int = 0) -> Group:
    """Fill in verdicts and rewards of a group's completions.

    Args:
        max_tokens, buffer: of the soft overlong penalty added to each reward; buffer 0 adds none.
    """
    verdicts = grader.grade_many([(completion.text, group.prompt.gold) for completion in group.completions])
    group.correct = [verdict.correct for verdict in verdicts]
    group.reasons = [verdict.reason for verdict in verdicts]
    group.answers = [verdict.answer for verdict in verdicts]
    group.rewards = [float(shape(v, c.text, c.truncated)) for v, c in zip(verdicts, group.completions, strict=True)]
    if buffer:
        lengths = [len(completion.token_ids) for completion in group.completions]
        group.rewards = [
            reward + shaping.overlong_penalty(length, max_tokens, buffer)
            for reward, length in zip(group.rewards, lengths, strict=True)
        ]
    return group
