"""What a family makes."""

from __future__ import annotations

from typing import NamedTuple


class Draft(NamedTuple):
    """A statement, its exact answer, and the steps of a worked solution (without the boxed answer)."""

    statement: str
    answer: str
    steps: str


def number(value: int) -> str:
    """A number as an operand: a negative one in brackets."""
    return f"({value})" if value < 0 else str(value)
