"""Brackets, separators and digit groups in a list of tokens."""

from __future__ import annotations

import re
from fractions import Fraction

from plumbline.rewards.latex import Token

_OPEN = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\lvert", "\\begin"}
_CLOSE = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\rvert", "\\end"}
_THOUSANDS = re.compile(r"[-+]?(?:\\dollar\s?)?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def unwrap_braces(tokens: list[Token]) -> list[Token]:
    while (
        len(tokens) > 2
        and not any(t.value in ("\\over", "\\choose") for t in tokens)
        and tokens[0].value == "{"
        and tokens[-1].value == "}"
        and _one_group(tokens)
    ):
        tokens = tokens[1:-1]
    return tokens


def _one_group(tokens: list[Token]) -> bool:
    """Whether the bracket that opens the tokens closes at their end, as in {ab} but not in {a}{b}."""
    level = 0
    for token in tokens[:-1]:
        if token.kind not in "tn":
            level += (token.value in _OPEN) - (token.value in _CLOSE)
        if level <= 0:
            return False
    return True


def depths(tokens: list[Token]) -> list[int]:
    """Nesting level of each token; an opening and its closing bracket count as inside."""
    out, level = [], 0
    for token in tokens:
        if token.kind == "t" or token.kind == "n":
            out.append(level)
        elif token.value in _OPEN:
            level += 1
            out.append(level)
        elif token.value in _CLOSE:
            out.append(level)
            level -= 1
        else:
            out.append(level)
    return out


_AND = re.compile(r"^\s*,?\s*(?:and|or)\s*,?\s*$", re.IGNORECASE)


def separates(token: Token) -> bool:
    """Whether it stands between the items of a list."""
    if token.kind == "t":
        return _AND.match(token.value) is not None or token.value.strip() == ","
    return token.value in (",", ";", "\\and", "\\or")


def is_or(token: Token) -> bool:
    """Whether it is the word or the sign for "or"."""
    return token.value.strip(" ,").lower() == "or" if token.kind == "t" else token.value == "\\or"


def joiner(tokens: list[Token], separators: list[int]) -> str:
    """ "or" or "and" if one of them joins a list, else empty."""
    if any(is_or(tokens[i]) for i in separators):
        return "or"
    return "" if all(tokens[i].value.strip() in (",", ";") for i in separators) else "and"


def split(tokens: list[Token], spots: list[int]) -> list[list[Token]]:
    out, start = [], 0
    for spot in [*spots, len(tokens)]:
        out.append(tokens[start:spot])
        start = spot + 1
    return out


def whole_thousands(tokens: list[Token], commas: list[int], text: str) -> bool:
    if any(tokens[i].value != "," or tokens[i].spaced for i in commas) or not text:
        return False
    head = re.match(_THOUSANDS, text.lstrip("\\dolar ") if text.startswith("\\dollar") else text)
    if head is None:
        return False
    return all(
        0 < i < len(tokens) - 1 and tokens[i - 1].kind == tokens[i + 1].kind == "n" and not tokens[i + 1].spaced
        and len(tokens[i + 1].value.split(".")[0]) == 3 for i in commas
    )  # fmt: skip


def join_thousands(tokens: list[Token]) -> list[Token]:
    out: list[Token] = []
    for token in tokens:
        if token.value == "," and token.kind == "x":
            continue
        if out and token.kind == "n" and out[-1].kind == "n":
            digits = out[-1].value + token.value
            out[-1] = Token("n", digits, out[-1].spaced, Fraction(digits))
        else:
            out.append(token)
    return out


def environment(tokens: list[Token], at: int) -> tuple[str, int]:
    """(name, position after it) of \\begin{name} or \\end{name}."""
    end = at + 2
    while end < len(tokens) and tokens[end].value != "}":
        end += 1
    return "".join(t.value for t in tokens[at + 2 : end]), end + 1
