"""From a verdict to a reward: pure functions, apart from grading."""

from __future__ import annotations

import zlib

from plumbline.rewards.extraction import count_boxes
from plumbline.rewards.verdict import Verdict

# LIMR's rules for a malformed response: this many boxes or more, or text that says the same thing over and over.
MANY_BOXES = 5
REPETITIVE_RATIO = 10.0
REPETITIVE_LENGTH = 400


def binary(verdict: Verdict, response: str, truncated: bool) -> float:
    """1 if correct, else 0."""
    return float(verdict.correct)


def limr(verdict: Verdict, response: str, truncated: bool) -> float:
    """LIMR (arXiv 2502.11886): 1 correct, -0.5 wrong but well formed, -1 malformed."""
    if is_malformed(verdict, response, truncated):
        return -1.0
    return 1.0 if verdict.correct else -0.5


def is_malformed(verdict: Verdict, response: str, truncated: bool) -> bool:
    """No end token, no box or an empty one, five boxes or more, garbled, or repetitive."""
    if truncated or verdict.reason in ("no_answer", "malformed"):
        return True
    return count_boxes(response) >= MANY_BOXES or "\ufffd" in response or is_repetitive(response)


def is_repetitive(response: str) -> bool:
    """A long text that compresses more than tenfold repeats itself."""
    raw = response.encode("utf-8", "surrogatepass")
    return len(raw) >= REPETITIVE_LENGTH and len(raw) / len(zlib.compress(raw, 6)) > REPETITIVE_RATIO


def dapo_overlong(verdict: Verdict, tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's reward: 1 if correct, else -1, plus the soft punishment of length."""
    return (1.0 if verdict.correct else -1.0) + overlong_penalty(tokens, max_tokens, buffer)


def overlong_penalty(tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 up to max_tokens - buffer, then linear down to -1.

    Raises ValueError unless 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer ({buffer}) must be positive and at most max_tokens ({max_tokens})")
    over = tokens - (max_tokens - buffer)
    return 0.0 if over <= 0 else -min(1.0, over / buffer)
