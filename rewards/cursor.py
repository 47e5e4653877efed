"""Walking over tokens: looking ahead, taking, names with their subscripts and primes."""

from __future__ import annotations

from collections.abc import Callable

from plumbline.rewards.latex import Token, Unreadable

Node = tuple
MAX_DEPTH = 60


class Cursor:
    """A place in a list of tokens."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> Token | None:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else None

    def see(self, *values: str) -> bool:
        token = self.peek()
        return token is not None and token.kind != "t" and token.value in values

    def take(self, value: str) -> None:
        if not self.see(value):
            raise Unreadable(f"expected {value!r}")
        self.at += 1

    def degree(self) -> bool:
        if self.see("\\circ"):
            self.at += 1
            return True
        ahead = [self.peek(0), self.peek(1), self.peek(2)]
        if [t.value if t else "" for t in ahead] in (["{", "\\circ", "}"], ["{", "o", "}"]):
            self.at += 3
            return True
        return False

    def nested(self, read: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        value = read()
        self.depth -= 1
        return value

    def symbol(self, name: str) -> Node:
        while self.see("'"):
            self.at += 1
            name += "'"
        if self.see("_"):
            self.at += 1
            name += "_" + self.subscript()
        while self.see("'"):
            self.at += 1
            name += "'"
        return ("sym", name)

    def subscript(self) -> str:
        token = self.peek()
        if token is None:
            raise Unreadable("a subscript is missing")
        self.at += 1
        if token.value != "{":
            return token.value
        depth, parts = 1, []
        while depth:
            token = self.peek()
            if token is None:
                raise Unreadable("braces do not match")
            self.at += 1
            if token.kind != "t":
                depth += {"{": 1, "}": -1}.get(token.value, 0)
            if depth:
                parts.append(token.value.strip())
        return "".join(parts)
