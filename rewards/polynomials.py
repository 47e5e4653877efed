"""Exact normal forms: sums of rational multiples of products of atoms, as a fraction of two such sums.

A sum ("poly") maps each product to its rational coefficient; a product is a sorted tuple of (atom, rational exponent).
Atoms are strings: "#p" the prime p under a root (exponent in (0, 1)), "@pi", "@e", "i", "s:x" a symbol, "(...)" a sum under a
root, "f:..." a function of a normal form, "g:b^m" the base b to the power m. Prime roots and i are linearly independent over
the rationals (Besicovitch 1940), so two forms made of them alone are equal exactly when they are the same.

Work is bounded: what would take too long raises TooHard and is compared numerically instead.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd, isqrt, lcm

Mono = tuple[tuple[str, Fraction], ...]
Poly = dict[Mono, Fraction]
Value = tuple[Poly, Poly]

ONE: Mono = ()
HALF = Fraction(1, 2)
MAX_TERMS = 300
MAX_WORK = 8_000
MAX_BITS = 20_000
MAX_FACTORIAL = 3000
MAX_POWER = 40
MAX_KEY = 2000


class TooHard(Exception):
    """Beyond what the exact path does in bounded time."""


def constant(value: Fraction | int) -> Value:
    return ({ONE: Fraction(value)} if value else {}, {ONE: Fraction(1)})


def key(poly: Poly) -> str:
    """A canonical text of a sum."""
    text = "+".join(f"{c}*" + ".".join(f"{a}^{e}" for a, e in m) for m, c in sorted(poly.items()))
    if len(text) > MAX_KEY:
        raise TooHard("long form")
    return text


def rational(value: Value) -> Fraction | None:
    """The number that a normal form is, if it is one."""
    top, bottom = value
    if len(bottom) == 1 and ONE in bottom and (not top or (len(top) == 1 and ONE in top)):
        return top.get(ONE, Fraction(0)) / bottom[ONE]
    return None


def is_algebraic(value: Value) -> bool:
    """Only rationals, roots of primes and i: equality of forms is equality of numbers."""
    return all(atom == "i" or (atom[0] == "#") for poly in value for mono in poly for atom, _ in mono)


def add_into(out: Poly, more: Poly) -> None:
    """out += more; products whose coefficients cancel are dropped."""
    for mono, c in more.items():
        total = out.get(mono, 0) + c
        if total:
            out[mono] = total
        else:
            out.pop(mono, None)


class Arithmetic:
    """Sums, products and quotients of normal forms; remembers what stands under roots and counts its work."""

    def __init__(self) -> None:
        self.bases: dict[str, Poly] = {}
        self.work = 0

    # -- arithmetic ---------------------------------------------------------------------------------------------

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_WORK:
            raise TooHard("too many terms")

    def add_poly(self, a: Poly, b: Poly) -> Poly:
        self.spend(len(a) + len(b))
        out = dict(a)
        add_into(out, b)
        if len(out) > MAX_TERMS:
            raise TooHard("too many terms")
        return out

    def mul_poly(self, a: Poly, b: Poly) -> Poly:
        if a == {ONE: 1}:
            return b
        if b == {ONE: 1}:
            return a
        self.spend(len(a) * len(b))
        out: Poly = {}
        for m1, c1 in a.items():
            for m2, c2 in b.items():
                coefficient = c1 * c2
                size = bits(coefficient)
                if size > MAX_BITS:
                    raise TooHard("large number")
                self.spend(size >> 8)
                if not m1 or not m2:
                    pieces: Poly = {m1 or m2: coefficient}
                else:
                    exponents = dict(m1)
                    for atom, e in m2:
                        exponents[atom] = exponents.get(atom, Fraction(0)) + e
                    pieces = self.reduce(exponents, coefficient)
                add_into(out, pieces)
        if len(out) > MAX_TERMS:
            raise TooHard("too many terms")
        return out

    def reduce(self, exponents: dict[str, Fraction], coefficient: Fraction) -> Poly:
        """One product with its atoms' exponents brought to range; a sum when a root is undone."""
        kept: list[tuple[str, Fraction]] = []
        expand: list[tuple[Poly, int]] = []
        for atom, e in exponents.items():
            if not e:
                continue
            if atom[0] == "#":
                whole = e.numerator // e.denominator
                prime = int(atom[1:])
                if whole and abs(whole) * prime.bit_length() <= MAX_BITS:
                    coefficient *= Fraction(prime) ** whole
                    e -= whole
            elif atom == "i":
                if e.denominator != 1:
                    raise TooHard("root of i")
                power = e.numerator % 4
                if power >= 2:
                    coefficient = -coefficient
                e = Fraction(power % 2)
            elif atom[0] == "(":
                whole = e.numerator // e.denominator
                if whole > 0:
                    if whole > 8:
                        raise TooHard("large power")
                    expand.append((self.bases[atom], whole))
                    e -= whole
            if e:
                kept.append((atom, e))
        kept.sort()
        out: Poly = {tuple(kept): coefficient}
        for base, times in expand:
            for _ in range(times):
                out = self.mul_poly(out, base)
        return out

    def add(self, a: Value, b: Value) -> Value:
        if a[1] == b[1]:
            return self.add_poly(a[0], b[0]), a[1]
        top = self.add_poly(self.mul_poly(a[0], b[1]), self.mul_poly(b[0], a[1]))
        return self.tidy(top, self.mul_poly(a[1], b[1]))

    def mul(self, a: Value, b: Value) -> Value:
        return self.tidy(self.mul_poly(a[0], b[0]), self.mul_poly(a[1], b[1]))

    def div(self, a: Value, b: Value) -> Value:
        if not b[0]:
            raise TooHard("division by zero")
        return self.tidy(self.mul_poly(a[0], b[1]), self.mul_poly(a[1], b[0]))

    def tidy(self, top: Poly, bottom: Poly) -> Value:
        """Clear a one-term denominator, and square roots of numbers from longer ones."""
        if not top:
            return {}, {ONE: Fraction(1)}
        for _ in range(6):
            if len(bottom) == 1:
                ((mono, c),) = bottom.items()
                if mono == ONE and c == 1:
                    return top, bottom
                if any(atom[0] == "(" for atom, _ in mono):
                    return top, bottom
                inverse = self.reduce({atom: -e for atom, e in mono}, 1 / c)
                return self.mul_poly(top, inverse), {ONE: Fraction(1)}
            if not all(atom == "i" or atom[0] == "#" for m in bottom for atom, _ in m):
                return top, bottom
            atom = next(((a, e) for m in bottom for a, e in m if a == "i" or e == HALF), None)
            if atom is None:
                return top, bottom
            conjugate = {m: -c if any(a == atom[0] for a, _ in m) else c for m, c in bottom.items()}
            top, bottom = self.mul_poly(top, conjugate), self.mul_poly(bottom, conjugate)
            if not bottom:
                raise TooHard("division by zero")
        return top, bottom

    def neg(self, a: Value) -> Value:
        return {m: -c for m, c in a[0].items()}, a[1]


def split_content(poly: Poly) -> tuple[Fraction, Poly]:
    """The positive rational content of a sum, and the sum divided by it."""
    top = gcd(*(c.numerator for c in poly.values()))
    bottom = lcm(*(c.denominator for c in poly.values()))
    content = Fraction(abs(top), bottom)
    return content, {m: c / content for m, c in poly.items()}


def factor(value: Fraction) -> list[tuple[int, int]]:
    """Prime factors with exponents of a positive rational. Raises TooHard for cofactors that trial division leaves."""
    out: dict[int, int] = {}
    for number, sign in ((value.numerator, 1), (value.denominator, -1)):
        p = 2
        while p * p <= number and p < 2000:
            while number % p == 0:
                out[p] = out.get(p, 0) + sign
                number //= p
            p += 1 if p == 2 else 2
        if number > 1:
            if number >= 4_000_000:
                root = isqrt(number)
                if root * root == number and root < 4_000_000:
                    out[root] = out.get(root, 0) + 2 * sign
                    continue
                raise TooHard("large factor")
            out[number] = out.get(number, 0) + sign
    return sorted(out.items())


def square_root(value: Fraction) -> Fraction | None:
    if value < 0:
        return None
    a, b = isqrt(value.numerator), isqrt(value.denominator)
    return Fraction(a, b) if a * a == value.numerator and b * b == value.denominator else None


def bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length() - 1
