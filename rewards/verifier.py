"""Is this answer right? One response against one gold, or many.

The judged answer is the last complete \\boxed{}. Most answers are settled exactly in microseconds in the calling process, by
a parser and normal forms of bounded work (equivalence.py, normal.py); the rest are compared at high precision in a child
process that is killed at its time or memory limit (workers.py). Nothing in a response or a gold is ever run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from plumbline.rewards.answers import Many, Words
from plumbline.rewards.equivalence import compare
from plumbline.rewards.extraction import final_phrase, last_boxed
from plumbline.rewards.polynomials import TooHard
from plumbline.rewards.structure import read
from plumbline.rewards.verdict import Verdict

__all__ = ["Verdict", "check_gold", "grade", "grade_many"]

# A longer answer is no answer to a maths problem; refusing it bounds every later step.
MAX_ANSWER = 5_000


def grade(response: str, gold: str, *, boxed_only: bool = True, timeout: float = 2.0) -> Verdict:
    """Grade one response. Never raises, never takes longer than `timeout` seconds; any thread or process may call it.

    Most pairs are settled here, in microseconds. The rest go to a grading process; the first of them also waits for it to
    start (a tenth of a second on an idle machine), within its time.

    Args:
        response: the whole generated text.
        gold: the expected answer, bare LaTeX or text (a \\boxed{} around it is taken off).
        boxed_only: False also reads a final-answer phrase when there is no box.
        timeout: seconds.
    """
    settled = settle(response, gold, boxed_only)
    if isinstance(settled, Verdict):
        return settled
    from plumbline.rewards.workers import shared_grader

    return shared_grader(timeout).compare(*settled)


def grade_many(pairs: Sequence[tuple[str, str]], *, boxed_only: bool = True, timeout: float = 2.0) -> list[Verdict]:
    """Grade (response, gold) pairs in order, the slow ones in shared killable child processes; `timeout` is each pair's."""
    from plumbline.rewards.workers import shared_grader

    return shared_grader(timeout).grade_many(pairs, boxed_only=boxed_only)


def check_gold(gold: str) -> str | None:
    """None if the gold can be read, else why not."""
    if not isinstance(gold, str):
        return f"it is no text but {type(gold).__name__}"
    text = unbox(gold).strip()
    if not text.strip("$ .\\,;"):
        return "it is empty"
    if (len(text) - len(text.rstrip("\\"))) % 2:
        return "it ends in a lone backslash"
    if "{" not in text and "}" not in text:
        return None
    depth, before = 0, " "
    for character in text:
        if before != "\\" and character in "{}":
            depth += 1 if character == "{" else -1
            if depth < 0:
                break
        before = " " if before == character == "\\" else character
    return "its braces do not match" if depth else None


def unbox(gold: str) -> str:
    """The gold without a \\boxed{} around it."""
    if "boxed" not in gold:
        return gold
    inner = last_boxed(gold)
    return gold if inner is None else inner


def settle(response: str, gold: str, boxed_only: bool) -> Verdict | tuple[str, str]:
    """A verdict if it is cheap to reach, else the (answer, gold) that the slow path must compare."""
    began = time.perf_counter()
    if check_gold(gold) is not None:
        return Verdict(False, "bad_gold", None, time.perf_counter() - began)
    if not isinstance(response, str):
        return Verdict(False, "no_answer", None, time.perf_counter() - began)
    reference = unbox(gold)
    answer = last_boxed(response)
    if answer is None and not boxed_only:
        answer = final_phrase(response)
    if answer is None:
        return Verdict(False, "no_answer", None, time.perf_counter() - began)
    if answer.strip() == reference.strip():
        return Verdict(True, "correct", answer, time.perf_counter() - began)
    if not answer.strip("$ \n\t") or max(len(answer), len(reference)) > MAX_ANSWER:
        return Verdict(False, "malformed", answer[:200], time.perf_counter() - began)
    try:
        equal = compare(answer, reference)
    except (TooHard, RecursionError):
        return answer, reference
    except Exception:  # a fault of ours in grading: compared again in the child, where it becomes an `error` verdict
        return answer, reference
    if equal is None:
        return answer, reference
    reason = "correct" if equal else "malformed" if _lists_candidates(answer, reference) else "wrong"
    return Verdict(equal, reason, answer, time.perf_counter() - began)  # type: ignore[arg-type]


def _lists_candidates(answer: str, gold: str) -> bool:
    """Whether the box lists several values where the gold is one."""
    if not any(mark in answer for mark in (",", ";", "or", "and", "\\pm", "±")):
        return False
    found = read(answer)
    return isinstance(found, Many) and len(found.items) > 1 and not isinstance(read(gold), (Many, Words))
