r"""Regular expressions over module names, as PEFT's `target_modules`, `exclude_modules`, `rank_pattern` and `alpha_pattern` hold them.

They come out of files, and Python's `re` can be kept busy for years by a short one such as `(a+)+$`. Here a node of the expression maps the
*set* of positions where it may begin to the set of those where it may end, as bits of an integer, so that nothing is tried twice; whether it
matches is all that is asked, so greedy and lazy are the same. Groups, alternatives, classes, repetitions, `^ $ \b \d \w \s`, lookahead and
lookbehind; back-references, flags and possessive repetitions are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from stllava.errors import ConfigError

MAX_CHARS = 4096
MAX_DEPTH = 32
MAX_REPEATS = 1000
MAX_STEPS = 200_000
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace,
    "D": lambda c: not c.isdecimal(), "W": lambda c: not (c.isalnum() or c == "_"), "S": lambda c: not c.isspace()}


@dataclass
class _Name:
    """The text that is matched. `full` has a bit for every position, the end included."""

    text: str
    n_steps: int = 0

    def __post_init__(self) -> None:
        self.full = (1 << len(self.text) + 1) - 1
        self._where: dict[Callable[[str], bool], int] = {}

    def where(self, holds: Callable[[str], bool]) -> int:
        if holds not in self._where:
            self._where[holds] = sum(1 << i for i, c in enumerate(self.text) if holds(c))
        return self._where[holds]

    def step(self) -> None:
        self.n_steps += 1
        if self.n_steps > MAX_STEPS:
            raise ConfigError(f"matching {self.text[:80]!r} takes more than {MAX_STEPS} steps")


_Node = Callable[[_Name, int], int]


def matches(expression: str, name: str) -> bool:
    """As `re.fullmatch(expression, name) is not None`. Raises ConfigError for what is no expression or not one of the kinds above."""
    try:
        text = _Name(name)
        return bool(_compiled(expression)(text, 1) >> len(name) & 1)
    except ConfigError as error:
        raise ConfigError(f"the expression {expression[:120]!r}: {error}") from error


@functools.lru_cache(maxsize=64)
def _compiled(expression: str) -> _Node:
    if len(expression) > MAX_CHARS:
        raise ConfigError(f"{len(expression)} characters, limit {MAX_CHARS}")
    return _Parser(expression).whole()


class _Parser:
    def __init__(self, expression: str) -> None:
        self._rest = expression
        self._depth = 0

    def whole(self) -> _Node:
        node = self._alternatives()
        if self._rest:
            raise ConfigError("a ')' without its '('")
        return node

    def _take(self, *beginnings: str) -> str:
        """Removes and returns the first of `beginnings` that comes next, or ""."""
        found = next((text for text in beginnings if self._rest.startswith(text)), "")
        self._rest = self._rest.removeprefix(found)
        return found

    def _next(self) -> str:
        if not self._rest:
            raise ConfigError("it ends too early")
        c, self._rest = self._rest[0], self._rest[1:]
        return c

    def _alternatives(self) -> _Node:
        nodes = [self._sequence()]
        while self._take("|"):
            nodes.append(self._sequence())
        return nodes[0] if len(nodes) == 1 else _either(nodes)

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        while self._rest and self._rest[0] not in "|)":
            nodes.append(self._repeated(self._atom()))
        return _one_after_another(nodes)

    def _repeated(self, node: _Node) -> _Node:
        sign = self._take("*", "+", "?", "{")
        if not sign:
            return node
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign) or self._counts()
        self._take("?")  # lazy: the same names
        if self._rest[:1] in ("*", "+", "?", "{"):
            raise ConfigError("a repetition of a repetition")
        return _repeat(node, low, high)

    def _counts(self) -> tuple[int, int | None]:
        inside, closed, self._rest = self._rest.partition("}")
        low, comma, high = inside.partition(",")
        numbers = [int(text) if text.isdecimal() and len(text) < 5 else -1 for text in (low or "0", high or low or "0")]
        if not closed or min(numbers) < 0 or max(numbers) > MAX_REPEATS or (high and numbers[0] > numbers[1]) or not (low or high):
            raise ConfigError(f"{{{inside[:20]}}} is no repetition of at most {MAX_REPEATS}")
        return numbers[0], None if comma and not high else numbers[1]

    def _atom(self) -> _Node:
        c = self._next()
        if c == "(":
            return self._group()
        if c == "[":
            return _one_of(self._class())
        if c == "^":
            return lambda name, starts: starts & 1
        if c == "$":
            return lambda name, starts: starts & 1 << len(name.text)
        if c in "*+?{":
            raise ConfigError(f"{c!r} without what it repeats")
        if c == ".":
            return _one_of(lambda c: c != "\n")
        if c != "\\":
            return _one_of(c.__eq__)
        if (edge := self._take("b", "B", "A", "Z")) in ("A", "Z"):
            return lambda name, starts: starts & (1 if edge == "A" else 1 << len(name.text))
        return _word_edge(edge == "b") if edge else _one_of(self._escaped())

    def _escaped(self) -> Callable[[str], bool]:
        c = self._next()
        if c in _CLASSES:
            return _CLASSES[c]
        if c.isalnum():
            raise ConfigError(f"\\{c} is not supported")
        return c.__eq__

    def _class(self) -> Callable[[str], bool]:
        negated = bool(self._take("^"))
        members: list[Callable[[str], bool]] = []
        while not members or not self._take("]"):
            c = self._next()
            if c == "\\":
                members.append(self._escaped())
            elif self._rest[:1] == "-" and self._rest[1:2] not in ("]", "\\", ""):
                self._next()
                low, high = c, self._next()
                members.append(functools.partial(_between, low, high))
            else:
                members.append(c.__eq__)
        return lambda c: any(member(c) for member in members) != negated

    def _group(self) -> _Node:
        kind = self._take("?:", "?P<", "?<=", "?<!", "?=", "?!", "?")
        if kind == "?":
            raise ConfigError(f"(?{self._rest[:1]} is not supported")
        if kind == "?P<":
            self._rest = self._rest.partition(">")[2]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"more than {MAX_DEPTH} groups inside each other")
        node = self._alternatives()
        if not self._take(")"):
            raise ConfigError("a '(' without its ')'")
        self._depth -= 1
        return _look(node, behind="<" in kind, negated="!" in kind) if kind in ("?=", "?!", "?<=", "?<!") else node


def _between(low: str, high: str, c: str) -> bool:
    return low <= c <= high


def _one_of(holds: Callable[[str], bool]) -> _Node:
    def node(name: _Name, starts: int) -> int:
        name.step()
        return (starts & name.where(holds)) << 1
    return node


def _one_after_another(nodes: list[_Node]) -> _Node:
    return lambda name, starts: functools.reduce(lambda at, node: node(name, at) if at else 0, nodes, starts)


def _either(nodes: list[_Node]) -> _Node:
    return lambda name, starts: functools.reduce(lambda found, node: found | node(name, starts), nodes, 0)


def _repeat(node: _Node, low: int, high: int | None) -> _Node:
    def repeat(name: _Name, starts: int) -> int:
        for _ in range(low):
            before, starts = starts, node(name, starts)
            if starts == before:  # so it stays for all further rounds
                break
        found = fresh = starts
        rounds = 0
        while fresh and (high is None or rounds < high - low):
            fresh = node(name, fresh) & ~found
            found |= fresh
            rounds += 1
        return found
    return repeat


def _look(node: _Node, behind: bool, negated: bool) -> _Node:
    def ahead(name: _Name, at: int) -> bool:
        return node(name, 1 << at) != 0

    def back(name: _Name, at: int) -> bool:
        return bool(node(name, (1 << at + 1) - 1) >> at & 1)

    def look(name: _Name, starts: int) -> int:
        holds = back if behind else ahead
        return sum(1 << at for at in range(len(name.text) + 1) if starts >> at & 1 and holds(name, at) != negated)
    return look


def _word_edge(wanted: bool) -> _Node:
    def edge(name: _Name, starts: int) -> int:
        word = name.where(_CLASSES["w"])
        edges = word ^ word << 1
        return starts & (edges if wanted else name.full & ~edges)
    return edge
