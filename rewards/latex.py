"""Tokens of a LaTeX (or plain) maths answer. One linear scan; nothing is evaluated."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_TOKENS = 1500
MAX_DIGITS = 3000


class Unreadable(Exception):
    """The text is not a mathematical expression this parser knows."""


class Token(NamedTuple):
    """kind: n (number), c (command), x (character), t (text inside \\text{...}); `spaced`: a space stood before it."""

    kind: str
    value: str
    spaced: bool
    number: Fraction | None = None


_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "/", "⁄": "/", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\ne ", "∞": "\\infty ", "π": "\\pi ", "θ": "\\theta ", "°": "^\\circ ", "º": "^\\circ ", "√": "\\sqrt ", "∛": "\\sqrt[3]", "½": "\\frac{1}{2}",
    "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "⅕": "\\frac{1}{5}", "⅖": "\\frac{2}{5}", "⅗": "\\frac{3}{5}", "⅘": "\\frac{4}{5}", "⅙": "\\frac{1}{6}", "⅚": "\\frac{5}{6}",
    "⅛": "\\frac{1}{8}", "⅜": "\\frac{3}{8}", "⅝": "\\frac{5}{8}", "⅞": "\\frac{7}{8}", "△": "\\triangle ", "∨": "\\lor ", "∧": "\\land ", "≡": "\\equiv ", "⩽": "\\le ", "⩾": "\\ge ", "→": "\\to ", "‑": "-", "－": "-", "\u200b": "", "\u2061": "", "\u3000": " ", "。": ".",
    "∪": "\\cup ",
    "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "±": "\\pm ", "∓": "\\mp ", "′": "'", "’": "'",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "…": "...", "≈": "\\approx ", "⌊": "\\lfloor ", "⌋": "\\rfloor ",
    "⌈": "\\lceil ", "⌉": "\\rceil ", "⟨": "\\langle ", "⟩": "\\rangle ", "∠": "\\angle ", "€": "\\euro ", "£": "\\pounds ",
    "¥": "\\yen ", "₹": "\\rupee ", "Ω": "\\Omega ", "µ": "\\mu ", "μ": "\\mu ", "″": "''", "“": '"', "”": '"', "¢": "\\cent ", "∖": "\\setminus ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ",
}  # fmt: skip
# Full-width forms, as Chinese and Japanese keyboards give them
_UNICODE |= {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}
_TRANSLATE = str.maketrans(_UNICODE)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
_PLAIN = {**dict(zip(_RAISED, "0123456789+-()ni", strict=True)), **dict(zip(_LOWERED, "0123456789+-()n", strict=True))}
_SHIFTED = re.compile(f"(?P<up>[{_RAISED}]+)|[{_LOWERED}]+")
_GROUP_COMMA = re.compile(r"(?:\\!\s?)?,\s?\\!\s?|\{,\\!\}|\{,\}")
_SIZES = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|bigg|Bigg|big|Big|displaystyle|textstyle|scriptstyle|limits|nolimits|quad|qquad|mathstrut"
    r"|phantom\s?-?|hspace\{[^{}]{0,20}\}|hfill|tiny|footnotesize|small|large|Large|LARGE|huge|Huge|normalsize|bf|rm|it)(?![A-Za-z])"
)
_LEFT_BAR = re.compile(r"\\left\s?\|")
_RIGHT_BAR = re.compile(r"\\right\s?\|")
_NULL_DELIMITER = re.compile(r"\\(?:left|right)\s?\.")
_SAME = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\dbinom": "\\binom", "\\tbinom": "\\binom", "\\leq": "\\le",
    "\\geq": "\\ge", "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\neq": "\\ne", "\\lt": "<", "\\gt": ">", "\\times": "*", "\\cdot": "*",
    "\\ast": "*", "\\div": "/", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\lparen": "(", "\\rparen": ")",
    "\\varnothing": "\\emptyset", "\\%": "%", "\\colon": ":", "\\land": "\\and", "\\lor": "\\or", "\\wedge": "\\and", "\\vee": "\\or",
    "\\vert": "|", "\\mid": "|", "\\dots": "\\ldots", "\\cdots": "\\ldots", "\\bar": "\\overline", "\\imath": "i", "\\degree": "\\degree",
    "\\varphi": "\\phi", "\\varepsilon": "\\epsilon", "\\backslash": "\\setminus", "\\union": "\\cup", "\\intersection": "\\cap",
    "\\colonequals": "=", "\\equiv": "\\equiv", "\\infin": "\\infty", "\\R": "\\reals", "\\&": "\\amp", "\\#": "\\hash", "\\prime": "'",
    "\\sim": "\\approx", "\\simeq": "\\approx", "\\to": "\\rightarrow", "\\implies": "\\Rightarrow", "\\lVert": "\\|", "\\rVert": "\\|",
}  # fmt: skip
_TEXT = {"\\text", "\\textbf", "\\textit", "\\textrm", "\\textnormal", "\\textsf", "\\texttt", "\\mbox", "\\mathrm", "\\operatorname", "\\hbox", "\\emph", "\\textsc", "\\textup", "\\mathsf", "\\unit"}  # fmt: skip
_SIGNS = {"cis", "\\euro", "\\dollar", "\\pounds", "\\yen", "\\cent", "\\rupee", "%", "\\%"}
_FONT = {"\\mathbf", "\\boldsymbol", "\\mathit", "\\bm", "\\vec", "\\hat", "\\mathcal", "\\boxed", "\\fbox", "\\underline", "\\overrightarrow", "\\ensuremath"}  # fmt: skip
_COMMAND = re.compile(r"\\[A-Za-z]")
_SCAN = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:!> ]|\\\n)+)"
    r"|(?P<rep>[0-9]*\.[0-9]*(?:\\overline|\\bar)\s?(?:\{[0-9]+\}|[0-9])(?:\s?(?:\.\.\.|\\l?dots|\\cdots))?"
    r"|[0-9]*\.[0-9]*\\dot\s?(?:\{[0-9]\}|[0-9])(?:[0-9]*\\dot\s?(?:\{[0-9]\}|[0-9]))?"
    r"|[0-9]*\.[0-9]*\([0-9]+\)|[0-9]*\.[0-9]+\s?(?:\.\.\.|\\l?dots|\\cdots))"
    r"|(?P<sci>[0-9]+\.[0-9]+[eE][-+]?[0-9]+(?![.0-9])|^[0-9]+e-[0-9]+$|[0-9]+E[-+]?[0-9]+(?![.0-9])|[0-9]+e\+?[0-9]+(?![.0-9]))"
    r"|(?P<num>[0-9]+(?:\{,\}[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<cmd>\\[A-Za-z]+|\\.)"
    r"|(?P<char>\*\*|<=|>=|!=|.)",
    re.DOTALL,
)


def tidy(text: str) -> str:
    """The answer without what carries no meaning: math delimiters, sizes of brackets, a final full stop."""
    if not text.isascii():
        text = _SHIFTED.sub(_shifted, text).translate(_TRANSLATE)
    if "\\" in text or "$" in text or "{,}" in text:
        text = text.replace("\\$", "\\dollar ").replace("$", "")
        for mark in ("\\(", "\\)", "\\[", "\\]"):
            if mark in text and not text.count("\\\\" + mark[1]):
                text = text.replace(mark, " ")
        text = _GROUP_COMMA.sub("{,}", text)
        if "\\left" in text or "\\right" in text:
            text = _NULL_DELIMITER.sub("", text)
            text = _LEFT_BAR.sub("\\\\lvert ", text)
            text = _RIGHT_BAR.sub("\\\\rvert ", text)
        text = _SIZES.sub(" ", text)
    text = text.strip()
    while text.endswith((".", ",", ";")) and not text.endswith("...") and not text.endswith("\\,"):
        text = text[:-1].rstrip()
    while text.endswith("\\"):
        text = text[:-1].rstrip()
    return text


def _shifted(match: re.Match[str]) -> str:
    """A run of raised or lowered characters as an exponent or an index."""
    return ("^{" if match["up"] else "_{") + "".join(_PLAIN[c] for c in match.group()) + "}"


def tokenize(text: str) -> list[Token]:
    """Tokens of a tidied text.

    Raises:
        Unreadable: more than MAX_TOKENS tokens, an overlong number, or braces that do not match.
    """
    tokens: list[Token] = []
    position, end, spaced = 0, len(text), False
    while position < end:
        match = _SCAN.match(text, position)
        assert match is not None
        kind, value = match.lastgroup, match.group()
        position = match.end()
        if kind == "space":
            spaced = True
            continue
        if len(tokens) >= MAX_TOKENS:
            raise Unreadable("too long")
        if kind == "num":
            plain = value.replace("{,}", "")
            if len(plain) > MAX_DIGITS:
                raise Unreadable("number too long")
            tokens.append(Token("n", plain, spaced, Fraction(plain)))
        elif kind == "rep":
            tokens.append(Token("n", value, spaced, repeating(value)))
        elif kind == "sci":
            mantissa, exponent = re.split("[eE]", value)
            if len(exponent) > 5 or abs(int(exponent)) > MAX_DIGITS:
                raise Unreadable("exponent too large")
            tokens.append(Token("n", value, spaced, Fraction(mantissa) * Fraction(10) ** int(exponent)))
        elif kind == "cmd":
            name = _SAME.get(value, value)
            if value in _TEXT or value in _FONT:
                inner, position = _braced(text, position)
                if (
                    value in _FONT
                    or (value in ("\\mathrm", "\\operatorname") and (len(inner) == 1 or inner in FUNCTIONS))
                    or inner.strip() in _SIGNS
                    or _COMMAND.search(inner)
                ):
                    tokens.extend(_inner(inner, spaced))
                else:
                    tokens.append(Token("t", inner, spaced))
            elif name.startswith("\\"):
                tokens.append(Token("c", name, spaced))
            else:
                tokens.append(Token("x", name, spaced))
        else:
            value = {"**": "^", "<=": "\\le", ">=": "\\ge", "!=": "\\ne"}.get(value, value)
            tokens.append(Token("c" if value[0] == "\\" else "x", value, spaced))
        spaced = False
    return tokens


FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "log", "lg", "exp", "max", "min",
    "gcd", "lcm", "sqrt", "arccot", "arcsec", "arccsc", "Re", "Im", "cis", "mod", "det", "sgn", "abs",
}  # fmt: skip


def _inner(inner: str, spaced: bool) -> list[Token]:
    if inner.strip() in FUNCTIONS:
        return [Token("c", "\\" + inner.strip(), spaced)]
    got = tokenize(inner)
    return [got[0]._replace(spaced=spaced), *got[1:]] if got else []


def _braced(text: str, position: int) -> tuple[str, int]:
    while position < len(text) and text[position].isspace():
        position += 1
    if position >= len(text):
        return "", position
    if text[position] != "{":
        return text[position], position + 1
    depth, at = 0, position
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return text[position + 1 : at], at + 1
        at += 1
    raise Unreadable("braces do not match")


def repeating(text: str) -> Fraction:
    """The exact value of 0.1\\overline{6}, 0.\\dot{1}2\\dot{3}, 0.1(6) or 0.1666..."""
    whole, _, rest = text.partition(".")
    if "dot{" in rest or "\\dot " in rest or re.search(r"\\dot[0-9]", rest):
        head, _, tail = rest.partition("\\dot")
        digits = "".join(c for c in tail if c.isdigit())
        return _periodic(whole, head, digits if "\\dot" in tail else digits[:1])
    if "\\overline" in rest or "\\bar" in rest:
        head, _, tail = rest.partition("\\")
        return _periodic(whole, head, "".join(c for c in tail if c.isdigit()))
    if "(" in rest:
        head, _, tail = rest.partition("(")
        return _periodic(whole, head, tail.rstrip(")"))
    digits = re.match(r"[0-9]+", rest).group()  # type: ignore[union-attr]
    if len(digits) > 200:
        raise Unreadable("decimal too long")
    for period in range(1, len(digits) // 2 + 1):
        block = digits[-period:]
        count, at = 0, len(digits)
        while at >= period and digits[at - period : at] == block:
            count, at = count + 1, at - period
        # A single digit must be seen three times, a longer block twice, to say that it repeats.
        if count >= (3 if period == 1 else 2):
            return _periodic(whole, digits[:at], block)
    raise Unreadable("an ellipsis after digits that do not repeat")


def _periodic(whole: str, head: str, period: str) -> Fraction:
    if not period or len(whole) + len(head) + len(period) > MAX_DIGITS:
        raise Unreadable("repeating decimal")
    scale = 10 ** len(head)
    return (
        Fraction(int(whole or "0"))
        + (Fraction(int(head or "0")) + Fraction(int(period), 10 ** len(period) - 1)) / scale
    )
