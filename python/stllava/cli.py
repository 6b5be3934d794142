"""`stllava VERB ...`: one verb per step. Settings are the fields of the configuration classes, so each exists once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_checkpoint import VERBS as CHECKPOINT_VERBS
from .cli_flags import add_fields, load_model, model_flags, parse_bool, take_fields
from .cli_use import VERBS as USE_VERBS, template_for
from .errors import StllavaError

if TYPE_CHECKING:
    from .model import LlavaModel

__all__ = ["main"]

SIGNALS = ("On SIGTERM the running step is finished and a checkpoint written, then the exit code is 143; on Ctrl-C the last checkpoint stands, 130. "
           "The same command with --resume_from_checkpoint auto goes on from the newest checkpoint, or begins: same weights, same log.")
USE = "Research use only: not a medical device, not for diagnosis or treatment."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error of the user's data or settings, or no memory (one line on stderr), 2 bad command line, 130 interrupted,
    143 stopped by SIGTERM after a checkpoint was written."""
    parser = argparse.ArgumentParser(prog="stllava", description=f"Self-training of medical vision-language models. {USE}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    words = [_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    for name, (add, _) in VERBS.items():
        sub = verbs.add_parser(name, help=(add.__doc__ or "").strip().split("\n")[0], description=add.__doc__)
        if name in words:  # flags come from classes whose modules need not be imported for another verb
            add(sub)
    args = parser.parse_args(words)
    try:
        return VERBS[args.verb][1](args) or 0
    except KeyboardInterrupt:
        print("stllava: interrupted", file=sys.stderr)
        return 130
    except (StllavaError, OSError, ValueError, MemoryError) as error:
        print(f"stllava {args.verb}: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1


def _underscores(word: str) -> str:
    """Flags are written with underscores; dashes are taken for them."""
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word


# ---- verbs -------------------------------------------------------------------------------------------------------------------


def _data_flags(parser: argparse.ArgumentParser, template: str) -> None:
    parser.epilog = SIGNALS
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--image_folder", default=None)
    parser.add_argument("--version", default=template, help="conversation template")
    parser.add_argument("--model_max_length", type=int, default=2048, help="rows of a sample, image rows included")
    parser.add_argument("--on_bad_sample", choices=("error", "skip"), default="error")
    for name, default in (("lora_r", 64), ("lora_alpha", 16), ("lora_dropout", 0.05),
                          ("lora_r_vit", 32), ("lora_alpha_vit", 64), ("lora_dropout_vit", 0.0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--lora_enable", type=parse_bool, nargs="?", const=True, default=False)
    parser.add_argument("--vit_lora_enable", type=parse_bool, nargs="?", const=True, default=False)
    parser.add_argument("--use_dora", type=parse_bool, nargs="?", const=True, default=False, help="adapters train magnitudes too")


def _data_options(args: argparse.Namespace, model: LlavaModel) -> dict[str, Any]:
    if not model.has_tokenizer or model.config.vision is None:
        raise ValueError(f"{args.model_name_or_path} has no tokenizer or no vision tower; training from files needs both")
    return {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "image_folder": args.image_folder, "template": args.version,
            "max_length": args.model_max_length, "tokens_per_image": model.core.tokens_per_image, "on_bad_sample": args.on_bad_sample}


def _train(args: argparse.Namespace, config: type, dataset: type, trainer: type, **data_options: Any) -> int:
    from .checkpoint.peft import LoraConfig
    from .data.sft import summary
    from .train.terminate import TERMINATED, Terminated
    model = load_model(args)
    settings = config(**take_fields(args, config))
    data = dataset(args.data_path, **_data_options(args, model), **data_options)
    if data.problems:
        print(f"left out {len(data.problems)} records: {summary(data.problems)}", file=sys.stderr)
    if args.lora_enable:
        model.add_lora(LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora),
                       "llm", seed=settings.seed)
    if args.vit_lora_enable:
        model.add_lora(LoraConfig(r=args.lora_r_vit, lora_alpha=args.lora_alpha_vit, lora_dropout=args.lora_dropout_vit, use_dora=args.use_dora),
                       "vit", seed=settings.seed)
    run = trainer(model, settings, data)
    try:
        result = run.train()
    except Terminated as stop:
        print(f"stllava: {stop}", file=sys.stderr)
        return TERMINATED
    run.save_model()
    print(json.dumps({"global_step": result.global_step, **result.metrics}))
    return 0


def add_sft(parser: argparse.ArgumentParser) -> None:
    """Stage 1: visual self-questioning SFT."""
    from .train.arguments import SFTConfig
    model_flags(parser)
    _data_flags(parser, "v1_sq")
    parser.add_argument("--sq_r", type=float, default=0.5)
    add_fields(parser, SFTConfig)


def run_sft(args: argparse.Namespace) -> int:
    from .data.sft import SFTDataset
    from .train.arguments import SFTConfig
    from .train.sft import SFTTrainer
    return _train(args, SFTConfig, SFTDataset, SFTTrainer, sq_r=args.sq_r, seed=getattr(args, "seed", 42))


def add_dpo(parser: argparse.ArgumentParser) -> None:
    """Stage 2: preference training."""
    from .train.arguments import DPOConfig
    model_flags(parser)
    _data_flags(parser, "v1")
    add_fields(parser, DPOConfig)


def run_dpo(args: argparse.Namespace) -> int:
    from .data.dpo import DPODataset
    from .train.arguments import DPOConfig
    from .train.dpo import DPOTrainer
    return _train(args, DPOConfig, DPODataset, DPOTrainer)


def _step_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    parser.add_argument("--out", required=True, help="JSON lines; continued if it exists")
    add_fields(parser, settings)


def add_ask(parser: argparse.ArgumentParser) -> None:
    """Self-training, step A: describe images, ask questions about them."""
    from .selftrain.ask import AskSettings
    model_flags(parser)
    parser.add_argument("--image_folder", required=True)
    _step_flags(parser, AskSettings)


def run_ask(args: argparse.Namespace) -> None:
    from .paths import inside
    from .selftrain.ask import AskSettings, ask
    folder = Path(args.image_folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"{folder}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
    ask(load_model(args), [(name, str(inside(folder, name))) for name in names], AskSettings(**take_fields(args, AskSettings)), out=args.out)


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tga", ".tif", ".tiff"}


def add_answer(parser: argparse.ArgumentParser) -> None:
    """Self-training, step B: answer every question several times."""
    from .selftrain.answer import AnswerSettings
    model_flags(parser)
    parser.add_argument("--questions", required=True, help="output of `stllava ask`")
    parser.add_argument("--image_folder", required=True)
    _step_flags(parser, AnswerSettings)


def run_answer(args: argparse.Namespace) -> None:
    from .data.records import read_jsonl
    from .paths import inside
    from .selftrain.answer import AnswerSettings, answer
    folder = Path(args.image_folder)
    settings = AnswerSettings(**take_fields(args, AnswerSettings))
    answer(load_model(args), read_jsonl(args.questions), lambda name: str(inside(folder, name)), settings, out=args.out)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Self-training, step C: score answers with recorded replies, both orders."""
    parser.add_argument("--answers", required=True, help="output of `stllava answer`")
    parser.add_argument("--replies", required=True, help="JSON lines {image, question, answers: [first, second], raw}")
    parser.add_argument("--one_order", action="store_true", help="as the original: no exchange of the two answers")
    parser.add_argument("--out", required=True)


def run_judge(args: argparse.Namespace) -> None:
    from .data.records import read_jsonl
    from .selftrain.judge import RecordedJudge, judge
    replies = {(row["image"], row["question"], *row["answers"]): row["raw"] for row in read_jsonl(args.replies)}
    judge(read_jsonl(args.answers), RecordedJudge(replies), both_orders=not args.one_order, out=args.out)


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """Self-training, step D: judged answers to DPO training pairs."""
    from .selftrain.pairs import PairSettings
    parser.add_argument("--judged", required=True, help="output of `stllava judge`")
    _step_flags(parser, PairSettings)


def run_pairs(args: argparse.Namespace) -> None:
    from .checkpoint.atomic import write_bytes
    from .checkpoint.lock import run_lock
    from .data.records import read_jsonl
    from .selftrain.pairs import PairSettings, build_pairs
    pairs, dropped = build_pairs(read_jsonl(args.judged), lambda name: name, PairSettings(**take_fields(args, PairSettings)))
    with run_lock(args.out):
        write_bytes(args.out, json.dumps(pairs, indent=1).encode())
    print(json.dumps({"pairs": len(pairs), "dropped": dropped}))


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
    from .conv_mode import model_name_of
    from .data.records import read_records
    from .evaluate.answers import answer_questions
    from .evaluate.report import print_report
    from .evaluate.vqa import evaluate_vqa
    from .paths import inside
    items = read_records(args.question_file)
    folder = Path(args.image_folder)
    model = load_model(args)
    answers = answer_questions(model, items, lambda name: str(inside(folder, name)), template=template_for(args, model),
                               max_new_tokens=args.max_new_tokens, out=args.answers_file, model_id=model_name_of(args.model_name_or_path))
    print_report(evaluate_vqa(items, answers, args.metrics))


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Print what was built and found."""
    parser.add_argument("--json", action="store_true")


def run_doctor(args: argparse.Namespace) -> int | None:
    from . import doctor
    return doctor.main(json=args.json)


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The whole method on real medical images: SFT, self-training, DPO, evaluation, report."""
    parser.add_argument("--out", default="build/demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the same path on a tenth of the data")


def run_demo(args: argparse.Namespace) -> None:
    from .demo.run import run
    run(Path(args.out), seed=args.seed, num_threads=args.num_threads, quick=args.quick)


def add_demo_base(parser: argparse.ArgumentParser) -> None:
    """Train the demo's base model anew."""
    parser.add_argument("--out", default="build/demo-base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=0)


def run_demo_base(args: argparse.Namespace) -> None:
    from .demo.base import train_base
    train_base(Path(args.out), seed=args.seed, num_threads=args.num_threads)


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int | None]]] = {
    "demo": (add_demo, run_demo), "demo-base": (add_demo_base, run_demo_base), "sft": (add_sft, run_sft), "dpo": (add_dpo, run_dpo),
    "ask": (add_ask, run_ask), "answer": (add_answer, run_answer), "judge": (add_judge, run_judge), "pairs": (add_pairs, run_pairs),
    "eval": (add_eval, run_eval), **USE_VERBS, **CHECKPOINT_VERBS, "doctor": (add_doctor, run_doctor)}
