"""Sums, products, powers, percentages and fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

from plumbline.rl.procedural.draft import Draft, number


def addition(rng: Random, level: int) -> Draft:
    """Two numbers of one to four digits, worked digit by digit from the right."""
    low, high = [(1, 9), (10, 49), (10, 99), (100, 999), (1000, 9999)][level - 1]
    a, b = rng.randint(low, high), rng.randint(low, high)
    return Draft(f"Compute ${a}+{b}$.", str(a + b), ", ".join(_column_sum(a, b)))


def subtraction(rng: Random, level: int) -> Draft:
    """A difference, negative from level 3 on."""
    low, high = [(2, 18), (10, 49), (10, 99), (100, 499), (100, 999)][level - 1]
    a, b = rng.randint(low, high), rng.randint(low, high)
    if level < 3 and a < b:
        a, b = b, a
    large, small = max(a, b), min(a, b)
    steps = _column_difference(large, small)
    if a < b:
        steps.append(f"-({large - small})")
    return Draft(f"Compute ${a}-{b}$.", str(a - b), ", ".join(steps))


def multiplication(rng: Random, level: int) -> Draft:
    """A product, worked by the digits of the first factor."""
    ranges = [((2, 9), (2, 9)), ((11, 19), (2, 5)), ((11, 49), (2, 9)), ((11, 99), (2, 9)), ((100, 499), (2, 9))]
    (a_low, a_high), (b_low, b_high) = ranges[level - 1]
    a, b = rng.randint(a_low, a_high), rng.randint(b_low, b_high)
    digits = str(a)
    if len(digits) == 1:
        return Draft(f"Compute ${a}\\times{b}$.", str(a * b), f"{a}*{b}={a * b}")
    steps, total = [], 0
    for place, digit in enumerate(digits):
        part = int(digit) * 10 ** (len(digits) - 1 - place)
        if part == 0:
            continue
        steps.append(f"{part}*{b}={part * b}")
        if total:
            steps.append(f"{total}+{part * b}={total + part * b}")
        total += part * b
    return Draft(f"Compute ${a}\\times{b}$.", str(a * b), ", ".join(steps))


def powers(rng: Random, level: int) -> Draft:
    """A small power, worked as a chain of products."""
    choices = {
        1: [(b, 2) for b in range(2, 11)],
        2: [(b, 3) for b in range(2, 6)] + [(b, 2) for b in range(11, 16)],
        3: [(2, e) for e in range(4, 7)] + [(3, 4), (6, 3), (7, 3)] + [(b, 2) for b in range(16, 21)],
        4: [(2, e) for e in range(7, 10)] + [(4, 4), (8, 3), (9, 3)] + [(-b, 3) for b in range(2, 8)],
        5: [(3, 5), (5, 4), (4, 5)] + [(-b, 4) for b in range(2, 6)] + [(b, 2) for b in range(21, 41)],
    }
    base, exponent = rng.choice(choices[level])
    shown = f"({base})" if base < 0 else str(base)
    steps, value = [], base
    for _ in range(exponent - 1):
        steps.append(f"{number(value)}*{number(base)}={value * base}")
        value *= base
    return Draft(f"Compute ${shown}^{{{exponent}}}$.", str(value), ", ".join(steps))


def percentages(rng: Random, level: int) -> Draft:
    """A percentage of a number with a whole or decimal result."""
    percents = [[10, 50], [20, 25], [5, 40, 75], [15, 30, 60], [12, 35, 45, 80]]
    percent = rng.choice(percents[level - 1])
    unit = 100 // math.gcd(percent, 100)
    size = unit * rng.randint(1, max(2, [100, 120, 200, 300, 600][level - 1] // unit))
    product = percent * size
    return Draft(
        f"What is ${percent}\\%$ of ${size}$?",
        str(product // 100),
        f"{percent}*{size}={product}, {product}/100={product // 100}",
    )


def fractions(rng: Random, level: int) -> Draft:
    """A sum, difference or product of fractions, reduced."""
    top = [4, 5, 6, 8, 10][level - 1]
    b, d = rng.randint(2, top), rng.randint(2, top)
    if level == 1:
        d = b
    a, c = rng.randint(1, b), rng.randint(1, d)
    operation = rng.choice("+" if level == 1 else "+-" if level < 4 else "+-*")
    symbol = {"+": "+", "-": "-", "*": "\\times"}[operation]
    statement = f"Compute $\\frac{{{a}}}{{{b}}}{symbol}\\frac{{{c}}}{{{d}}}$."
    if operation == "*":
        top_value, bottom = a * c, b * d
        steps = [f"{a}*{c}={top_value}", f"{b}*{d}={bottom}"]
    elif b == d:
        top_value, bottom = (a + c, b) if operation == "+" else (a - c, b)
        steps = [f"{a}{operation}{c}={top_value}", f"{bottom}"]
    else:
        left, right, bottom = a * d, c * b, b * d
        top_value = left + right if operation == "+" else left - right
        steps = [f"{a}*{d}={left}", f"{c}*{b}={right}", f"{left}{operation}{right}={top_value}", f"{b}*{d}={bottom}"]
    divisor = math.gcd(top_value, bottom)
    steps.append(f"gcd {divisor}")
    return Draft(statement, fraction_latex(Fraction(top_value, bottom)), ", ".join(steps))


def fraction_latex(value: Fraction) -> str:
    """Reduced LaTeX: an integer, or \\frac with the sign in front."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _column_sum(a: int, b: int) -> list[str]:
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return steps


def _column_difference(a: int, b: int) -> list[str]:
    """a >= b, digit by digit; a borrowed ten is written into the digit."""
    steps, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10 - borrow, b // 10**place % 10
        borrow = int(x < y)
        x += 10 * borrow
        steps.append(f"{x}-{y}={x - y}")
    return steps
