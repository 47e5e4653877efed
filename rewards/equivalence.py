"""Whether two answers agree: the conventions of docs/rewards.md over the structures of structure.py.

Comparisons answer True, False or None: None means that exact forms and double precision cannot tell, and that the grading
child must compare at high precision (`deep`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

from plumbline.rewards import units
from plumbline.rewards.normal import ONE, Normaliser, TooHard, Value, is_algebraic
from plumbline.rewards.numeric import Double, Evaluator, Unevaluable, has_imaginary, points, symbols, uses_calls
from plumbline.rewards.parser import Node
from plumbline.rewards.structure import (
    Answer,
    Base,
    Choice,
    Expr,
    Infinite,
    Many,
    Matrix,
    Ordered,
    Ratio,
    Reals,
    Relation,
    Union,
    Words,
    is_wordy,
    read,
    words_of,
)

Truth = bool | None
MAX_ITEMS = 200
_PLAIN_SPACE = re.compile(r"(?:\s|~|\\[,;:! ]|\\left(?![a-z])|\\right(?![a-z]))+")


def compare(answer: str, gold: str, *, deep: bool = False) -> Truth:
    """Whether an answer agrees with a gold; None if that takes high precision and `deep` is False."""
    if answer.strip() == gold.strip():
        return True
    if gold.lstrip().startswith("\\approx"):
        gold = gold.replace("\\approx", "", 1)
        answer = answer.replace("\\approx", "", 1)
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
    return re.sub(r"[\s$]+", " ", words_of(text)).strip(" .")


def _other_commas(text: str) -> str:
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", ", ", text)


def all_of(truths: Iterable[Truth]) -> Truth:
    result: Truth = True
    for truth in truths:
        if truth is False:
            return False
        if truth is None:
            result = None
    return result


class Comparison:
    """One comparison of two answers."""

    def __init__(self, deep: bool) -> None:
        self.deep = deep
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
        if isinstance(a, Relation) or isinstance(g, Relation):
            return self.relations(a, g)
        if isinstance(a, Many) and isinstance(g, Many):
            as_sets = self.sets(a, g)
            return self.unordered(a.items, g.items) if as_sets is not True else True
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
            return bool(a.text) and a.text == g.text
        if isinstance(a, Infinite) and isinstance(g, Infinite):
            return a.sign == g.sign
        if isinstance(a, (Matrix, Ordered)) and isinstance(g, (Matrix, Ordered)):
            return self.vectors(a, g)
        return self.sets(a, g) is True

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
            truths = [self.answers(item, other) for other in open_items]
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
            return False
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
                hour, minute = marked.clock
                return bare.clock[1] == minute and bare.clock[0] in (
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
                    return False
                if first[1] != second[1]:
                    x, y = ("mul", x, ("num", first[1])), ("mul", y, ("num", second[1]))
        return self.equal(x, y)

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
        told = 0
        for point in points(names):
            try:
                differ = test(Double(), point)
            except (Unevaluable, OverflowError, ZeroDivisionError):
                continue
            if differ:
                return False
            if differ is not None:
                told += 1
        if not self.deep:
            return None
        from plumbline.rewards.deep import Precise

        told = 0
        for point in points(names):
            try:
                differ = test(Precise(120), point)
            except (Unevaluable, OverflowError, ZeroDivisionError):
                continue
            if differ:
                return False
            if differ is not None:
                told += 1
        return told >= (2 if names else 1)

    # -- relations ----------------------------------------------------------------------------------------------

    def relations(self, a: Answer, g: Answer) -> Truth:
        if isinstance(a, Relation) and isinstance(g, Relation):
            direct = self.two_relations(a, g)
            if direct is not False:
                return direct
            return self.sets(a, g) is True
        relation, other = (a, g) if isinstance(a, Relation) else (g, a)
        assert isinstance(relation, Relation)
        value = _assigned_value(relation)
        if value is not None:
            if relation.ops[-1] == "in" or len(relation.ops) == 1:
                return self.answers(value, g) if relation is a else self.answers(a, value)
            rest = [side for side, name in zip(relation.sides, relation.names, strict=True) if name is None]
            truths = [self.answers(side, other) if relation is a else self.answers(other, side) for side in rest]
            return all_of(truths)
        return self.sets(a, g) is True

    def two_relations(self, a: Relation, g: Relation) -> Truth:
        value_a, value_g = _assigned_value(a), _assigned_value(g)
        if value_a is not None and value_g is not None:
            name_a, name_g = _assigned_name(a), _assigned_name(g)
            if name_a == name_g or {_plain_name(name_a), _plain_name(name_g)} in ({"y", "f(x)"}, {"y"}, {"f(x)"}):
                truth = self.answers(value_a, value_g)
                if truth is not False or name_a != name_g:
                    return truth
            if _wordy_name(name_a) or _wordy_name(name_g):
                return self.answers(value_a, value_g)
        for candidate in (a, _flipped(a)):
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

    # -- sets of real numbers -----------------------------------------------------------------------------------

    def sets(self, a: Answer, g: Answer) -> Truth:
        """Whether both are the same set of real numbers: intervals, unions, inequalities in one name, excluded points."""
        if not (_set_like(a) and _set_like(g)):
            return False
        name_a, name_g = _set_name(a), _set_name(g)
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


class Piece:
    """An interval of real numbers; None stands for an infinite end."""

    def __init__(self, low: Node | None, low_closed: bool, high: Node | None, high_closed: bool) -> None:
        self.low, self.low_closed, self.high, self.high_closed = low, low_closed, high, high_closed
        self.at = (-float("inf") if low is None else _real(low), float("inf") if high is None else _real(high))


def _real(node: Node) -> float:
    value, _ = Evaluator(Double(), {}).value(node)
    if abs(value.imag) > 1e-9:
        raise Unevaluable("not real")
    return value.real


def pieces(answer: Answer) -> list[Piece] | None:
    """A set of real numbers as separate intervals in order; None if it is none."""
    try:
        found = _pieces(answer)
    except (Unevaluable, KeyError):
        return None
    return None if found is None else _merged(found)


def _pieces(answer: Answer) -> list[Piece] | None:
    if isinstance(answer, Reals):
        return [Piece(None, False, None, False)]
    if isinstance(answer, Ordered) and len(answer.items) == 2:
        ends = [_end(item) for item in answer.items]
        if any(end is None for end in ends):
            return None
        (low, low_sign), (high, high_sign) = ends  # type: ignore[misc]
        if low_sign == 1 or high_sign == -1:
            return None
        low_closed, high_closed = answer.opening == "[", answer.closing == "]"
        if (low is None and low_closed) or (high is None and high_closed):
            return None
        piece = Piece(low, low_closed, high, high_closed)
        return [piece] if piece.at[0] <= piece.at[1] else None
    if isinstance(answer, Union):
        out: list[Piece] = []
        for part in answer.parts:
            found = _pieces(part)
            if found is None:
                return None
            out.extend(found)
        for gone in answer.removed:
            holes = gone.items if isinstance(gone, Many) else (gone,)
            for hole in holes:
                if not isinstance(hole, Expr):
                    return None
                out = _without(out, hole.node)
        return out
    if isinstance(answer, Relation):
        if answer.ops == ("in",) and answer.names[0]:
            return _pieces(answer.sides[1])
        return _solutions(answer)
    if isinstance(answer, Many):
        if answer.braced and all(isinstance(item, Expr) for item in answer.items):
            return [Piece(item.node, True, item.node, True) for item in answer.items if isinstance(item, Expr)]
        if answer.items and all(isinstance(item, Relation) for item in answer.items):
            if all(isinstance(item, Relation) and item.ops == ("!=",) for item in answer.items):
                out = [Piece(None, False, None, False)]
                for item in answer.items:
                    excluded = item.sides[1] if isinstance(item, Relation) else None
                    if not isinstance(excluded, Expr):
                        return None
                    out = _without(out, excluded.node)
                return out
            out = []
            for item in answer.items:
                found = _pieces(item)
                if found is None:
                    return None
                out.extend(found)
            return out
    return None


def _end(item: Answer) -> tuple[Node | None, int] | None:
    if isinstance(item, Infinite):
        return None, item.sign
    return (item.node, 0) if isinstance(item, Expr) and not symbols(item.node) else None


def _solutions(relation: Relation) -> list[Piece] | None:
    """The solutions of x < a, a < x <= b, x != a in one name."""
    spot = [i for i, name in enumerate(relation.names) if name and len(name) <= 12 and not name.startswith("(")]
    if len(spot) != 1 or any(op not in ("<", "<=", ">", ">=", "!=") for op in relation.ops):
        return None
    at = spot[0]
    others = [side for i, side in enumerate(relation.sides) if i != at]
    if any(not isinstance(s, (Expr, Infinite)) or (isinstance(s, Expr) and symbols(s.node)) for s in others):
        return None
    if relation.ops == ("!=",):
        hole = others[0]
        return _without([Piece(None, False, None, False)], hole.node) if isinstance(hole, Expr) else None
    if len(relation.sides) == 2:
        end = others[0]
        node = end.node if isinstance(end, Expr) else None
        op = relation.ops[0] if at == 0 else relation.ops[0].translate(str.maketrans("<>", "><"))
        closed = op.endswith("=") and node is not None
        return [Piece(None, False, node, closed)] if op[0] == "<" else [Piece(node, closed, None, False)]
    if len(relation.sides) == 3 and at == 1 and len({op[0] for op in relation.ops}) == 1 and "!" not in relation.ops[0]:
        low, high = others if relation.ops[0][0] == "<" else others[::-1]
        low_op, high_op = relation.ops if relation.ops[0][0] == "<" else relation.ops[::-1]
        low_node, high_node = (s.node if isinstance(s, Expr) else None for s in (low, high))
        piece = Piece(
            low_node, "=" in low_op and low_node is not None, high_node, "=" in high_op and high_node is not None
        )
        return [piece] if piece.at[0] <= piece.at[1] else None
    return None


def _without(parts: list[Piece], hole: Node) -> list[Piece]:
    x, out = _real(hole), []
    for piece in parts:
        low, high = piece.at
        if low < x < high:
            out += [Piece(piece.low, piece.low_closed, hole, False), Piece(hole, False, piece.high, piece.high_closed)]
        elif x == low < high:
            out.append(Piece(piece.low, False, piece.high, piece.high_closed))
        elif x == high > low:
            out.append(Piece(piece.low, piece.low_closed, piece.high, False))
        elif not x == low == high:
            out.append(piece)
    return out


def _merged(parts: list[Piece]) -> list[Piece]:
    out: list[Piece] = []
    for piece in sorted(parts, key=lambda p: (p.at[0], not p.low_closed, p.at[1])):
        if out:
            last = out[-1]
            if piece.at[0] < last.at[1] or (piece.at[0] == last.at[1] and (piece.low_closed or last.high_closed)):
                further = piece.at[1] > last.at[1] or (piece.at[1] == last.at[1] and piece.high_closed)
                end, closed = (piece.high, piece.high_closed) if further else (last.high, last.high_closed)
                out[-1] = Piece(last.low, last.low_closed, end, closed)
                continue
        out.append(piece)
    return out


def _set_like(answer: Answer) -> bool:
    if isinstance(answer, Many):
        return bool(answer.items) and (answer.braced or all(isinstance(item, Relation) for item in answer.items))
    return isinstance(answer, (Reals, Ordered, Union, Relation))


def _set_name(answer: Answer) -> str:
    if isinstance(answer, Relation):
        return next((name for name in answer.names if name), "")
    if isinstance(answer, Many) and answer.items and isinstance(answer.items[0], Relation):
        return _set_name(answer.items[0])
    return ""


def _differ(lib: object, point: dict[str, Fraction], a: Node, g: Node, complexes: bool) -> Truth:
    evaluator = Evaluator(lib, point)
    (x, e), (y, f) = evaluator.value(a), evaluator.value(g)
    if not complexes and point:
        real_x, real_y = abs(x.imag) <= 10 * e, abs(y.imag) <= 10 * f
        if not (real_x and real_y):
            return None  # outside the real domain of one of them
    return bool(abs(x - y) > 10 * (e + f))


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


def _assigned_value(relation: Relation) -> Answer | None:
    """What a name is said to be: x = 5, 5 = x, x = 2 + 3 = 5, x \\in {1, 2}."""
    if relation.ops == ("in",) and relation.names[0]:
        return relation.sides[1]
    if any(op != "=" for op in relation.ops):
        return None
    if relation.names[0]:
        return relation.sides[-1]
    if len(relation.ops) == 1 and relation.names[1] and not _spelled_number(relation.sides[0]):
        return relation.sides[0]
    return None


def _spelled_number(side: Answer) -> bool:
    return isinstance(side, Words)


def _assigned_name(relation: Relation) -> str:
    return (relation.names[0] or relation.names[1] or "") if len(relation.names) == 2 else relation.names[0] or ""


def _plain_name(name: str) -> str:
    return name.replace(" ", "").replace("\\", "")


def _wordy_name(name: str) -> bool:
    return "\\text" in name or (len(name) >= 4 and name.replace(" ", "").isalpha())


def _flipped(relation: Relation) -> Relation:
    swap = str.maketrans("<>", "><")
    return Relation(relation.sides[::-1], tuple(op.translate(swap) for op in relation.ops[::-1]), relation.names[::-1])


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
