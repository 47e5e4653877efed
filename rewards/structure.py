"""What kind of answer a text is: a number or expression, a list, a tuple or interval, a union, a matrix, a relation, a base
numeral, a time of day, a choice, or words."""

from __future__ import annotations

import re
from fractions import Fraction

from plumbline.rewards.answers import (
    Answer,
    Expr,
    Infinite,
    Many,
    Matrix,
    Meet,
    Ordered,
    Ratio,
    Reals,
    Relation,
    Union,
    Words,
)
from plumbline.rewards.grouping import (
    depths,
    environment,
    is_or,
    join_thousands,
    joiner,
    separates,
    split,
    unwrap_braces,
    whole_thousands,
)
from plumbline.rewards.latex import Token, Unreadable, tidy, tokenize
from plumbline.rewards.parser import parse
from plumbline.rewards.quantity import read_quantity
from plumbline.rewards.spelling import respell
from plumbline.rewards.wording import WHOLE_TEXT, base_numeral, is_spelled, name_of, read_words, spelling_of

MAX_NESTING = 12
MAX_VARIANTS = 16

_RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\approx": "~", "\\equiv": "==", "\\notin": "!in", "\\cong": "~", "\\rightarrow": "->", "\\mapsto": "->", "\\Rightarrow": "=>", "\\propto": "~", "\\subset": "sub", "\\subseteq": "sub", "\\not": "!"}  # fmt: skip
_REAL_NUMBERS = ("\\mathbb{R}", "\\mathbbR", "\\reals")
_OTHER_NUMBERS = {
    "\\mathbb{Z}": "the integers", "\\mathbb{N}": "the natural numbers", "\\mathbb{Q}": "the rational numbers", "\\mathbb{C}": "the complex numbers",
}  # fmt: skip
_MATRICES = ("cases", "pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array", "Vmatrix")


def read(text: str, depth: int = 0) -> Answer:
    """The answer that a text is. What is no maths is Words."""
    text = respell(tidy(text))
    try:
        return _Reader(text, depth).answer()
    except (Unreadable, RecursionError, ValueError, ZeroDivisionError, IndexError):
        return Words(spelling_of(text))


class _Reader:
    def __init__(self, text: str, depth: int) -> None:
        if depth > MAX_NESTING:
            raise Unreadable("nested too deeply")
        self.text, self.depth = text, depth

    def answer(self) -> Answer:
        text = self.text
        if not text:
            raise Unreadable("empty")
        whole = WHOLE_TEXT.match(text)
        if whole and re.search(r"[0-9,;]| and | or ", whole.group(1)):
            return read(whole.group(1), self.depth + 1)
        special = read_words(text, lambda rest: read(rest, self.depth + 1))
        if special is not None:
            return special
        tokens = unwrap_braces(tokenize(text))
        return self.from_tokens(tokens, text)

    def part(self, tokens: list[Token]) -> Answer:
        """What a part of the answer is, one level down."""
        return _Reader("", self.depth + 1).from_tokens(tokens)

    def from_tokens(self, tokens: list[Token], text: str = "") -> Answer:
        if not tokens:
            raise Unreadable("empty")
        expanded = self.expand_signs(tokens)
        if isinstance(expanded, Many):
            return expanded
        tokens = expanded
        depth = depths(tokens)
        relation = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.kind != "t" and t.value in _RELATIONS]
        commas = [i for i, t in enumerate(tokens) if depth[i] == 0 and separates(t)]
        if commas and whole_thousands(tokens, commas, text):
            return read_quantity(join_thousands(tokens))
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
            any(separates(t) and d == 0 for t, d in zip(tokens, depths(tokens), strict=True))
            or 2 ** len(spots) > MAX_VARIANTS
        ):
            if len(spots) > 4:
                raise Unreadable("too many signs")
            depth = depths(tokens)
            pieces = [
                self.from_tokens(p)
                for p in split(tokens, [i for i, t in enumerate(tokens) if depth[i] == 0 and separates(t)])
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
        sets = [variant for variant in variants if isinstance(variant, Many) and variant.braced]
        if len(sets) == len(variants):  # {\\pm 2}
            return Many(tuple(item for variant in sets for item in variant.items), braced=True)
        return Many(tuple(variants))

    def listed(self, tokens: list[Token], commas: list[int], text: str) -> Answer:
        if any(
            t.value == "," and t.kind == "x" and tokens[i + 1 : i + 2] and tokens[i + 1].spaced
            for i, t in enumerate(tokens)
            if i in commas
        ):
            # 1,000, 2,000: the commas with a space behind them separate
            tokens, commas = self.grouped(tokens, commas)
        joined = joiner(tokens, commas)
        if joined == "or":
            ways = [
                self.part(p[:-1] if p[-1].value == "," else p)
                for p in split(tokens, [i for i in commas if is_or(tokens[i])])
                if p
            ]
            if len(ways) > 1 and all(isinstance(way, Many) and not way.braced and _is_system(way) for way in ways):
                return Many(tuple(ways), joined="or")  # x=1, y=2 or x=2, y=1
        pieces = split(tokens, commas)
        # ", and" are two separators in a row; a list begins and ends with an item
        if not pieces[0] or not pieces[-1]:
            raise Unreadable("a list with an item missing")
        pieces = [piece for piece in pieces if piece]
        items: list[Answer] = []
        for piece in pieces:
            item = self.part(piece)
            items.append(item.items[0] if isinstance(item, Many) and len(item.items) == 1 and not item.braced else item)
        # "x = 1 or 2" and "a, b or c" are one flat list
        flat: list[Answer] = []
        for item in items:
            flat.extend(item.items if isinstance(item, Many) and not item.braced else (item,))
        if isinstance(flat[0], Relation) and flat[0].ops == ("!=",) and flat[0].names[0]:
            # x \\ne -2, 2
            flat = [
                Relation((flat[0].sides[0], item), ("!=",), (flat[0].names[0], None))
                if isinstance(item, Expr)
                else item
                for item in flat
            ]
        return Many(tuple(flat), joined=joined)

    def grouped(self, tokens: list[Token], commas: list[int]) -> tuple[list[Token], list[int]]:
        """Tokens with digit groups joined, and where the separators then stand."""
        inside = {
            i for i in commas
            if 0 < i < len(tokens) - 1 and tokens[i].value == "," and not tokens[i].spaced and not tokens[i + 1].spaced
            and tokens[i - 1].kind == tokens[i + 1].kind == "n" and len(tokens[i + 1].value) == 3 and tokens[i + 1].value.isdigit()
            and (len(tokens[i - 1].value) <= 3 and tokens[i - 1].value.isdigit())
        }  # fmt: skip
        if not inside:
            return tokens, commas
        out: list[Token] = []
        for i, token in enumerate(tokens):
            if i in inside:
                continue
            if i - 1 in inside:
                digits = out[-1].value + token.value
                out[-1] = Token("n", digits, out[-1].spaced, Fraction(digits))
            else:
                out.append(token)
        level = depths(out)
        return out, [i for i, t in enumerate(out) if level[i] == 0 and separates(t)]

    def relation(self, tokens: list[Token], spots: list[int]) -> Answer:
        ops: list[str] = []
        for i in spots:
            op = _RELATIONS[tokens[i].value]
            if op == "!" and i + 1 in spots:
                continue
            if i - 1 in spots and tokens[i - 1].value == "\\not":
                op = {"=": "!=", "in": "!in"}.get(op, "!" + op)
            ops.append(op)
        sides = split(tokens, spots)
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
            if name is not None and is_spelled(name)
            else _Reader("", self.depth + 1).unrelated(side, depths(side))
            for name, side in zip(names, sides, strict=True)
        )
        if any(isinstance(side, Many) and not side.braced for side in read_sides[:-1]):
            raise Unreadable("relation")
        return Relation(read_sides, tuple(ops), names)

    def unrelated(self, tokens: list[Token], depth: list[int]) -> Answer:
        if not tokens:
            raise Unreadable("empty")
        if tokens[0].kind == "n" and len(tokens) in (3, 5) and tokens[1].value == "_":
            base = base_numeral("".join(t.value for t in tokens))
            if base is not None:
                return base
        joined = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.value == "\\cup" and t.kind == "c"]
        met = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.value == "\\cap" and t.kind == "c"]
        minus = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.value == "\\setminus" and t.kind == "c"]
        if len(minus) == 1:
            whole, gone = (
                self.unrelated(tokens[: minus[0]], depth[: minus[0]]),
                self.unrelated(tokens[minus[0] + 1 :], depth[minus[0] + 1 :]),
            )
            return Union((whole,), (gone,))
        if joined:
            return Union(tuple(_Reader("", self.depth + 1).unrelated(p, depths(p)) for p in split(tokens, joined)))
        if met:
            return Meet(tuple(_Reader("", self.depth + 1).unrelated(p, depths(p)) for p in split(tokens, met)))
        colons = [i for i, t in enumerate(tokens) if depth[i] == 0 and t.value == ":" and t.kind == "x"]
        if colons:
            return Ratio(tuple(parse(p) for p in split(tokens, colons)))
        plain = "".join(t.value for t in tokens)
        if plain in _REAL_NUMBERS:
            return Reals()
        if plain in _OTHER_NUMBERS:
            return Words(_OTHER_NUMBERS[plain])
        if tokens[0].value in "([" and tokens[-1].value in ")]" and len(tokens) > 3 and tokens[1].value == "\\begin":
            tokens = tokens[1:-1]
        if tokens[0].value == "\\begin" or (tokens[-1].value == "}" and any(t.value == "\\end" for t in tokens)):
            matrix = self.matrix(tokens)
            if matrix is not None:
                return matrix
        bracketed = self.bracketed(tokens)
        if bracketed is not None:
            return bracketed
        if plain in ("\\infty", "+\\infty", "-\\infty"):
            return Infinite(-1 if plain[0] == "-" else 1)
        if plain == "\\emptyset":
            return Words("\\emptyset")
        return read_quantity(tokens)

    def matrix(self, tokens: list[Token]) -> Answer | None:
        start = next((i for i, t in enumerate(tokens) if t.value == "\\begin"), None)
        if start is None:
            return None
        kind, at = environment(tokens, start)
        stop = max((i for i, t in enumerate(tokens) if t.value == "\\end"), default=0)
        if kind not in _MATRICES or environment(tokens, stop) != (kind, len(tokens)):
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
        depth = depths(body)
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
        if kind == "cases":
            return self.cases([[_condition(c) for c in r] for r in rows])
        if kind == "array" and len(rows) == len(rows[0]) == 1:
            return self.part(rows[0][0])
        cells = tuple(tuple(self.part(c) for c in r) for r in rows)
        if len({len(r) for r in cells}) != 1:
            raise Unreadable("rows of different lengths")
        return Matrix(cells, "det" if kind == "vmatrix" else "norm" if kind == "Vmatrix" else "matrix", factor)

    def cases(self, rows: list[list[list[Token]]]) -> Answer:
        """Equations of a system, or the branches of a piecewise function, in any order."""
        if all(len(row) == 1 for row in rows):
            parts = [self.part(row[0]) for row in rows if row[0]]
            return Many(tuple(p for part in parts for p in (part.items if isinstance(part, Many) else (part,))))
        if any(len(row) != 2 for row in rows):
            raise Unreadable("a branch without its condition")
        branches = []
        for value, condition in rows:
            words = "".join(t.value for t in condition).strip().lower()
            if words in ("otherwise", "else") or any(t.kind == "t" for t in condition):
                when: Answer = Words(re.sub(r"\s+", "", words))
            else:
                when = self.part(condition)
            branches.append(Ordered("case", "case", (self.part(value), when)))
        return Many(tuple(branches), braced=True)

    def bracketed(self, tokens: list[Token]) -> Answer | None:
        """(a, b), [a, b), {a, b}, <a, b>: one bracket around the whole, with separators in it."""
        if len(tokens) > 4 and tokens[0].kind == "x" and tokens[0].value.isupper() and tokens[1].value == "(":
            tokens = tokens[1:]  # A(3,4): a point with its name
            if not any(t.value == "," and d == 1 for t, d in zip(tokens, depths(tokens), strict=True)):
                return None
        first, last = tokens[0].value, tokens[-1].value
        if tokens[0].kind == "t" or first not in ("(", "[", "\\{", "\\langle", "]", "\\lbrace"):
            return None
        inner = tokens[1:-1]
        if first == "]" or (first in "([" and last == "[" and len(tokens) > 2):
            commas = [i for i, t in enumerate(inner) if t.value == ","]
            if len(commas) == 1 and last in ("[", "]", ")", "("):
                items = tuple(self.part(p) for p in split(inner, commas))
                return Ordered("(" if first == "]" else first, ")" if last == "[" else last, items)
        if last not in (")", "]", "\\}", "\\rangle") or not inner:
            return None
        depth = depths(inner)
        if any(level < 0 for level in depth):
            return None
        spots = [i for i, t in enumerate(inner) if depth[i] == 0 and separates(t) and t.kind != "t"]
        if first == "\\{":
            if last != "\\}":
                return None
            bars = [i for i, t in enumerate(inner) if depth[i] == 0 and t.value in ("|", ":") and t.kind == "x"]
            if len(bars) == 1:
                return self.builder(inner[: bars[0]], inner[bars[0] + 1 :])
            members = [self.part(p) for p in split(inner, spots) if p]
            flat = [
                f for item in members for f in (item.items if isinstance(item, Many) and not item.braced else (item,))
            ]
            return Many(tuple(flat), braced=True)
        if not spots:
            return None
        if first == "\\langle":
            first, last = "(", ")"
        return Ordered(first, last, tuple(self.part(p) for p in split(inner, spots)))

    def builder(self, member: list[Token], condition: list[Token]) -> Answer:
        """{x | x > 2} is its condition where the member is a mere name, of a real number if anything."""
        domain = next((i for i, t in enumerate(member) if t.value == "\\in"), len(member))
        real = "".join(t.value for t in member[domain + 1 :]) in ("", *_REAL_NUMBERS)
        if real and name_of(member[:domain]) is not None:
            if domain == 1:  # the member's name is bound: any other says the same
                condition = [t._replace(value="x") if t.value == member[0].value else t for t in condition]
            return self.part(condition)
        return Ordered("{|", "|}", (self.part(member), self.part(condition)))


def _is_system(many: Many) -> bool:
    """Equations that each name another unknown."""
    names = [item.names[0] for item in many.items if isinstance(item, Relation) and item.ops == ("=",)]
    return len(many.items) > 1 and len(names) == len(many.items) == len(set(names)) and None not in names


def _condition(tokens: list[Token]) -> list[Token]:
    """A cell of \\begin{cases} without commas at its ends and words such as "if"."""
    while tokens and (
        tokens[-1].value in (",", ".", ";") or (tokens[-1].kind == "t" and tokens[-1].value.strip(" ,.;") == "")
    ):
        tokens = tokens[:-1]
    while (
        tokens and tokens[0].kind == "t" and tokens[0].value.strip(" ,").lower() in ("if", "for", "when", "where", "")
    ):
        tokens = tokens[1:]
    return tokens
