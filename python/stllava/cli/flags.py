"""What the verbs of `stllava` share: flags made from the fields of configuration classes, and those that say which model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from stllava.model import LlavaModel

__all__ = ["Verbs", "add_fields", "base_flags", "load_model", "loading_flags", "model_flags", "parse_bool", "take_fields", "template_for"]

Verbs: TypeAlias = dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int | None]]]
"""Name of a verb -> (adds its flags, runs it and gives the exit code). The docstring of the first is the verb's help."""


def add_fields(parser: argparse.ArgumentParser, cls: type, *, skip: Sequence[str] = ()) -> None:
    """One --flag per field. Booleans take no value (true) or true/false/yes/no/1/0; lists take several values."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init or field.name in skip:
            continue
        kind, many = _kind(hints[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        options: dict[str, Any] = {"dest": field.name, "required": required, "default": argparse.SUPPRESS, "metavar": kind.__name__.upper()}
        if not required:
            options["help"] = f"default {field.default}"
        if kind is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True}
        else:
            options |= {"type": kind, "nargs": "+" if many else None}
        parser.add_argument(f"--{field.name}", **options)


def take_fields(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The given values of `cls`'s fields."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if f.init and hasattr(args, f.name)}
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in values.items()}


def _kind(hint: Any) -> tuple[type, bool]:
    """(element type, several values?) of a field's annotation: the first of str, float, int, bool it names."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    many = any(typing.get_origin(option) is list for option in options)
    flat = [typing.get_args(option)[0] if typing.get_origin(option) is list else option for option in options]
    return next(kind for kind in (str, float, int, bool) if kind in flat), many


def parse_bool(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not a truth value; use true or false")
    return values[text.lower()]


def model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", "--model_path", required=True, help="checkpoint directory, or a .gguf file")
    loading_flags(parser)


def base_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_base", help="base of an adapter directory")
    parser.add_argument("--vision_tower", help="the tower's directory, where the checkpoint does not hold it; for a .gguf file its mmproj file")


def loading_flags(parser: argparse.ArgumentParser) -> None:
    base_flags(parser)
    parser.add_argument("--dtype", default="f32", choices=("f32", "f64"))
    parser.add_argument("--num_threads", type=int, default=0, help="default: one per core")


def load_model(args: argparse.Namespace) -> LlavaModel:
    import stllava_c
    from stllava.model import LlavaModel
    if args.num_threads > 0:
        stllava_c.set_num_threads(args.num_threads)
    return LlavaModel.from_pretrained(args.model_name_or_path, args.model_base, dtype=args.dtype, vision_tower=args.vision_tower)


def template_for(args: argparse.Namespace, model: LlavaModel) -> str:
    """The template of `--conv_mode`, or the one guessed; a warning on stderr where they differ."""
    from stllava.conv_mode import choose_conv_mode, model_name_of
    from stllava.conversation import check_template
    chosen, warning = choose_conv_mode(args.conv_mode, model.config, model_name_of(args.model_name_or_path))
    if warning is not None:
        print(f"stllava {args.verb}: {warning}", file=sys.stderr)
    check_template(chosen, model.tokenizer)
    return chosen
