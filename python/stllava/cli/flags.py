"""What the verbs of `stllava` share: flags made from the fields of configuration classes, and those that say which model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from .help_texts import HELP

if TYPE_CHECKING:
    from stllava.model import LlavaModel

__all__ = ["Flag", "Verbs", "add_fields", "add_flags", "base_flags", "flags_of", "given", "help_of", "load_model", "loading_flags", "model_flags",
           "parse_bool", "take_fields", "template_for"]

_ABSENT = object()

Verbs: TypeAlias = dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int | None]]]
"""Name of a verb -> (adds its flags, runs it and gives the exit code). The docstring of the first is the verb's help."""


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
    """A setting as the grammar sees it. `kind`: str, float, int or bool. `many`: takes several values; `single`: one may stand without a list.
    `hidden`: taken, but not in the help."""

    name: str
    kind: type
    many: bool = False
    single: bool = True
    default: Any = None
    required: bool = False
    hidden: bool = False


def flags_of(cls: type, skip: Sequence[str] = ()) -> list[Flag]:
    """The fields of a data class that its user may set."""
    hints, flags = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if not field.init or field.name in skip:
            continue
        options = typing.get_args(hints[field.name]) if isinstance(hints[field.name], types.UnionType) else (hints[field.name],)
        lists = [typing.get_args(option)[0] for option in options if typing.get_origin(option) is list]
        kind = next(kind for kind in (str, float, int, bool) if kind in (*options, *lists))
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = field.default if field.default is not dataclasses.MISSING else None
        flags.append(Flag(field.name, kind, bool(lists), kind in options, default, required))
    return flags


def add_flags(parser: argparse._ActionsContainer, flags: Iterable[Flag], *, required: bool = True,
              aliases: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
    """One --flag each; what is not given is not in the namespace.

    Booleans take no value (true) or true/false/yes/no/1/0; those that are true by default have a --no_NAME too. Lists take several values.
    """
    for flag in flags:
        options: dict[str, Any] = {"dest": flag.name, "required": flag.required and required, "default": argparse.SUPPRESS,
                                   "help": argparse.SUPPRESS if flag.hidden else help_of(flag)}
        if flag.kind is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            options |= {"type": flag.kind, "nargs": "+" if flag.many else None, "metavar": flag.kind.__name__.upper()}
        parser.add_argument(f"--{flag.name}", *aliases.get(flag.name, ()), **options)
        if flag.kind is bool and flag.default is True:
            parser.add_argument(f"--no_{flag.name}", dest=flag.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_fields(parser: argparse.ArgumentParser, cls: type, *, skip: Sequence[str] = ()) -> None:
    """One --flag per field of a data class."""
    add_flags(parser, flags_of(cls, skip))


def given(args: argparse.Namespace, flags: Iterable[Flag]) -> dict[str, Any]:
    """The values that the command line gives, by name."""
    values = {flag.name: getattr(args, flag.name) for flag in flags if hasattr(args, flag.name)}
    return {flag.name: value[0] if flag.many and flag.single and len(value) == 1 else value
            for flag in flags if (value := values.get(flag.name, _ABSENT)) is not _ABSENT}


def take_fields(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The given values of `cls`'s fields."""
    return given(args, flags_of(cls))


def help_of(flag: Flag) -> str:
    text = HELP.get(flag.name, "")
    default = "" if flag.required or flag.default is None else f"default {flag.default}"
    return "; ".join(part for part in (text, default) if part).replace("%", "%%")


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
