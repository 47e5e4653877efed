"""Rewards written for TRL run here, and ours run in TRL. TRL itself is not imported.

TRL's signature: f(prompts, completions, completion_ids=..., **columns) -> list[float | None], where a completion is a text or, in
conversational data sets, a list of messages, and every column of the data set comes as a list.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from plumbline.rewards.shaping import binary
from plumbline.rewards.verdict import Verdict
from plumbline.rewards.verifier import grade_many


def text_of(completion: Any) -> str:
    """The text of a TRL completion: itself, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def as_trl_reward(
    shape: Callable[[Verdict, str, bool], float] = binary, *, gold: str = "answer", timeout: float = 2.0
) -> Callable[..., list[float]]:
    """Our verifier and a shaping as a TRL reward function; golds come from the data set's column `gold`.

    TRL does not say which completions were cut off, so `truncated` is False for all.
    """

    def plumbline_reward(
        completions: Sequence[Any], prompts: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        if gold not in columns:
            raise ValueError(f"the data set has no column {gold!r}; it has {', '.join(sorted(columns)) or 'none'}")
        texts = [text_of(completion) for completion in completions]
        verdicts = grade_many(list(zip(texts, map(str, columns[gold]), strict=True)), timeout=timeout)
        return [float(shape(verdict, text, False)) for verdict, text in zip(verdicts, texts, strict=True)]

    return plumbline_reward


def run_trl_reward(
    path: str, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Rewards of a function written for TRL, given as package.module:function.

    Args:
        prompts, completions: texts, one a completion.
        columns: further columns it reads (answer, solution, ...), one value a completion.

    Raises:
        ValueError: the path names no function, or the function returns another number of rewards or no number (None).
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} names no reward function (package.module:function): {error}") from None
    return call_trl_reward(function, path, list(prompts), list(completions), {k: list(v) for k, v in columns.items()})


def call_trl_reward(
    function: Callable[..., Any], name: str, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
) -> list[float]:
    """Rewards of a function with TRL's signature, one a completion. Raises ValueError as run_trl_reward does."""
    rewards = function(prompts=prompts, completions=completions, **columns)
    if len(rewards) != len(completions) or any(reward is None for reward in rewards):
        raise ValueError(
            f"{name} must return a number for each of {len(completions)} completions; got {rewards!r:.200}"
        )
    return [float(reward) for reward in rewards]
