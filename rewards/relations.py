"""Relations: what a name is said to be, the same relation from its other side, values followed by their rounding."""

from __future__ import annotations

from plumbline.rewards.answers import Answer, Expr, Relation, Words
from plumbline.rewards.numeric import Double, Evaluator, Unevaluable
from plumbline.rewards.parser import Node


def assigned_value(relation: Relation) -> Answer | None:
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


def assigned_name(relation: Relation) -> str:
    return (relation.names[0] or relation.names[1] or "") if len(relation.names) == 2 else relation.names[0] or ""


def plain_name(name: str) -> str:
    return name.replace(" ", "").replace("\\", "")


def is_wordy_name(name: str) -> bool:
    return "\\text" in name or (len(name) >= 4 and name.replace(" ", "").isalpha())


def flipped(relation: Relation) -> Relation:
    swap = str.maketrans("<>", "><")
    return Relation(relation.sides[::-1], tuple(op.translate(swap) for op in relation.ops[::-1]), relation.names[::-1])


def without_rounding(answer: Answer) -> Answer:
    """An answer without the decimal that says about how much it is: sqrt 2 for "sqrt 2 \\approx 1.414".

    The decimal must be its value cut or rounded at the last digit; else the two contradict and stay.
    """
    while isinstance(answer, Relation) and answer.ops[-1] == "~":
        value, rounded = answer.sides[-2:]
        if not (isinstance(value, Expr) and isinstance(rounded, Expr) and _rounds(value.node, rounded.node)):
            return answer
        sides, names = answer.sides[:-1], answer.names[:-1]
        answer = Relation(sides, answer.ops[:-1], names) if len(sides) > 1 else value
    return answer


def _rounds(value: Node, rounded: Node) -> bool:
    number = rounded[1] if rounded[0] == "neg" else rounded
    if number[0] != "num":
        return False
    places = next((k for k in range(20) if (number[1] * 10**k).denominator == 1), None)
    if places is None:
        return False
    try:
        exact, error = Evaluator(Double(), {}).value(value)
    except (Unevaluable, KeyError, OverflowError, ZeroDivisionError):
        return False
    shown = float(-number[1] if rounded[0] == "neg" else number[1])
    if abs(exact.imag) > error:
        return False
    off, last = exact.real - shown, 10.0**-places
    cut = shown * off >= 0 and abs(off) < last
    return bool(cut or abs(off) <= last / 2 + error)
