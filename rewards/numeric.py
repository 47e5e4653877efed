"""Numbers with error bounds: double precision here, any precision with mpmath in the grading child.

Every operation returns (value, bound on its absolute error), so two trees are told apart only when their difference is
larger than rounding can explain.
"""

from __future__ import annotations

import cmath
import math
from fractions import Fraction
from typing import Any

from plumbline.rewards.parser import Node

Bounded = tuple[Any, Any]
LARGEST = 1e290


class Unevaluable(Exception):
    """No number at this point: a pole, an overflow, or beyond the work limit."""


class Double:
    """Arithmetic in complex doubles."""

    eps = 2.0**-50
    pi, e = math.pi, math.e

    def number(self, value: Fraction) -> Bounded:
        try:
            x = value.numerator / value.denominator
        except OverflowError:
            raise Unevaluable("overflow") from None
        if value and (abs(x) < 1e-290 or abs(x) > LARGEST):
            raise Unevaluable("out of range")
        return complex(x), 0.0 if value.denominator == 1 and abs(value) < 2**53 else abs(x) * self.eps

    def call(self, name: str, *x: Any) -> Any:
        try:
            result = self._call(name, *x)
        except (OverflowError, ValueError, ZeroDivisionError):
            raise Unevaluable(name) from None
        if not cmath.isfinite(result) or abs(result) > LARGEST:
            raise Unevaluable("overflow")
        return result

    def _call(self, name: str, *x: Any) -> Any:
        if name == "gamma":
            if abs(x[0].imag) > 0 or abs(x[0].real) > 150:
                raise Unevaluable("gamma")
            return complex(math.gamma(x[0].real))
        if name == "power":
            return x[0] ** x[1]
        return {"sin": cmath.sin, "cos": cmath.cos, "exp": cmath.exp, "ln": cmath.log, "arcsin": cmath.asin, "arccos": cmath.acos,
                "arctan": cmath.atan, "sinh": cmath.sinh, "cosh": cmath.cosh}[name](x[0])  # fmt: skip


class Evaluator:
    """Values of trees at one point.

    Args:
        lib: Double, or mpmath's counterpart (deep.py).
        point: symbol -> rational value.
    """

    def __init__(self, lib: Any, point: dict[str, Fraction]) -> None:
        self.lib = lib
        self.point = point

    def value(self, node: Node) -> Bounded:
        kind, lib = node[0], self.lib
        if kind == "num":
            return lib.number(node[1])
        if kind == "sym":
            return lib.number(self.point[node[1]])
        if kind == "const":
            if node[1] == "inf":
                raise Unevaluable("infinity")
            if node[1] == "i":
                return lib.number(Fraction(1))[0] * 1j, lib.number(Fraction(0))[1]
            x = lib.pi if node[1] == "pi" else lib.e
            return lib.number(Fraction(1))[0] * x, x * lib.eps
        if kind == "neg":
            x, e = self.value(node[1])
            return -x, e
        if kind == "add":
            total, error = self.value(node[1])
            for term in node[2:]:
                x, e = self.value(term)
                total = total + x
                error = error + e + abs(total) * lib.eps
            return total, error
        if kind == "mul":
            return self.multiply(self.value(node[1]), self.value(node[2]))
        if kind == "div":
            return self.divide(self.value(node[1]), self.value(node[2]))
        if kind == "deg":
            return self.multiply(self.value(node[1]), (lib.pi / 180, lib.eps))
        if kind == "pow":
            return self.power(self.value(node[1]), self.value(node[2]), self.ratio(node[2]))
        return self.function(node)

    def ratio(self, node: Node) -> Fraction | None:
        if node[0] == "num":
            return node[1]
        if node[0] == "neg":
            inner = self.ratio(node[1])
            return None if inner is None else -inner
        if node[0] == "div":
            a, b = self.ratio(node[1]), self.ratio(node[2])
            return a / b if a is not None and b else None
        return None

    def multiply(self, a: Bounded, b: Bounded) -> Bounded:
        r = a[0] * b[0]
        if abs(r) > LARGEST and self.lib.eps > 1e-30:
            raise Unevaluable("overflow")
        return r, abs(a[0]) * b[1] + abs(b[0]) * a[1] + abs(r) * self.lib.eps

    def divide(self, a: Bounded, b: Bounded) -> Bounded:
        if abs(b[0]) <= 4 * b[1] or abs(b[0]) == 0:
            raise Unevaluable("division by zero")
        r = a[0] / b[0]
        return r, (a[1] + abs(r) * b[1]) / abs(b[0]) + abs(r) * self.lib.eps

    def power(self, a: Bounded, b: Bounded, exact: Fraction | None) -> Bounded:
        x, y = a[0], b[0]
        if abs(x) == 0 or abs(x) <= a[1]:
            if y.imag == 0 and y.real > 0 and a[1] == 0:
                return x * 0, a[1]
            if y.imag == 0 and y.real > 0:
                return x, a[1] + abs(x) if y.real >= 1 else (a[1] + abs(x)) ** float(y.real)
            raise Unevaluable("power of zero")
        if exact is not None and exact.denominator % 2 and exact.denominator > 1 and abs(x.imag) <= a[1] and x.real < 0:
            # The real odd root, as schools take it.
            r, error = self.power((-x, a[1]), b, None)
            return (-r if exact.numerator % 2 else r), error
        log = self.lib.call("ln", x)
        size = abs(y * log)
        if size > (600 if self.lib.eps > 1e-30 else 1e6):
            raise Unevaluable("large power")
        if exact is not None and exact.denominator == 1 and abs(exact.numerator) < 2**20:
            r = self.lib.call("power", x, exact.numerator)
        else:
            r = self.lib.call("power", x, y)
        return r, abs(r) * (abs(y) * a[1] / abs(x) + abs(log) * b[1] + self.lib.eps * (2 + size))

    def function(self, node: Node) -> Bounded:
        name, lib = node[1], self.lib
        if name == "root":
            index = self.ratio(node[3])
            if not index:
                raise Unevaluable("root index")
            return self.power(self.value(node[2]), lib.number(1 / index), 1 / index)
        arguments = [self.value(argument) for argument in node[2:]]
        (x, e), one = arguments[0], lib.number(Fraction(1))
        if name == "abs":
            return lib.number(Fraction(1))[0] * abs(x), e
        if name in ("sin", "cos", "cis"):
            if abs(x) > 1e8:
                raise Unevaluable("large angle")
            if name == "cis":
                return lib.call("exp", x * 1j), e + lib.eps * (1 + abs(x))
            r = lib.call(name, x)
            return r, (e + lib.eps * abs(x)) * (1 + abs(x.imag)) + lib.eps * (1 + abs(r))
        if name in ("tan", "cot", "sec", "csc"):
            sin, cos = self.function(("fn", "sin", node[2])), self.function(("fn", "cos", node[2]))
            return self.divide(*{"tan": (sin, cos), "cot": (cos, sin), "sec": (one, cos), "csc": (one, sin)}[name])
        if name in ("ln", "log"):
            value = self.log(x, e)
            if len(arguments) == 2:
                return self.divide(value, self.log(*arguments[1]))
            return value if name == "ln" else self.divide(value, self.log(*lib.number(Fraction(10))))
        if name in ("exp", "sinh", "cosh"):
            if abs(x) > 600:
                raise Unevaluable("overflow")
            r = lib.call(name, x)
            return r, (abs(r) + 1) * (e + lib.eps * (1 + abs(x)))
        if name == "tanh":
            return self.divide(self.function(("fn", "sinh", node[2])), self.function(("fn", "cosh", node[2])))
        if name in ("arcsin", "arccos"):
            r = lib.call(name, x)
            room = abs(1 - x * x)
            return r, (e + lib.eps) / room**0.5 + lib.eps if room > 1e-6 else (e + 4 * lib.eps) ** 0.5 * 4
        if name == "arctan":
            return lib.call("arctan", x), e + lib.eps * 4
        if name in ("arccot", "arcsec", "arccsc"):
            inverse = self.divide(one, (x, e))
            r = lib.call({"arccot": "arctan", "arcsec": "arccos", "arccsc": "arcsin"}[name], inverse[0])
            return r, inverse[1] * 4 + lib.eps * 4
        if name in ("floor", "ceil", "sgn"):
            if abs(x.imag) > e + lib.eps or abs(x) > 2**50:
                raise Unevaluable(name)
            if name == "sgn":
                if abs(x) <= 4 * e:
                    raise Unevaluable("sgn")
                return one[0] * (1 if x.real > 0 else -1), one[1]
            near = round(float(x.real))
            if abs(x.real - near) <= 4 * e:
                if e:
                    raise Unevaluable(name)
                return lib.number(Fraction(near))
            return lib.number(Fraction(math.floor(x.real) if name == "floor" else math.ceil(x.real)))
        if name == "factorial":
            return self.gamma(x + 1, e)
        if name == "binomial":
            n, k = arguments
            bottom = self.multiply(self.gamma(k[0] + 1, k[1]), self.gamma(n[0] - k[0] + 1, n[1] + k[1]))
            return self.divide(self.gamma(n[0] + 1, n[1]), bottom)
        if name in ("max", "min"):
            best = max if name == "max" else min
            return best(arguments, key=lambda pair: float(pair[0].real))
        raise Unevaluable(name)

    def gamma(self, x: Any, e: Any) -> Bounded:
        if abs(x) > 1e5:
            raise Unevaluable("factorial")
        r = self.lib.call("gamma", x)
        return r, abs(r) * (math.log(float(abs(x)) + 2) + 4) * (e + self.lib.eps * (1 + abs(x)))

    def log(self, x: Any, e: Any) -> Bounded:
        if abs(x) <= 4 * e or abs(x) == 0:
            raise Unevaluable("log of zero")
        r = self.lib.call("ln", x)
        return r, e / abs(x) + self.lib.eps * (1 + abs(r))


_POINTS = [
    ("7/5", 3),
    ("-11/7", 5),
    ("23/9", 7),
    ("-3/13", 11),
    ("31/10", 13),
    ("5/19", 17),
    ("-29/8", 19),
    ("83/17", 23),
]


def points(names: list[str]) -> list[dict[str, Fraction]]:
    """Where trees with these symbols are compared: fixed rationals, both signs."""
    if not names:
        return [{}]
    out = []
    for row, (start, step) in enumerate(_POINTS):
        point = {}
        for number, name in enumerate(names):
            sign = -1 if (row * 5 + number * number * 3 + number * row) % 4 == 1 else 1
            point[name] = Fraction(start) * (1 if number == 0 else sign) + Fraction(number * step, 7 + 2 * row + number)
        out.append(point)
    return out


def symbols(node: Node) -> set[str]:
    if node[0] == "sym":
        return {node[1]}
    found: set[str] = set()
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= symbols(part)
    return found


def has_imaginary(node: Node) -> bool:
    return node == ("const", "i") or any(isinstance(part, tuple) and has_imaginary(part) for part in node[1:])


def uses_calls(node: Node) -> bool:
    """Whether an unknown function such as f(x) is applied in it: such trees have no numbers."""
    if node[0] == "fn" and node[1].startswith("call:"):
        return True
    return any(isinstance(part, tuple) and uses_calls(part) for part in node[1:])
