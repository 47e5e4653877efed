"""Remainders, greatest common divisors, least common multiples, modular powers."""

from __future__ import annotations

import math
from random import Random

from plumbline.rl.procedural.draft import Draft


def remainders(rng: Random, level: int) -> Draft:
    """The remainder of a division."""
    low, high, top = [(5, 30, 5), (10, 50, 6), (20, 80, 9), (50, 120, 9), (50, 200, 12)][level - 1]
    m = rng.randint(3, top)
    a = rng.randint(low, high)
    quotient, rest = divmod(a, m)
    steps = f"{m}*{quotient}={m * quotient}, {a}-{m * quotient}={rest}"
    return Draft(f"Find the remainder when ${a}$ is divided by ${m}$.", str(rest), steps)


def greatest_common_divisors(rng: Random, level: int) -> Draft:
    """gcd by Euclid's algorithm."""
    factor = rng.randint(1, [4, 5, 6, 8, 10][level - 1])
    span = [5, 6, 8, 10, 12][level - 1]
    a, b = factor * rng.randint(2, span), factor * rng.randint(2, span)
    steps = _euclid(a, b)
    return Draft(f"Find $\\gcd({a}, {b})$.", str(math.gcd(a, b)), ", ".join(steps))


def least_common_multiples(rng: Random, level: int) -> Draft:
    """lcm as the product over the gcd."""
    top = [6, 8, 10, 12, 15][level - 1]
    a, b = rng.randint(2, top), rng.randint(2, top)
    divisor, product = math.gcd(a, b), a * b
    steps = [*_euclid(a, b), f"{a}*{b}={product}", f"{product}/{divisor}={product // divisor}"]
    return Draft(f"Find the least common multiple of ${a}$ and ${b}$.", str(product // divisor), ", ".join(steps))


def modular_products(rng: Random, level: int) -> Draft:
    """a b mod m."""
    low, high, top = [(2, 6, 5), (2, 9, 6), (3, 9, 7), (3, 12, 9), (5, 15, 10)][level - 1]
    a, b, m = rng.randint(low, high), rng.randint(low, high), rng.randint(3, top)
    product = a * b
    quotient, rest = divmod(product, m)
    steps = f"{a}*{b}={product}, {m}*{quotient}={m * quotient}, {product}-{m * quotient}={rest}"
    return Draft(f"Compute ${a}\\times{b} \\bmod {m}$.", str(rest), steps)


def _euclid(a: int, b: int) -> list[str]:
    a, b = max(a, b), min(a, b)
    steps = []
    while b:
        steps.append(f"{a} mod {b}={a % b}")
        a, b = b, a % b
    return [*steps, f"gcd {a}"]
