"""Sets of real numbers as separate intervals in order: intervals, unions, inequalities in one name, excluded points."""

from __future__ import annotations

from plumbline.rewards.answers import Answer, Expr, Infinite, Many, Meet, Ordered, Reals, Relation, Union
from plumbline.rewards.numeric import Double, Evaluator, Unevaluable, symbols
from plumbline.rewards.parser import Node


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
        out = _joined_pieces(answer.parts)
        if out is None:
            return None
        for gone in answer.removed:
            holes = gone.items if isinstance(gone, Many) else (gone,)
            for hole in holes:
                if not isinstance(hole, Expr):
                    return None
                out = _without(out, hole.node)
        return out
    if isinstance(answer, Meet):
        parts = [_pieces(part) for part in answer.parts]
        return None if any(part is None for part in parts) else _met_all([part for part in parts if part is not None])
    if isinstance(answer, Relation):
        if answer.ops == ("in",) and answer.names[0]:
            return _pieces(answer.sides[1])
        return _solutions(answer)
    if isinstance(answer, Many):
        if _intervals(answer):
            return _joined_pieces(answer.items)
        if answer.braced and all(isinstance(item, Expr) for item in answer.items):
            return [Piece(item.node, True, item.node, True) for item in answer.items if isinstance(item, Expr)]
        if answer.items and all(isinstance(item, Relation) for item in answer.items):
            if len({set_name(item) for item in answer.items} - {""}) > 1:
                return None
            each = [_pieces(item) for item in answer.items]
            if all(each) and len(each) > 1 and answer.joined != "or":
                met = _met_all([part for part in each if part])
                # "and" says that all hold; a comma does where "or" would leave nothing out
                if answer.joined == "and" or any(
                    _everything(_merged([*a, *b])) for a in each if a for b in each if b and b is not a
                ):
                    return met
            if all(isinstance(item, Relation) and item.ops == ("!=",) for item in answer.items):
                out = [Piece(None, False, None, False)]
                for item in answer.items:
                    excluded = item.sides[1] if isinstance(item, Relation) else None
                    if not isinstance(excluded, Expr):
                        return None
                    out = _without(out, excluded.node)
                return out
            return _joined_pieces(answer.items)
    return None


def _intervals(answer: Many) -> bool:
    """A list of intervals that cannot be points: each has a closed or an infinite end."""
    return not answer.braced and answer.joined != "and" and len(answer.items) > 1 and all(
        isinstance(item, Ordered) and len(item.items) == 2 and (
            {item.opening, item.closing} in ({"(", "]"}, {"[", ")"}) or any(isinstance(end, Infinite) for end in item.items))
        for item in answer.items
    )  # fmt: skip


def _joined_pieces(items: tuple[Answer, ...]) -> list[Piece] | None:
    out: list[Piece] = []
    for item in items:
        found = _pieces(item)
        if found is None:
            return None
        out.extend(found)
    return out


def _everything(parts: list[Piece]) -> bool:
    return len(parts) == 1 and parts[0].low is None and parts[0].high is None


def _met_all(sets: list[list[Piece]]) -> list[Piece]:
    """The intersection of sets."""
    out = _merged(sets[0])
    for other in sets[1:]:
        out = [piece for p in out for q in _merged(other) if (piece := _met(p, q)) is not None]
    return out


def _met(p: Piece, q: Piece) -> Piece | None:
    low = max((p, q), key=lambda piece: (piece.at[0], not piece.low_closed))
    high = min((p, q), key=lambda piece: (piece.at[1], piece.high_closed))
    if low.at[0] > high.at[1] or (low.at[0] == high.at[1] and not (low.low_closed and high.high_closed)):
        return None
    return Piece(low.low, low.low_closed, high.high, high.high_closed)


def _end(item: Answer) -> tuple[Node | None, int] | None:
    if isinstance(item, Infinite):
        return None, item.sign
    return (item.node, 0) if isinstance(item, Expr) and not symbols(item.node) else None


def _solutions(relation: Relation) -> list[Piece] | None:
    """The solutions of x < a, a < x <= b, x != a in one name."""
    bound = _absolute(relation)
    if bound is not None:
        return bound
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


def _absolute(relation: Relation) -> list[Piece] | None:
    """|x| < a and its like."""
    if len(relation.sides) != 2 or relation.ops[0] not in ("<", "<=", ">", ">="):
        return None
    at = next(
        (i for i, side in enumerate(relation.sides) if isinstance(side, Expr) and _bare_absolute(side.node)), None
    )
    if at is None:
        return None
    other = relation.sides[1 - at]
    if not isinstance(other, Expr) or symbols(other.node) or _real(other.node) <= 0:
        return None
    op = relation.ops[0] if at == 0 else relation.ops[0].translate(str.maketrans("<>", "><"))
    closed, minus = op.endswith("="), ("neg", other.node)
    if op[0] == "<":
        return [Piece(minus, closed, other.node, closed)]
    return [Piece(None, False, minus, closed), Piece(other.node, closed, None, False)]


def _bare_absolute(node: Node) -> bool:
    return node[:2] == ("fn", "abs") and node[2][0] == "sym"


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


def set_like(answer: Answer) -> bool:
    if isinstance(answer, Many):
        plain = all(isinstance(item, Relation) for item in answer.items) or _intervals(answer)
        return bool(answer.items) and (answer.braced or plain)
    return isinstance(answer, (Reals, Ordered, Union, Meet, Relation))


def set_name(answer: Answer) -> str:
    if isinstance(answer, Relation):
        for side in answer.sides:
            if isinstance(side, Expr) and _bare_absolute(side.node):
                return side.node[2][1]
        return next((name for name in answer.names if name), "")
    if isinstance(answer, Many) and answer.items and isinstance(answer.items[0], Relation):
        return set_name(answer.items[0])
    return ""
