"""What an answer can be: the structures that reading a text yields and comparing looks at."""

from __future__ import annotations

from dataclasses import dataclass, field

from plumbline.rewards.parser import Node


@dataclass(frozen=True)
class Expr:
    """One expression; `unit` as written, None when there is none."""

    node: Node
    unit: str | None = None
    unit_power: int = 1
    words: str = ""


@dataclass(frozen=True)
class Many:
    """An unordered, complete list or {set}. `braced`: written with set braces; `joined`: "and" or "or" if these words join it."""

    items: tuple[Answer, ...]
    braced: bool = False
    joined: str = field(default="", compare=False)


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
class Meet:
    """Intersection of sets."""

    parts: tuple[Answer, ...]


@dataclass(frozen=True)
class Residue:
    """A value modulo a whole number."""

    value: Answer
    modulus: int


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
    """a:b or a:b:c. `clock`: (hour, seconds after it) where it can be a time of day; `half`: am, pm or empty."""

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


Answer = (
    Expr
    | Many
    | Ordered
    | Union
    | Meet
    | Residue
    | Matrix
    | Relation
    | Base
    | Ratio
    | Choice
    | Words
    | Reals
    | Infinite
)
