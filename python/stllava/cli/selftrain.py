"""`stllava ask | answer | judge | pairs`: the steps between the two stages, each a file that the next reads."""

from __future__ import annotations

import argparse
import json

from .flags import Verbs, add_fields, load_model, model_flags, take_fields

__all__ = ["VERBS"]


def _step_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    parser.add_argument("--out", required=True, help="JSON lines; continued if it exists")
    add_fields(parser, settings)


def add_ask(parser: argparse.ArgumentParser) -> None:
    """Self-training, step A: describe images, ask questions about them."""
    from stllava.selftrain.ask import AskSettings
    model_flags(parser)
    parser.add_argument("--image_folder", required=True, help="a folder, or a zip or tar archive")
    _step_flags(parser, AskSettings)


def run_ask(args: argparse.Namespace) -> None:
    from stllava.data.image_store import IMAGE_SUFFIXES, ImageStore
    from stllava.selftrain.ask import AskSettings, ask
    store = ImageStore(args.image_folder)
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
    from stllava.data.records import read_jsonl
    from stllava.selftrain.answer import AnswerSettings, answer
    settings = AnswerSettings(**take_fields(args, AnswerSettings))
    answer(load_model(args), read_jsonl(args.questions), ImageStore(args.image_folder).source, settings, out=args.out)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Self-training, step C: score answers with recorded replies, both orders."""
    parser.add_argument("--answers", required=True, help="output of `stllava answer`")
    parser.add_argument("--replies", required=True, help="JSON lines {image, question, answers: [first, second], raw}")
    parser.add_argument("--one_order", action="store_true", help="as the original: no exchange of the two answers")
    parser.add_argument("--out", required=True)


def run_judge(args: argparse.Namespace) -> None:
    from stllava.data.records import read_jsonl
    from stllava.selftrain.judge import RecordedJudge, judge
    replies = {(row["image"], row["question"], *row["answers"]): row["raw"] for row in read_jsonl(args.replies)}
    judge(read_jsonl(args.answers), RecordedJudge(replies), both_orders=not args.one_order, out=args.out)


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """Self-training, step D: judged answers to DPO training pairs."""
    from stllava.selftrain.pairs import PairSettings
    parser.add_argument("--judged", required=True, help="output of `stllava judge`")
    _step_flags(parser, PairSettings)


def run_pairs(args: argparse.Namespace) -> None:
    from stllava.checkpoint.atomic import write_bytes
    from stllava.checkpoint.lock import run_lock
    from stllava.data.records import read_jsonl
    from stllava.selftrain.pairs import PairSettings, build_pairs
    pairs, dropped = build_pairs(read_jsonl(args.judged), lambda name: name, PairSettings(**take_fields(args, PairSettings)))
    with run_lock(args.out):
        write_bytes(args.out, json.dumps(pairs, indent=1).encode())
    print(json.dumps({"pairs": len(pairs), "dropped": dropped}))


VERBS: Verbs = {"ask": (add_ask, run_ask), "answer": (add_answer, run_answer), "judge": (add_judge, run_judge), "pairs": (add_pairs, run_pairs)}
