"""stllava: self-training of medical vision-language models, in C, behind Python. Research use only: not a medical device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.peft import LoraConfig as LoraConfig
    from .config import LlavaConfig as LlavaConfig, VisionConfig as VisionConfig
    from .data.dpo import DPODataset as DPODataset
    from .data.sft import SFTDataset as SFTDataset
    from .evaluate.answers import answer_questions as answer_questions
    from .evaluate.vqa import evaluate_vqa as evaluate_vqa
    from .images import ImageProcessor as ImageProcessor
    from .model import LlavaModel as LlavaModel
    from .notebook import LossPlot as LossPlot, PictureTable as PictureTable
    from .selftrain.answer import AnswerSettings as AnswerSettings, answer as answer
    from .selftrain.ask import AskSettings as AskSettings, ask as ask
    from .selftrain.judge import judge as judge
    from .selftrain.pairs import PairSettings as PairSettings, build_pairs as build_pairs
    from .text.tokenizer import Tokenizer as Tokenizer
    from .train.callbacks import TrainerCallback as TrainerCallback
    from .train.dpo import DPOTrainer as DPOTrainer
    from .train.from_script import DPOConfig as DPOConfig, SFTConfig as SFTConfig
    from .train.sft import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

_WHERE = {
    "LoraConfig": "checkpoint.peft", "LlavaConfig": "config", "VisionConfig": "config", "DPODataset": "data.dpo", "SFTDataset": "data.sft",
    "answer_questions": "evaluate.answers", "evaluate_vqa": "evaluate.vqa", "ImageProcessor": "images", "LlavaModel": "model",
    "LossPlot": "notebook", "PictureTable": "notebook", "AnswerSettings": "selftrain.answer", "answer": "selftrain.answer",
    "AskSettings": "selftrain.ask", "ask": "selftrain.ask", "judge": "selftrain.judge", "PairSettings": "selftrain.pairs",
    "build_pairs": "selftrain.pairs", "Tokenizer": "text.tokenizer",
    "DPOConfig": "train.from_script", "SFTConfig": "train.from_script", "TrainerCallback": "train.callbacks", "DPOTrainer": "train.dpo",
    "SFTTrainer": "train.sft"}
__all__ = ["__version__", *_WHERE]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used, so that `import stllava` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'stllava' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
