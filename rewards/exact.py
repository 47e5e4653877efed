"""The cheap exact path: settles most answers in microseconds, and says None when it cannot.

It knows rational numbers in their usual spellings and text that is the same after cosmetic differences. What it settles
is exact: no rounding, no tolerance.
"""

from __future__ import annotations

import re
from fractions import Fraction

_COSMETIC = re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|limits|,|;|!|:| )(?![a-zA-Z])|~|\\\s")
_UNIT = re.compile(r"\\(?:text|mathrm|mbox|textrm|rm)\s*\{\s*[A-Za-z .^/\d]*\}(?:\^\{?\d\}?)?$")
_DEGREE = re.compile(r"\^\{?(?:\\circ|°)\}?$|°$|\\degree$|\\%$|%$")
_GROUPED = re.compile(r"^[-+]?\d{1,3}(?:,(?:\\!)?\d{3})+(?:\.\d+)?$")
_DECIMAL = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)$")
_FRACTION = re.compile(r"^([-+]?)\\[dt]?frac\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))$")
_SLASH = re.compile(r"^([-+]?\d+)/(\d+)$")
_MIXED = re.compile(r"^([-+]?)(\d+)\s*\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))$")
_NAMED = re.compile(r"^[a-zA-Z]\s*=\s*")
# Longer digit strings go the slow way, where time is limited: converting them is quadratic.
MAX_DIGITS = 2000


def clean(answer: str) -> str:
    """The answer without what carries no meaning: dollar signs, spacing commands, \\left and \\right, a final full stop."""
    text = answer.strip()
    while len(text) > 1 and text[0] == "$" == text[-1]:
        text = text[1:-1].strip()
    text = _COSMETIC.sub("", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("−", "-").replace("{,}", ",")
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") else text


def rational(text: str) -> Fraction | None:
    """The exact value of a cleaned number, unit, currency, degree and percent signs left out; None if it is none.

    Integers, grouped thousands, terminating decimals, a/b, \\frac{a}{b} and mixed numbers (sums, negative ones too).
    """
    if len(text) > MAX_DIGITS:
        return None
    text = text.removeprefix("\\$").removeprefix("$").strip()
    text = _UNIT.sub("", text).strip()
    text = _DEGREE.sub("", text).strip()
    if _GROUPED.match(text):
        return Fraction(text.replace("\\!", "").replace(",", ""))
    if _DECIMAL.match(text):
        return Fraction(text.removesuffix("."))
    if match := _SLASH.match(text):
        return _ratio("", match.group(1), match.group(2))
    if match := _FRACTION.match(text):
        sign, a, b, c, d = match.groups()
        return _ratio(sign, a or b, c or d)
    if match := _MIXED.match(text):
        sign, whole, a, b, c, d = match.groups()
        part = _ratio("", a or b, c or d)
        if part is None:
            return None
        value = int(whole) + part
        return -value if sign == "-" else value
    return None


def compare(answer: str, gold: str) -> bool | None:
    """Whether two answers agree; None if this path cannot tell.

    Two rationals are settled either way; equal text is settled as equal. Everything else is left to the slow path.
    """
    a, g = clean(answer), clean(gold)
    if not a or not g:
        return None
    names = {match.group()[0] for match in (_NAMED.match(a), _NAMED.match(g)) if match}
    if len(names) < 2:  # x = 5 agrees with 5, but not with y = 5
        value_a, value_g = rational(_NAMED.sub("", a)), rational(_NAMED.sub("", g))
        if value_a is not None and value_g is not None:
            return value_a == value_g
    if "".join(a.split()) == "".join(g.split()):
        return True
    return None


def _ratio(sign: str, top: str, bottom: str) -> Fraction | None:
    if int(bottom) == 0:
        return None
    value = Fraction(int(top), int(bottom))
    return -value if sign == "-" else value
