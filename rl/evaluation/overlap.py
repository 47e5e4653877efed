"""Evaluation problems that also stand in the training data, found by normalised word n-grams.

Exact copies are rare; what leaks is a problem with another layout, other TeX or a changed tail. So texts are reduced to
words and numbers, and an evaluation problem is compared with everything the training problems hold.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plumbline.rl.data import Problem

WORDS = 8
# Layout, not content: spacing, sizing and font commands, and the mathematics delimiters.
_LAYOUT = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|text|textbf|textit|mathrm|mathbf|mbox|operatorname|quad|qquad|[,;:! ()\[\]])"
)
_TOKEN = re.compile(r"[^\W_]+")
_EXACT_TOKEN = re.compile(r"[^\W_]+|[-+*/=<>^!|]")


@dataclass(frozen=True)
class Match:
    """An evaluation problem and the training problem it shares most with.

    Attributes:
        evaluation, training: sample ids.
        kind: `same` (equal after normalisation, operators included) or `shared` (n-grams in common).
        share: of the evaluation problem's n-grams that stand in that training problem; 1 for `same`.
        common: an n-gram both hold; "" for `same`.
    """

    evaluation: str
    training: str
    kind: str
    share: float
    common: str = ""


@dataclass
class Overlap:
    """What was found. `words` is n; `problems` and `training` count the texts compared."""

    training_source: str
    words: int
    problems: int
    training: int
    matches: list[Match] = field(default_factory=list)

    @property
    def same(self) -> int:
        return sum(match.kind == "same" for match in self.matches)

    @property
    def mostly(self) -> int:
        """Problems that are the same, or share at least half of their n-grams."""
        return sum(match.share >= 0.5 for match in self.matches)

    def line(self, name: str) -> str:
        return (
            f"overlap {name} with {self.training_source}: of {self.problems:,} problems {self.same} are the same as one of "
            f"{self.training:,}, {self.mostly} share at least half of their {self.words}-grams with one, {len(self.matches)} share any"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "training_source": self.training_source,
            "words": self.words,
            "problems": self.problems,
            "training_problems": self.training,
            "same": self.same,
            "share_half_or_more": self.mostly,
            "share_any": len(self.matches),
            "matches": [match.__dict__ for match in self.matches],
        }


def normalise(text: str) -> list[str]:
    """Words and numbers in lower case; layout commands, punctuation and accents' encodings gone; \\dfrac is \\frac."""
    return _TOKEN.findall(_plain(text))


def exact(text: str) -> list[str]:
    """As `normalise`, with the operators left in: z^4 + z^2 and z^4 - z^2 are two problems."""
    return _EXACT_TOKEN.findall(_plain(text))


def find_overlap(
    evaluation: Sequence[Problem], training: Sequence[Problem], *, source: str = "training data", words: int = WORDS
) -> Overlap:
    """Compare problem statements.

    Args:
        evaluation, training: problems.
        source: of the training data, for the report.
        words: n. A text shorter than n words is one n-gram of its own length, so it matches only its copy.

    Returns:
        An Overlap with at most one match an evaluation problem: the training problem that shares most, the first of
        equals.
    """
    if words < 1:
        raise ValueError(f"words must be positive, got {words}")
    wanted: dict[tuple[str, ...], list[int]] = {}
    grams: list[set[tuple[str, ...]]] = []
    texts = [tuple(normalise(problem.problem)) for problem in evaluation]
    wholes = [exact(problem.problem) for problem in evaluation]
    for number, text in enumerate(texts):
        grams.append(_grams(text, words))
        for gram in grams[-1]:
            wanted.setdefault(gram, []).append(number)
    best: dict[int, Match] = {}
    for other in training:
        text = tuple(normalise(other.problem))
        hits: dict[int, tuple[int, tuple[str, ...]]] = {}
        for gram in _grams(text, words):
            for number in wanted.get(gram, ()):
                count, first = hits.get(number, (0, gram))
                hits[number] = (count + 1, min(first, gram))
        for number, (count, gram) in hits.items():
            same = texts[number] == text and wholes[number] == exact(other.problem)
            share = count / len(grams[number])
            known = best.get(number)
            if known is None or (same, share) > (known.kind == "same", known.share):
                best[number] = Match(
                    evaluation[number].id, other.id, "same" if same else "shared", share, "" if same else " ".join(gram)
                )
    matches = sorted((best[number] for number in best), key=lambda m: (-(m.kind == "same"), -m.share, m.evaluation))
    return Overlap(source, words, len(evaluation), len(training), matches)


def _plain(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _LAYOUT.sub(" ", plain).lower()


def _grams(text: tuple[str, ...], words: int) -> set[tuple[str, ...]]:
    if len(text) <= words:
        return {text} if text else set()
    return {text[i : i + words] for i in range(len(text) - words + 1)}
