"""A model's answers to a question file, greedy by default (spec D49); all questions of an image share its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.conversation import as_template
from stllava.data.steps import run_step
from stllava.generation import generate
from stllava.model import LlavaModel
from stllava.text.prompts import dialogue_about_image, open_turn

__all__ = ["answer_questions"]


def answer_questions(model: LlavaModel, questions: Iterable[Mapping[str, Any]], image_of: Callable[[str], Any], *, template: str = "v1",
                     max_new_tokens: int = 1024, batch_size: int = 32, out: str | Path | None = None, progress: bool = True,
                     label: str = "answer") -> list[dict[str, Any]]:
    """Answers question records.

    Args:
        questions: ``{"question_id" or "id", "image", "text"}``, or LLaVA-Med test items whose question is the first turn of `conversations`. An
            ``<image>`` marker in the text is removed first (spec 4.1). image_of: image name -> image.
        out: answer file (JSON lines), continued by id if it exists.

    Returns:
        ``{"id", "question_id", "prompt", "text"}`` per question, in order.
    """
    chosen = as_template(template)
    items = [(str(row.get("question_id", row.get("id"))), row["image"], _question(row)) for row in questions]

    def work(batch: list[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
        pictures = {image: image_of(image) for image in dict.fromkeys(image for _, image, _ in batch)}
        prompts = [open_turn(dialogue_about_image(chosen, question), chosen.roles[1], model.tokenizer) for _, _, question in batch]
        found = generate(model, prompts, [pictures[image] for _, image, _ in batch], max_new_tokens=max_new_tokens, batch_size=batch_size)
        for (name, _, question), [answer] in zip(batch, found, strict=True):
            yield {"id": name, "question_id": name, "prompt": question, "text": answer.text}

    return run_step(items, lambda item: item[0], work, out=out, batch_size=batch_size, label=label, progress=progress)


def _question(row: Mapping[str, Any]) -> str:
    text: str = row["text"] if "text" in row else row.get("conversations", row.get("conversatons"))[0]["value"]
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
