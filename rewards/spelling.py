"""Other spellings of the same thing, rewritten into one before tokens are read: colours and marks dropped, ordinals,
binomial coefficients as nCk, currencies and units in front, feet and inches, piecewise braces, bare "and" and "or"."""

from __future__ import annotations

import re

# Longer texts have none of these forms; it also bounds patterns that look further than one place.
MAX_LENGTH = 1000
_TEXT = r"\\(?:text|textrm|textbf|textit|mathrm|mbox|operatorname|rm)"
_ANSWER = re.compile(
    rf"^(?:{_TEXT}\s*\{{)?\s*(?:the |our |so |hence |thus )*(?:final )?answer(?: is|:| ?=)+:?\s*\}}?\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
_REMARK = re.compile(rf"(?<=[0-9}}])(?:\s|\\[,;: ])*\(\s*({_TEXT}\s?\{{[^{{}}]*\}})\s*\)$")
_POINT = re.compile(rf"^{_TEXT}\s*\{{\s*(?:(?:the|at) )*points?:? *\}}\s*(?=\()", re.IGNORECASE)
_OPTION = re.compile(
    rf"^(?:{_TEXT}\s*\{{)?\s*(?:option|choice)\s*(?:{_TEXT}\s*\{{)?\s*\(?([A-J])\)?\s*\}}?\.?$", re.IGNORECASE
)
_COLOUR = re.compile(r"\\(?:text)?color\s?(?:\[[A-Za-z]*\])?\s?\{[^{}]*\}")
_EMPTY_TEXT = re.compile(rf"{_TEXT}\s?\{{\s*\}}")
_ROW_SKIP = re.compile(r"\\\\\s?\[\s?-?[0-9.]+\s?(?:pt|em|ex|mm|cm)\s?\]")
_MARKS = re.compile(r"\\(?:checkmark|blacksquare|square|Box|qed)(?![A-Za-z])")
_ORDINAL = re.compile(
    rf"(?<=[0-9])\s?(?:\^\s?\{{\s*(?:{_TEXT}\s*\{{\s*(?:st|nd|rd|th)\s*\}}|(?:st|nd|rd|th))\s*\}}"
    rf"|\^?\s?{_TEXT}\s*\{{\s*(?:st|nd|rd|th)\s*\}}|(?:st|nd|rd|th)(?![A-Za-z]))"
)
_NCK = re.compile(
    r"(?<![A-Za-z0-9}).^_])(?:\{\})?(?:[_^]\s?(?:\{([0-9nmN]+)\}|([0-9nmN]))\s?C|([0-9]+)\s?C)\s?_\s?(?:\{([0-9kmrn]+)\}|([0-9kmrn]))(?![0-9A-Za-z])"
    r"|(?<![A-Za-z0-9}).\\])C\(\s?([0-9nmN]+)\s?,\s?([0-9kmrn]+)\s?\)"
)
_CURRENCY = re.compile(
    rf"^(-?)\s?(?:{_TEXT}\s?\{{\s?(Rs\.?|INR|RM|USD|US|EUR|GBP)\s?\}}|(Rs\.?|INR|RM|USD|US|EUR|GBP)(?=\s?(?:[0-9.]|\\dollar)))\s*(?:\\dollar\s?)?(?=[0-9.\\])"
)
_CURRENCIES = {"Rs": "\\rupee ", "INR": "\\rupee ", "RM": "\\ringgit ", "EUR": "\\euro ", "GBP": "\\pounds "}
_FRACTION_UNIT = re.compile(
    rf"(?<=[0-9}}\s])\\[dt]?frac\s?\{{\s*{_TEXT}\s?\{{([A-Za-z. ]+)\}}\s*\}}\s?\{{\s*{_TEXT}\s?\{{([A-Za-z. ]+)\}}\s*(\^\s?\{{?[23]\}}?)?\s*\}}$"
)
_CELSIUS = re.compile(
    rf"(?:\^\s?\{{\s?\\circ\s?\}}|\^\s?\\circ|\\degree)\s*(?:{_TEXT}\s?\{{\s?([CF])\s?\}}|([CF]))\s*$"
    rf"|{_TEXT}\s?\{{\s*\^\s?\\circ\s*([CF])\s*\}}\s*$"
)
_GREEK_UNIT = re.compile(
    rf"(?<=[0-9])((?:\s|\\[,;: ])*)(?:\\(Omega)|\\mu\s?(?:{_TEXT}\s?\{{\s?([msg])\s?\}}|([msg])))\s*$"
)
_ODDS = re.compile(rf"^([0-9]+)\s?(?:{_TEXT}\s?\{{\s?to\s?\}}| to )\s?([0-9]+)$")
_NPK = re.compile(r"^(?:\{\})?[_^]\s?\{?([0-9]+)\}?\s?P\s?_\s?\{?([0-9]+)\}?$")
_TIMES_TEN = re.compile(r"(?<=[0-9]) ?x ?(?=10\s?\^)")
_MINUTES = re.compile(
    r"([0-9]+)\s?\^\s?(?:\{\s?\\circ\s?\}|\\circ)\s?([0-9]+)\s?(?:'|\^\{?\\prime\}?)(?:\s?([0-9]+)\s?(?:''|\"|\^\{?\\prime\\prime\}?))?$"
)
_FEET = re.compile(r"^([0-9]+)\s?(?:'|\^\{?\\prime\}?)\s?(?:([0-9]+(?:\.[0-9]+)?)\s?(?:''|\"|\^\{\\prime\\prime\}))?$")
_INCHES = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s?(?:''|\"|\^\{\\prime\\prime\})$")
# 1.234.567 and 1'234'567, with or without decimals after a comma: at least two groups, which nothing else reads like
_POINT_GROUPS = re.compile(
    r"(?<![0-9.,'])[1-9][0-9]{0,2}(?:(?:\.[0-9]{3}){2,}|(?:'[0-9]{3}){2,})(?:(?:,|\{,\})[0-9]+)?(?![0-9.'])"
)
_DECIMAL_COMMA = re.compile(
    r"(?<![0-9}.])((?:[0-9]+(?=\{,\}(?:[0-9]{1,2}|[0-9]{4,})(?![0-9{]))|0))\{,\}([0-9]+)(?![0-9{])"
)
_BRACED_FRACTION = re.compile(r"(?<=[0-9])\s?\{(\\[dt]?frac\s?\{[0-9]+\}\s?\{[0-9]+\})\}")
_PIECEWISE = re.compile(
    r"^(.*?)\\\{\s?\\begin\s?\{(?:array|aligned|matrix)\}(?:\s?\{[lcr| @]*\})?(.*)\\end\s?\{(?:array|aligned|matrix)\}\s?$",
    re.DOTALL,
)
_BARE_JOINER = re.compile(r"(?<=[\s,;}$)\]])(and|or)(?=[\s\\($\[{])")
_TEXT_GROUP = re.compile(rf"{_TEXT}\s?\{{[^{{}}]*\}}")
_MINUS_SET = re.compile(r"(\\mathbb\s?\{?\s?R\s?\}?|\\R|\\reals)\s?(?:-|\\backslash)\s?(?=\\\{)")


def respell(text: str) -> str:
    """The text with other spellings rewritten; bounded work."""
    if len(text) > MAX_LENGTH:
        return text
    if "nswer" in text:
        text = _ANSWER.sub("", text)
    if "oint" in text:
        text = _POINT.sub("", text)
    if "ption" in text or "hoice" in text:
        text = _OPTION.sub(r"(\1)", text)
    if text[:1] in "*`\"'" and len(text) > 2:
        text = _unquoted(text)
    if "th" in text or "st" in text or "nd" in text or "rd" in text:
        text = _ORDINAL.sub("", text)
    if "C" in text:
        text = _NCK.sub(_binomial, text)
    if " to " in text:
        text = _ODDS.sub(r"\1:\2", text)
    if "10" in text and "x" in text:
        text = _TIMES_TEN.sub("\\\\times ", text)
    if text.count(".") > 1 or text.count("'") > 1:
        text = _POINT_GROUPS.sub(_ungrouped, text)
    if "{,}" in text:
        text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    if "{.}" in text:
        text = text.replace("{.}", ".")
    if "{:}" in text:
        text = text.replace("{:}", ":")
    if "P" in text:
        text = _NPK.sub(r"\\frac{\1!}{(\1-\2)!}", text)
    if "and" in text or "or" in text:
        text = _joiners(text)
    if "'" in text or '"' in text or "prime" in text:
        text = _FEET.sub(_feet, _INCHES.sub(r"\1\\text{ inches}", text))
        text = _MINUTES.sub(_minutes, text)
    if text[:1] in "-\\RIUEG":
        text = _CURRENCY.sub(_currency, text)
    if "\\" not in text:
        return text
    if text.endswith(")"):
        text = _REMARK.sub(r" \1", text)
    if "color" in text:
        text = _COLOUR.sub("", text)
    text = _EMPTY_TEXT.sub(" ", text)
    if "\\\\" in text:
        text = _ROW_SKIP.sub(r"\\\\", text)
        text = _PIECEWISE.sub(r"\1\\begin{cases}\2\\end{cases}", text)
    if "\\checkmark" in text or "quare" in text or "\\Box" in text or "\\qed" in text:
        text = _MARKS.sub("", text)
    if "frac" in text:
        text = _FRACTION_UNIT.sub(r"\\text{ \1/\2}\3", text)
        text = _BRACED_FRACTION.sub(r"\1", text)
    if "circ" in text or "degree" in text:
        text = _CELSIUS.sub(_temperature, text)
    if "\\Omega" in text or "\\mu" in text:
        text = _GREEK_UNIT.sub(_greek_unit, text)
    if "-" in text or "backslash" in text:
        text = _MINUS_SET.sub(r"\1\\setminus ", text)
    return text.strip()


def _ungrouped(match: re.Match[str]) -> str:
    return match[0].replace(".", "").replace("'", "").replace("{,}", ".").replace(",", ".")


def _unquoted(text: str) -> str:
    for mark in ("**", "*", "`", '"', "'"):
        if text.startswith(mark) and text.endswith(mark) and mark not in text[len(mark) : -len(mark)]:
            return text[len(mark) : -len(mark)].strip()
    return text


def _binomial(match: re.Match[str]) -> str:
    a = next(group for group in (match[1], match[2], match[3], match[6]) if group)
    b = next(group for group in (match[4], match[5], match[7]) if group)
    return f"\\binom{{{a}}}{{{b}}}"


def _joiners(text: str) -> str:
    """Bare " and " and " or ", outside \\text, as \\text{ and }."""
    if "\\" not in text:
        return _BARE_JOINER.sub(r"\\text{ \1 }", text)
    out, at = [], 0
    for group in _TEXT_GROUP.finditer(text):
        out += [_BARE_JOINER.sub(r"\\text{ \1 }", text[at : group.start()]), group.group()]
        at = group.end()
    return "".join([*out, _BARE_JOINER.sub(r"\\text{ \1 }", text[at:])])


def _currency(match: re.Match[str]) -> str:
    return match[1] + _CURRENCIES.get((match[2] or match[3]).rstrip("."), "\\dollar ")


def _feet(match: re.Match[str]) -> str:
    if match[2] is None:
        return f"{match[1]}\\text{{ feet}}" if "prime" not in match[0] else match[0]
    return f"{match[1]}\\text{{ feet }}{match[2]}\\text{{ inches}}"


def _minutes(match: re.Match[str]) -> str:
    """Degrees, minutes and seconds as a sum."""
    return f"({match[1]}+\\frac{{{match[2]}}}{{60}}+\\frac{{{match[3] or 0}}}{{3600}})^\\circ "


def _temperature(match: re.Match[str]) -> str:
    return "\\text{ celsius}" if "C" in (match[1], match[2], match[3]) else "\\text{ fahrenheit}"


def _greek_unit(match: re.Match[str]) -> str:
    small = {"m": "micrometer", "s": "microsecond", "g": "microgram"}
    return f"\\text{{ {'ohm' if match[2] else small[match[3] or match[4]]}}}"
