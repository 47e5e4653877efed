"""Units of measurement: what may be left out of an answer or added to it, and what contradicts."""

from __future__ import annotations

import re
from fractions import Fraction

# name -> (dimension, size in the dimension's base unit)
_BASE: dict[str, tuple[str, Fraction]] = {}


def _define(dimension: str, table: dict[str, str]) -> None:
    for size, names in table.items():
        for name in names.split():
            _BASE[name] = (dimension, Fraction(size))


_define("length", {
    "1/1000": "mm millimeter millimetre", "1/100": "cm centimeter centimetre", "1/10": "dm decimeter decimetre", "1": "m meter metre",
    "1000": "km kilometer kilometre", "127/5000": "inch inches in", "381/1250": "ft foot feet", "1143/1250": "yd yard", "201168/125": "mi mile",
})  # fmt: skip
_define("mass", {"1/1000000": "mg milligram", "1/1000": "g gm gram", "1": "kg kilogram", "1000": "tonne", "45359237/100000000": "lb lbs pound", "45359237/1600000000": "oz ounce"})  # fmt: skip
_define(
    "time",
    {
        "1/1000": "ms millisecond",
        "1": "s sec second",
        "60": "min minute",
        "3600": "h hr hour",
        "86400": "day",
        "604800": "week",
    },
)
_define("month", {"1": "month", "12": "year yr"})
_define("volume", {"1/1000": "ml mL milliliter millilitre", "1": "l L liter litre"})
_define("money", {"1/100": "cent ¢", "1": "dollar usd buck"})
_define("euro", {"1": "euro eur"})
_define("sterling", {"1": "gbp"})
_define("yen", {"1": "yen"})
_define("rupee", {"1": "rupee inr"})
_define("ringgit", {"1": "ringgit"})
_define("resistance", {"1": "ohm"})
_define("small length", {"1": "micrometer micrometre micron"})
_define("angle", {"1": "degree deg °"})
_define("radian", {"1": "radian rad"})
_define("percent", {"1": "percent %"})
_define("length/time", {"5588/12500": "mph", "5/18": "kph kmh"})
_define("pressure", {"1": "pascal"})
_define("temperature", {"1": "celsius"})
_define("fahrenheit", {"1": "fahrenheit"})
_define("energy", {"1": "joule j"})
_define("count", {"1": "unit"})

BARE = {
    "cm", "mm", "km", "kg", "mg", "ml", "mL", "ft", "lb", "lbs", "oz", "mph", "sec", "min", "hr", "hrs", "inches", "inch", "feet", "foot",
    "meters", "metres", "meter", "dollars", "dollar", "cents", "degrees", "degree", "percent", "miles", "mile", "hours", "hour", "minutes",
    "minute", "seconds", "second", "days", "day", "weeks", "week", "years", "year", "months", "units", "unit", "pounds", "grams", "liters",
    "litres", "yards", "square", "sq", "cubic", "points", "ways", "people", "students", "radians", "euros", "ounces", "kilometers", "kilograms",
    "centimeters", "millimeters", "gallons", "usd", "USD", "rupees", "ohms", "integers", "numbers", "solutions", "times", "boxes", "books", "apples", "marbles",
}  # fmt: skip
# Words that change what the number says; a tail with one of them is no unit.
_CHANGING = re.compile(
    r"\b(?:or|and|not|no|more|less|fewer|least|most|than|about|approximately|to|wrong|incorrect|false|except|if|mod|base|false|"
    r"nor|either|maybe|perhaps|possibly|unknown|above|below|over|under|around|nearly|almost|when|where|for|with|is|are|was|the|"
    r"rounded|times|half|choose|factorial|squared|cubed|negative|minus|plus|divided|multiplied|otherwise|else|only|between|through|via|"
    r"am|pm|a\.m|p\.m|remainder|(?:quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|hundredth|thousandth|millionth)s?|halves|"
    r"point|score|gross|root|power|inverse|infinity|off|past|prime$|provided|unless|given|[a-z]*illions?|lakhs?|crores?|pi|sqrt|"
    r"(?:ten|hundred|thousand|dozen)s|mil|doubled?|tripled?|halved|reciprocal|radical|log|sin|cos|tan|imaginary|complex|repeating|recurring|bar|"
    r"undefined|impossible|fails?|too|guess)\b|\?|[0-9=<>]|!"
)
# Symbols of one or two letters that are units; "5 x", "5 pi" and "5 k" are other values than 5.
_SHORT = {
    "m", "g", "s", "h", "l", "L", "N", "J", "W", "V", "A", "C", "F", "°", "%", "¢", "mm", "cm", "dm", "km", "nm", "kg", "mg", "gm",
    "ml", "mL", "dl", "dL", "cl", "cL", "kl", "kL", "ft", "in", "yd", "mi", "lb", "oz", "hr", "ms", "ns", "Hz", "Pa", "kW", "kJ", "kN", "kV",
    "mA", "mV", "mW", "cc", "pt", "qt", "sq", "cu", "th", "st", "nd", "rd", "ha", "Rs", "cd", "eV",
}  # fmt: skip
MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}


def split_tail(tail: str) -> tuple[int, str] | None:
    """(multiple, unit words) of the words after a number, None if they are no unit."""
    words = tail.strip().strip(".").strip()
    multiple = 1
    first, _, rest = words.partition(" ")
    if first.lower() in MULTIPLES:
        multiple, words = MULTIPLES[first.lower()], rest.strip()
        words = words.removeprefix("of ")
    if _CHANGING.search(words.lower()):
        return None
    if words and not re.fullmatch(r"[A-Za-z°%\u00a2 .,'/^*()-]{1,60}", words):
        return None
    if len(words) <= 2 and words and words not in _SHORT and words.lower() not in BARE:
        return None
    return multiple, words


def dimension(words: str, power: int) -> tuple[str, Fraction] | None:
    """(dimension, size) of a unit spelled in words, None if it is not a known unit."""
    text = words.strip().strip(".").strip()
    text = re.sub(r"\^\s*\{?\s*([23])\s*\}?", r" ^\1", text)
    parts = [p.strip(".") for p in text.replace("/", " / ").split()]
    kept: list[str] = []
    for part in parts:
        low = part.lower()
        if low in ("square", "sq", "squared", "^2"):
            power = 2
        elif low in ("cubic", "cu", "cubed", "^3"):
            power = 3
        else:
            kept.append(part)
    kept = ["/" if p.lower() == "per" else p for p in kept]
    if "/" in kept:
        at = kept.index("/")
        above, below = dimension(" ".join(kept[:at]), power), dimension(" ".join(kept[at + 1 :]), 1)
        if above is None or below is None:
            return None
        return f"{above[0]}/{below[0]}", above[1] / below[1]
    if len(kept) != 1:
        return None
    found = _lookup(kept[0])
    if found is None or found[0] == "count":
        return None
    name, size = found
    if power > 1 and name != "length":
        return None
    return (f"{name}^{power}" if power > 1 else name), size**power


def _lookup(word: str) -> tuple[str, Fraction] | None:
    for candidate in (word, word.lower(), word.removesuffix("s"), word.lower().removesuffix("s")):
        if candidate in _BASE:
            return _BASE[candidate]
    return None


_COMPOUND = re.compile(
    r"([0-9]+(?:\.[0-9]+)?)\s?([A-Za-z]+)\.?\s?(?:,|and|,\s?and)?\s?([0-9]+(?:\.[0-9]+)?)\s?([A-Za-z]+)\.?"
    r"(?:\s?(?:,|and|,\s?and)?\s?([0-9]+(?:\.[0-9]+)?)\s?([A-Za-z]+)\.?)?"
)


def compound(plain: str) -> tuple[Fraction, str] | None:
    """1 hour 30 minutes, 5 ft 6 in: units of one kind, each smaller than the one before, as (their sum in the last, the last).

    Args:
        plain: the text without commands and braces.
    """
    match = _COMPOUND.fullmatch(plain)
    if match is None:
        return None
    total, kind, unit = Fraction(0), "", ""
    last: Fraction | None = None
    for number, word in zip(match.groups()[::2], match.groups()[1::2], strict=True):
        if number is None:
            break
        found = dimension(word, 1)
        if found is None or (last is not None and (found[0] != kind or found[1] >= last)):
            return None
        kind, last = found
        unit, total = word, total + Fraction(number) * last
    assert last is not None
    return total / last, unit
