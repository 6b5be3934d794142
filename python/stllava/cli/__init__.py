"""`stllava VERB ...`: one verb per step. Settings are the fields of the configuration classes, so each exists once.

    parser     the grammar, and mistakes in one line       flags   flags made from fields; which model
    check      check-data
    train      sft, dpo        selftrain   ask, answer, judge, pairs        evaluate   eval
    use        chat, generate  checkpoint  inspect, merge, convert          house      doctor, demo, demo-base
    data       data describe, convert, split, sample, merge
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from stllava.checkpoint.lock import LockedError
from stllava.errors import NumericsError, StllavaError

from . import check, checkpoint, data, evaluate, house, selftrain, train, use
from .flags import Verbs
from .parser import WRONG, Parser, parse

__all__ = ["VERBS", "main"]

USE = "Research use only: not a medical device, not for diagnosis or treatment."
VERBS: Verbs = {**house.VERBS, **check.VERBS, **train.VERBS, **selftrain.VERBS, **evaluate.VERBS, **use.VERBS, **checkpoint.VERBS, **data.VERBS}
MISTAKES = (StllavaError, ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, default the program's.

    Returns:
        exit code: 0 done; 2 a mistake in the command line, the settings or the data (one line on stderr); 1 something else went wrong: no memory, no
        room on the disk, numbers that are not finite, another run at work there; 130 interrupted; 143 stopped by SIGTERM, with a checkpoint written.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="stllava", description=f"Self-training of medical vision-language models. {USE}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parsers = {name: verbs.add_parser(name, help=(add.__doc__ or "").strip().split("\n")[0], description=add.__doc__)
               for name, (add, _) in VERBS.items()}
    for name in parsers.keys() & words:  # flags come from classes whose modules need not be imported for another verb
        VERBS[name][0](parsers[name])
    args = parse(parser, parsers, words)
    args.words = words
    try:
        return VERBS[args.verb][1](args) or 0
    except KeyboardInterrupt:
        print("stllava: interrupted", file=sys.stderr)
        return 130
    except (StllavaError, OSError, ValueError, MemoryError) as error:
        print(f"stllava {args.verb}: {_text(error)}", file=sys.stderr)
        return WRONG if isinstance(error, MISTAKES) and not isinstance(error, (NumericsError, LockedError)) else 1


def _text(error: Exception) -> str:
    """One line, with the file first, whoever raised it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error) or "out of memory"
