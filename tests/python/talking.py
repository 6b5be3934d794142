"""A tiny model that says words: all others have the logit zero, so that what it says is tokenised the way it was drawn, and is different every time."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tiny import TOKENIZER, config

from stllava.demo.base import fresh_weights
from stllava.images import ImageProcessor
from stllava.model import LlavaModel
from stllava.text.tokenizer import Tokenizer

WORDS = ["the", "lung", "heart", "film", "shows", "no", "left", "right", "small", "large", "normal", "chest", "bone", "air", "fluid", "sign", "seen",
         "and", "is", "one"]


def talking_model(dtype: str = "f32", *, seed: int = 3, **changes) -> LlavaModel:
    cfg = config(**changes)
    weights = fresh_weights(cfg, 0)
    tokenizer = Tokenizer(str(TOKENIZER))
    said = [tokenizer.encode(word, add_bos=False)[0] for word in WORDS]
    rng = np.random.default_rng(seed)
    weights["lm_head.weight"] = np.zeros_like(weights["lm_head.weight"])
    weights["lm_head.weight"][said] = rng.normal(0, 1, (len(said), 64))
    return LlavaModel(cfg, weights, dtype=dtype, tokenizer=tokenizer, image_processor=ImageProcessor(size=28, aspect="pad"))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))
