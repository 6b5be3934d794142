"""Our side of bench_real.py: `ours_real.py vit|decode|questions`, a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
from cases import ANSWER_TOKENS, CACHED, REAL, decode_prompt, real_pixels, real_questions
from worker import serve

import stllava_c
from stllava.model import LlavaModel


def vit() -> Callable[[], float]:
    """The value is the root mean square of the features."""
    model, pixels = LlavaModel.from_pretrained(REAL.directory), real_pixels()
    return lambda: float(np.sqrt(np.mean(np.square(model.run.vision_forward(pixels)))))


def decode() -> Callable[[], float]:
    """The value is the root mean square of the logits."""
    whole = LlavaModel.from_pretrained(REAL.directory)
    config = whole.config.core_config()
    model = stllava_c.Model({"vision": None, "projector": None, "decoder": config["decoder"] | {"n_layers": 1}})
    for info in model.tensors():
        model.bind(info.name, whole.tensors()[info.name])
    ids = decode_prompt()
    generator = stllava_c.Generator(model, stllava_c.Batch(model, parent=[-1], begin=[0, CACHED], ids=ids), max_new_tokens=64)

    def step() -> float:
        generator.step()
        return float(np.sqrt(np.mean(np.square(generator.logits()))))

    return step


def questions() -> Callable[[], float]:
    """The value is the mean log-probability of the answers' first tokens."""
    model, image = LlavaModel.from_pretrained(REAL.directory), real_pixels()[0]
    prompts = [[1, -200, *question.tolist()] for question in real_questions()]

    def step() -> float:
        answers = model.generate(prompts, [image] * len(prompts), max_new_tokens=ANSWER_TOKENS, eos_token_id=[])
        return float(np.mean([answer[0].logps[0] for answer in answers]))

    return step


if __name__ == "__main__":
    stllava_c.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve({"vit": vit, "decode": decode, "questions": questions}[sys.argv[1]])
