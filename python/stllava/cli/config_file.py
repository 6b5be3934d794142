"""`--config FILE`: settings from a TOML, JSON or YAML file, under the names of the flags."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stllava.checkpoint import strict_json
from stllava.errors import ConfigError, FormatError, did_you_mean
from stllava.limits import MAX_JSON_BYTES
from stllava.paths import read_regular

from .flags import Flag, parse_bool

__all__ = ["read_config"]


def read_config(path: str, flags: Iterable[Flag]) -> dict[str, Any]:
    """The settings of a file, by name; dashes for underscores are taken, null leaves a setting as it is.

    Raises:
        ConfigError, FormatError: naming file and key; FileNotFoundError.
    """
    known = {flag.name: flag for flag in flags if flag.name != "config"}
    values = {}
    for key, value in _read(Path(path)).items():
        name = str(key).replace("-", "_")
        if isinstance(value, dict) and name != "lr_scheduler_kwargs":
            raise ConfigError(f"{path}: {key} is a table; write its settings at the top level", path=path, field=str(key))
        if name not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{did_you_mean(name, known)}", path=path, field=str(key))
        if value is not None:
            values[name] = _convert(known[name], value, f"{path}: {key}")
    return values


def _read(path: Path) -> dict[str, Any]:
    kind = path.suffix.lower()
    if kind not in (".toml", ".json", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a configuration is named .toml, .json or .yaml, this {kind or 'has no ending'}", path=path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if kind == ".json":
        return strict_json.read_object(path)
    try:
        text = read_regular(path, MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8: {error}", path=path) from error
    if kind == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise FormatError(f"{path}: not TOML: {error}", path=path) from error
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(f"{path}: YAML needs PyYAML: pip install 'stllava[yaml]', or write it as .toml or .json", path=path) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FormatError(f"{path}: not YAML: {' '.join(str(error).split())}", path=path) from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: want a mapping of settings, found {type(content).__name__}", path=path)
    return content


def _convert(flag: Flag, value: Any, where: str) -> Any:
    if isinstance(value, list):
        if not flag.many:
            raise ConfigError(f"{where} is a list, want {_WANT[flag.kind]}", field=flag.name)
        return [_one(flag, element, where) for element in value]
    if isinstance(value, dict) and flag.name == "lr_scheduler_kwargs":
        return json.dumps(value)
    one = _one(flag, value, where)
    return one if flag.single else [one]


def _one(flag: Flag, value: Any, where: str) -> Any:
    """A value as the command line would make it of the same word; YAML reads 2e-5 as a text."""
    if isinstance(value, str) and flag.kind is not str:
        try:
            return parse_bool(value) if flag.kind is bool else flag.kind(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ConfigError(f"{where} is {value!r}, want {_WANT[flag.kind]}", field=flag.name) from error
    if flag.kind is float and type(value) is int:
        return float(value)
    if flag.kind is str and type(value) in (int, float, bool):
        return str(value)
    if type(value) is not flag.kind:
        raise ConfigError(f"{where} is {value!r}, want {_WANT[flag.kind]}", field=flag.name)
    return value


_WANT = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
