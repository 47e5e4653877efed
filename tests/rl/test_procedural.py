"""Procedural problems: golds recomputed from the statements alone, true steps, and splits that never meet."""

import math
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from plumbline.errors import InputError
from plumbline.rewards.verifier import check_gold, grade_many
from plumbline.rl.procedural import FAMILIES, LEVELS, generate, split_of, stream

PROBLEMS = generate("train", 1400, 7) + generate("heldout", 700, 7)


def value(expression):
    """An arithmetic expression in Python's notation, exactly."""
    assert re.fullmatch(r"[\d+\-*/()% ]+", expression), expression
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


def latex_value(text):
    """Integers and \\frac{a}{b}, with +, -, \\times and integer powers."""
    text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)", text).replace(r"\times", "*")
    power = re.fullmatch(r"(\(?-?\d+\)?)\^\{(\d+)\}", text)
    if power:
        return Fraction(int(power[1].strip("()"))) ** int(power[2])
    return value(text)


def solve(statement):
    """The answer, read from the statement without the family's code."""
    if match := re.fullmatch(r"Compute \$1\+2\+\\cdots\+(\d+)\$\.", statement):
        return Fraction(sum(range(int(match[1]) + 1)))
    if match := re.fullmatch(r"Compute \$(\d+)\\times(\d+) \\bmod (\d+)\$\.", statement):
        return Fraction(int(match[1]) * int(match[2]) % int(match[3]))
    if match := re.fullmatch(r"Compute \$(.+)\$\.", statement):
        return latex_value(match[1])
    if match := re.fullmatch(r"What is \$(\d+)\\%\$ of \$(\d+)\$\?", statement):
        return Fraction(int(match[1]) * int(match[2]), 100)
    if match := re.fullmatch(r"Find the remainder when \$(\d+)\$ is divided by \$(\d+)\$\.", statement):
        return Fraction(int(match[1]) % int(match[2]))
    if match := re.fullmatch(r"Find \$\\gcd\((\d+), (\d+)\)\$\.", statement):
        return Fraction(math.gcd(int(match[1]), int(match[2])))
    if match := re.fullmatch(r"Find the least common multiple of \$(\d+)\$ and \$(\d+)\$\.", statement):
        return Fraction(math.lcm(int(match[1]), int(match[2])))
    if match := re.fullmatch(r"Solve \$(.+)=(.+)\$ for \$x\$\.", statement):
        (a, b), (c, d) = line(match[1]), line(match[2])
        return Fraction(d - b, a - c)
    if match := re.fullmatch(r"If \$f\(x\)=(.+)\$, find \$f\((-?\d+)\)\$\.", statement):
        body = re.sub(r"(\d+)x", r"\1*x", match[1]).replace("^", "**")
        return Fraction(eval(body, {"x": int(match[2])}))
    if match := re.fullmatch(r"Find the next term of \$(.+)\$\.", statement):
        return next_term([int(term) for term in match[1].split(", ")])
    raise AssertionError(f"a statement of no known form: {statement}")


def line(side):
    """ax+b as (a, b)."""
    slope = re.search(r"(\d*)x", side)
    rest = re.sub(r"\d*x", "", side)
    return (int(slope[1] or 1) if slope else 0), (int(rest) if rest else 0)


def next_term(terms):
    """Of the simplest rule: constant difference, then constant ratio, then constant second difference."""
    gaps = [b - a for a, b in pairwise(terms)]
    if len(set(gaps)) == 1:
        return Fraction(terms[-1] + gaps[0])
    ratios = {Fraction(b, a) for a, b in pairwise(terms)}
    if len(ratios) == 1:
        return terms[-1] * ratios.pop()
    growth = {b - a for a, b in pairwise(gaps)}
    assert len(growth) == 1
    return Fraction(terms[-1] + gaps[-1] + growth.pop())


def test_every_gold_is_what_its_statement_asks_for():
    for problem in PROBLEMS:
        assert latex_value(problem.answer) == solve(problem.problem), problem


def test_every_step_of_every_solution_is_true():
    checked = 0
    for problem in PROBLEMS:
        steps, box, answer = problem.solution.rpartition(r". \boxed{")
        assert box
        assert answer == problem.answer + "}"
        for step in steps.split(", "):
            left, equals, right = step.partition("=")
            if equals:
                expression = left.replace(" mod ", "%")
                assert value(expression) == value(right), problem
                checked += 1
    assert checked > 2 * len(PROBLEMS)


def test_the_verifier_takes_every_worked_solution():
    assert {check_gold(problem.answer) for problem in PROBLEMS} == {None}
    verdicts = grade_many([(problem.solution, problem.answer) for problem in PROBLEMS])
    assert Counter(verdict.reason for verdict in verdicts) == {"correct": len(PROBLEMS)}


def test_every_family_and_level_appears():
    counts = Counter((problem.family, problem.level) for problem in PROBLEMS)
    assert set(counts) == {(family, level) for family in FAMILIES for level in LEVELS}


def test_the_splits_never_share_a_statement():
    train = {p.problem for seed in range(3) for p in generate("train", 1500, seed)}
    held_out = {p.problem for seed in range(3) for p in generate("heldout", 600, seed)}
    assert not train & held_out
    assert {split_of(statement) for statement in train} == {"train"}
    assert {split_of(statement) for statement in held_out} == {"heldout"}
    assert {split_of(p.problem) for p in stream("train", 500, 1)} == {"train"}


def test_statements_and_ids_are_unique():
    problems = generate("train", 3000, 0)
    assert len({p.problem for p in problems}) == len({p.id for p in problems}) == 3000


def test_arguments_decide_everything():
    assert generate("train", 50, 3) == generate("train", 50, 3)
    assert generate("train", 50, 3) != generate("train", 50, 4)
    assert list(stream("train", 50, 3)) == list(stream("train", 50, 3))


def test_a_stream_gives_every_family_and_level_its_equal_share():
    cells = len(FAMILIES) * len(LEVELS)
    counts = Counter((p.family, p.level) for p in stream("train", 3 * cells, 0))
    assert len(counts) == cells
    assert set(counts.values()) == {3}


def test_families_and_levels_can_be_chosen():
    problems = generate("heldout", 20, 0, families=["gcd", "lcm"], levels=[2, 4])
    assert {p.family for p in problems} == {"gcd", "lcm"}
    assert {p.level for p in problems} == {2, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "unknown procedural split 'test'; known: train, heldout"),
        ({"families": ["knots"]}, "unknown procedural family 'knots'; known: addition"),
        ({"levels": [6]}, "procedural level 6 does not exist"),
        ({"count": 500, "families": ["powers"], "levels": [1]}, r"hold only \d+ different train problems, not 500"),
    ],
)
def test_bad_requests_are_one_clear_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        generate(**{"split": "train", "count": 10, "seed": 0, **arguments})
    assert "\n" not in str(error.value)
