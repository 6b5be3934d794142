"""stllava: self-training of medical vision-language models, in C, behind Python. Research use only: not a medical device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.peft import LoraConfig as LoraConfig
    from .config import LlavaConfig as LlavaConfig, VisionConfig as VisionConfig
    from .data.dpo import DPODataset as DPODataset
    from .data.sft import SFTDataset as SFTDataset
    from .evaluate.vqa import evaluate_vqa as evaluate_vqa
    from .images import ImageProcessor as ImageProcessor
    from .model import LlavaModel as LlavaModel
    from .text.tokenizer import Tokenizer as Tokenizer
    from .train.callbacks import TrainerCallback as TrainerCallback
    from .train.dpo import DPOTrainer as DPOTrainer
    from .train.from_script import DPOConfig as DPOConfig, SFTConfig as SFTConfig
    from .train.sft import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

_WHERE = {
    "LoraConfig": "checkpoint.peft", "LlavaConfig": "config", "VisionConfig": "config", "DPODataset": "data.dpo", "SFTDataset": "data.sft",
    "evaluate_vqa": "evaluate.vqa", "ImageProcessor": "images", "LlavaModel": "model", "Tokenizer": "text.tokenizer",
    "DPOConfig": "train.from_script", "SFTConfig": "train.from_script", "TrainerCallback": "train.callbacks", "DPOTrainer": "train.dpo",
    "SFTTrainer": "train.sft"}
__all__ = ["__version__", *_WHERE]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used, so that `import stllava` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'stllava' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
