"""What `stllava eval` costs besides the model, on a test set as large as VQA-RAD's. `bench_eval.py [part of an id]`

The model is what the core does: tower, projector, prefill, decoding. All else is overhead: pictures, prompts, tokens, files, scores, intervals, reports.
CPU time, so that other work on the machine does not count. No peer: the bar is 2 per cent of the whole, so an answer has to take the core 49 times the overhead of one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from cases import MID
from harness import Row, main, make_row
from PIL import Image

import stllava_c
from stllava.config import LlavaConfig
from stllava.demo.base import fresh_weights, load_base
from stllava.demo.questions import question_texts
from stllava.evaluate.answers import read_questions
from stllava.evaluate.evaluation import Answers, evaluate
from stllava.evaluate.pictures import ItemPictures
from stllava.evaluate.runs import AnswerRun, write_evaluation
from stllava.images import ImageProcessor
from stllava.model import LlavaModel

N_QUESTIONS, N_PICTURES, TOKENS = 451, 203, 16
BAR = 0.02


class TimedGenerator:
    """The core's generator, whose work is counted."""

    real = stllava_c.Generator
    seconds = 0.0

    def __init__(self, *args: object, **settings: object) -> None:
        started = time.process_time()
        self.generator = self.real(*args, **settings)
        TimedGenerator.seconds += time.process_time() - started

    def step(self) -> object:
        started = time.process_time()
        result = self.generator.step()
        TimedGenerator.seconds += time.process_time() - started
        return result

    def __getattr__(self, name: str) -> object:
        return getattr(self.generator, name)


@contextmanager
def counted_core() -> Iterator[None]:
    stllava_c.Generator, TimedGenerator.seconds = TimedGenerator, 0.0
    try:
        yield
    finally:
        stllava_c.Generator = TimedGenerator.real


def make_test_set(folder: Path, n_questions: int, n_pictures: int) -> list[dict]:
    rng = np.random.default_rng(0)
    for i in range(n_pictures):
        coarse = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        coarse.resize((800, 640), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    texts = question_texts()
    return [{"id": i, "image": f"{i * n_pictures // n_questions}.jpg", "answer_type": "CLOSED" if i % 5 < 3 else "OPEN", "organ": "chest" if i % 3 else "head",
             "conversations": [{"from": "human", "value": texts[i % len(texts)]}, {"from": "gpt", "value": "no" if i % 5 < 3 else "left lung"}]}
            for i in range(n_questions)]


def medium_model() -> LlavaModel:
    """Random weights; the demo's tokenizer."""
    tokenizer = load_base().tokenizer
    config = LlavaConfig.from_dict(replace(MID, vocab=512).config)
    return LlavaModel(config, fresh_weights(config, seed=0), tokenizer=tokenizer, image_processor=ImageProcessor(size=MID.image_size, aspect="pad"))


def measure(model: LlavaModel, n_questions: int, n_pictures: int) -> dict[str, float]:
    """CPU seconds of the whole, of the core, of the pictures, and of scoring with every report."""
    with tempfile.TemporaryDirectory() as name, counted_core():
        folder = Path(name)
        items = make_test_set(folder, n_questions, n_pictures)
        started = time.process_time()
        pictures = ItemPictures(items, folder)
        pictures.require()
        run = AnswerRun(model, "model", "v1", read_questions(items), pictures, {"pictures": pictures.digest()}, {"max_new_tokens": TOKENS},
                        folder=folder / "out", progress=False)
        rows = run.answers()
        answered = time.process_time()
        found = evaluate(items, Answers("model", rows), title="as VQA-RAD", benchmark="vqa-rad")
        write_evaluation(found, folder / "out", {}, [folder / "out" / "answers.jsonl"], pictures)
        ended = time.process_time()
        core = TimedGenerator.seconds
        decoding = time.process_time()
        for one in pictures.names:
            model.image_processor(pictures(one))
        decoding = time.process_time() - decoding
    return {"whole": ended - started, "core": core, "pictures": decoding, "scoring": ended - answered}


def eval_overhead() -> Iterator[Row]:
    found = measure(load_base(), N_QUESTIONS, N_PICTURES)
    case = f"{N_QUESTIONS} questions on {N_PICTURES} pictures of 800x640"
    overhead = found["whole"] - found["core"]
    yield make_row("eval_overhead", f"{case}: everything but the core, a question", 1e3 * overhead / N_QUESTIONS, None, None, "ms")
    yield make_row("eval_pictures", f"{case}: of that, reading and preprocessing them", 1e3 * found["pictures"] / N_QUESTIONS, None, None, "ms")
    yield make_row("eval_scoring", f"{case}: of that, scores, 2000 resamplings, every report", 1e3 * found["scoring"] / N_QUESTIONS, None, None, "ms")
    yield make_row("eval_model_needed", f"time of the core for an answer from which on the overhead is at most {BAR:.0%}",
                   1e3 * overhead / N_QUESTIONS * (1 - BAR) / BAR, None, None, "ms")


def eval_share() -> Iterator[Row]:
    n = N_QUESTIONS // 4
    found = measure(medium_model(), n, N_PICTURES // 4)
    yield make_row("eval_share", f"{n} questions, tower of {MID.tower_layers} layers, decoder of {MID.layers}, width {MID.width}: overhead of the whole",
                   100 * (1 - found["core"] / found["whole"]), None, None, "%")
    yield make_row("eval_share_answer", "the core's time for one of these answers", 1e3 * found["core"] / n, None, None, "ms")


if __name__ == "__main__":
    main("eval", {"eval_overhead": eval_overhead, "eval_share": eval_share})
