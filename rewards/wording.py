"""Answers that are words, or read like words: names, times of day, choices, base numerals, number words, the empty set."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from plumbline.rewards import units
from plumbline.rewards.answers import Answer, Base, Choice, Expr, Infinite, Ordered, Ratio, Reals, Residue, Union, Words
from plumbline.rewards.latex import Token

MAX_WORDS = 1000
_CLOCK = re.compile(
    r"^([0-9]{1,2}) ?: ?([0-9]{2}(?: ?: ?[0-9]{2})?)\s*([ap])\.?\s?m\.?$|^([0-9]{1,2}) ?: ?([0-9]{2}(?: ?: ?[0-9]{2})?)$|^([0-9]{1,2})\s*([ap])\.?\s?m\.?$"
)
_CHOICE = re.compile(r"^\(?([A-J])\s*[).:](?!\s*(?:and|or)\b)\s*(.*)$", re.DOTALL)
_LETTER = re.compile(r"^\(?([A-Z])\)?$")
_BASE = re.compile(
    r"^(-?\(?[0-9A-Fa-f][0-9A-Fa-f ]*(?:\.[0-9A-Fa-f]+)?)\)?_[{(]?(?:base ?)?([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|sixteen)[)}]?$"
    r"|^(-?[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?) \(?(?:in )?base[ -]([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|sixteen)\)?$"
)
_NUMBER_WORDS = {w: n for n, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"])} | {w: 10 * n for n, w in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)}  # fmt: skip
_ARTICLE = re.compile(r"^(?:an?|the) (?=[a-z]{3,})")
_UNWRAP = re.compile(r"\\(?:textbf|textit|textrm|textnormal|texttt|textsf|textsc|text|mbox|mathrm|mathbf|mathit|mathsf|operatorname|emph|bf|rm|boldsymbol|hbox|underline)(?![A-Za-z])")  # fmt: skip
WHOLE_TEXT = re.compile(r"^\\(?:text|textbf|mathrm|mbox|textrm|textit|textnormal)\s?\{([^{}]*)\}$")
_TEXT_PART = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm)\s?\{([^{}]*)\}")
_ONE_BRACED = re.compile(r"\{([^{}\\])\}")
SPACES = re.compile(r"(?:\s|~|\\[,;:! ])+")
_NAME = re.compile(
    r"^(?:m?\\angle ?)?(?:\\(?:overline|triangle|vec|hat|mathbf|mathrm|widehat|mathcal)\{?)?(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|rho|tau|varphi|epsilon|ell|Delta|Omega))\}?'*"
    r"(?:_(?:\{[^{}]{1,12}\}|[A-Za-z0-9]))?'*(?:(?:\^\{-1\})?\([A-Za-z0-9,. ]{1,12}\))?$"
    r"|^(?:m?\\angle ?)?[A-Z]{1,4}$|^\|[A-Z]{1,3}\|$|^\\lvert ?[A-Z]{1,3}\\rvert$|^\[[A-Z]{3,6}\]$|^\\frac\{d[A-Za-z]?\}\{d[a-z]\}$|^\\(?:overline|triangle)\{?[A-Z]{2,4}\}?$|^P\([A-Za-z ]{1,20}\)$|^\\text\{[A-Za-z .]{1,40}\}$|^[A-Za-z]{4,20}(?: [A-Za-z]{1,20}){0,4}$"
)
_NAME_TUPLE = re.compile(
    r"^\( ?(?:[A-Za-z]|\\[a-z]{2,7})(?:_\{?[0-9a-z]\}?)?(?: ?, ?(?:[A-Za-z]|\\[a-z]{2,7})(?:_\{?[0-9a-z]\}?)?)+ ?\)$"
)
_REALS = {"all real numbers", "all reals", "real numbers", "the real numbers", "all real number", "\\mathbbr", "\\reals", "\\mathbb r", "the set of all real numbers", "reals", "r (all real numbers)", "all real values"}  # fmt: skip
_ZERO = Expr(("num", Fraction(0)))
_HALF_LINES = {
    **dict.fromkeys(
        ("\\mathbbr^+", "\\mathbbr_>0", "\\mathbbr_+", "\\mathbbr^>0", "all positive real numbers", "positive real numbers", "all positive reals",
         "positive reals", "the positive real numbers"), Ordered("(", ")", (_ZERO, Infinite(1)))),
    **dict.fromkeys(
        ("\\mathbbr^-", "\\mathbbr_<0", "\\mathbbr_-", "all negative real numbers", "negative real numbers", "all negative reals"),
        Ordered("(", ")", (Infinite(-1), _ZERO))),
    **dict.fromkeys(
        ("\\mathbbr_\\ge 0", "\\mathbbr_\\geq 0", "all nonnegative real numbers", "all non-negative real numbers", "nonnegative real numbers",
         "non-negative real numbers"), Ordered("[", ")", (_ZERO, Infinite(1)))),
}  # fmt: skip
_NO_SOLUTION = re.compile(
    r"^(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?|values?|such (?:numbers?|values?|x)|real numbers?)(?: exists?)?$"
)
_EXCEPT = re.compile(
    r"^(?:\\text\{\s*)?(?:the set of )?(?:all )?(?:the )?real(?:s| numbers?) except (?:for )?(?:\s*\})?\s*(?:x ?= ?)?(.+)$",
    re.IGNORECASE,
)
_MODULO = re.compile(
    r"^(.*?[0-9A-Za-z}])\s*\(?\s*(?:\\pmod\s*(?:\{\s*([0-9]{1,6})\s*\}|([0-9]))|(?:\\b?mod(?![A-Za-z])|\\(?:text|mathrm|operatorname)\s?\{\s*mod\s*\}|(?<=[ (])mod(?![A-Za-z]))"
    r"\s*(?:\{\s*([0-9]{1,6})\s*\}|([0-9]{1,6})))\s*\)?$", re.DOTALL,
)  # fmt: skip
_SYNONYMS = {
    **dict.fromkeys(("\\mathbbz", "all integers", "integers", "the integers", "the set of integers"), "the integers"),
    **dict.fromkeys(("\\mathbbn", "all natural numbers", "natural numbers"), "the natural numbers"),
    **dict.fromkeys(("\\mathbbq", "all rational numbers", "rational numbers"), "the rational numbers"),
    **dict.fromkeys(("all complex numbers", "complex numbers"), "the complex numbers"),
    "no solutions": "\\emptyset", "no solution": "\\emptyset", "empty set": "\\emptyset", "the empty set": "\\emptyset", "\\{\\}": "\\emptyset",
    "\\{ \\}": "\\emptyset", "no real solutions": "\\emptyset", "no real solution": "\\emptyset", "dne": "does not exist", "undef": "undefined", "not defined": "undefined",
    "infinity": "\\infty", "+\\infty": "\\infty", "negative infinity": "-\\infty", "noon": "12:00 pm", "midnight": "12:00 am",
    "∅": "\\emptyset", "+infinity": "\\infty", "-infinity": "-\\infty", "infinite": "\\infty",
}  # fmt: skip


def words_of(text: str) -> str:
    """The text without \\text and the like, braces, repeated spaces and a final full stop; lower case."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = SPACES.sub(" ", _UNWRAP.sub("", text)).replace("{", "").replace("}", "").strip().strip("\"'`“”").strip()
    if "  " in text:
        text = SPACES.sub(" ", text)
    return text.rstrip(".").strip().lower()


def spelling_of(text: str) -> str:
    """What tells two texts apart that are compared as they are written: words alone, or all of a formula.

    In a formula braces and capitals carry meaning: \\frac{1}{23} is not \\frac{12}{3}, and \\Delta not \\delta.
    """
    bare = _UNWRAP.sub("", SPACES.sub(" ", _TEXT_PART.sub(r" \1 ", text)))
    if "\\" not in bare and "^" not in bare and "_" not in bare:
        return words_of(text)
    bare = bare.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _ONE_BRACED.sub(r"\1", SPACES.sub("", bare)).rstrip(".")


def without_article(words: str) -> str:
    """ "an ellipse" as "ellipse"; a lone letter stays."""
    return _ARTICLE.sub("", words)


def number_in_words(plain: str) -> int | None:
    """twelve, twenty-one, three hundred and five, two thousand; None if the words spell no whole number."""
    if plain in _NUMBER_WORDS:
        return _NUMBER_WORDS[plain]
    words = plain.replace("-", " ").split()
    if not 2 <= len(words) <= 9 or words[0] not in _NUMBER_WORDS:
        return None
    total, group, last = 0, 0, 10**9
    for number, word in enumerate(words):
        if word == "and" and 0 < number < len(words) - 1:
            continue
        if word == "hundred" and 0 < group < 10:
            group, last = group * 100, 100
        elif word in ("thousand", "million") and group:
            total, group, last = total + group * (1000 if word == "thousand" else 10**6), 0, 10**9
        elif word in _NUMBER_WORDS and (value := _NUMBER_WORDS[word]) < last and (value < 10 or last > 99) and value:
            group, last = group + value, (10 if value >= 20 and value % 10 == 0 else 1)
        else:
            return None
    return total + group


def is_wordy(text: str) -> bool:
    """Whether the text is words rather than a formula."""
    bare = re.sub(r"\\[A-Za-z]+", " ", text) if "\\" in text else text
    return "\\text" in text or "\\mbox" in text or "\\mathrm" in text or re.search(r"[A-Za-z]{3,}", bare) is not None


def read_words(text: str, read: Callable[[str], Answer]) -> Answer | None:
    """The answer, if the text is one of these; `read` reads what stands beside a choice's letter."""
    if text.isdigit():
        return None
    wordy = "\\" in text or any(c.isalpha() for c in text) or ":" in text or "_" in text
    if not wordy:
        return None
    if len(text) > MAX_WORDS:
        return None
    plain = words_of(text)
    if text in ("\\{\\}", "\\{ \\}"):
        return Words("\\emptyset")
    if plain in _REALS:
        return Reals()
    if plain in _HALF_LINES:
        return _HALF_LINES[plain]
    plain = _SYNONYMS.get(plain, plain)
    if "no " in plain and _NO_SOLUTION.match(plain):
        return Words("\\emptyset")
    if "except" in plain:
        match = _EXCEPT.match(text)
        if match:
            return Union((Reals(),), (read(match[1].rstrip("}")),))
    if "mod" in plain:
        match = _MODULO.match(text)
        if match:
            modulus = next(group for group in match.groups()[1:] if group)
            return Residue(read(match[1].replace("\\equiv", "=")), int(modulus))
    if plain in (
        "\\emptyset",
        "does not exist",
        "undefined",
        "the integers",
        "the natural numbers",
        "the rational numbers",
        "the complex numbers",
    ):
        return Words(plain)
    if plain in ("\\infty", "-\\infty"):
        return Infinite(-1 if plain[0] == "-" else 1)
    spelled_out = number_in_words(plain)
    if spelled_out is not None:
        return Expr(("num", Fraction(spelled_out)))
    if "o'clock" in plain or "noon" in plain or "midnight" in plain:
        plain = re.sub(r"^([0-9]{1,2}) ?o'clock", r"\1:00", plain)
        plain = re.sub(r"^12(?::00)? (noon|midnight)$", lambda m: f"12:00 {'p' if m[1] == 'noon' else 'a'}m", plain)
    if ":" in plain or plain.endswith("m"):
        clock = _CLOCK.match(plain)
        if clock:
            return read_clock(clock, plain)
    if "_" in text or "base" in text:
        base = base_numeral(text)
        if base is not None:
            return base
    if plain[-1:].isalpha() and plain[:1].isdigit():
        compound = units.compound(plain)
        if compound is not None:
            return Expr(("num", compound[0]), compound[1])
    cased = SPACES.sub(" ", _UNWRAP.sub("", text)).replace("{", "").replace("}", "").strip() if "\\" in text else text
    choice = _CHOICE.match(cased)
    if choice and not re.match(r"^\(?[A-J]\)\s*[-+*/^=,(]", cased):
        rest = _after_choice(text)
        if cased[0] == "(" or ")" not in cased[:3] or "(" not in cased:
            return Choice(choice.group(1), read(rest) if rest else None)
    letter = _LETTER.match(cased)
    if letter and ("\\text" in text or cased[0] == "("):
        return Choice(letter.group(1), None)
    return None


def _after_choice(text: str) -> str:
    inner = re.match(
        r"^\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{\s*\(?[A-J]\s*[).:]?\s*([^{}]*)\}\s*[).:]?\s*(.*)$",
        text,
        re.DOTALL,
    )
    if inner:
        return (inner.group(1) + " " + inner.group(2)).strip().strip("~").strip()
    return re.sub(r"^\(?[A-J]\s*[).:]\s*", "", text).strip()


def base_numeral(text: str) -> Base | None:
    """A numeral with its base: 52_8, 52_{\\text{eight}}, 52 base 8."""
    if len(text) > 400:
        return None
    cased = SPACES.sub(" ", _UNWRAP.sub("", text.replace("{,}", ""))).replace("{", "").replace("}", "").strip()
    match = _BASE.match(cased)
    if not match:
        return None
    digits, base = match.group(1) or match.group(3), match.group(2) or match.group(4)
    if digits.isalpha() and (len(digits) == 1 or base not in ("11", "12", "16", "eleven", "twelve", "sixteen")):
        return None
    number = int(base) if base.isdigit() else _NUMBER_WORDS[base]
    digits = digits.replace(" ", "").replace("(", "").upper()
    sign, digits = ("-", digits[1:]) if digits[0] == "-" else ("", digits)
    return Base(sign + (digits.lstrip("0") or "0"), number)


def is_word(tokens: list[Token]) -> bool:
    """Letters that spell a word, and are no product of variables."""
    if any(t.kind == "n" or (t.kind != "t" and not t.value.isalpha() and t.value not in "-'") for t in tokens):
        return False
    if any(t.kind == "t" for t in tokens):
        return True
    letters = "".join(t.value for t in tokens)
    if letters in ("pi", "infinity", "inf", "oo") or len(letters) < 2 or not letters[0].isalpha() or "-" in letters:
        return False
    return (
        letters.isupper()
        or (len(letters) >= 4 and list(letters) != sorted(letters))
        or (len(letters) > 2 and letters[0].isupper() and letters[1:].islower())
    )


def name_of(tokens: list[Token]) -> str | None:
    """The side of a relation as text when it is a mere name: x, x_1, f(x), AB, \\angle A, (x, y), Area."""
    text = "".join(
        (" " if t.spaced and n else "") + (f"\\text{{{t.value.strip()}}}" if t.kind == "t" else t.value)
        for n, t in enumerate(tokens)
    )
    if len(text) > 60:
        return None
    if _NAME.match(text) or _NAME_TUPLE.match(text):
        return None if text in ("e", "i") else text
    return None


def is_spelled(name: str) -> bool:
    """Names that are words or carry an angle sign, and so are no expression."""
    return (
        bool(re.search(r"\\text|\\angle|\\overline|\\triangle|\^\{-1\}|[A-Za-z]{2,}", name))
        or name.startswith("(")
        or name.startswith("P(")
    )


def read_clock(match: re.Match[str], plain: str) -> Answer:
    hour, minute = match.group(1) or match.group(4) or match.group(6), match.group(2) or match.group(5) or "00"
    half = match.group(3) or match.group(7) or ""
    minute, _, second = minute.replace(" ", "").partition(":")
    h, m = int(hour), int(minute)
    s = int(second or 0)
    if s > 59:
        return Words(plain)  # no time of day, and no ratio anyone would write so
    parts = tuple(("num", Fraction(part)) for part in ((h, m, s) if second else (h, m)))
    if h > 24 or m > 59 or (half and not 1 <= h <= 12):
        if half:
            return Words(plain)
        return Ratio(parts)
    if half:
        h = h % 12 + (12 if half == "p" else 0)
    return Ratio(parts, (h, 60 * m + s), half)
