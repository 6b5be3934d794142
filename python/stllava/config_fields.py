"""What both configurations share: JSON object <-> dataclass fields, and checks whose errors name key, value and range."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from stllava.checkpoint.atomic import write_bytes
from stllava.checkpoint.strict_json import dump_object, read_object
from stllava.errors import ConfigError
from stllava.limits import MAX_NUMBER

CONFIG_FILE = "config.json"


class FileConfig:
    """Shared half of the two configurations: dictionary <-> fields, unknown keys kept in `extra`."""

    _derived: ClassVar[tuple[str, ...]] = ()  # fields that are not keys of the file
    extra: Mapping[str, Any]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """From a directory or its `config.json`. Raises ConfigError or FormatError naming file and key."""
        path = Path(path)
        file = path / CONFIG_FILE if path.is_dir() else path
        try:
            return cls.from_dict(read_object(file))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}", path=file, field=error.field) from error

    @classmethod
    def _keys(cls) -> list[str]:
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # its subclasses are dataclasses
        return [f.name for f in fields if f.name not in ("extra", *cls._derived)]

    @classmethod
    def _split(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for the constructor: known keys as fields, the rest as `extra`."""
        keys = cls._keys()
        known = {key: values[key] for key in keys if key in values}
        return {**known, "extra": {key: value for key, value in values.items() if key not in keys}}

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: every field with its resolved value, and the unknown keys as they were read."""
        return {**{key: getattr(self, key) for key in self._keys()}, **self.extra}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into an existing directory."""
        write_bytes(Path(directory) / CONFIG_FILE, dump_object(self.to_dict()))


def unsupported(where: str, key: str, value: object, supported: tuple[Any, ...]) -> ConfigError:
    wanted = ", ".join(repr(item) for item in supported)
    return ConfigError(f"{where}: {key} is {value!r}, supported: {wanted}", field=key)


def check_neutral(values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in neutral.items():
        if key in values and not any(values[key] == item and isinstance(values[key], bool) == isinstance(item, bool)
                                     for item in allowed):
            raise unsupported(where, key, values[key], allowed)


def check_integer(where: str, key: str, value: object, limit: int) -> None:
    if type(value) is not int or not 1 <= value <= limit:
        raise ConfigError(f"{where}: {key} is {value!r}, want an integer from 1 to {limit}", field=key)


def check_integers(config: object, where: str, limit: int, *keys: str) -> None:
    for key in keys:
        check_integer(where, key, getattr(config, key), limit)


def check_positive(config: object, where: str, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if type(value) not in (int, float) or not 0 < value <= MAX_NUMBER:
            raise ConfigError(f"{where}: {key} is {value!r}, want a positive number of at most {MAX_NUMBER:g}", field=key)


def check_divides(config: object, where: str, key: str, divisor: str) -> None:
    if getattr(config, key) % getattr(config, divisor):
        raise ConfigError(f"{where}: {key} {getattr(config, key)} is not a multiple of {divisor} {getattr(config, divisor)}",
                          field=key)
