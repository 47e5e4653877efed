"""A number or expression with its currency sign, unit, percent or degree sign."""

from __future__ import annotations

import re
from fractions import Fraction

from plumbline.rewards import units
from plumbline.rewards.answers import Answer, Expr, Words
from plumbline.rewards.latex import Token, Unreadable
from plumbline.rewards.parser import Node, parse
from plumbline.rewards.wording import SPACES, is_word

_CURRENCIES = {
    "\\dollar": "dollar", "\\euro": "euro", "\\pounds": "gbp", "\\yen": "yen", "\\rupee": "rupee", "\\ringgit": "ringgit",
}  # fmt: skip


def read_quantity(tokens: list[Token]) -> Answer:
    """An expression with its currency sign, unit, percent or degree sign apart; or words."""
    if is_word(tokens):
        return Words("".join((" " if t.spaced else "") + t.value for t in tokens).strip().lower())
    unit: str | None = None
    power = 1
    multiple = 1
    tokens = list(tokens)
    negative = len(tokens) > 1 and tokens[0].value == "-" and tokens[1].value in _CURRENCIES
    for at in (0, 1) if negative else (0,):
        if at < len(tokens) and tokens[at].value in _CURRENCIES:
            unit = _CURRENCIES[tokens.pop(at).value]
            break
    if tokens and tokens[-1].value in (*_CURRENCIES, "\\cent"):
        unit = _CURRENCIES.get(tokens.pop().value, "cent")
    words = ""
    cut = _unit_start(tokens)
    if cut is not None:
        tail = tokens[cut:]
        words, power = _tail_words(tail)
        split = units.split_tail(words)
        if split is None or cut == 0:
            raise Unreadable("words that are no unit")
        multiple, words = split
        if words:
            unit = words
        tokens = tokens[:cut]
    while tokens and tokens[-1].value == "%":
        tokens.pop()
        unit = "%"
    if not tokens:
        raise Unreadable("no number")
    node = parse(tokens)
    if node[0] == "deg":
        node, unit = node[1], unit or "°"
    elif node[0] == "neg" and node[1][0] == "deg":
        node, unit = ("neg", node[1][1]), unit or "°"
    elif unit is None and _has_degrees(node):
        node, unit = _without_degrees(node), "°"
    if multiple != 1:
        node = ("mul", node, ("num", Fraction(multiple)))
    return Expr(node, unit, power, words)


def _has_degrees(node: Node) -> bool:
    """Whether a sum of angles holds one in degrees; inside functions the sign is part of the value."""
    return node[0] == "deg" or (
        node[0] in ("add", "neg", "mul", "div") and any(_has_degrees(part) for part in node[1:])
    )


def _without_degrees(node: Node) -> Node:
    if node[0] == "deg":
        return node[1]
    return (node[0], *map(_without_degrees, node[1:])) if node[0] in ("add", "neg", "mul", "div") else node


def _unit_start(tokens: list[Token]) -> int | None:
    """Where the words after a number begin."""
    for i, token in enumerate(tokens):
        if token.kind == "t" and i > 0:
            return i
        if token.kind == "x" and token.value.isalpha() and i > 0 and token.spaced:
            end = i + 1
            while (
                end < len(tokens) and tokens[end].kind == "x" and tokens[end].value.isalpha() and not tokens[end].spaced
            ):
                end += 1
            word = "".join(t.value for t in tokens[i:end])
            if (
                word in units.BARE
                or word.lower() in units.MULTIPLES
                or (len(word) >= 4 and word.isalpha() and tokens[i - 1].kind == "n")
            ):
                return i
    tail = "".join(t.value for t in tokens[-12:] if t.kind == "x")
    match = re.search(
        r"(?<![A-Za-z])(?:cm|mm|km|kg|mph|percent|degrees|inches|dollars|cents|meters|feet|miles|hours|minutes|seconds|units)$",
        tail,
    )
    if match and len(tokens) > len(match.group()) and tokens[-len(match.group()) - 1].kind == "n":
        return len(tokens) - len(match.group())
    return None


def _is_bare_unit(tokens: list[Token]) -> bool:
    """Whether the letters that the tokens begin with spell a unit."""
    end = next((i for i, t in enumerate(tokens) if t.kind != "x" or not t.value.isalpha()), len(tokens))
    return "".join(t.value for t in tokens[:end]) in units.BARE


def _tail_words(tail: list[Token]) -> tuple[str, int]:
    text = ""
    power = 1
    skip = 0
    for n, token in enumerate(tail):
        if skip:
            skip -= 1
            continue
        if token.value == "^" and n + 1 < len(tail):
            ahead = [t.value for t in tail[n + 1 : n + 4]]
            if ahead[:1] in (["2"], ["3"]):
                power, skip = int(ahead[0]), 1
                continue
            if ahead in (["{", "2", "}"], ["{", "3", "}"]):
                power, skip = int(ahead[1]), 3
                continue
            raise Unreadable("unit")
        if token.kind == "n" or token.kind == "c":
            raise Unreadable("unit")
        if (
            n
            and tail[n - 1].kind == "t"
            and token.kind == "x"
            and token.value.isalpha()
            and not _is_bare_unit(tail[n:])
        ):
            raise Unreadable("a letter after the unit")  # 5 \text{ cm}x
        text += (" " if token.spaced else "") + token.value
    return SPACES.sub(" ", text).strip(), power
