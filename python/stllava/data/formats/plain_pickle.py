"""Pickles that hold nothing but lists, tuples, dictionaries, text and numbers: read without running them (spec 5.3).

A pickle is a program that may call anything. The opcodes that look up a name or call something do not exist here, so none of it can happen; a file
that needs one is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stllava.checkpoint.pickle_machine import MARK, PickleMachine
from stllava.limits import MAX_PICKLE_BYTES
from stllava.paths import read_regular

__all__ = ["read_plain_pickle"]

_MAX_INTEGER_BYTES = 16


def read_plain_pickle(path: str | Path) -> Any:
    """The object in a pickle of protocol 0 to 5. Raises FormatError naming the file, the byte and what stands there."""
    return _Reader(read_regular(path, MAX_PICKLE_BYTES), path).run()


class _Reader(PickleMachine):
    HOLDS, MAX_LINE = "lists, dictionaries, text and numbers", 1 << 20

    def run(self) -> Any:
        return self._run(_OPCODES)

    # ---- what the opcodes do, in the order of the table

    def protocol(self) -> None:
        if (version := self._uint(1)) > 5:
            raise self._fail(f"pickle protocol {version}, want at most 5")

    def frame(self) -> None:
        """Says how much a reader may read at once, and nothing else."""
        self._take(8)

    def text(self, n_bytes: int) -> None:
        self.push(self._take(self._uint(n_bytes)).decode("utf-8"))

    def line_of_text(self) -> None:
        self.push(self._line().decode("raw-unicode-escape"))

    def quoted(self) -> None:
        """Python 2's str, as repr writes it."""
        line = self._line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise self._fail("text without quotes")
        self.push(line[1:-1].decode("unicode-escape").encode("latin-1").decode("utf-8"))

    def line_of_integer(self) -> None:
        line = self._line().removesuffix(b"L")
        if len(line) > 2 * _MAX_INTEGER_BYTES:
            raise self._fail(f"an integer of {len(line)} digits")
        self.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def long(self, n_bytes: int) -> None:
        if (count := self._uint(n_bytes)) > _MAX_INTEGER_BYTES:
            raise self._fail(f"an integer of {count} bytes")
        self.push(self._int(count))

    def float_of(self, value: float) -> None:
        if value - value != 0:
            raise self._fail(f"the number {value}")
        self.push(value)

    def append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise self._fail("items appended to something that is not a list")
        self._stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict) or len(items) % 2:
            raise self._fail("items set on something that is not a dictionary")
        self._stack[-1].update(self.dictionary(items))

    def dictionary(self, items: list[Any]) -> dict[Any, Any]:
        keys = items[::2]
        if len(items) % 2 or not all(isinstance(key, (str, int, float)) for key in keys):  # a tuple's hash would walk through all it holds
            raise self._fail("a key that is neither text nor a number")
        return dict(zip(keys, items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])


_OPCODES: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": _Reader.protocol,
    b"\x95": _Reader.frame,
    b"(": lambda r: r.push(MARK),
    b"N": lambda r: r.push(None),
    b"\x88": lambda r: r.push(True),
    b"\x89": lambda r: r.push(False),
    b"I": _Reader.line_of_integer,
    b"L": _Reader.line_of_integer,
    b"K": lambda r: r.push(r._uint(1)),
    b"M": lambda r: r.push(r._uint(2)),
    b"J": lambda r: r.push(r._int(4)),
    b"\x8a": lambda r: r.long(1),
    b"\x8b": lambda r: r.long(4),
    b"F": lambda r: r.float_of(float(r._line())),
    b"G": lambda r: r.float_of(*struct.unpack(">d", r._take(8))),
    b"V": _Reader.line_of_text,
    b"X": lambda r: r.text(4),
    b"\x8c": lambda r: r.text(1),
    b"\x8d": lambda r: r.text(8),
    b"S": _Reader.quoted,
    b"T": lambda r: r.text(4),
    b"U": lambda r: r.text(1),
    b"]": lambda r: r.push([]),
    b"}": lambda r: r.push({}),
    b")": lambda r: r.push(()),
    b"l": lambda r: r.push(r._pop_to_mark()),
    b"d": lambda r: r.push(r.dictionary(r._pop_to_mark())),
    b"t": lambda r: r.push(tuple(r._pop_to_mark())),
    b"\x85": lambda r: r.push((r._pop(),)),
    b"\x86": lambda r: r.push(r._pop_several(2)),
    b"\x87": lambda r: r.push(r._pop_several(3)),
    b"a": lambda r: r.append([r._pop()]),
    b"e": lambda r: r.append(r._pop_to_mark()),
    b"s": _Reader.set_item,
    b"u": lambda r: r.set_items(r._pop_to_mark()),
    b"p": lambda r: r.remember(int(r._line())),
    b"q": lambda r: r.remember(r._uint(1)),
    b"r": lambda r: r.remember(r._uint(4)),
    b"\x94": lambda r: r.remember(len(r._memo)),
    b"g": lambda r: r.recall(int(r._line())),
    b"h": lambda r: r.recall(r._uint(1)),
    b"j": lambda r: r.recall(r._uint(4)),
}
