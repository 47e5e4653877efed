"""The second, independent checker: math-verify, with the gold boxed. Runs in a killable child only."""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.disable(logging.CRITICAL)


def agrees(answer: str, gold: str) -> bool:
    """Whether math-verify holds a boxed answer equal to a boxed gold. Raises ValueError when it cannot read the gold."""
    # Timeouts inside math-verify need signals and do not kill; the parent's limit does.
    reference = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not reference:
        raise ValueError("math-verify cannot read the gold")
    candidate = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(candidate) and bool(verify(reference, candidate, timeout_seconds=None))
