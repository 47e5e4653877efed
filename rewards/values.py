"""Whether two trees are the same number or function: exact normal forms first, then numbers with error bounds.

Comparisons answer True, False or None: None means that exact forms and double precision cannot tell, and that the grading
child must compare at high precision (`deep`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction

from plumbline.rewards.normal import Normaliser
from plumbline.rewards.numeric import Double, Evaluator, Unevaluable, has_imaginary, points, symbols, uses_calls
from plumbline.rewards.parser import Node
from plumbline.rewards.polynomials import ONE, TooHard, Value, is_algebraic

Truth = bool | None


def all_of(truths: Iterable[Truth]) -> Truth:
    result: Truth = True
    for truth in truths:
        if truth is False:
            return False
        if truth is None:
            result = None
    return result


class Values:
    """Comparison of trees.

    Args:
        deep: compare at high precision what nothing else decides (in the grading child only).
    """

    def __init__(self, deep: bool) -> None:
        self.deep = deep

    def equal(self, a: Node, g: Node) -> Truth:
        """Whether two trees are the same number or function."""
        if a == g:
            return True
        if a[0] == g[0] == "num":
            return a[1] == g[1]
        forms = Normaliser()
        try:
            x, y = forms.normal(a), forms.normal(g)
            if forms.same(x, y):
                return True
            if is_algebraic(x) and is_algebraic(y):
                return False
        except TooHard:
            pass
        if uses_calls(a) or uses_calls(g):
            return False
        names = symbols(a) | symbols(g)
        complexes = has_imaginary(a) or has_imaginary(g)
        return self.sampled(sorted(names), lambda lib, point: _differ(lib, point, a, g, complexes))

    def sampled(self, names: list[str], test: Callable[..., Truth]) -> Truth:
        """A test at fixed points: False as soon as one point tells the trees apart; True only at high precision."""
        if len(names) > 12:
            raise TooHard("too many symbols")
        if points_alike(names, Double, test) is None:
            return False
        if not self.deep:
            return None
        from plumbline.rewards.deep import Precise

        alike = points_alike(names, lambda: Precise(120), test)
        return alike is not None and alike >= (2 if names else 1)

    def proportional(self, f: Node, h: Node, *, directed: bool) -> Truth:
        """Whether f = c h for a constant c (positive where `directed`), or f and h have proportional numerators."""
        names = sorted(symbols(f) | symbols(h))
        if symbols(f) != symbols(h) or not names or uses_calls(f) or uses_calls(h):
            return False
        forms = Normaliser()
        try:
            x, y = forms.normal(f), forms.normal(h)
            if not x[0] or not y[0]:
                return False
            if directed and (not _constant(x[1]) or not _constant(y[1])):
                raise TooHard("denominator")
            top_x, top_y = _numerator(x, directed), _numerator(y, directed)
            if set(top_x) == set(top_y):
                lead = min(top_x)
                c = top_x[lead] / top_y[lead]
                if all(top_x[m] == c * top_y[m] for m in top_x):
                    signs = x[1].get(ONE, Fraction(1)) * y[1].get(ONE, Fraction(1))
                    return not directed or c * signs > 0
        except TooHard:
            pass
        ratios: list[complex] = []

        def test(lib: object, point: dict[str, Fraction]) -> Truth:
            evaluator = Evaluator(lib, point)
            value, error = evaluator.divide(evaluator.value(f), evaluator.value(h))
            if not ratios:
                ratios.append(value)
                return None
            if isinstance(value, complex) != isinstance(ratios[0], complex):
                ratios[0] = value
                return None
            if directed and value.real <= 0:
                return True
            return abs(value - ratios[0]) > 100 * error + abs(value) * 1e-12

        return self.sampled(names, test)


def points_alike(names: list[str], library: Callable[[], object], test: Callable[..., Truth]) -> int | None:
    """At how many points the test cannot tell the trees apart; None as soon as one point does."""
    alike = 0
    for point in points(names):
        try:
            differ = test(library(), point)
        except (Unevaluable, OverflowError, ZeroDivisionError):
            continue
        if differ:
            return None
        if differ is not None:
            alike += 1
    return alike


def _differ(lib: object, point: dict[str, Fraction], a: Node, g: Node, complexes: bool) -> Truth:
    evaluator = Evaluator(lib, point)
    (x, e), (y, f) = evaluator.value(a), evaluator.value(g)
    if not complexes and point:
        real_x, real_y = abs(x.imag) <= 10 * e, abs(y.imag) <= 10 * f
        if not (real_x and real_y):
            return None  # outside the real domain of one of them
    return bool(abs(x - y) > 10 * (e + f))


def _constant(poly: dict) -> bool:
    return len(poly) == 1 and ONE in poly


def _numerator(value: Value, directed: bool) -> dict:
    """The numerator, products with negative exponents cleared (not for inequalities: that could turn them)."""
    top = value[0]
    if directed:
        return top
    lowest: dict[str, Fraction] = {}
    for mono in top:
        for atom, e in mono:
            if atom.startswith("s:"):
                lowest[atom] = min(lowest.get(atom, Fraction(0)), e)
    lowest = {atom: e for atom, e in lowest.items() if e < 0}
    if not lowest:
        return top
    out = {}
    for mono, c in top.items():
        exponents = dict(mono)
        for atom, e in lowest.items():
            exponents[atom] = exponents.get(atom, Fraction(0)) - e
        out[tuple(sorted((atom, e) for atom, e in exponents.items() if e))] = c
    return out
