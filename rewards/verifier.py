"""Is this answer right? One response against one gold, or many.

The judged answer is the last complete \\boxed{}. Most answers are settled exactly in microseconds (exact.py); the rest
go to math-verify in a child process that is killed at its time or memory limit (workers.py). Nothing in a response or
a gold is ever run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from plumbline.rewards import exact
from plumbline.rewards.extraction import final_phrase, last_boxed
from plumbline.rewards.verdict import Verdict

__all__ = ["Verdict", "check_gold", "grade", "grade_many"]

# A longer answer is no answer to a maths problem; refusing it bounds every later step.
MAX_ANSWER = 20_000


def grade(response: str, gold: str, *, boxed_only: bool = True, timeout: float = 2.0) -> Verdict:
    """Grade one response. Never raises, never takes longer than `timeout` seconds; any thread or process may call it.

    Args:
        response: the whole generated text.
        gold: the expected answer, bare LaTeX or text (a \\boxed{} around it is taken off).
        boxed_only: False also reads a final-answer phrase when there is no box.
        timeout: seconds.
    """
    return grade_many([(response, gold)], boxed_only=boxed_only, timeout=timeout)[0]


def grade_many(pairs: Sequence[tuple[str, str]], *, boxed_only: bool = True, timeout: float = 2.0) -> list[Verdict]:
    """Grade (response, gold) pairs in order, the slow ones in a shared killable child process."""
    from plumbline.rewards.workers import shared_grader

    return shared_grader(timeout).grade_many(pairs, boxed_only=boxed_only)


def check_gold(gold: str) -> str | None:
    """None if the gold can be read, else why not."""
    text = unbox(gold).strip()
    if not text:
        return "it is empty"
    depth = 0
    for before, character in zip(" " + text, text, strict=False):
        if before != "\\" and character in "{}":
            depth += 1 if character == "{" else -1
        if depth < 0:
            break
    return "its braces do not match" if depth else None


def unbox(gold: str) -> str:
    """The gold without a \\boxed{} around it."""
    inner = last_boxed(gold)
    return gold if inner is None else inner


def settle(response: str, gold: str, boxed_only: bool) -> Verdict | tuple[str, str]:
    """A verdict if it is cheap to reach, else the (answer, gold) that the slow path must compare."""
    began = time.perf_counter()
    reference = unbox(gold)
    if check_gold(gold) is not None:
        return Verdict(False, "bad_gold", None, time.perf_counter() - began)
    answer = last_boxed(response)
    if answer is None and not boxed_only:
        answer = final_phrase(response)
    if answer is None:
        return Verdict(False, "no_answer", None, time.perf_counter() - began)
    if not answer.strip() or len(answer) > MAX_ANSWER:
        return Verdict(False, "malformed", answer[:200], time.perf_counter() - began)
    equal = exact.compare(answer, reference)
    if equal is None:
        return answer, reference
    return Verdict(equal, "correct" if equal else "wrong", answer, time.perf_counter() - began)
