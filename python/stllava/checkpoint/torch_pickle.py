"""The pickle inside torch `.bin` files: read without running it, and written.

A pickle is a program. `_Program` runs only the opcodes that a dictionary of tensors needs, knows three kinds of names
(OrderedDict, _rebuild_tensor_v2, the storage classes), and calls nothing: every "call" is one of the two constructions
written here. There is no fall-back to a real unpickler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stllava.checkpoint.pickle_machine import MARK, PickleMachine
from stllava.checkpoint.tensor_file import NUMPY_DTYPES, Tensor, dtype_name, is_shape, is_size
from stllava.limits import MAX_RANK

_STORAGES = {"f64": "DoubleStorage", "f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage",
             "i64": "LongStorage", "i32": "IntStorage", "i16": "ShortStorage", "i8": "CharStorage", "u8": "ByteStorage",
             "bool": "BoolStorage"}
_DTYPE_OF_STORAGE = {f"torch {storage}": name for name, storage in _STORAGES.items()}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD = "torch._utils _rebuild_tensor_v2"


StorageReader = Callable[[str, np.dtype, int], np.ndarray]


def parse(code: bytes, path: Path, storage: StorageReader) -> Any:
    """The object a pickle describes; `storage(key, dtype, count)` gives the flat array of a storage.

    Tensors come out as read-only strided views. Raises FormatError (naming `path`) for every opcode, name or construction
    that a dictionary of tensors does not need.
    """
    return _Program(code, path, storage).run()


@dataclass(frozen=True)
class _Global:
    """A name of the pickle, e.g. 'torch FloatStorage': never looked up, only compared."""

    name: str


class _Program(PickleMachine):
    """Interpreter for the opcodes that a dictionary of tensors needs; anything else is a FormatError. Dictionary keys must be strings."""

    WHERE, HOLDS, MAX_LINE = "data.pkl", "dictionaries of tensors", 256

    def __init__(self, code: bytes, path: Path, storage: StorageReader) -> None:
        super().__init__(code, path)
        self._storage = storage

    def run(self) -> Any:
        return self._run(_OPCODES)

    def _protocol(self) -> None:
        if (version := self._uint(1)) != 2:
            raise self._fail(f"pickle protocol {version}, want 2")

    def _global(self) -> None:
        name = f"{self._line().decode('ascii')} {self._line().decode('ascii')}"
        if name not in (_ORDERED_DICT, _REBUILD) and name not in _DTYPE_OF_STORAGE:
            raise self._fail(f"name {name!r} is not allowed")
        self.push(_Global(name))

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise self._fail("items set on something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self._fail(f"key of type {type(key).__name__}, want a string")
            if key in target:
                raise self._fail(f"duplicate key {key!r}")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _build(self) -> None:
        """A module's state_dict carries its version table as an attribute (`_metadata`); weights do not depend on it."""
        state = self._pop()
        if not isinstance(state, dict) or not isinstance(self._stack[-1], dict):
            raise self._fail("state set on something that is not a dictionary")

    def _persistent(self) -> None:
        """('storage', storage class, key, device, count) -> flat array."""
        match self._pop():  # types first: compared with a string, an array is neither true nor false
            case (str(kind), _Global(name), str(key), str(_), int(count)) if kind == "storage" and name in _DTYPE_OF_STORAGE and count >= 0:
                self.push(self._storage(key, NUMPY_DTYPES[_DTYPE_OF_STORAGE[name]], count))
            case other:
                raise self._fail(f"persistent object of type {type(other).__name__} is not a storage")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise self._fail("call of something that is not a name")
        if function.name == _ORDERED_DICT and arguments == ():
            self.push({})
        elif function.name == _REBUILD:
            self.push(self._tensor(arguments))
        else:
            raise self._fail(f"call of {function.name!r} is not allowed")

    def _tensor(self, arguments: tuple[Any, ...]) -> np.ndarray:
        """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks) -> view on the storage."""
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], np.ndarray):
            raise self._fail("tensor with unknown arguments")
        storage, offset, size, stride = arguments[:4]
        if not (_is_sizes(size) and _is_sizes(stride) and _is_sizes((offset,)) and len(size) == len(stride) and is_shape(size)):
            raise self._fail(f"tensor whose size, stride or offset is not made of non-negative integers, rank at most {MAX_RANK}")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
        if last >= storage.size or count > storage.size:
            raise self._fail(f"tensor of size {size} at {offset} does not fit its storage of {storage.size} values")
        byte_strides = tuple(step * storage.itemsize if n > 1 and count else 0 for n, step in zip(size, stride, strict=True))
        return np.lib.stride_tricks.as_strided(storage[offset:], size, byte_strides, writeable=False)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(is_size, value))


_OPCODES: dict[bytes, Callable[[_Program], None]] = {
    b"\x80": _Program._protocol,
    b"}": lambda p: p.push({}),
    b"(": lambda p: p.push(MARK),
    b")": lambda p: p.push(()),
    b"N": lambda p: p.push(None),
    b"\x88": lambda p: p.push(True),
    b"\x89": lambda p: p.push(False),
    b"K": lambda p: p.push(p._uint(1)),
    b"M": lambda p: p.push(p._uint(2)),
    b"J": lambda p: p.push(p._int(4)),
    b"\x8a": lambda p: p.push(p._int(p._uint(1))),
    b"X": lambda p: p.push(p._take(p._uint(4)).decode("utf-8")),
    b"t": lambda p: p.push(tuple(p._pop_to_mark())),
    b"\x85": lambda p: p.push((p._pop(),)),
    b"\x86": lambda p: p.push(p._pop_several(2)),
    b"\x87": lambda p: p.push(p._pop_several(3)),
    b"c": _Program._global,
    b"Q": _Program._persistent,
    b"R": _Program._reduce,
    b"b": _Program._build,
    b"s": _Program._set_item,
    b"u": lambda p: p._set_items(p._pop_to_mark()),
    b"q": lambda p: p.remember(p._uint(1)),
    b"r": lambda p: p.remember(p._uint(4)),
    b"h": lambda p: p.recall(p._uint(1)),
    b"j": lambda p: p.recall(p._uint(4)),
}


def dump(tensors: Mapping[str, Tensor]) -> bytes:
    """Pickle of a dictionary of contiguous tensors; tensor k lies at the start of storage "k"."""
    code = bytearray(b"\x80\x02}(")
    for key, (name, array) in enumerate(tensors.items()):
        storage = _STORAGES[dtype_name(array)]
        strides = [math.prod(array.shape[axis + 1:]) for axis in range(array.ndim)]
        code += _text(name) + f"c{_REBUILD.replace(' ', chr(10))}\n((".encode()
        code += _text("storage") + f"ctorch\n{storage}\n".encode() + _text(str(key)) + _text("cpu") + _integer(array.size)
        code += b"tQ" + _integer(0) + b"(" + b"".join(map(_integer, array.shape)) + b"t"
        code += b"(" + b"".join(map(_integer, strides)) + b"t"
        code += b"\x89" + f"c{_ORDERED_DICT.replace(' ', chr(10))}\n".encode() + b")RtR"
    return bytes(code + b"u.")


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return b"X" + len(data).to_bytes(4, "little") + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x08" + value.to_bytes(8, "little")
