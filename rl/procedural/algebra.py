"""Linear equations, functions, sequences and longer sums."""

from __future__ import annotations

from random import Random

from plumbline.rl.procedural.draft import Draft, number


def linear_equations(rng: Random, level: int) -> Draft:
    """Solve for x: one step at level 1, unknowns on both sides from level 4."""
    x = rng.randint(*[(1, 9), (1, 9), (-5, 9), (-9, 12), (-12, 20)][level - 1])
    if level == 1:
        b = rng.randint(1, 20)
        return Draft(f"Solve $x+{b}={x + b}$ for $x$.", str(x), f"{x + b}-{b}={x}")
    a, b = rng.randint(2, 5 if level < 4 else 9), rng.randint(1, 20)
    if level < 4:
        right = a * x + b
        return Draft(f"Solve ${a}x+{b}={right}$ for $x$.", str(x), f"{right}-{b}={right - b}, {right - b}/{a}={x}")
    c = rng.randint(1, a - 1)
    right = (a - c) * x + b
    steps = f"{a}-{c}={a - c}, {number(right)}-{b}={right - b}, {right - b}/{a - c}={x}"
    unknown = f"{c}x" if c > 1 else "x"
    other = f"{unknown}{right:+d}" if right else unknown
    return Draft(f"Solve ${a}x+{b}={other}$ for $x$.", str(x), steps)


def functions(rng: Random, level: int) -> Draft:
    """Evaluate a polynomial of degree one or two at a point."""
    x = rng.randint(*[(1, 9), (2, 12), (-9, 9), (2, 6), (-6, 9)][level - 1])
    a, b, c = rng.randint(2, 6 if level < 4 else 4), rng.randint(1, 20), rng.randint(2, 5)
    if level < 4:
        steps = f"{a}*{number(x)}={a * x}, {a * x}+{b}={a * x + b}"
        return Draft(f"If $f(x)={a}x+{b}$, find $f({x})$.", str(a * x + b), steps)
    square, middle = x * x, c * x
    value = a * square + middle + b
    steps = (
        f"{number(x)}*{number(x)}={square}, {a}*{square}={a * square}, {c}*{number(x)}={middle}, "
        f"{a * square}+{number(middle)}={a * square + middle}, {a * square + middle}+{b}={value}"
    )
    return Draft(f"If $f(x)={a}x^2+{c}x+{b}$, find $f({x})$.", str(value), steps)


def sequences(rng: Random, level: int) -> Draft:
    """The next term of an arithmetic, geometric or quadratic sequence."""
    if level in (3, 5):
        ratio, first = rng.randint(2, 3 if level == 3 else 4), rng.randint(1, 5 if level == 3 else 9)
        terms = [first * ratio**k for k in range(4)]
        steps = f"{terms[1]}/{terms[0]}={ratio}, {terms[3]}*{ratio}={terms[3] * ratio}"
        answer = terms[3] * ratio
    elif level == 4:
        first, step, growth = rng.randint(1, 12), rng.randint(1, 6), rng.randint(1, 4)
        terms = [first]
        for k in range(4):
            terms.append(terms[-1] + step + k * growth)
        last = terms[3] - terms[2]
        answer = terms.pop()
        steps = (
            f"{terms[3]}-{terms[2]}={last}, {terms[2]}-{terms[1]}={last - growth}, "
            f"{last}+{growth}={last + growth}, {terms[3]}+{last + growth}={answer}"
        )
    else:
        span = 5 if level == 1 else 12
        first = rng.randint(1, 12 if level == 1 else 50)
        step = rng.randint(1, span) * (1 if level == 1 else rng.choice((1, -1)))
        terms = [first + k * step for k in range(4)]
        steps = f"{number(terms[1])}-{number(terms[0])}={step}, {terms[3]}+{number(step)}={terms[3] + step}"
        answer = terms[3] + step
    shown = ", ".join(str(term) for term in terms)
    return Draft(f"Find the next term of ${shown}$.", str(answer), steps)


def sums(rng: Random, level: int) -> Draft:
    """A sum of three to five numbers, added from the left."""
    count, high = [(3, 9), (4, 9), (3, 40), (4, 60), (5, 99)][level - 1]
    low = 1 if high == 9 else 10
    terms = [rng.randint(low, high) for _ in range(count)]
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total}+{term}={total + term}")
        total += term
    return Draft(f"Compute ${'+'.join(map(str, terms))}$.", str(total), ", ".join(steps))
