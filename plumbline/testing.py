"""Small pieces that tests of plumbline, and of code built on it, share."""

from __future__ import annotations

from plumbline.rewards.verdict import Verdict


def short_is_good(verdict: Verdict, response: str, truncated: bool) -> float:
    """A reward that any policy can earn more of: minus the length of the response in characters, over ten."""
    return -len(response) / 10
