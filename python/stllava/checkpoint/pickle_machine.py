"""What both readers of pickles stand on: bytes, a stack and a memo. No opcode here or there looks up a name or calls what a file names.

Work and memory are bounded by the pickle's length: an opcode pushes one object, nothing is copied, walked or compared recursively, and no message
prints a nested object (a memo can build one that is exponentially larger than the file).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from stllava.errors import FormatError

__all__ = ["MARK", "PickleMachine"]

MARK = object()


class PickleMachine:
    """Subclasses give the opcodes they know and what a file may hold; any other opcode is a FormatError."""

    WHERE: ClassVar[str] = "pickle"
    HOLDS: ClassVar[str]
    MAX_LINE: ClassVar[int]

    def __init__(self, code: bytes, path: str | Path) -> None:
        self._code, self._path, self._at = code, path, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def _run(self, opcodes: Mapping[bytes, Callable[[Self], None]]) -> Any:
        """The one object that is left. Raises FormatError naming the file, the byte and what stands there."""
        try:
            while (opcode := self._take(1)) != b".":
                step = opcodes.get(opcode)
                if step is None:
                    raise self._fail(f"opcode {opcode!r} is not allowed")
                step(self)
            if len(self._stack) != 1 or self._stack[0] is MARK:
                raise self._fail(f"{len(self._stack)} objects left at the end, want 1")
            return self._stack[0]
        except (IndexError, KeyError, ValueError, OverflowError, TypeError) as error:  # of a damaged program; TypeError: a list as a key
            if isinstance(error, FormatError):
                raise
            raise self._fail(f"malformed: {type(error).__name__} {error}") from error

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {self.WHERE}, byte {self._at}: {what}. Only {self.HOLDS} are read; a pickle is never run",
                           path=self._path, field=self.WHERE)

    # ---- bytes

    def _take(self, count: int) -> bytes:
        data = self._code[self._at:self._at + count]
        if len(data) != count:
            raise self._fail("ends too early")
        self._at += count
        return data

    def _uint(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "little")

    def _int(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "little", signed=True)

    def _line(self) -> bytes:
        end = self._code.find(b"\n", self._at, self._at + self.MAX_LINE)
        if end < 0:
            raise self._fail("a line without an end")
        line = self._code[self._at:end]
        self._at = end + 1
        return line

    # ---- stack and memo

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is MARK:
            raise self._fail("mark where a value is wanted")
        return value

    def _pop_several(self, count: int) -> tuple[Any, ...]:
        return tuple([self._pop() for _ in range(count)][::-1])

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (value := self._stack.pop()) is not MARK:
            items.append(value)
        return items[::-1]

    def remember(self, index: int) -> None:
        if self._stack[-1] is MARK:
            raise self._fail("mark where a value is wanted")
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])
