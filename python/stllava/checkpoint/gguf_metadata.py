"""Keys of a GGUF file as settings: typed, in range, and none overlooked that changes the maths."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from stllava.checkpoint.gguf_container import GgufFile, Value
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_NUMBER

_MISSING = object()


def check_architecture(file: GgufFile, wanted: str) -> None:
    found = file.metadata.get("general.architecture")
    if found != wanted:
        raise ConfigError(f"{file.path}: general.architecture is {found!r}, supported here: {wanted!r}", path=file.path, field="general.architecture")


def refuse_other_keys(file: GgufFile, prefix: str, known: Collection[str]) -> None:
    """ConfigError for a key of the architecture that is not in `known`: nobody here can tell what it does."""
    for key in file.metadata:
        if key.startswith(prefix) and key.removeprefix(prefix) not in known:
            raise ConfigError(f"{file.path}: {key} = {str(file.metadata[key])[:80]} is not implemented, and may change the result", path=file.path,
                              field=key)


def check_neutral(file: GgufFile, prefix: str, neutral: Mapping[str, tuple[Value, ...]]) -> None:
    """ConfigError for a key whose value is none of `neutral`; an empty tuple allows any value."""
    for name, allowed in neutral.items():
        value = file.metadata.get(prefix + name)
        if value is not None and allowed and (isinstance(value, np.ndarray) or value not in allowed):
            raise ConfigError(f"{file.path}: {prefix + name} is {str(value)[:80]}, supported: {', '.join(map(repr, allowed))}", path=file.path,
                              field=prefix + name)


def _get(file: GgufFile, key: str, default: object) -> object:
    value = file.metadata.get(key, default)
    if value is _MISSING:
        raise FormatError(f"{file.path}: key {key} is missing", path=file.path, field=key)
    return value


def integer(file: GgufFile, key: str, limit: int, default: object = _MISSING) -> int:
    """The key's value, from 1 to `limit`. Raises FormatError."""
    value = _get(file, key, default)
    if type(value) is not int or not 1 <= value <= limit:
        raise FormatError(f"{file.path}: {key} is {str(value)[:80]}, want an integer from 1 to {limit}", path=file.path, field=key)
    return value


def number(file: GgufFile, key: str, default: object = _MISSING) -> float:
    """The key's value, positive; a float32 as the shortest decimal that stands for it, since 1e-5 is what was meant. Raises FormatError."""
    value = _get(file, key, default)
    if type(value) not in (int, float) or not 0 < value <= MAX_NUMBER:  # type: ignore[operator]
        raise FormatError(f"{file.path}: {key} is {str(value)[:80]}, want a positive number of at most {MAX_NUMBER:g}", path=file.path, field=key)
    with np.errstate(all="ignore"):
        short = np.float32(value)  # type: ignore[arg-type]
    return float(str(short)) if float(short) == value else float(value)  # type: ignore[arg-type]


def boolean(file: GgufFile, key: str, default: bool) -> bool:
    """The key's value. Raises FormatError."""
    value = file.metadata.get(key, default)
    if type(value) is not bool:
        raise FormatError(f"{file.path}: {key} is {str(value)[:80]}, want true or false", path=file.path, field=key)
    return value
