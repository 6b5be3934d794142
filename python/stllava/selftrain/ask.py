"""Step A: the model describes an image, then asks itself questions about it (spec 1.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava.conversation import as_template
from stllava.data.steps import item_seed, run_step
from stllava.errors import ConfigError
from stllava.generation import generate
from stllava.model import LlavaModel
from stllava.text.prompts import dialogue_about_image, open_turn

__all__ = ["AskSettings", "ask", "DESCRIBE"]

DESCRIBE = "Can you describe the image in detail?"


@dataclass(frozen=True, slots=True)
class AskSettings:
    """The original's constants as defaults."""

    n_questions: int = 5
    temperature: float = 1.2
    top_k: int = 300
    top_p: float = 0.95
    max_new_tokens: int = 300
    description: str = DESCRIBE
    description_max_new_tokens: int = 1024
    template: str = "v1_sq"
    seed: int = 0
    batch_size: int = 16


def ask(model: LlavaModel, images: Iterable[tuple[str, Any]], settings: AskSettings = AskSettings(), *, out: str | Path | None = None,
        progress: bool = True) -> list[dict[str, Any]]:
    """Asks `n_questions` questions about every image.

    Args:
        images: (id, image) pairs; an image is anything `LlavaModel.generate` takes. out: JSON-lines file, continued if it exists.

    Returns:
        one ``{"id", "description", "questions"}`` per image. Questions are independent draws after the greedy description; empty ones and
        repetitions are left out and counted in ``"dropped"``.

    Raises:
        ConfigError: a template without a virtual user.
    """
    template = as_template(settings.template)
    if len(template.roles) < 3:
        raise ConfigError(f"template {template.name} has no virtual user who asks; use v1_sq", field="template")

    def work(batch: list[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        pictures = [image for _, image in batch]
        opened = [dialogue_about_image(template, settings.description) for _ in batch]
        described = generate(model, [open_turn(dialogue, template.roles[1], model.tokenizer) for dialogue in opened], pictures,
                             max_new_tokens=settings.description_max_new_tokens, batch_size=settings.batch_size)
        prompts = []
        for dialogue, [description] in zip(opened, described, strict=True):
            dialogue.append_message(template.roles[1], description.text or " ")
            prompts.append(open_turn(dialogue, template.roles[2], model.tokenizer))
        asked = generate(model, prompts, pictures, num_return_sequences=settings.n_questions, temperature=settings.temperature,
                         top_k=settings.top_k, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
                         seeds=[item_seed(settings.seed, "ask", name, j) for name, _ in batch for j in range(settings.n_questions)])
        for (name, _), [description], questions in zip(batch, described, asked, strict=True):
            texts = [question.text for question in questions]
            kept = list(dict.fromkeys(text for text in texts if text))
            empty = texts.count("")
            yield {"id": name, "description": description.text, "questions": kept,
                   "dropped": {"empty": empty, "repeated": len(texts) - empty - len(kept)}}

    return run_step(images, lambda item: item[0], work, out=out, batch_size=settings.batch_size, label="ask", progress=progress)
