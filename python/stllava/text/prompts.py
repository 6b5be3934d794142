"""A question about one image, and the ids that leave a turn open for the model."""

from __future__ import annotations

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.conversation import Conversation
from stllava.text.encode import encode_conversation
from stllava.text.interface import AnyTokenizer

__all__ = ["dialogue_about_image", "dialogue_without_image", "open_turn"]


def dialogue_about_image(template: Conversation, question: str) -> Conversation:
    """A new dialogue whose first turn shows the image and asks `question`."""
    dialogue = template.copy()
    dialogue.append_message(template.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    return dialogue


def dialogue_without_image(template: Conversation, question: str) -> Conversation:
    """A new dialogue whose first turn asks `question`."""
    dialogue = template.copy()
    dialogue.append_message(template.roles[0], question)
    return dialogue


def open_turn(dialogue: Conversation, role: str, tokenizer: AnyTokenizer, n_images: int = 1) -> list[int]:
    """Ids of the dialogue so far, which shows `n_images`, with an open turn of `role`; the dialogue itself stays as it is."""
    waiting = dialogue.copy()
    waiting.append_message(role, None)
    return encode_conversation(waiting, tokenizer, n_images)
