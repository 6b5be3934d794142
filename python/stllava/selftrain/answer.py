"""Step B: several sampled answers to every question, the description not shown (spec 1.4). All questions of an image share its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava.conversation import as_template
from stllava.data.steps import item_seed, run_step
from stllava.generation import generate
from stllava.model import LlavaModel
from stllava.text.prompts import dialogue_about_image, open_turn

__all__ = ["AnswerSettings", "answer"]


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """The original's constants as defaults; it drew exactly two answers, with fixed seeds 40 and 42 for every item (spec D38)."""

    n_answers: int = 2
    temperature: float = 1.2
    top_k: int = 100
    top_p: float = 0.95
    max_new_tokens: int = 1024
    template: str = "v1"
    seed: int = 0
    batch_size: int = 16


def answer(model: LlavaModel, asked: Iterable[dict[str, Any]], image_of: Callable[[str], Any], settings: AnswerSettings = AnswerSettings(), *,
           out: str | Path | None = None, progress: bool = True) -> list[dict[str, Any]]:
    """Answers every question of every record of `ask`.

    Args:
        asked: records of `ask` (``{"id", "questions"}``). image_of: id -> image.

    Returns:
        one ``{"id": "IMAGE/NUMBER", "image", "question", "answers"}`` per question.
    """
    template = as_template(settings.template)
    items = [(f"{row['id']}/{number}", row["id"], question) for row in asked for number, question in enumerate(row["questions"])]

    def work(batch: list[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
        pictures = {image: image_of(image) for image in dict.fromkeys(image for _, image, _ in batch)}
        prompts = [open_turn(dialogue_about_image(template, question), template.roles[1], model.tokenizer) for _, _, question in batch]
        found = generate(model, prompts, [pictures[image] for _, image, _ in batch], num_return_sequences=settings.n_answers,
                         temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens,
                         batch_size=settings.batch_size,
                         seeds=[item_seed(settings.seed, "answer", name, j) for name, _, _ in batch for j in range(settings.n_answers)])
        for (name, image, question), answers in zip(batch, found, strict=True):
            yield {"id": name, "image": image, "question": question, "answers": [a.text for a in answers]}

    return run_step(items, lambda item: item[0], work, out=out, batch_size=settings.batch_size, label="answer", progress=progress)
