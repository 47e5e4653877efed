"""The result of grading one response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal["correct", "wrong", "no_answer", "malformed", "timeout", "bad_gold", "error"]


@dataclass(frozen=True)
class Verdict:
    """One graded response.

    Attributes:
        correct: whether it earns the point.
        reason: `correct`; `wrong`; `no_answer` (no complete box); `malformed` (an empty box, or candidates listed where
            one answer is asked); `timeout`; `bad_gold` (the gold itself cannot be read); `error` (grading failed).
        answer: the judged text, None when there is none.
        seconds: spent grading.
    """

    correct: bool
    reason: Reason
    answer: str | None
    seconds: float
