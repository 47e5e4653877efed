"""What kind of answer a text is: a number or expression, a list, a tuple or interval, a union, a matrix, a relation, a base
numeral, a time of day, a choice, or words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from plumbline.rewards import units
from plumbline.rewards.latex import Token, Unreadable, tidy, tokenize
from plumbline.rewards.parser import Node, parse

MAX_NESTING = 12
MAX_VARIANTS = 16


@dataclass(frozen=True)
class Expr:
    """One expression; `unit` as written, None when there is none."""

    node: Node
    unit: str | None = None
    unit_power: int = 1
    words: str = ""


@dataclass(frozen=True)
class Many:
    """An unordered, complete list or {set}. `braced`: written with set braces."""

    items: tuple[Answer, ...]
    braced: bool = False


@dataclass(frozen=True)
class Ordered:
    """A tuple, point, ordered list or interval: the brackets are part of the answer."""

    opening: str
    closing: str
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Union:
    """Union of sets; `removed` is taken away from it."""

    parts: tuple[Answer, ...]
    removed: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Answer, ...], ...]
    kind: str
    factor: Node | None = None


@dataclass(frozen=True)
class Relation:
    """sides[0] ops[0] sides[1] ...; `names` tells which sides are mere names, as text (None for the others)."""

    sides: tuple[Answer, ...]
    ops: tuple[str, ...]
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class Base:
    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """a:b or a:b:c. `clock`: (hour, minute) where it can be a time of day; `half`: am, pm or empty."""

    parts: tuple[Node, ...]
    clock: tuple[int, int] | None = None
    half: str = ""


@dataclass(frozen=True)
class Choice:
    letter: str
    rest: Answer | None


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Reals:
    """The real numbers."""

    name: str = field(default="R")


@dataclass(frozen=True)
class Infinite:
    sign: int


Answer = Expr | Many | Ordered | Union | Matrix | Relation | Base | Ratio | Choice | Words | Reals | Infinite

_RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\approx": "~", "\\equiv": "==", "\\notin": "!in", "\\cong": "~", "\\rightarrow": "->", "\\mapsto": "->", "\\Rightarrow": "=>", "\\propto": "~", "\\subset": "sub", "\\subseteq": "sub", "\\not": "!"}  # fmt: skip
_OPEN = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\lvert", "\\begin"}
_CLOSE = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\rvert", "\\end"}
_MATRICES = ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array", "Vmatrix")
_CLOCK = re.compile(
    r"^([0-9]{1,2}) ?: ?([0-9]{2}(?: ?: ?[0-9]{2})?)\s*([ap])\.?\s?m\.?$|^([0-9]{1,2}) ?: ?([0-9]{2}(?: ?: ?[0-9]{2})?)$|^([0-9]{1,2})\s*([ap])\.?\s?m\.?$"
)
_CHOICE = re.compile(r"^\(?([A-J])\s*[).:]\s*(.*)$", re.DOTALL)
_LETTER = re.compile(r"^\(?([A-Z])\)?$")
_BASE = re.compile(
    r"^(-?\(?[0-9A-Fa-f][0-9A-Fa-f ]*(?:\.[0-9A-Fa-f]+)?)\)?_\{?([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|sixteen)\}?$"
    r"|^(-?[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?) (?:\(?in )?base[ -]([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|sixteen)$"
)
_NUMBER_WORDS = {w: n for n, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"])}  # fmt: skip
_UNWRAP = re.compile(r"\\(?:textbf|textit|textrm|textnormal|texttt|textsf|textsc|text|mbox|mathrm|mathbf|mathit|mathsf|operatorname|emph|bf|rm|boldsymbol|hbox)(?![A-Za-z])")  # fmt: skip
_WHOLE_TEXT = re.compile(r"^\\(?:text|textbf|mathrm|mbox|textrm|textit|textnormal)\s?\{([^{}]*)\}$")
_SPACES = re.compile(r"(?:\s|~|\\[,;:! ])+")
_THOUSANDS = re.compile(r"[-+]?(?:\\dollar\s?)?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_NAME = re.compile(
    r"^(?:m?\\angle ?)?(?:\\(?:overline|triangle|vec|hat|mathbf|mathrm|widehat|mathcal)\{?)?(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|rho|tau|varphi|epsilon|ell|Delta|Omega))\}?'*"
    r"(?:_(?:\{[^{}]{1,12}\}|[A-Za-z0-9]))?'*(?:(?:\^\{-1\})?\([A-Za-z0-9,. ]{1,12}\))?$"
    r"|^(?:m?\\angle ?)?[A-Z]{1,4}$|^\\(?:overline|triangle)\{?[A-Z]{2,4}\}?$|^P\([A-Za-z ]{1,20}\)$|^\\text\{[A-Za-z .]{1,40}\}$|^[A-Za-z]{4,20}(?: [A-Za-z]{1,20}){0,4}$"
)
_NAME_TUPLE = re.compile(r"^\( ?[A-Za-z](?:_\{?[0-9a-z]\}?)?(?: ?, ?[A-Za-z](?:_\{?[0-9a-z]\}?)?)+ ?\)$")
_REALS = {"all real numbers", "all reals", "real numbers", "the real numbers", "all real number", "\\mathbb{r}", "\\reals", "\\mathbb r", "the set of all real numbers", "reals", "r (all real numbers)", "all real values"}  # fmt: skip
_SYNONYMS = {
    "no solutions": "\\emptyset", "no solution": "\\emptyset", "empty set": "\\emptyset", "the empty set": "\\emptyset", "\\{\\}": "\\emptyset",
    "\\{ \\}": "\\emptyset", "no real solutions": "\\emptyset", "no real solution": "\\emptyset", "dne": "does not exist", "undef": "undefined",
    "infinity": "\\infty", "+\\infty": "\\infty", "negative infinity": "-\\infty", "noon": "12:00 pm", "midnight": "12:00 am",
    "∅": "\\emptyset", "+infinity": "\\infty", "-infinity": "-\\infty", "infinite": "\\infty",
}  # fmt: skip


def words_of(text: str) -> str:
    """The text without \\text and the like, braces, repeated spaces and a final full stop; lower case."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _SPACES.sub(" ", _UNWRAP.sub("", text)).replace("{", "").replace("}", "").strip().strip("\"'`“”").strip()
    return text.rstrip(".").strip().lower()


def is_wordy(text: str) -> bool:
    """Whether the text is words rather than a formula."""
    bare = re.sub(r"\\[A-Za-z]+", " ", text) if "\\" in text else text
    return "\\text" in text or "\\mbox" in text or "\\mathrm" in text or re.search(r"[A-Za-z]{3,}", bare) is not None


def read(text: str, depth: int = 0) -> Answer:
    """The answer that a text is. What is no maths is Words."""
    text = tidy(text)
    try:
        return _Reader(text, depth).answer()
    except (Unreadable, RecursionError, ValueError, ZeroDivisionError, IndexError):
        return Words(words_of(text))


class _Reader:
    def __init__(self, text: str, depth: int) -> None:
        if depth > MAX_NESTING:
            raise Unreadable("nested too deeply")
        self.text, self.depth = text, depth

    def answer(self) -> Answer:
        text = self.text
        if not text:
            raise Unreadable("empty")
        whole = _WHOLE_TEXT.match(text)
        if whole and re.search(r"[0-9,;]", whole.group(1)):
            return read(whole.group(1), self.depth + 1)
        special = self.special()
        if special is not None:
            return special
        tokens = _unwrap_braces(tokenize(text))
        return self.from_tokens(tokens, text)

    def special(self) -> Answer | None:
        text = self.text
        if text.isdigit():
            return None
        wordy = "\\" in text or any(c.isalpha() for c in text) or ":" in text or "_" in text
        if not wordy:
            return None
        plain = words_of(text)
        if self.text in ("\\{\\}", "\\{ \\}"):
            return Words("\\emptyset")
        if plain in _REALS:
            return Reals()
        plain = _SYNONYMS.get(plain, plain)
        if plain in ("\\emptyset", "does not exist", "undefined"):
            return Words(plain)
        if plain in ("\\infty", "-\\infty"):
            return Infinite(-1 if plain[0] == "-" else 1)
        if plain in _NUMBER_WORDS:
            return Expr(("num", Fraction(_NUMBER_WORDS[plain])))
        if ":" in text or plain.endswith("m"):
            clock = _CLOCK.match(plain)
            if clock:
                return _clock(clock, plain)
        if "_" in text or "base" in text:
            base = self.base_numeral()
            if base is not None:
                return base
        cased = (
            _SPACES.sub(" ", _UNWRAP.sub("", text)).replace("{", "").replace("}", "").strip() if "\\" in text else text
        )
        choice = _CHOICE.match(cased)
        if choice and not re.match(r"^\(?[A-J]\)\s*[-+*/^=,(]", cased):
            rest = self.after_choice(text)
            if cased[0] == "(" or ")" not in cased[:3] or "(" not in cased:
                return Choice(choice.group(1), read(rest, self.depth + 1) if rest else None)
        letter = _LETTER.match(cased)
        if letter and ("\\text" in text or cased[0] == "("):
            return Choice(letter.group(1), None)
        return None

    def after_choice(self, text: str) -> str:
        inner = re.match(
            r"^\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{\s*\(?[A-J]\s*[).:]?\s*([^{}]*)\}\s*[).:]?\s*(.*)$",
            text,
            re.DOTALL,
        )
        if inner:
            return (inner.group(1) + " " + inner.group(2)).strip().strip("~").strip()
        return re.sub(r"^\(?[A-J]\s*[).:]\s*", "", text).strip()

    def base_numeral(self) -> Base | None:
        if len(self.text) > 400:
            return None
        cased = (
            _SPACES.sub(" ", _UNWRAP.sub("", self.text.replace("{,}", ""))).replace("{", "").replace("}", "").strip()
        )
        match = _BASE.match(cased)
        if not match:
            return None
        digits, base = match.group(1) or match.group(3), match.group(2) or match.group(4)
        if digits.isalpha():
            return None
        number = int(base) if base.isdigit() else _NUMBER_WORDS[base]
        digits = digits.replace(" ", "").replace("(", "").upper()
        sign, digits = ("-", digits[1:]) if digits[0] == "-" else ("", digits)
        return Base(sign + (digits.lstrip("0") or "0"), number)

    # -- token level --------------------------------------------------------------------------------------------

    def from_tokens(self, tokens: list[Token], text: str = "") -> Answer:
        if not tokens:
            raise Unreadable("empty")
        expanded = self.expand_signs(tokens)
        if isinstance(expanded, Many):
            return expanded
        tokens = expanded
        depth = _depths(tokens)
        relation = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.kind != "t" and t.value in _RELATIONS]
        commas = [i for i, t in enumerate(tokens) if depth[i] == 0 and _separates(t)]
        if commas and _whole_thousands(tokens, commas, text):
            return self.scalar(_join_thousands(tokens))
        if commas:
            return self.listed(tokens, commas, text)
        if relation:
            return self.relation(tokens, relation)
        return self.unrelated(tokens, depth)

    def expand_signs(self, tokens: list[Token]) -> list[Token] | Many:
        """a \\pm b as the list of its values."""
        spots = [i for i, t in enumerate(tokens) if t.value in ("\\pm", "\\mp") and t.kind == "c"]
        plus_slash = [
            i
            for i in range(len(tokens) - 2)
            if tokens[i].value == "+" and tokens[i + 1].value == "/" and tokens[i + 2].value == "-"
        ]
        if plus_slash:
            i = plus_slash[0]
            return self.expand_signs([*tokens[:i], Token("c", "\\pm", False), *tokens[i + 3 :]])
        if not spots:
            return tokens
        if (
            any(_separates(t) and d == 0 for t, d in zip(tokens, _depths(tokens), strict=True))
            or 2 ** len(spots) > MAX_VARIANTS
        ):
            if len(spots) > 4:
                raise Unreadable("too many signs")
            depth = _depths(tokens)
            pieces = [
                self.from_tokens(p)
                for p in _split(tokens, [i for i, t in enumerate(tokens) if depth[i] == 0 and _separates(t)])
                if p
            ]
            return Many(tuple(item for p in pieces for item in (p.items if isinstance(p, Many) else (p,))))
        linked = any(tokens[i].value == "\\mp" for i in spots)
        variants = []
        for number in range(2 if linked else 2 ** len(spots)):
            variant = list(tokens)
            for bit, i in enumerate(spots):
                plus = (number == 0) == (tokens[i].value == "\\pm") if linked else not number >> bit & 1
                variant[i] = Token("x", "+" if plus else "-", tokens[i].spaced)
            variants.append(self.from_tokens(variant))
        return Many(tuple(variants))

    def listed(self, tokens: list[Token], commas: list[int], text: str) -> Answer:
        pieces = _split(tokens, commas)
        # ", and" are two separators in a row; a list begins and ends with an item
        if not pieces[0] or not pieces[-1]:
            raise Unreadable("a list with an item missing")
        pieces = [piece for piece in pieces if piece]
        items: list[Answer] = []
        for piece in pieces:
            item = _Reader("", self.depth + 1).from_tokens(piece)
            items.append(item.items[0] if isinstance(item, Many) and len(item.items) == 1 and not item.braced else item)
        # "x = 1 or 2" and "a, b or c" are one flat list
        flat: list[Answer] = []
        for item in items:
            flat.extend(item.items if isinstance(item, Many) and not item.braced else (item,))
        return Many(tuple(flat))

    def relation(self, tokens: list[Token], spots: list[int]) -> Answer:
        ops: list[str] = []
        for i in spots:
            op = _RELATIONS[tokens[i].value]
            if op == "!" and i + 1 in spots:
                continue
            if i - 1 in spots and tokens[i - 1].value == "\\not":
                op = {"=": "!=", "in": "!in"}.get(op, "!" + op)
            ops.append(op)
        sides = _split(tokens, spots)
        if "\\not" in [tokens[i].value for i in spots]:
            sides = [s for n, s in enumerate(sides) if s or n in (0, len(sides) - 1)]
        if len(sides) != len(ops) + 1:
            raise Unreadable("relation")
        if not sides[0] and ops == ["="]:
            return self.from_tokens(sides[1])
        if any(not s for s in sides):
            # "\neq 4", "> 5": a relation without its left side is no number
            return Words("".join(t.value for t in tokens).lower())
        names = tuple(name_of(side) for side in sides)
        read_sides = tuple(
            Words(name)
            if name is not None and _spelled(name)
            else _Reader("", self.depth + 1).unrelated(side, _depths(side))
            for name, side in zip(names, sides, strict=True)
        )
        if any(isinstance(side, Many) and not side.braced for side in read_sides[:-1]):
            raise Unreadable("relation")
        return Relation(read_sides, tuple(ops), names)

    def unrelated(self, tokens: list[Token], depth: list[int]) -> Answer:
        if not tokens:
            raise Unreadable("empty")
        joined = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.value == "\\cup" and t.kind == "c"]
        minus = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.value == "\\setminus" and t.kind == "c"]
        if len(minus) == 1:
            whole, gone = (
                self.unrelated(tokens[: minus[0]], depth[: minus[0]]),
                self.unrelated(tokens[minus[0] + 1 :], depth[minus[0] + 1 :]),
            )
            return Union((whole,), (gone,))
        if joined:
            return Union(tuple(_Reader("", self.depth + 1).unrelated(p, _depths(p)) for p in _split(tokens, joined)))
        colons = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.value == ":" and t.kind == "x"]
        if colons:
            return Ratio(tuple(parse(p) for p in _split(tokens, colons)))
        if "".join(t.value for t in tokens) in ("\\mathbb{R}", "\\mathbbR", "\\reals"):
            return Reals()
        if tokens[0].value in "([" and tokens[-1].value in ")]" and len(tokens) > 3 and tokens[1].value == "\\begin":
            tokens = tokens[1:-1]
        if tokens[0].value == "\\begin" or (tokens[-1].value == "}" and any(t.value == "\\end" for t in tokens)):
            matrix = self.matrix(tokens)
            if matrix is not None:
                return matrix
        bracketed = self.bracketed(tokens)
        if bracketed is not None:
            return bracketed
        plain = "".join(t.value for t in tokens)
        if plain in ("\\infty", "+\\infty", "-\\infty"):
            return Infinite(-1 if plain[0] == "-" else 1)
        if plain == "\\emptyset":
            return Words("\\emptyset")
        return self.scalar(tokens)

    def matrix(self, tokens: list[Token]) -> Answer | None:
        start = next((i for i, t in enumerate(tokens) if t.value == "\\begin"), None)
        if start is None:
            return None
        kind, at = _environment(tokens, start)
        stop = max((i for i, t in enumerate(tokens) if t.value == "\\end"), default=0)
        if kind not in _MATRICES or _environment(tokens, stop) != (kind, len(tokens)):
            return None
        if kind == "array" and at < stop and tokens[at].value == "{":
            while tokens[at].value != "}":
                at += 1
            at += 1
        factor = None
        if start:
            before = tokens[:start]
            if before[-1].value == "*":
                before = before[:-1]
            if before in ([], None):
                return None
            factor = ("num", Fraction(-1)) if len(before) == 1 and before[0].value == "-" else parse(before)
        body = tokens[at:stop]
        depth = _depths(body)
        rows, row, cell = [], [], []  # type: ignore[var-annotated]
        for token, level in zip(body, depth, strict=True):
            if level == 0 and token.kind != "t" and token.value in ("&", "\\\\"):
                row.append(cell)
                cell = []
                if token.value == "\\\\":
                    rows.append(row)
                    row = []
            else:
                cell.append(token)
        if cell or row:
            rows.append([*row, cell])
        cells = tuple(tuple(_Reader("", self.depth + 1).from_tokens(c) for c in r) for r in rows)
        if len({len(r) for r in cells}) != 1:
            raise Unreadable("rows of different lengths")
        return Matrix(cells, "det" if kind == "vmatrix" else "norm" if kind == "Vmatrix" else "matrix", factor)

    def bracketed(self, tokens: list[Token]) -> Answer | None:
        """(a, b), [a, b), {a, b}, <a, b>: one bracket around the whole, with separators in it."""
        if len(tokens) > 4 and tokens[0].kind == "x" and tokens[0].value.isupper() and tokens[1].value == "(":
            tokens = tokens[1:]  # A(3,4): a point with its name
            if not any(t.value == "," and d == 1 for t, d in zip(tokens, _depths(tokens), strict=True)):
                return None
        first, last = tokens[0].value, tokens[-1].value
        if tokens[0].kind == "t" or first not in ("(", "[", "\\{", "\\langle", "]", "\\lbrace"):
            return None
        inner = tokens[1:-1]
        if first == "]" or (first in "([" and last == "[" and len(tokens) > 2):
            commas = [i for i, t in enumerate(inner) if t.value == ","]
            if len(commas) == 1 and last in ("[", "]", ")", "("):
                items = tuple(_Reader("", self.depth + 1).from_tokens(p) for p in _split(inner, commas))
                return Ordered("(" if first == "]" else first, ")" if last == "[" else last, items)
        if last not in (")", "]", "\\}", "\\rangle") or not inner:
            return None
        depth = _depths(inner)
        if any(level < 0 for level in depth):
            return None
        spots = [i for i, t in enumerate(inner) if depth[i] == 0 and _separates(t) and t.kind != "t"]
        if first == "\\{":
            if last != "\\}":
                return None
            bars = [i for i, t in enumerate(inner) if depth[i] == 0 and t.value in ("|", ":") and t.kind == "x"]
            if len(bars) == 1 and not spots:
                return _Reader("", self.depth + 1).from_tokens(inner[bars[0] + 1 :])
            members = [_Reader("", self.depth + 1).from_tokens(p) for p in _split(inner, spots) if p]
            flat = [
                f for item in members for f in (item.items if isinstance(item, Many) and not item.braced else (item,))
            ]
            return Many(tuple(flat), braced=True)
        if not spots:
            return None
        if first == "\\langle":
            first, last = "(", ")"
        return Ordered(first, last, tuple(_Reader("", self.depth + 1).from_tokens(p) for p in _split(inner, spots)))

    def scalar(self, tokens: list[Token]) -> Answer:
        """An expression with its currency sign, unit, percent or degree sign apart; or words."""
        if _is_word(tokens):
            return Words("".join((" " if t.spaced else "") + t.value for t in tokens).strip().lower())
        unit: str | None = None
        power = 1
        multiple = 1
        tokens = list(tokens)
        negative = (
            len(tokens) > 1
            and tokens[0].value == "-"
            and tokens[1].value in ("\\dollar", "\\euro", "\\pounds", "\\yen")
        )
        for at in (0, 1) if negative else (0,):
            if at < len(tokens) and tokens[at].value in ("\\dollar", "\\euro", "\\pounds", "\\yen"):
                unit = {"\\dollar": "dollar", "\\euro": "euro", "\\pounds": "gbp", "\\yen": "yen"}[tokens[at].value]
                del tokens[at]
                break
        if tokens and tokens[-1].value in ("\\dollar", "\\euro", "\\pounds", "\\yen", "\\cent"):
            unit = {"\\dollar": "dollar", "\\euro": "euro", "\\pounds": "gbp", "\\yen": "yen", "\\cent": "cent"}[
                tokens.pop().value
            ]
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
        if multiple != 1:
            node = ("mul", node, ("num", Fraction(multiple)))
        return Expr(node, unit, power, words)


def _is_word(tokens: list[Token]) -> bool:
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


def _spelled(name: str) -> bool:
    """Names that are words or carry an angle sign, and so are no expression."""
    return (
        bool(re.search(r"\\text|\\angle|\\overline|\\triangle|\^\{-1\}|[A-Za-z]{2,}", name))
        or name.startswith("(")
        or name.startswith("P(")
    )


def _clock(match: re.Match[str], plain: str) -> Answer:
    hour, minute = match.group(1) or match.group(4) or match.group(6), match.group(2) or match.group(5) or "00"
    half = match.group(3) or match.group(7) or ""
    minute, _, second = minute.replace(" ", "").partition(":")
    h, m = int(hour), int(minute)
    if second:
        return Words(f"{h}:{minute}:{second} {half}m" if half else f"{h}:{minute}:{second}")
    if h > 24 or m > 59 or (half and not 1 <= h <= 12):
        if half:
            return Words(plain)
        return Ratio((("num", Fraction(h)), ("num", Fraction(m))))
    parts = (("num", Fraction(h)), ("num", Fraction(m)))
    if half:
        h = h % 12 + (12 if half == "p" else 0)
    return Ratio(parts, (h, m), half)


def _unwrap_braces(tokens: list[Token]) -> list[Token]:
    while (
        len(tokens) > 2
        and not any(t.value in ("\\over", "\\choose") for t in tokens)
        and tokens[0].value == "{"
        and tokens[-1].value == "}"
        and all(d >= 0 for d in _depths(tokens[1:-1]))
    ):
        tokens = tokens[1:-1]
    return tokens


def _depths(tokens: list[Token]) -> list[int]:
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


def _separates(token: Token) -> bool:
    if token.kind == "t":
        return _AND.match(token.value) is not None or token.value.strip() == ","
    return token.value in (",", ";", "\\and", "\\or")


def _split(tokens: list[Token], spots: list[int]) -> list[list[Token]]:
    out, start = [], 0
    for spot in [*spots, len(tokens)]:
        out.append(tokens[start:spot])
        start = spot + 1
    return out


def _whole_thousands(tokens: list[Token], commas: list[int], text: str) -> bool:
    if any(tokens[i].value != "," or tokens[i].spaced for i in commas) or not text:
        return False
    head = re.match(_THOUSANDS, text.lstrip("\\dolar ") if text.startswith("\\dollar") else text)
    if head is None:
        return False
    return all(
        0 < i < len(tokens) - 1 and tokens[i - 1].kind == tokens[i + 1].kind == "n" and not tokens[i + 1].spaced
        and len(tokens[i + 1].value.split(".")[0]) == 3 for i in commas
    )  # fmt: skip


def _join_thousands(tokens: list[Token]) -> list[Token]:
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


def _environment(tokens: list[Token], at: int) -> tuple[str, int]:
    """(name, position after it) of \\begin{name} or \\end{name}."""
    end = at + 2
    while end < len(tokens) and tokens[end].value != "}":
        end += 1
    return "".join(t.value for t in tokens[at + 2 : end]), end + 1


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
        text += (" " if token.spaced else "") + token.value
    return _SPACES.sub(" ", text).strip(), power
