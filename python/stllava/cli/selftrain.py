"""`stllava ask | answer | judge | pairs`: the steps between the two stages, each a file that the next reads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .flags import Verbs, add_fields, load_model, model_flags, take_fields

__all__ = ["VERBS"]


def _step_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    parser.add_argument("--out", required=True, help="JSON lines; continued if it exists")
    add_fields(parser, settings)


def _rows(path: str, source: str, **fields: type) -> list[dict[str, Any]]:
    """The lines of a file that another step wrote. Raises FormatError naming the line and what it lacks."""
    from stllava.data.records import read_jsonl
    from stllava.errors import FormatError
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        want = f"want the output of {source}, JSON lines of {{{', '.join(fields)}}}"
        if not isinstance(row, dict):
            raise FormatError(f"{path}: line {number} is a {type(row).__name__}; {want}", path=path)
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise FormatError(f"{path}: line {number}: {name} is {'missing' if name not in row else 'a ' + type(row[name]).__name__}; {want}",
                                  path=path, field=name)
    if not rows:
        raise FormatError(f"{path}: is empty; want the output of {source}", path=path)
    return rows


def _folder(path: str) -> str:
    if not Path(path).exists():
        raise FileNotFoundError(f"image_folder {path}: no such folder or archive")
    return path


def add_ask(parser: argparse.ArgumentParser) -> None:
    """Self-training, step A: describe images, ask questions about them."""
    from stllava.selftrain.ask import AskSettings
    model_flags(parser)
    parser.add_argument("--image_folder", required=True, help="a folder, or a zip or tar archive")
    _step_flags(parser, AskSettings)


def run_ask(args: argparse.Namespace) -> None:
    from stllava.data.image_store import IMAGE_SUFFIXES, ImageStore
    from stllava.selftrain.ask import AskSettings, ask
    store = ImageStore(_folder(args.image_folder))
    if not (names := store.names()):
        raise ValueError(f"{args.image_folder}: no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}; archives are looked into)")
    ask(load_model(args), [(name, store.source(name)) for name in names], AskSettings(**take_fields(args, AskSettings)), out=args.out)


def add_answer(parser: argparse.ArgumentParser) -> None:
    """Self-training, step B: answer every question several times."""
    from stllava.selftrain.answer import AnswerSettings
    model_flags(parser)
    parser.add_argument("--questions", required=True, help="output of `stllava ask`")
    parser.add_argument("--image_folder", required=True, help="a folder, or a zip or tar archive")
    _step_flags(parser, AnswerSettings)


def run_answer(args: argparse.Namespace) -> None:
    from stllava.data.image_store import ImageStore
    from stllava.selftrain.answer import AnswerSettings, answer
    settings = AnswerSettings(**take_fields(args, AnswerSettings))
    asked = _rows(args.questions, "stllava ask", id=str, questions=list)
    answer(load_model(args), asked, ImageStore(_folder(args.image_folder)).source, settings, out=args.out)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Self-training, step C: score answers with recorded replies, both orders."""
    parser.add_argument("--answers", required=True, help="output of `stllava answer`")
    parser.add_argument("--replies", required=True, help="JSON lines {image, question, answers: [first, second], raw}")
    parser.add_argument("--one_order", action="store_true", help="as the original: no exchange of the two answers")
    parser.add_argument("--original_compat", action="store_true", help="the same as --one_order")
    parser.add_argument("--out", required=True)


def run_judge(args: argparse.Namespace) -> None:
    from stllava.selftrain.judge import RecordedJudge, judge
    answers = _rows(args.answers, "stllava answer", image=str, question=str, answers=list)
    rows = _rows(args.replies, "a judge", image=str, question=str, answers=list, raw=str)
    replies = {(row["image"], row["question"], *row["answers"]): row["raw"] for row in rows}
    if args.original_compat:
        print("stllava judge: original_compat: one_order True", file=sys.stderr)
    judge(answers, RecordedJudge(replies), both_orders=not (args.one_order or args.original_compat), out=args.out)


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """Self-training, step D: judged answers to DPO training pairs."""
    from stllava.selftrain.pairs import PairSettings
    parser.add_argument("--judged", required=True, help="output of `stllava judge`")
    parser.add_argument("--original_compat", action="store_true", help="as the original: --ties last --no_balance")
    _step_flags(parser, PairSettings)


def run_pairs(args: argparse.Namespace) -> None:
    from stllava.checkpoint.atomic import write_bytes
    from stllava.checkpoint.lock import run_lock
    from stllava.selftrain.pairs import PairSettings, build_pairs
    compat = {"ties": "last", "balance": False} if args.original_compat else {}
    settings = PairSettings(**{**compat, **take_fields(args, PairSettings)})
    if args.original_compat:
        print(f"stllava pairs: original_compat: ties {settings.ties}, balance {settings.balance}", file=sys.stderr)
    judged = _rows(args.judged, "stllava judge", id=str, image=str, question=str, candidates=list)
    pairs, dropped = build_pairs(judged, lambda name: name, settings)
    with run_lock(args.out):
        write_bytes(args.out, json.dumps(pairs, indent=1).encode())
    print(json.dumps({"pairs": len(pairs), "dropped": dropped}))


VERBS: Verbs = {"ask": (add_ask, run_ask), "answer": (add_answer, run_answer), "judge": (add_judge, run_judge), "pairs": (add_pairs, run_pairs)}
