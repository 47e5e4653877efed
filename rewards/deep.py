"""High-precision comparison with mpmath. Runs in the grading child alone, where time and memory are limited."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath

from plumbline.rewards.numeric import Bounded, Unevaluable


class Precise:
    """mpmath complex numbers at a set number of decimal digits; the counterpart of numeric.Double."""

    def __init__(self, digits: int) -> None:
        mpmath.mp.dps = digits
        self.eps = mpmath.mpf(10) ** (3 - digits)
        self.pi = +mpmath.mp.pi
        self.e = +mpmath.mp.e

    def number(self, value: Fraction) -> Bounded:
        x = mpmath.mpc(mpmath.mpf(value.numerator) / value.denominator)
        whole = value.denominator == 1 and value.numerator.bit_length() < mpmath.mp.prec
        return x, mpmath.mpf(0) if whole else abs(x) * self.eps

    def call(self, name: str, *x: Any) -> Any:
        function = {"sin": mpmath.sin, "cos": mpmath.cos, "exp": mpmath.exp, "ln": mpmath.log, "arcsin": mpmath.asin, "arccos": mpmath.acos,
                    "arctan": mpmath.atan, "sinh": mpmath.sinh, "cosh": mpmath.cosh, "gamma": mpmath.gamma, "power": mpmath.power}[name]  # fmt: skip
        try:
            return mpmath.mpc(function(*x))
        except (OverflowError, ValueError, ZeroDivisionError):
            raise Unevaluable(name) from None
