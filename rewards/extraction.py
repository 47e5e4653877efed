"""Finding the judged answer in a response, in linear time."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BRACES = re.compile(r"[{}]")
_PHRASE = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*:?\s*(.+?)(?:\.(?:\s|$)|\n|$)", re.IGNORECASE)


def last_boxed(response: str) -> str | None:
    """Content of the last complete \\boxed{...}; None if none is complete.

    A generation cut off inside a box leaves that box incomplete: it has no answer, whatever stands before it.
    """
    starts = [match.end() for match in _BOX.finditer(response)]
    if not starts:
        return None
    return _content(response, starts[-1])


def count_boxes(response: str) -> int:
    """How many \\boxed{ open in the response."""
    return sum(1 for _ in _BOX.finditer(response))


def final_phrase(response: str) -> str | None:
    """What follows the last "answer is", for responses without a box."""
    found = None
    for match in _PHRASE.finditer(response):
        found = match.group(1).strip().strip("$").strip()
    return found or None


def _content(text: str, opening: int) -> str | None:
    """Between the brace at `opening` and its partner; escaped braces (\\{) do not count."""
    depth = 0
    for match in _BRACES.finditer(text, opening):
        at = match.start()
        backslashes = 0
        while at - 1 - backslashes >= 0 and text[at - 1 - backslashes] == "\\":
            backslashes += 1
        if backslashes % 2:
            continue
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return text[opening + 1 : at]
    return None
