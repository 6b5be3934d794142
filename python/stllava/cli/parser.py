"""The command line's grammar: underscores or dashes, no abbreviations, and every mistake answered with one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from stllava.errors import did_you_mean

__all__ = ["WRONG", "Parser", "parse"]

WRONG = 2
"""Exit code of a command line that cannot be run."""


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, without the usage before it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse's own does not know -1e-5

    def error(self, message: str) -> NoReturn:
        for kind, want in (("int", "a whole number"), ("float", "a number")):
            message = re.sub(rf"invalid {kind} value: (.*)", rf"\1 is not {want}", message)
        message = message.replace("expected one argument", "wants a value").replace("expected at least one argument", "wants a value or more")
        print(f"{self.prog}: {' '.join(message.split())} (`{self.prog} --help` lists what there is)", file=sys.stderr)
        raise SystemExit(WRONG)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices and isinstance(value, str):
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(names)}{did_you_mean(value, names)}")
        super()._check_value(action, value)


def parse(parser: Parser, verbs: dict[str, Parser], words: Sequence[str]) -> argparse.Namespace:
    """Parses `words`; a flag that nobody knows ends the program, with the nearest one that exists."""
    args, rest = parser.parse_known_args([underscores(word) for word in words])
    if rest:
        verb = getattr(args, "leaf", verbs[args.verb])  # the parser of a verb below a verb
        flag = rest[0].partition("=")[0]
        if flag.startswith("-"):
            verb.error(f"unknown flag {flag}{did_you_mean(flag, verb._option_string_actions)}")  # argparse has no other list of them
        verb.error(f"unexpected {rest[0]!r}: it belongs to no flag")
    return args


def underscores(word: str) -> str:
    """Flags are written with underscores; dashes are taken for them."""
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word
