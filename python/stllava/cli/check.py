"""`stllava check-data`: a look at the data before the first update."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .flags import Verbs, base_flags
from .parser import WRONG

if TYPE_CHECKING:
    from stllava.datacheck import Report
    from stllava.datacheck.estimate import Estimate
    from stllava.datacheck.masks import Masked
    from stllava.model import LlavaModel

__all__ = ["VERBS"]


def add_check(parser: argparse.ArgumentParser) -> None:
    """Look at training data before any training: images, roles, markers, lengths, labels, pairs, overlap with test files, memory and time."""
    from stllava.datacheck.overlap import PATIENT_FIELDS
    parser.epilog = "Exit code 0: no errors; 2: errors, with --strict also warnings."
    parser.add_argument("data", metavar="DATA", help="instruction rows, VQA items or preference pairs")
    parser.add_argument("--image_folder", default=None, help="where the image names start; default: here")
    parser.add_argument("--model_name_or_path", "--model_path", default=None, help="checkpoint to be trained: its tokenizer says lengths and labels")
    base_flags(parser)
    parser.add_argument("--version", "--template", default=None, help="conversation template; default v1_sq, for pairs v1")
    parser.add_argument("--model_max_length", type=int, default=2048, help="rows of a sample, image rows included")
    parser.add_argument("--sq_r", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=42, help="of the self-questioning draws and of the rows shown")
    parser.add_argument("--form", choices=("sft", "dpo"), default=None, help="default: what most rows are")
    parser.add_argument("--against", nargs="+", default=[], metavar="FILE", help="test files with which no image, patient or question may be shared")
    parser.add_argument("--against_image_folder", default=None, help="default: --image_folder")
    parser.add_argument("--patient_field", nargs="+", default=list(PATIENT_FIELDS), metavar="NAME",
                        help=f"fields that name a patient or study; default {' '.join(PATIENT_FIELDS)}")
    looks = parser.add_argument_group("images")
    looks.add_argument("--deep", action="store_true", help="decode every image, and look for near duplicates")
    looks.add_argument("--near_duplicates", action="store_true", help="only look for near duplicates, from reduced pictures")
    looks.add_argument("--min_side", type=int, default=16, help="pixels; smaller images are reported")
    looks.add_argument("--max_aspect", type=float, default=8.0, help="longer side / shorter side; more oblong images are reported")
    cost = parser.add_argument_group("memory and time, with --model_name_or_path")
    cost.add_argument("--per_device_train_batch_size", type=int, default=8)
    cost.add_argument("--num_train_epochs", type=float, default=1.0)
    cost.add_argument("--lora_enable", action="store_true")
    cost.add_argument("--lora_r", type=int, default=64)
    cost.add_argument("--vit_lora_enable", action="store_true")
    cost.add_argument("--lora_r_vit", type=int, default=32)
    cost.add_argument("--gradient_checkpointing", action="store_true")
    cost.add_argument("--flops", type=float, default=None, help="FLOP/s of the machine's matrix products; default: measured here")
    out = parser.add_argument_group("what is written")
    out.add_argument("--html", default=None, metavar="FILE", help="one page with everything inside it")
    out.add_argument("--jsonl", default=None, metavar="FILE", help="one finding a line")
    out.add_argument("--show", default=None, metavar="ROW[,ROW...]",
                     help="print these rows with their masked tokens in colour; the page shows them too")
    out.add_argument("--show_random", type=int, default=3, metavar="N", help="without --show: the page shows N rows, chosen by the seed")
    out.add_argument("--strict", action="store_true", help="warnings are errors")
    out.add_argument("--num_workers", type=int, default=None, help="processes; default: one per core")


def run_check(args: argparse.Namespace) -> int:
    from stllava.datacheck import CheckSettings, check_data
    from stllava.datacheck.page import write_jsonl, write_page
    from stllava.datacheck.pictures import PictureRules
    from stllava.datacheck.screen import print_report
    wanted = _rows_of(args.show)
    settings = CheckSettings(
        template=args.version, max_length=args.model_max_length, sq_r=args.sq_r, seed=args.seed, form=args.form,
        patient_fields=tuple(args.patient_field),
        pictures=PictureRules(args.deep, args.deep or args.near_duplicates, args.min_side, args.max_aspect), workers=args.num_workers,
        show_progress=sys.stderr.isatty())
    _check_numbers(args)
    model = None if args.model_name_or_path is None else _open_model(args)
    report = check_data(args.data, args.image_folder, tokenizer=None if model is None else model.tokenizer,
                        tokens_per_image=1 if model is None or model.config.vision is None else model.core.tokens_per_image,
                        against=args.against, against_image_folder=args.against_image_folder, settings=settings)
    samples = _samples(report, wanted, args)
    cost = None if model is None else _cost(model, report, args)
    print_report(report, samples if wanted else (), cost)
    if args.jsonl is not None:
        write_jsonl(args.jsonl, report)
    if args.html is not None:
        write_page(args.html, report, samples, cost)
    return WRONG if report.n_of("error") or (args.strict and report.n_of("warning")) else 0


def _check_numbers(args: argparse.Namespace) -> None:
    for name, low in (("model_max_length", 1), ("per_device_train_batch_size", 1), ("lora_r", 1), ("lora_r_vit", 1), ("min_side", 1),
                      ("show_random", 0)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name} is {getattr(args, name)}, want at least {low}")
    if not 0.0 <= args.sq_r <= 1.0:
        raise ValueError(f"--sq_r is {args.sq_r}, want a probability from 0 to 1")
    if args.num_workers is not None and args.num_workers < 1:
        raise ValueError(f"--num_workers is {args.num_workers}, want at least 1")
    for name, least in (("num_train_epochs", 0.0), ("max_aspect", 1.0), ("flops", 0.0)):
        value = getattr(args, name)
        if value is not None and not least < value < float("inf"):
            raise ValueError(f"--{name} is {value}, want a number above {least:g}")


def _rows_of(text: str | None) -> list[int]:
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--show is {text!r}, want row numbers with commas between them, from 0")
    return [int(word) for word in words]


def _open_model(args: argparse.Namespace) -> LlavaModel:
    """Tables and maps of the weights; none of their values is read."""
    from stllava.model import LlavaModel
    model = LlavaModel.from_pretrained(args.model_name_or_path, args.model_base, vision_tower=args.vision_tower, check_finite=False)
    if not model.has_tokenizer:
        raise ValueError(f"{args.model_name_or_path} has no tokenizer, and lengths and labels need one")
    return model


def _samples(report: Report, wanted: list[int], args: argparse.Namespace) -> list[Masked]:
    from stllava.conversation import ConversationError
    from stllava.datacheck.masks import choose_rows, masked
    if wanted and report.tokens is None:
        raise ValueError("--show needs the tokenizer of --model_name_or_path")
    if beyond := [row for row in wanted if row >= len(report.records)]:
        raise ValueError(f"--show {beyond[0]}: the data has {len(report.records)} rows, counted from 0")
    if report.tokens is None:
        return []
    usable = {row for row, _ in report.lengths}
    samples = []
    for row in wanted or (choose_rows(sorted(usable), args.show_random, args.seed) if args.html is not None else ()):
        if row not in usable:
            reasons = ", ".join(sorted({finding.kind for finding in report.findings if finding.row == row and finding.severity == "error"}))
            print(f"stllava check-data: row {row} cannot be shown: {reasons}", file=sys.stderr)
            continue
        try:
            samples += masked(report.records[row], row, report.tokens)
        except ConversationError as error:
            print(f"stllava check-data: row {row} cannot be shown: {error}", file=sys.stderr)
    return samples


def _cost(model: LlavaModel, report: Report, args: argparse.Namespace) -> Estimate | None:
    from stllava.datacheck.estimate import Plan, estimate
    if model.config.vision is None:
        return None
    plan = Plan(args.per_device_train_batch_size, args.num_train_epochs, args.lora_r * args.lora_enable, args.lora_r_vit * args.vit_lora_enable,
                args.gradient_checkpointing)
    return estimate(model, report, plan, args.flops)


VERBS: Verbs = {"check-data": (add_check, run_check)}
