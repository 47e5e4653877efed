"""Procedural problems: graded families with LaTeX statements, exact answers and worked solutions.

A problem's statement alone decides whether it is for training or held out (a hash of it), so the two splits are
disjoint whatever the seeds and sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from plumbline.errors import InputError
from plumbline.rl.procedural import algebra, arithmetic, number_theory
from plumbline.rl.procedural.draft import Draft

LEVELS = (1, 2, 3, 4, 5)
SPLITS = ("train", "heldout")

FAMILIES: dict[str, Callable[[Random, int], Draft]] = {
    "addition": arithmetic.addition,
    "subtraction": arithmetic.subtraction,
    "multiplication": arithmetic.multiplication,
    "powers": arithmetic.powers,
    "percentages": arithmetic.percentages,
    "fractions": arithmetic.fractions,
    "linear_equations": algebra.linear_equations,
    "functions": algebra.functions,
    "sequences": algebra.sequences,
    "sums": algebra.sums,
    "remainders": number_theory.remainders,
    "gcd": number_theory.greatest_common_divisors,
    "lcm": number_theory.least_common_multiples,
    "modular_products": number_theory.modular_products,
}

# Draws of one family and level before it counts as used up.
ATTEMPTS = 400


@dataclass(frozen=True)
class ProceduralProblem:
    """One problem.

    Attributes:
        id: family, level and a hash of the statement.
        problem: LaTeX statement.
        answer: exact, LaTeX.
        family, level: where it comes from; level 1 is the easiest of 5.
        solution: worked steps ending in the boxed answer.
    """

    id: str
    problem: str
    answer: str
    family: str
    level: int
    solution: str


def generate(
    split: str, count: int, seed: int, families: list[str] | None = None, levels: list[int] | None = None
) -> list[ProceduralProblem]:
    """`count` different problems, families and levels in turn, the same for the same arguments.

    Args:
        split: `train` or `heldout`.
        count: how many.
        seed: of the draws.
        families: names in FAMILIES; None is all.
        levels: of 1..5; None is all.

    Raises:
        InputError: unknown split, family or level, or the families hold fewer different problems than asked for.
    """
    if split not in SPLITS:
        raise InputError(f"unknown procedural split {split!r}; known: {', '.join(SPLITS)}")
    chosen = families or list(FAMILIES)
    for family in chosen:
        if family not in FAMILIES:
            raise InputError(f"unknown procedural family {family!r}; known: {', '.join(FAMILIES)}")
    wanted = levels or list(LEVELS)
    for level in wanted:
        if level not in LEVELS:
            raise InputError(f"procedural level {level} does not exist; levels are 1 to 5")
    rng = Random(f"{split}/{seed}")
    cells = [(family, level) for level in wanted for family in chosen]
    rng.shuffle(cells)
    seen: set[str] = set()
    problems: list[ProceduralProblem] = []
    while len(problems) < count:
        left = []
        for family, level in cells:
            if len(problems) == count:
                break
            problem = _draw(rng, split, family, level, seen)
            if problem is not None:
                problems.append(problem)
                left.append((family, level))
        if not left and len(problems) < count:
            raise InputError(
                f"the chosen families and levels hold only {len(problems)} different {split} problems, not {count}"
            )
        cells = left or cells
    return problems


def stream(split: str, count: int, seed: int, families: Sequence[str] | None = None) -> Iterator[ProceduralProblem]:
    """`count` problems with families and levels in equal shares, repeats allowed: what a long cold start reads."""
    rng = Random(f"stream/{split}/{seed}")
    cells = [(family, level) for level in LEVELS for family in families or FAMILIES]
    for number in range(count):
        if number % len(cells) == 0:
            rng.shuffle(cells)
        family, level = cells[number % len(cells)]
        problem = None
        while problem is None:
            problem = _draw(rng, split, family, level, set())
        yield problem


def split_of(statement: str) -> str:
    """`heldout` for one statement in eight, by its hash."""
    return "heldout" if hashlib.sha256(statement.encode()).digest()[0] % 8 == 0 else "train"


def _draw(rng: Random, split: str, family: str, level: int, seen: set[str]) -> ProceduralProblem | None:
    for _ in range(ATTEMPTS):
        draft = FAMILIES[family](rng, level)
        if draft.statement in seen or split_of(draft.statement) != split:
            continue
        seen.add(draft.statement)
        name = hashlib.sha256(draft.statement.encode()).hexdigest()[:12]
        solution = f"{draft.steps}. \\boxed{{{draft.answer}}}"
        return ProceduralProblem(f"{family}-{level}-{name}", draft.statement, draft.answer, family, level, solution)
    return None
