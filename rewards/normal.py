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

from plumbline.rewards.parser import Node

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


class Normaliser:
    """Normal forms of trees; one a comparison, since it remembers what stands under roots and counts its work."""

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
        for mono, c in b.items():
            total = out.get(mono, 0) + c
            if total:
                out[mono] = total
            else:
                out.pop(mono, None)
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
                bits = _bits(coefficient)
                if bits > MAX_BITS:
                    raise TooHard("large number")
                self.spend(bits >> 8)
                if not m1 or not m2:
                    pieces: Poly = {m1 or m2: coefficient}
                else:
                    exponents = dict(m1)
                    for atom, e in m2:
                        exponents[atom] = exponents.get(atom, Fraction(0)) + e
                    pieces = self.reduce(exponents, coefficient)
                for mono, c in pieces.items():
                    total = out.get(mono, 0) + c
                    if total:
                        out[mono] = total
                    else:
                        out.pop(mono, None)
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

    # -- powers -------------------------------------------------------------------------------------------------

    def whole_power(self, value: Value, n: int) -> Value:
        if n == 0:
            if not value[0]:
                raise TooHard("zero to the zero")
            return constant(1)
        if n < 0:
            return self.whole_power(self.div(constant(1), value), -n)
        top, bottom = value
        if not top:
            return value
        if len(top) == 1 and len(bottom) == 1 and bottom.get(ONE) == 1:
            ((mono, c),) = top.items()
            if _bits(c) * n > MAX_BITS:
                return self.huge_power(mono, c, Fraction(n))
            if any(atom[0] == "(" for atom, _ in mono) and n > MAX_POWER:
                raise TooHard("large power")
            return self.reduce({atom: e * n for atom, e in mono}, c**n), bottom
        if n > MAX_POWER:
            raise TooHard("large power")
        out = constant(1)
        for bit in bin(n)[2:]:
            out = self.mul(out, out)
            if bit == "1":
                out = self.mul(out, value)
        return out

    def huge_power(self, mono: Mono, c: Fraction, n: Fraction) -> Value:
        """A number too long to write out stays a product of prime powers."""
        exponents: dict[str, Fraction] = {atom: e * n for atom, e in mono}
        if c < 0:
            if n.denominator != 1:
                raise TooHard("root of a negative number")
            sign = -1 if n.numerator % 2 else 1
        else:
            sign = 1
        for prime, k in factor(abs(c)):
            atom = f"#{prime}"
            exponents[atom] = exponents.get(atom, Fraction(0)) + k * n
        return self.reduce(exponents, Fraction(sign)), {ONE: Fraction(1)}

    def power(self, base: Value, exponent: Value) -> Value:
        number = rational(exponent)
        if number is None:
            return self.general_power(base, exponent)
        if number.denominator == 1:
            return self.whole_power(base, number.numerator)
        return self.root_power(base, number)

    def root_power(self, base: Value, number: Fraction) -> Value:
        top, bottom = base
        if not top:
            if number > 0:
                return base
            raise TooHard("division by zero")
        if bottom != {ONE: 1}:
            return self.div(
                self.root_power((top, {ONE: Fraction(1)}), number),
                self.root_power((bottom, {ONE: Fraction(1)}), number),
            )
        even = number.denominator % 2 == 0
        if len(top) == 1:
            ((mono, c),) = top.items()
            unit: Value = constant(1)
            if c < 0:
                if even:
                    if number.denominator != 2:
                        raise TooHard("root of a negative number")
                    unit = self.whole_power(
                        ({(("i", Fraction(1)),): Fraction(1)}, {ONE: Fraction(1)}), number.numerator
                    )
                elif number.numerator % 2:
                    unit = constant(-1)
                c = -c
            for atom, e in mono:
                if atom == "i" or (atom[0] in "sfg(" and even and e.numerator % 2 == 0):
                    # sqrt(x^2) is |x|, no power of x
                    raise TooHard("branch of a root")
            return self.mul(unit, self.huge_power(mono, c, number))
        content, primitive = split_content(top)
        if number.denominator == 2:
            inner = self.denest(primitive)
            if inner is not None:
                return self.mul(self.root_power(constant(content), number), self.whole_power(inner, number.numerator))
        if not even:
            raise TooHard("odd root of a sum")
        atom = f"({key(primitive)})"
        self.bases[atom] = primitive
        whole = number.numerator // number.denominator
        rest: Value = ({((atom, number - whole),): Fraction(1)}, {ONE: Fraction(1)})
        value = self.mul(self.root_power(constant(content), number), rest)
        return self.mul(value, self.whole_power((primitive, {ONE: Fraction(1)}), whole)) if whole else value

    def denest(self, poly: Poly) -> Value | None:
        """sqrt(a + b sqrt r) as sqrt x + sqrt y with rational x and y, where it is one."""
        if len(poly) != 2 or ONE not in poly:
            return None
        ((mono, b),) = ((m, c) for m, c in poly.items() if m != ONE)
        if not all(atom[0] == "#" and e == HALF for atom, e in mono):
            return None
        a, r = poly[ONE], Fraction(1)
        for atom, _ in mono:
            r *= int(atom[1:])
        s = _root(a * a - b * b * r)
        if a <= 0 or s is None:
            return None
        x, y = (a + s) / 2, (a - s) / 2
        first, second = self.root_power(constant(x), HALF), self.root_power(constant(y), HALF)
        return self.add(first, second if b > 0 else self.neg(second))

    def general_power(self, base: Value, exponent: Value) -> Value:
        if exponent[1] != {ONE: 1} or base[1] != {ONE: 1} or len(base[0]) != 1:
            raise TooHard("general power")
        ((mono, c),) = base[0].items()
        if c < 0 and (mono or c != -1):
            raise TooHard("negative base")
        out: Value = constant(1)
        for m, k in exponent[0].items():
            if m == ONE:
                out = self.mul(out, self.power(base, constant(k)))
                continue
            name = key({m: Fraction(1)})
            exponents: dict[str, Fraction] = {}
            if mono == (("@e", Fraction(1)),) and c == 1 and m == (("@pi", Fraction(1)), ("i", Fraction(1))):
                out = self.mul(out, self.add(self.cosine(k), self.mul(self.imaginary(), self.cosine(HALF - k))))
                continue
            for atom, e in mono:
                if e.denominator != 1 or atom in ("i",) or atom[0] == "(":
                    raise TooHard("general power")
                exponents[f"g:{atom}^{name}"] = e * k
            if c == -1:
                exponents[f"g:-1^{name}"] = k
            elif c != 1:
                for prime, times in factor(c):
                    exponents[f"g:{prime}^{name}"] = times * k
            out = self.mul(out, ({tuple(sorted(exponents.items())): Fraction(1)}, {ONE: Fraction(1)}))
        return out

    def imaginary(self) -> Value:
        return {(("i", Fraction(1)),): Fraction(1)}, {ONE: Fraction(1)}

    # -- functions ----------------------------------------------------------------------------------------------

    def cosine(self, turns: Fraction) -> Value:
        """cos(turns * pi), exactly for multiples of 15 and 36 degrees."""
        turns = abs(turns) % 2
        if turns > 1:
            turns = 2 - turns
        sign = 1
        if turns > HALF:
            turns, sign = 1 - turns, -1
        table = _COSINES.get(turns)
        if table is None:
            return {((f"f:cos({turns})", Fraction(1)),): Fraction(sign)}, {ONE: Fraction(1)}
        return {tuple((f"#{p}", HALF) for p in primes): c * sign for primes, c in table}, {ONE: Fraction(1)}

    def turns(self, value: Value) -> Fraction | None:
        """The rational r with value = r pi."""
        top, bottom = value
        if not top:
            return Fraction(0)
        if bottom == {ONE: 1} and len(top) == 1:
            ((mono, c),) = top.items()
            if mono == (("@pi", Fraction(1)),):
                return c
        return None

    def opaque(self, name: str, *arguments: Value) -> Value:
        parts = [key(a[0]) + ("" if a[1] == {ONE: 1} else "|" + key(a[1])) for a in arguments]
        return {((f"f:{name}({','.join(parts)})", Fraction(1)),): Fraction(1)}, {ONE: Fraction(1)}

    def function(self, name: str, arguments: list[Value]) -> Value:
        x = arguments[0]
        number = rational(x)
        if name == "root":
            index = rational(arguments[1])
            if index is None or index.denominator != 1 or index < 2:
                raise TooHard("root index")
            return self.power(x, constant(1 / index))
        if name in ("sin", "cos", "tan", "sec", "csc", "cot", "cis"):
            r = self.turns(x)
            if r is None:
                if name in ("sin", "cos"):
                    return self.opaque(name, x)
                raise TooHard("function")
            cos, sin = self.cosine(r), self.cosine(HALF - r)
            if name == "cis":
                return self.add(cos, self.mul(self.imaginary(), sin))
            one = constant(1)
            pair = {
                "sin": (sin, one),
                "cos": (cos, one),
                "tan": (sin, cos),
                "cot": (cos, sin),
                "sec": (one, cos),
                "csc": (one, sin),
            }[name]
            return self.div(*pair)
        if name in ("ln", "log"):
            if len(arguments) == 2:
                return self.div(self.logarithm(x), self.logarithm(arguments[1]))
            return self.logarithm(x) if name == "ln" else self.div(self.logarithm(x), self.logarithm(constant(10)))
        if name == "exp":
            return self.power(({(("@e", Fraction(1)),): Fraction(1)}, {ONE: Fraction(1)}), x)
        if name == "abs" and number is not None:
            return constant(abs(number))
        if name in ("floor", "ceil") and number is not None:
            return constant(number.__floor__() if name == "floor" else number.__ceil__())
        if name == "factorial":
            if number is not None and number.denominator == 1 and 0 <= number <= MAX_FACTORIAL:
                return constant(_factorial(number.numerator))
            return self.opaque("factorial", x)
        if name == "binomial":
            k = rational(arguments[1])
            if (
                number is not None
                and k is not None
                and number.denominator == k.denominator == 1
                and 0 <= k <= number <= MAX_FACTORIAL
            ):
                top = number.numerator
                return constant(_factorial(top) // (_factorial(k.numerator) * _factorial(top - k.numerator)))
            return self.opaque("binomial", *arguments)
        if name in ("max", "min", "gcd", "lcm"):
            numbers = [rational(a) for a in arguments]
            known = [n for n in numbers if n is not None]
            if len(known) < len(numbers):
                raise TooHard("function")
            if name in ("max", "min"):
                return constant(max(known) if name == "max" else min(known))
            whole = [n.numerator for n in known if n.denominator == 1]
            if len(whole) < len(known):
                raise TooHard("function")
            return constant(gcd(*whole) if name == "gcd" else lcm(*whole))
        if name.startswith("call:"):
            return self.opaque(name, *arguments)
        raise TooHard("function")

    def logarithm(self, x: Value) -> Value:
        if x[1] != {ONE: 1} or len(x[0]) != 1:
            return self.opaque("ln", x)
        ((mono, c),) = x[0].items()
        if c <= 0 or any(atom[0] != "#" and atom != "@e" for atom, _ in mono):
            return self.opaque("ln", x)
        out: Poly = {}
        for prime, k in factor(c):
            out = self.add_poly(out, {((f"f:ln({prime})", Fraction(1)),): Fraction(k)})
        for atom, e in mono:
            piece: Mono = ONE if atom == "@e" else ((f"f:ln({atom[1:]})", Fraction(1)),)
            out = self.add_poly(out, {piece: e})
        return out, {ONE: Fraction(1)}

    # -- trees --------------------------------------------------------------------------------------------------

    def normal(self, node: Node) -> Value:
        """The normal form of a tree. Raises TooHard."""
        self.spend(1)
        kind = node[0]
        if kind == "num":
            if _bits(node[1]) > MAX_BITS:
                raise TooHard("large number")
            return constant(node[1])
        if kind == "sym":
            return {(("s:" + node[1], Fraction(1)),): Fraction(1)}, {ONE: Fraction(1)}
        if kind == "const":
            if node[1] == "inf":
                raise TooHard("infinity")
            atom = "i" if node[1] == "i" else "@" + node[1]
            return {((atom, Fraction(1)),): Fraction(1)}, {ONE: Fraction(1)}
        if kind == "neg":
            return self.neg(self.normal(node[1]))
        if kind == "add":
            total = self.normal(node[1])
            for term in node[2:]:
                total = self.add(total, self.normal(term))
            return total
        if kind == "mul":
            return self.mul(self.normal(node[1]), self.normal(node[2]))
        if kind == "div":
            return self.div(self.normal(node[1]), self.normal(node[2]))
        if kind == "pow":
            return self.power(self.normal(node[1]), self.normal(node[2]))
        if kind == "deg":
            return self.mul(self.normal(node[1]), ({(("@pi", Fraction(1)),): Fraction(1, 180)}, {ONE: Fraction(1)}))
        assert kind == "fn", kind
        return self.function(node[1], [self.normal(argument) for argument in node[2:]])

    def same(self, a: Value, b: Value) -> bool:
        if a[1] == b[1]:
            return a[0] == b[0]
        return self.mul_poly(a[0], b[1]) == self.mul_poly(b[0], a[1])


_COSINES: dict[Fraction, list[tuple[tuple[int, ...], Fraction]]] = {
    Fraction(0): [((), Fraction(1))],
    Fraction(1, 12): [((2, 3), Fraction(1, 4)), ((2,), Fraction(1, 4))],
    Fraction(1, 6): [((3,), HALF)],
    Fraction(1, 5): [((), Fraction(1, 4)), ((5,), Fraction(1, 4))],
    Fraction(1, 4): [((2,), HALF)],
    Fraction(1, 3): [((), HALF)],
    Fraction(2, 5): [((), Fraction(-1, 4)), ((5,), Fraction(1, 4))],
    Fraction(5, 12): [((2, 3), Fraction(1, 4)), ((2,), Fraction(-1, 4))],
    HALF: [],
}


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


def _root(value: Fraction) -> Fraction | None:
    if value < 0:
        return None
    a, b = isqrt(value.numerator), isqrt(value.denominator)
    return Fraction(a, b) if a * a == value.numerator and b * b == value.denominator else None


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length() - 1


def _factorial(n: int) -> int:
    from math import factorial

    return factorial(n)
