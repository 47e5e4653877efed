"""A recursive-descent parser from tokens to a small tree. The tree is plain tuples; nothing in it can be run.

Nodes: ("num", Fraction), ("sym", name), ("const", "pi" | "e" | "i" | "inf"), ("add", a, b, ...), ("mul", a, b, ...), ("neg", a),
("div", a, b), ("pow", a, b), ("fn", name, a, ...), ("deg", a) for an angle in degrees.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial

from plumbline.rewards.cursor import MAX_DEPTH, Cursor, Node
from plumbline.rewards.latex import FUNCTIONS, Token, Unreadable

MAX_FACTORS = 100
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau",
    "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega", "ell", "vartheta",
    "triangle", "hbar",
}  # fmt: skip
_ALIAS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc"}
_PAIRS = {
    "(": ")",
    "[": "]",
    "{": "}",
    "\\{": "\\}",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
    "\\lvert": "\\rvert",
    "\\langle": "\\rangle",
}
# Bare words that are not products of letters.
_WORDS = {"pi": ("const", "pi"), "infinity": ("const", "inf"), "inf": ("const", "inf"), "oo": ("const", "inf")}
_BARE_FUNCTIONS = {*FUNCTIONS, "binom", "floor", "ceil", "asin", "acos", "atan", "cbrt"} - {
    "Re",
    "Im",
    "mod",
    "det",
    "cis",
}


def parse(tokens: list[Token]) -> Node:
    """The tree of one expression.

    Raises:
        Unreadable: the tokens are not one complete expression.
    """
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.at < len(tokens):
        raise Unreadable(f"unexpected {tokens[parser.at].value!r}")
    return node


class _Parser(Cursor):
    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        terms = [self.signed()]
        while self.see("+", "-"):
            terms.append(self.signed())
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def signed(self) -> Node:
        negative = False
        while self.see("+", "-"):
            negative ^= self.see("-")
            self.at += 1
        term = self.product()
        return ("neg", term) if negative else term

    def product(self) -> Node:
        value = self.factor()
        for _ in range(MAX_FACTORS):
            if self.see("*"):
                self.at += 1
                value = ("mul", value, self.signed_factor())
            elif self.see("/"):
                self.at += 1
                value = ("div", value, self.signed_factor())
            elif self.starts_factor():
                last, following = self.tokens[self.at - 1], self.tokens[self.at]
                if following.kind == "n" and (
                    last.kind == "n" or (last.value.isalpha() and last.value != "i" and not following.spaced)
                ):
                    # "2 3" is no product, and neither is "x2".
                    raise Unreadable("a number where none can stand")
                value = ("mul", value, self.factor())
            else:
                return value
        raise Unreadable("too many factors")

    def signed_factor(self) -> Node:
        negative = False
        while self.see("+", "-"):
            negative ^= self.see("-")
            self.at += 1
        value = self.factor()
        return ("neg", value) if negative else value

    def starts_factor(self) -> bool:
        token = self.peek()
        if token is None or token.kind == "t":
            return False
        if token.kind == "n":
            return True
        value = token.value
        if token.kind == "x":
            return value.isalpha() or value in "([{" or (value == "|" and self.bars == 0)
        name = value[1:]
        return (
            name in _GREEK or name in FUNCTIONS or name in ("frac", "sqrt", "binom", "pi", "infty")
            or value in ("\\{", "\\lfloor", "\\lceil", "\\lvert")
        )  # fmt: skip

    def factor(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        value = self.postfix(self.base())
        self.depth -= 1
        return value

    def postfix(self, value: Node) -> Node:
        while True:
            if self.see("^"):
                self.at += 1
                if self.degree():
                    value = ("deg", value)
                    continue
                exponent = self.argument()
                if self.see("^"):  # 2^3^2 is 2^(3^2)
                    exponent = self.nested(partial(self.postfix, exponent))
                value = ("pow", value, exponent)
            elif self.see("\\degree"):
                self.at += 1
                value = ("deg", value)
            elif self.see("!"):
                self.at += 1
                double = self.see("!")
                self.at += double
                if self.see("!"):
                    raise Unreadable("more than two factorial signs")
                value = ("fn", "double_factorial" if double else "factorial", value)
            else:
                return value

    def argument(self) -> Node:
        """What a LaTeX command takes: a braced group or one token; a whole number counts as one token."""
        token = self.peek()
        if token is None:
            raise Unreadable("an argument is missing")
        if token.value == "{" and token.kind == "x":
            return self.group("{")
        if self.see("-", "+"):
            return self.signed_factor()
        if token.value == "(" and token.kind == "x":
            return self.group("(")
        if token.kind == "c" and token.value in ("\\sqrt", "\\frac", "\\binom"):
            return self.base()
        return self.atom()

    def digit_argument(self) -> Node:
        """As `argument`, but \\frac12 takes one digit."""
        token = self.peek()
        if token is not None and token.kind == "n" and token.value.isdigit() and len(token.value) > 1:
            rest = token.value[1:]
            self.tokens = [*self.tokens]
            self.tokens[self.at] = Token("n", rest, False, Fraction(rest))
            return ("num", Fraction(token.value[0]))
        if self.see("("):
            return self.atom()
        return self.argument()

    def group(self, opening: str) -> Node:
        self.take(opening)
        bars, self.bars = self.bars, 0
        value = self.sum()
        if opening == "{" and self.see("\\over", "\\choose"):
            over = self.see("\\over")
            self.at += 1
            bottom = self.sum()
            value = ("div", value, bottom) if over else ("fn", "binomial", value, bottom)
        self.bars = bars
        self.take(_PAIRS[opening])
        return value

    def base(self) -> Node:
        token = self.peek()
        if token is None or token.kind == "t":
            raise Unreadable("an operand is missing")
        if token.kind == "n":
            return self.number()
        return self.atom()

    def number(self) -> Node:
        token = self.tokens[self.at]
        self.at += 1
        assert token.number is not None
        value = token.number
        if not token.value.isdigit():
            return ("num", value)
        following = self.peek()
        if following is None:
            return ("num", value)
        # 1 234 567: groups of three digits set apart by spaces
        if len(token.value) <= 3 and token.value != "0" and following.kind == "n" and following.spaced:
            at, digits = self.at, token.value
            while (
                (t := self.peek()) is not None
                and t.kind == "n"
                and t.spaced
                and len(t.value) == 3
                and t.value.isdigit()
            ):
                digits += t.value
                self.at += 1
            if self.at > at and not self.see("/"):
                return ("num", Fraction(digits))
            self.at = at
        if following.kind == "c" and following.value == "\\frac":
            start = self.at
            tokens = self.tokens
            fraction = self.atom()
            part = _proper(fraction)
            if part is not None and not self.see("^"):
                return ("num", value + part)
            self.at, self.tokens = start, tokens
        elif following.kind == "n" and following.spaced and following.value.isdigit():
            slash, bottom = self.peek(1), self.peek(2)
            if (
                slash is not None
                and slash.value == "/"
                and bottom is not None
                and bottom.kind == "n"
                and bottom.value.isdigit()
            ):
                top, low = int(following.value), int(bottom.value)
                if top < low:
                    self.at += 3
                    return ("num", value + Fraction(top, low))
        return ("num", value)

    def atom(self) -> Node:
        return self.nested(self.plain_atom)

    def plain_atom(self) -> Node:
        token = self.peek()
        if token is None or token.kind == "t":
            raise Unreadable("an operand is missing")
        if token.kind == "n":
            self.at += 1
            return ("num", token.number)
        value = token.value
        if token.kind == "x":
            if value.isalpha() and value.isascii():
                return self.word()
            if value in ("(", "[", "{"):
                return self.group(value)
            if value == "|":
                return self.absolute()
            raise Unreadable(f"unexpected {value!r}")
        self.at += 1
        name = value[1:]
        if value == "\\frac":
            top = self.digit_argument()
            return ("div", top, self.digit_argument())
        if value == "\\sqrt":
            return self.root()
        if value == "\\binom":
            top = self.digit_argument()
            return ("fn", "binomial", top, self.digit_argument())
        if value == "\\pi":
            return ("const", "pi")
        if value == "\\infty":
            return ("const", "inf")
        if name in _GREEK:
            return self.symbol(name)
        if name in FUNCTIONS:
            return self.function(name)
        if value in ("\\lfloor", "\\lceil", "\\lvert", "\\{"):
            self.at -= 1
            inner = self.group(value)
            names = {"\\lfloor": "floor", "\\lceil": "ceil", "\\lvert": "abs"}
            return ("fn", names[value], inner) if value in names else inner
        raise Unreadable(f"unknown command {value}")

    def absolute(self) -> Node:
        self.take("|")
        self.bars += 1
        value = self.sum()
        self.bars -= 1
        self.take("|")
        return ("fn", "abs", value)

    def word(self) -> Node:
        """A letter; or a bare function or constant name such as sqrt or pi."""
        end = self.at
        while end < len(self.tokens) and self.tokens[end].kind == "x" and self.tokens[end].value.isalpha():
            if end > self.at and self.tokens[end].spaced:
                break
            end += 1
        run = "".join(t.value for t in self.tokens[self.at : end])
        if len(run) > 1:
            for length in range(min(len(run), 8), 1, -1):
                head = run[:length]
                if head in _WORDS and length == len(run):
                    self.at += length
                    return _WORDS[head]
                if head in _BARE_FUNCTIONS and length == len(run):
                    self.at += length
                    if head == "sqrt":
                        return self.root()
                    if head == "cbrt":
                        return ("pow", self.group("("), ("num", Fraction(1, 3)))
                    if head in ("floor", "ceil", "abs"):
                        return ("fn", head, self.group("("))
                    return self.function(head)
        letter = self.tokens[self.at].value
        self.at += 1
        if letter == "e" and not self.see("_"):
            return ("const", "e")
        if letter == "i" and not self.see("_"):
            return ("const", "i")
        if letter in "fghFG" and self.see("("):
            return ("fn", "call:" + letter, *self.arguments())
        return self.symbol(letter)

    def root(self) -> Node:
        index: Node = ("num", Fraction(2))
        if self.see("["):
            self.at += 1
            index = self.sum()
            self.take("]")
        inner = self.group("(") if self.see("(") else self.argument()
        return ("fn", "root", inner, index)

    def arguments(self) -> list[Node]:
        self.take("(")
        values = [self.sum()]
        while self.see(",", ";"):
            self.at += 1
            values.append(self.sum())
        self.take(")")
        return values

    def function(self, name: str) -> Node:
        name = _ALIAS.get(name, name)
        if name in ("max", "min", "gcd", "lcm"):
            if self.see("\\{"):
                raise Unreadable("a set where arguments should stand")
            return ("fn", name, *self.arguments())
        if name in ("det", "mod", "Re", "Im"):
            raise Unreadable(f"\\{name} is not read")
        power: Node | None = None
        base: Node | None = None
        while self.see("^", "_"):
            up = self.see("^")
            self.at += 1
            if up:
                power = self.argument()
            else:
                base = self.log_base()
        if power == ("neg", ("num", Fraction(1))) and name in _INVERSE:
            name, power = _INVERSE[name], None
        value: Node = ("fn", name, self.applied()) if base is None else ("fn", name, self.applied(), base)
        return value if power is None else ("pow", value, power)

    def log_base(self) -> Node:
        """A subscript. \\log_28 is log_2 8, as LaTeX sets it; \\log_10 100 is to base 10, as people mean it."""
        token, following = self.peek(), self.peek(1)
        if token is not None and token.kind == "n" and following is None:
            return self.digit_argument()
        return self.argument()

    def applied(self) -> Node:
        """A function's argument: a bracketed group, else a product up to the next sum or function."""
        if self.see("("):
            return self.group("(")
        if self.see("{"):
            return self.group("{")
        if self.see("["):
            return self.group("[")
        if self.see("-"):
            self.at += 1
            return ("neg", self.nested(self.applied))
        value = self.factor()
        while self.starts_factor():
            token = self.tokens[self.at]
            if (
                (token.kind == "c" and token.value[1:] in FUNCTIONS and token.value != "\\sqrt")
                or token.value == "|"
                or token.value == "("
            ):
                break
            value = ("mul", value, self.factor())
        return value


def _proper(node: Node) -> Fraction | None:
    if node[0] == "div" and node[1][0] == "num" and node[2][0] == "num":
        top, low = node[1][1], node[2][1]
        if top.denominator == low.denominator == 1 and 0 <= top < low:
            return top / low
    return None
