"""Pickles that hold nothing but lists, tuples, dictionaries, text and numbers: read without running them (spec 5.3).

A pickle is a program that may call anything. The opcodes that look up a name or call something do not exist here, so none of it can happen; a file
that needs one is refused. Work and memory are bounded by the file: an opcode pushes one object, and nothing is copied or walked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stllava.errors import FormatError
from stllava.limits import MAX_PICKLE_BYTES
from stllava.paths import read_regular

__all__ = ["read_plain_pickle"]

_MARK = object()
_MAX_INTEGER_BYTES = 16
_MAX_LINE = 1 << 20


def read_plain_pickle(path: str | Path) -> Any:
    """The object in a pickle of protocol 0 to 5. Raises FormatError naming the file, the byte and what stands there."""
    return _Reader(read_regular(path, MAX_PICKLE_BYTES), path).run()


class _Reader:
    def __init__(self, code: bytes, path: str | Path) -> None:
        self._code, self._path, self._at = code, path, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            while (opcode := self._take(1)) != b".":
                step = _OPCODES.get(opcode)
                if step is None:
                    raise self._fail(f"opcode {opcode!r} is not allowed")
                step(self)
            if len(self._stack) != 1 or self._stack[0] is _MARK:
                raise self._fail(f"{len(self._stack)} objects left at the end, want 1")
            return self._stack[0]
        except (IndexError, KeyError, ValueError, OverflowError, TypeError) as error:  # of a damaged program; TypeError: a list as a key
            if isinstance(error, FormatError):
                raise
            raise self._fail(f"malformed: {type(error).__name__} {error}") from error

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: pickle, byte {self._at}: {what}. Only lists, dictionaries, text and numbers are read; "
                           "a pickle is never run", path=self._path)

    def _take(self, count: int) -> bytes:
        data = self._code[self._at:self._at + count]
        if len(data) != count:
            raise self._fail("ends too early")
        self._at += count
        return data

    def _uint(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "little")

    def _line(self) -> bytes:
        end = self._code.find(b"\n", self._at, self._at + _MAX_LINE)
        if end < 0:
            raise self._fail("a line without an end")
        line = self._code[self._at:end]
        self._at = end + 1
        return line

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise self._fail("mark where a value is wanted")
        return value

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

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
        self.push(int.from_bytes(self._take(count), "little", signed=True))

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

    def remember(self, index: int) -> None:
        if self._stack[-1] is _MARK:
            raise self._fail("mark where a value is wanted")
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])




_OPCODES: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": _Reader.protocol,
    b"\x95": _Reader.frame,
    b"(": lambda r: r.push(_MARK),
    b"N": lambda r: r.push(None),
    b"\x88": lambda r: r.push(True),
    b"\x89": lambda r: r.push(False),
    b"I": _Reader.line_of_integer,
    b"L": _Reader.line_of_integer,
    b"K": lambda r: r.push(r._uint(1)),
    b"M": lambda r: r.push(r._uint(2)),
    b"J": lambda r: r.push(int.from_bytes(r._take(4), "little", signed=True)),
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
    b"\x86": lambda r: r.push((r._pop(), r._pop())[::-1]),
    b"\x87": lambda r: r.push((r._pop(), r._pop(), r._pop())[::-1]),
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
