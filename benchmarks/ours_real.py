"""Our side of bench_real.py: `ours_real.py vit|decode|prefill|questions` or `ours_real.py open LAYERS`, a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
from cases import ANSWER_TOKENS, OPEN, REAL, best_logp, decode_prompt, real_pixels, real_questions
from worker import serve

import stllava_c
from stllava.model import LlavaModel


def vit() -> Callable[[], float]:
    """The value is the root mean square of the features."""
    model, pixels = LlavaModel.from_pretrained(REAL.directory), real_pixels()
    return lambda: float(np.sqrt(np.mean(np.square(model.run.vision_forward(pixels)))))


def first_layers(whole: LlavaModel, layers: int, prompt: np.ndarray) -> tuple[stllava_c.Generator, stllava_c.Batch]:
    """The first layers of the decoder and its head, and the prompt that it has read."""
    model = stllava_c.Model({"vision": None, "projector": None, "decoder": whole.config.core_config()["decoder"] | {"n_layers": layers}})
    tensors = whole.tensors()
    for info in model.tensors():
        model.bind(info.name, tensors[info.name])
    batch = stllava_c.Batch(model, parent=[-1], begin=[0, len(prompt)], ids=prompt)
    return stllava_c.Generator(model, batch, max_new_tokens=64), batch


def decode() -> Callable[[], float]:
    """The value is the likeliest token's log-probability."""
    generator, _ = first_layers(LlavaModel.from_pretrained(REAL.directory), 1, decode_prompt())

    def step() -> float:
        generator.step()
        return best_logp(generator.logits()[0])

    return step


def prefill() -> Callable[[], float]:
    """The prompt into an empty cache that is there already, as the peer's; the value as in `decode`."""
    generator, batch = first_layers(LlavaModel.from_pretrained(REAL.directory), REAL.layers, decode_prompt())

    def step() -> float:
        generator.extend(batch, keep_rows=0, max_new_tokens=64)
        return best_logp(generator.logits()[0])

    return step


def questions() -> Callable[[], float]:
    """The value is the mean log-probability of the answers' first tokens."""
    model, image = LlavaModel.from_pretrained(REAL.directory), real_pixels()[0]
    prompts = [[1, -200, *question.tolist()] for question in real_questions()]

    def step() -> float:
        answers = model.generate(prompts, [image] * len(prompts), max_new_tokens=ANSWER_TOKENS, eos_token_id=[])
        return float(np.mean([answer[0].logps[0] for answer in answers]))

    return step


def open_and_read(layers: int) -> Callable[[], float]:
    """The value is the likeliest token's log-probability after one token."""
    model = LlavaModel.from_pretrained(OPEN)
    return lambda: best_logp(first_layers(model, layers, np.array([1]))[0].logits()[0])


if __name__ == "__main__":
    stllava_c.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    what = sys.argv[1]
    serve(lambda: open_and_read(int(sys.argv[2])) if what == "open" else {"vit": vit, "decode": decode, "prefill": prefill, "questions": questions}[what]())
