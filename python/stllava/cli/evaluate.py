"""`stllava eval`: a checkpoint on a test set."""

from __future__ import annotations

import argparse
from pathlib import Path

from .flags import Verbs, load_model, model_flags, template_for

__all__ = ["VERBS"]


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Answer a VQA test file greedily and score it."""
    model_flags(parser)
    parser.add_argument("--question_file", required=True, help="LLaVA-Med test items (JSON)")
    parser.add_argument("--image_folder", required=True)
    parser.add_argument("--answers_file", default=None, help="JSON lines; continued if it exists")
    parser.add_argument("--conv_mode", default=None, help="conversation template; default: what the checkpoint seems to be made with")
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--metrics", choices=("compat", "strict"), default="compat")


def run_eval(args: argparse.Namespace) -> None:
    from stllava.conv_mode import model_name_of
    from stllava.data.records import read_records
    from stllava.evaluate.answers import answer_questions
    from stllava.evaluate.report import print_report
    from stllava.evaluate.vqa import evaluate_vqa
    from stllava.paths import inside
    items = read_records(args.question_file)
    folder = Path(args.image_folder)
    model = load_model(args)
    answers = answer_questions(model, items, lambda name: str(inside(folder, name)), template=template_for(args, model),
                               max_new_tokens=args.max_new_tokens, out=args.answers_file, model_id=model_name_of(args.model_name_or_path))
    print_report(evaluate_vqa(items, answers, args.metrics))


VERBS: Verbs = {"eval": (add_eval, run_eval)}
