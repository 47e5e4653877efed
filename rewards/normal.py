"""Normal forms of trees: powers, roots, trigonometric values, logarithms and what else has an exact form."""

from __future__ import annotations

from fractions import Fraction
from math import factorial, gcd, lcm, prod

from plumbline.rewards.parser import Node
from plumbline.rewards.polynomials import (
    HALF,
    MAX_BITS,
    MAX_FACTORIAL,
    MAX_POWER,
    ONE,
    Arithmetic,
    Mono,
    Poly,
    TooHard,
    Value,
    bits,
    constant,
    factor,
    key,
    rational,
    split_content,
    square_root,
)

# n choose k is written out as a polynomial in n up to this k.
MAX_CHOSEN = 6


class Normaliser(Arithmetic):
    """Normal forms of trees; one a comparison."""

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
            if bits(c) * n > MAX_BITS:
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
        s = square_root(a * a - b * b * r)
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
                return constant(factorial(number.numerator))
            return self.opaque("factorial", x)
        if name == "double_factorial":
            if number is not None and number.denominator == 1 and 0 <= number <= MAX_FACTORIAL:
                return constant(prod(range(number.numerator, 0, -2)))
            return self.opaque("double_factorial", x)
        if name == "binomial":
            k = rational(arguments[1])
            if (
                number is not None
                and k is not None
                and number.denominator == k.denominator == 1
                and 0 <= k <= number <= MAX_FACTORIAL
            ):
                top = number.numerator
                return constant(factorial(top) // (factorial(k.numerator) * factorial(top - k.numerator)))
            small = x[1] == {ONE: 1} and len(x[0]) <= 2 and all(e <= 2 for mono in x[0] for _, e in mono)
            if number is None and small and k is not None and k.denominator == 1 and 0 <= k <= MAX_CHOSEN:
                out = constant(Fraction(1, factorial(k.numerator)))
                for taken in range(k.numerator):
                    out = self.mul(out, self.add(x, constant(-taken)))
                return out
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
            if bits(node[1]) > MAX_BITS:
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
