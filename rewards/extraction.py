"""Finding the judged answer in a response, in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BRACES = re.compile(r"[{}]")
_PHRASE = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*:?\s*(.+?)(?:\.(?:\s|$)|\n|$)", re.IGNORECASE)


def last_boxed(response: str) -> str | None:
    """Content of the last complete \\boxed{...}; None if none is complete.

    A generation cut off inside a box leaves that box incomplete: it has no answer, whatever stands before it. A box inside
    a complete box is part of that one's content.
    """
    starts = [match.end() for match in _BOX.finditer(response)]
    if not starts:
        return None
    content = _content(response, starts[-1])
    if content is None or len(starts) == 1:
        return content
    return _outermost(response, starts) or content


def count_boxes(response: str) -> int:
    """How many \\boxed{ open in the response."""
    return sum(1 for _ in _BOX.finditer(response))


def final_phrase(response: str) -> str | None:
    """What follows the last "answer is", for responses without a box."""
    found = None
    for match in _PHRASE.finditer(response):
        found = match.group(1).strip().strip("$").strip()
    return found or None


def _outermost(text: str, starts: list[int]) -> str | None:
    """Content of the outermost complete box around the last one, None if it stands in no other."""
    boxes, last = set(starts), starts[-1]
    open_braces: list[int] = []
    found: tuple[int, int] | None = None
    for at in _unescaped(text, starts[0]):
        if text[at] == "{":
            open_braces.append(at)
            continue
        if not open_braces:
            continue
        opening = open_braces.pop()
        if opening in boxes and opening < last < at:
            found = opening + 1, at
    return None if found is None else text[found[0] : found[1]]


def _content(text: str, opening: int) -> str | None:
    """Between the brace at `opening` and its partner."""
    depth = 0
    for at in _unescaped(text, opening):
        depth += 1 if text[at] == "{" else -1
        if depth == 0:
            return text[opening + 1 : at]
    return None


def _unescaped(text: str, start: int) -> Iterator[int]:
    """Where braces stand from `start` on; escaped ones (\\{) do not count."""
    for match in _BRACES.finditer(text, start):
        at = match.start()
        backslashes = 0
        while at - 1 - backslashes >= 0 and text[at - 1 - backslashes] == "\\":
            backslashes += 1
        if backslashes % 2 == 0:
            yield at
