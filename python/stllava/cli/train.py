"""`stllava sft` and `stllava dpo`: the two stages, from files."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .flags import Verbs, add_fields, load_model, model_flags, parse_bool, take_fields

if TYPE_CHECKING:
    from stllava.model import LlavaModel

__all__ = ["VERBS"]

SIGNALS = ("On SIGTERM the running step is finished and a checkpoint written, then the exit code is 143; on Ctrl-C the last checkpoint stands, 130. "
           "The same command with --resume_from_checkpoint auto goes on from the newest checkpoint, or begins: same weights, same log.")


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
    from stllava.checkpoint.peft import LoraConfig
    from stllava.data.sft import summary
    from stllava.train.terminate import TERMINATED, Terminated
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
    from stllava.train.arguments import SFTConfig
    model_flags(parser)
    _data_flags(parser, "v1_sq")
    parser.add_argument("--sq_r", type=float, default=0.5)
    add_fields(parser, SFTConfig)


def run_sft(args: argparse.Namespace) -> int:
    from stllava.data.sft import SFTDataset
    from stllava.train.arguments import SFTConfig
    from stllava.train.sft import SFTTrainer
    return _train(args, SFTConfig, SFTDataset, SFTTrainer, sq_r=args.sq_r, seed=getattr(args, "seed", 42))


def add_dpo(parser: argparse.ArgumentParser) -> None:
    """Stage 2: preference training."""
    from stllava.train.arguments import DPOConfig
    model_flags(parser)
    _data_flags(parser, "v1")
    add_fields(parser, DPOConfig)


def run_dpo(args: argparse.Namespace) -> int:
    from stllava.data.dpo import DPODataset
    from stllava.train.arguments import DPOConfig
    from stllava.train.dpo import DPOTrainer
    return _train(args, DPOConfig, DPODataset, DPOTrainer)


VERBS: Verbs = {"sft": (add_sft, run_sft), "dpo": (add_dpo, run_dpo)}
