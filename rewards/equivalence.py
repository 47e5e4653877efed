"""Whether two answers agree: the conventions of docs/rewards.md over the structures of structure.py.

Comparisons answer True, False or None: None means that exact forms and double precision cannot tell, and that the grading
child must compare at high precision (`deep`).
"""

from __future__ import annotations

import re
from fractions import Fraction

from plumbline.rewards import units
from plumbline.rewards.answers import (
    Answer,
    Base,
    Choice,
    Expr,
    Infinite,
    Many,
    Matrix,
    Meet,
    Ordered,
    Ratio,
    Relation,
    Residue,
    Words,
)
from plumbline.rewards.parser import Node
from plumbline.rewards.polynomials import TooHard
from plumbline.rewards.relations import (
    assigned_name,
    assigned_value,
    flipped,
    is_wordy_name,
    plain_name,
    without_rounding,
)
from plumbline.rewards.sets import pieces, set_like, set_name
from plumbline.rewards.structure import read
from plumbline.rewards.values import Truth, Values, all_of
from plumbline.rewards.wording import is_wordy, spelling_of, without_article

MAX_ITEMS = 200
_SAME_NAMES = ({"y", "f(x)"}, {"y"}, {"f(x)"}, {"y'", "frac{dy}{dx}"})
_PLAIN_SPACE = re.compile(r"(?:\s|~|\\[,;:! ]|\\left(?![a-z])|\\right(?![a-z]))+")


def compare(answer: str, gold: str, *, deep: bool = False) -> Truth:
    """Whether an answer agrees with a gold; None if that takes high precision and `deep` is False."""
    if answer.strip() == gold.strip():
        return True
    if gold.lstrip().startswith("\\approx"):
        gold = gold.replace("\\approx", "", 1)
        answer = answer.replace("\\approx", "=", 1)
    if answer.isascii() and gold.isascii() and answer.isdigit() and gold.isdigit():
        return answer.lstrip("0") == gold.lstrip("0")
    tight_a, tight_g = _PLAIN_SPACE.sub("", answer), _PLAIN_SPACE.sub("", gold)
    if tight_a == tight_g and not _spaced_digits(answer, gold):
        return True
    if (is_wordy(answer) or is_wordy(gold)) and _plain_text(answer) == _plain_text(gold) != "":
        return True
    comparison = Comparison(deep)
    try:
        verdict = comparison.answers(read(answer), read(gold))
    except TooHard:
        # More parts or symbols than any answer has: not the same unless spelled the same
        return False
    if verdict is False and "," in gold and _other_commas(gold) != gold:
        # "70,110" can be a list of two numbers
        return comparison.answers(read(answer), read(_other_commas(gold))) if ", " in answer or "{" in answer else False
    return verdict


def _spaced_digits(answer: str, gold: str) -> bool:
    return bool(re.search(r"[0-9](?:\s|\\[,;: ])+[0-9]", answer) or re.search(r"[0-9](?:\s|\\[,;: ])+[0-9]", gold))


def _plain_text(text: str) -> str:
    return without_article(re.sub(r"[\s$]+", " ", spelling_of(text)).strip(" ."))


def _other_commas(text: str) -> str:
    if re.search(r"[0-9],0[0-9]", text):
        return text  # no number of a list begins with 0
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", ", ", text)


class Comparison(Values):
    """One comparison of two answers."""

    def __init__(self, deep: bool) -> None:
        super().__init__(deep)
        self.pairs = 0

    # -- structures ---------------------------------------------------------------------------------------------

    def answers(self, a: Answer, g: Answer) -> Truth:
        self.pairs += 1
        if self.pairs > 3000:
            raise TooHard("too many parts")
        if isinstance(a, Choice) or isinstance(g, Choice):
            return self.choices(a, g)
        if isinstance(a, Many) and len(a.items) == 1 and not isinstance(g, Many):
            return self.answers(a.items[0], g) if not (a.braced and isinstance(a.items[0], Words)) else False
        if isinstance(g, Many) and len(g.items) == 1 and not isinstance(a, Many):
            return self.answers(a, g.items[0])
        if isinstance(a, Residue) or isinstance(g, Residue):
            return self.residues(a, g)
        if isinstance(a, Relation) or isinstance(g, Relation):
            return self.relations(a, g)
        if isinstance(a, Many) and isinstance(g, Many):
            as_sets = self.sets(a, g)
            if {a.joined, g.joined} == {"and", "or"}:
                if set_like(a) and set_like(g):
                    return as_sets
                if all(isinstance(item, Expr) and item.node[0] == "sym" for item in (*a.items, *g.items)):
                    return False  # p and q is not p or q
            return self.unordered(a.items, g.items) if as_sets is not True else True
        if isinstance(a, Many) and a.joined == "or" and isinstance(g, Expr):
            return all_of(self.answers(item, g) for item in a.items)  # 3/2 or 1.5
        if isinstance(a, Many) or isinstance(g, Many):
            return self.assigned(a, g)
        if isinstance(a, Expr) and isinstance(g, Expr):
            return self.quantities(a, g)
        if isinstance(a, Ordered) and isinstance(g, Ordered):
            return self.ordered(a, g)
        if isinstance(a, Matrix) and isinstance(g, Matrix):
            return self.matrices(a, g)
        if isinstance(a, Base) or isinstance(g, Base):
            return self.bases(a, g)
        if isinstance(a, Ratio) or isinstance(g, Ratio):
            return self.ratios(a, g)
        if isinstance(a, Words) and isinstance(g, Words):
            return bool(a.text) and without_article(a.text) == without_article(g.text)
        if isinstance(a, Infinite) and isinstance(g, Infinite):
            return a.sign == g.sign
        if isinstance(a, (Matrix, Ordered)) and isinstance(g, (Matrix, Ordered)):
            return self.vectors(a, g)
        if isinstance(a, Meet) and isinstance(g, Meet) and self.unordered(a.parts, g.parts):
            return True
        return self.sets(a, g) is True

    def residues(self, a: Answer, g: Answer) -> Truth:
        """Values modulo one number; whole numbers agree when they differ by a multiple of it."""
        if not isinstance(a, Residue) or not isinstance(g, Residue) or a.modulus != g.modulus or not a.modulus:
            return False
        values: list[Fraction | None] = []
        for side in (a.value, g.value):
            value = assigned_value(side) if isinstance(side, Relation) else side
            node = value.node if isinstance(value, Expr) else None
            sign = -1 if node is not None and node[0] == "neg" else 1
            number = node[1] if node is not None and node[0] == "neg" else node
            values.append(sign * number[1] if number is not None and number[0] == "num" else None)
        if (
            isinstance(a.value, Relation)
            and isinstance(g.value, Relation)
            and assigned_name(a.value) != assigned_name(g.value)
        ):
            return False
        first, second = values
        if first is not None and second is not None:
            return (first - second) % a.modulus == 0
        return self.answers(a.value, g.value)

    def choices(self, a: Answer, g: Answer) -> Truth:
        letter_a, letter_g = _letter(a), _letter(g)
        if isinstance(g, Choice):
            if letter_a is not None:
                if letter_a != g.letter:
                    return False
                rest = a.rest if isinstance(a, Choice) else None
                return True if rest is None or g.rest is None else self.answers(rest, g.rest)
            return self.answers(a, g.rest) if g.rest is not None else False
        assert isinstance(a, Choice)
        if letter_g is not None:
            return a.letter == letter_g
        return self.answers(a.rest, g) if a.rest is not None else False

    def unordered(self, a: tuple[Answer, ...], g: tuple[Answer, ...]) -> Truth:
        if max(len(a), len(g)) > MAX_ITEMS:
            raise TooHard("too many parts")
        a, g = self.distinct(a), self.distinct(g)
        if len(a) != len(g):
            return False
        open_items, unsure = list(g), False
        for item in a:
            truths = [self.answers(item, other) if _is_set(item) == _is_set(other) else False for other in open_items]
            if True in truths:
                del open_items[truths.index(True)]
            elif None in truths:
                unsure = True
            else:
                return False
        return None if unsure else True

    def distinct(self, items: tuple[Answer, ...]) -> tuple[Answer, ...]:
        kept: list[Answer] = []
        for item in items:
            if item not in kept:
                kept.append(item)
        return tuple(kept)

    def ordered(self, a: Ordered, g: Ordered) -> Truth:
        if len(a.items) != len(g.items):
            return False
        if (a.opening, a.closing) != (g.opening, g.closing):
            plain = {("(", ")"), ("[", "]")}
            if len(a.items) == 2 or (a.opening, a.closing) not in plain or (g.opening, g.closing) not in plain:
                return False
        return all_of(self.answers(x, y) for x, y in zip(a.items, g.items, strict=True))

    def assigned(self, a: Answer, g: Answer) -> Truth:
        """x = 1, y = 2 against (1, 2): a point given by its coordinates' names."""
        many, other = (a, g) if isinstance(a, Many) else (g, a)
        assert isinstance(many, Many)
        if (
            isinstance(other, Ordered)
            and len(other.items) == len(many.items)
            and (other.opening, other.closing) == ("(", ")")
        ):
            named: dict[str, Answer] = {}
            for item in many.items:
                if isinstance(item, Relation) and item.ops == ("=",) and item.names[0] and len(item.names[0]) == 1:
                    named[item.names[0]] = item.sides[1]
            if len(named) == len(many.items):
                return all_of(self.answers(named[name], y) for name, y in zip(sorted(named), other.items, strict=True))
        return self.sets(a, g) is True

    def matrices(self, a: Matrix, g: Matrix) -> Truth:
        if a.kind != g.kind or len(a.rows) != len(g.rows) or len(a.rows[0]) != len(g.rows[0]):
            return False
        cells = [(x, y) for row, other in zip(a.rows, g.rows, strict=True) for x, y in zip(row, other, strict=True)]
        return all_of(self.answers(_scaled(x, a.factor), _scaled(y, g.factor)) for x, y in cells)

    def vectors(self, a: Matrix | Ordered, g: Matrix | Ordered) -> Truth:
        """A column against a point in round brackets."""
        matrix, point = (a, g) if isinstance(a, Matrix) else (g, a)
        if (
            not isinstance(matrix, Matrix)
            or not isinstance(point, Ordered)
            or (point.opening, point.closing) != ("(", ")")
        ):
            return False
        if matrix.kind != "matrix" or any(len(row) != 1 for row in matrix.rows) or len(matrix.rows) != len(point.items):
            return False
        pairs = [(_scaled(r[0], matrix.factor), item) for r, item in zip(matrix.rows, point.items, strict=True)]
        return all_of(self.answers(x, y) for x, y in pairs)

    def bases(self, a: Answer, g: Answer) -> Truth:
        if isinstance(a, Base) and isinstance(g, Base):
            return a.base == g.base and a.digits == g.digits
        numeral, other = (a, g) if isinstance(a, Base) else (g, a)
        assert isinstance(numeral, Base)
        if numeral.base == 10 and isinstance(other, Expr):
            return self.equal(("num", Fraction(numeral.digits)), other.node) if numeral.digits.isdigit() else False
        return False

    def ratios(self, a: Answer, g: Answer) -> Truth:
        if isinstance(a, Ratio) and isinstance(g, Ratio):
            if a.clock and g.clock:
                if (a.half and g.half) or not (a.half or g.half):
                    return a.clock == g.clock
                # one side says a.m. or p.m., the other a 24-hour or a bare 12-hour time
                bare, marked = (g, a) if a.half else (a, g)
                assert bare.clock and marked.clock  # noqa: PT018
                hour, seconds = marked.clock
                return bare.clock[1] == seconds and bare.clock[0] in (
                    hour,
                    hour - 12 if hour > 12 else 12 if hour == 0 else hour,
                )
            if bool(a.half) or bool(g.half) or len(a.parts) != len(g.parts):
                return False
            if g.clock:
                return all_of(self.equal(x, y) for x, y in zip(a.parts, g.parts, strict=True))
            first = (a.parts[0], g.parts[0])
            return all_of(
                self.equal(("mul", x, first[1]), ("mul", y, first[0]))
                for x, y in zip(a.parts[1:], g.parts[1:], strict=True)
            )
        ratio, other = (a, g) if isinstance(a, Ratio) else (g, a)
        assert isinstance(ratio, Ratio)
        if (
            isinstance(other, Expr)
            and other.unit is None
            and not ratio.half
            and len(ratio.parts) == 2
            and other.node[0] == "div"
        ):
            return self.equal(("div", *ratio.parts), other.node)
        return False

    # -- quantities ---------------------------------------------------------------------------------------------

    def quantities(self, a: Expr, g: Expr) -> Truth:
        x, y = a.node, g.node
        if a.unit and g.unit:
            first, second = units.dimension(a.unit, a.unit_power), units.dimension(g.unit, g.unit_power)
            if first is not None and second is not None:
                if first[0] != second[0]:
                    # a degree sign alone may stand for a temperature
                    temperature = {first[0], second[0]} in ({"angle", "temperature"}, {"angle", "fahrenheit"})
                    return self.equal(x, y) if temperature else False
                if first[1] != second[1]:
                    x, y = ("mul", x, ("num", first[1])), ("mul", y, ("num", second[1]))
        return self.equal(x, y)

    # -- relations ----------------------------------------------------------------------------------------------

    def relations(self, a: Answer, g: Answer) -> Truth:
        if isinstance(g, Relation) and g.ops == ("~",) and g.names[0] is None:
            # a gold that gives its rounding too takes either
            either = [self.answers(a, side) for side in (without_rounding(g), *g.sides) if side is not g]
            return True if True in either else self.two_relations(a, g) if isinstance(a, Relation) else False
        a = without_rounding(a)
        if not isinstance(a, Relation) and not isinstance(g, Relation):
            return self.answers(a, g)
        if isinstance(a, Relation) and isinstance(g, Relation):
            direct = self.two_relations(a, g)
            if direct is not False:
                return direct
            return self.sets(a, g) is True
        relation, other = (a, g) if isinstance(a, Relation) else (g, a)
        assert isinstance(relation, Relation)
        value = assigned_value(relation)
        if value is not None:
            if relation.ops[-1] == "in" or len(relation.ops) == 1:
                return self.answers(value, g) if relation is a else self.answers(a, value)
            rest = [side for side, name in zip(relation.sides, relation.names, strict=True) if name is None]
            truths = [self.answers(side, other) if relation is a else self.answers(other, side) for side in rest]
            return all_of(truths)
        return self.sets(a, g) is True

    def two_relations(self, a: Relation, g: Relation) -> Truth:
        value_a, value_g = assigned_value(a), assigned_value(g)
        if value_a is not None and value_g is not None:
            name_a, name_g = assigned_name(a), assigned_name(g)
            if name_a == name_g or {plain_name(name_a), plain_name(name_g)} in _SAME_NAMES:
                truth = self.answers(value_a, value_g)
                if truth is not False or name_a != name_g:
                    return truth
            if is_wordy_name(name_a) or is_wordy_name(name_g):
                return self.answers(value_a, value_g)
        for candidate in (a, flipped(a)):
            if candidate.ops == g.ops and len(candidate.sides) == len(g.sides):
                truth = all_of(self.answers(x, y) for x, y in zip(candidate.sides, g.sides, strict=True))
                if truth is not False:
                    return truth
        if len(a.ops) != 1 or len(g.ops) != 1 or not all(isinstance(s, Expr) for s in (*a.sides, *g.sides)):
            return False
        nodes = [s.node for s in (*a.sides, *g.sides) if isinstance(s, Expr)]
        op_a, op_g = a.ops[0], g.ops[0]
        if op_a in (">", ">="):
            nodes[0], nodes[1], op_a = nodes[1], nodes[0], op_a.replace(">", "<")
        if op_g in (">", ">="):
            nodes[2], nodes[3], op_g = nodes[3], nodes[2], op_g.replace(">", "<")
        if op_a != op_g or op_a not in ("=", "<", "<=", "!="):
            return False
        return self.proportional(
            ("add", nodes[0], ("neg", nodes[1])), ("add", nodes[2], ("neg", nodes[3])), directed=op_a[0] == "<"
        )

    # -- sets of real numbers -----------------------------------------------------------------------------------

    def sets(self, a: Answer, g: Answer) -> Truth:
        """Whether both are the same set of real numbers: intervals, unions, inequalities in one name, excluded points."""
        if not (set_like(a) and set_like(g)):
            return False
        name_a, name_g = set_name(a), set_name(g)
        if name_a and name_g and name_a != name_g:
            return False
        first, second = pieces(a), pieces(g)
        if first is None or second is None or len(first) != len(second):
            return False
        truths: list[Truth] = []
        for p, q in zip(first, second, strict=True):
            if (p.low_closed, p.high_closed) != (q.low_closed, q.high_closed):
                return False
            for u, v in ((p.low, q.low), (p.high, q.high)):
                if (u is None) != (v is None):
                    return False
                if u is not None and v is not None:
                    truths.append(self.equal(u, v))
        return all_of(truths)


def _is_set(answer: Answer) -> bool:
    return isinstance(answer, Many) and answer.braced


def _letter(answer: Answer) -> str | None:
    if isinstance(answer, Choice):
        return answer.letter
    if isinstance(answer, Expr) and answer.node[0] == "sym" and len(answer.node[1]) == 1 and answer.unit is None:
        return answer.node[1].upper()
    if isinstance(answer, Words) and len(answer.text) == 1:
        return answer.text.upper()
    return "E" if isinstance(answer, Expr) and answer.node == ("const", "e") else None


def _scaled(cell: Answer, factor: Node | None) -> Answer:
    if factor is None or not isinstance(cell, Expr):
        return cell
    return Expr(("mul", factor, cell.node))
