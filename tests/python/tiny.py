"""A tiny random model, tokenizer and data for tests of the Python package (28 px, 16 image tokens, width 64, the recorded 32,000-piece tokenizer)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from stllava.config import LlavaConfig
from stllava.demo.base import fresh_weights
from stllava.images import ImageProcessor
from stllava.model import LlavaModel
from stllava.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "parity" / "goldens" / "templates" / "tokenizer.model"
VISION = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
          "intermediate_size": 64, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def config(vocab_size: int = 32000, **changes) -> LlavaConfig:
    return LlavaConfig.from_dict({
        "model_type": "llava", "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "mm_vision_tower": "tiny", "mm_hidden_size": 32, "mm_projector_type": "cluster",
        "num_latents": 4, "mm_vision_config": VISION, "image_aspect_ratio": "pad", **changes})


def tiny_model(dtype: str = "f32", *, seed: int = 0, vocab_size: int = 32000, **changes) -> LlavaModel:
    cfg = config(vocab_size, **changes)
    tokenizer = Tokenizer(str(TOKENIZER)) if vocab_size == 32000 else None
    return LlavaModel(cfg, fresh_weights(cfg, seed), dtype=dtype, tokenizer=tokenizer, image_processor=ImageProcessor(size=28, aspect="pad"))


def write_pictures(folder: Path, n: int = 4, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    names = [f"{i}.png" for i in range(n)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / name)
    return names


def sft_records(pictures: list[str]) -> list[dict]:
    """One record per picture with two turns, and one without a picture."""
    records = [{"id": f"r{i}", "image": name, "conversations": [
        {"from": "human", "value": f"<image>\nWhat is in picture {i}?"}, {"from": "gpt", "value": f"Thing number {i}."},
        {"from": "human", "value": "Is it large?"}, {"from": "gpt", "value": "Yes." if i % 2 else "No, it is small."}]}
        for i, name in enumerate(pictures)]
    return [*records, {"id": "text", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Good day."}]}]


def dpo_records(pictures: list[str]) -> list[dict]:
    def turns(question: str, answer: str) -> list[dict]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return [{"id": f"p{i}", "image": name, "chosen_conversations": turns("<image>\nWhat is it?", f"It is thing {i}."),
             "reject_conversations": turns("<image>\nWhat is it?", "I do not know, maybe nothing.")} for i, name in enumerate(pictures)]
