"""Conversations: one answer to a list of messages (`chat`), or turn by turn with what was computed kept (`ChatSession`)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import stllava_c

from .constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from .conv_mode import guess_conv_mode
from .conversation import Conversation, as_template
from .data.steps import item_seed
from .generation import Answers, DecodingSettings, Generation, end_ids, generate, room_for_answer
from .text.encode import encode_conversation
from .tree import Sequence

if TYPE_CHECKING:
    from .images import Picture
    from .model import LlavaModel

__all__ = ["ChatPrompt", "ChatSession", "Reply", "chat", "chat_prompt"]


def chat(model: LlavaModel, messages: Seq[Mapping[str, Any]], images: Seq[Picture] = (), *, template: str | Conversation | None = None,
         **options: Any) -> str:
    """Answers a conversation.

    Args:
        messages: ``{"role": "user" | "assistant", "content": text or parts}`` taking turns, the last one the user's, perhaps after one of the role
            "system". Parts are ``{"type": "text", "text": ...}``, ``{"type": "image", "image": anything `generate` takes}`` and
            ``{"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}``; nothing is ever fetched.
        images: shown before the first user message unless the texts have ``<image>`` markers.
        template: conversation template; default: `guess_conv_mode` of the checkpoint.
        options: as for `generate` (max_new_tokens, temperature, seeds, ...).

    Raises:
        ValueError: roles that do not alternate, a last message that is not the user's, parts of another kind, markers that do not match the images.
    """
    prompt = chat_prompt(model, messages, images, template=template)
    options["stop"] = (*DecodingSettings(stop=options.get("stop", ())).stops, *prompt.stop)
    [[answer]] = generate(model, [prompt.ids], [prompt.images], **options)
    return answer.text


class ChatPrompt(NamedTuple):
    """What `generate` takes to answer a conversation; `stop` are the template's strings that end an answer."""

    ids: list[int]
    images: tuple[Picture, ...]
    stop: tuple[str, ...]


def chat_prompt(model: LlavaModel, messages: Seq[Mapping[str, Any]], images: Seq[Picture] = (), *,
                template: str | Conversation | None = None) -> ChatPrompt:
    """The prompt that `chat` answers, for those who answer many at once. Arguments and errors as there."""
    dialogue, shown = _dialogue(model, messages, images, template)
    return ChatPrompt(encode_conversation(dialogue, model.tokenizer, len(shown)), shown, tuple(dialogue.stop_strings()))


def _dialogue(model: LlavaModel, messages: Seq[Mapping[str, Any]], images: Seq[Picture],
              template: str | Conversation | None) -> tuple[Conversation, tuple[Picture, ...]]:
    """The conversation with an open turn at its end, and its images in their order."""
    dialogue = as_template(template or guess_conv_mode(model.config)).copy()
    if messages and messages[0].get("role") == "system":
        dialogue, messages = dialogue.with_system(_content(messages[0].get("content"), 0)[0]), messages[1:]
    shown = list(images)
    for turn, message in enumerate(messages):
        wanted = "user" if turn % 2 == 0 else "assistant"
        if message.get("role") != wanted:
            raise ValueError(f"chat: message {turn} has role {message.get('role')!r}, want {wanted!r}: user and assistant take turns")
        text, of_parts = _content(message.get("content"), turn)
        shown += of_parts
        if turn == 0 and images and DEFAULT_IMAGE_TOKEN not in text:
            text = (DEFAULT_IMAGE_TOKEN + "\n") * len(images) + text
        dialogue.append_message(dialogue.roles[turn % 2], text)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("chat: the last message must be the user's")
    dialogue.append_message(dialogue.roles[1], None)
    return dialogue, tuple(shown)


def _content(content: object, turn: int) -> tuple[str, list[Picture]]:
    """Text of a message, with a marker in front for each of its images, and these."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"chat: message {turn} has a {type(content).__name__} as content, want a text or a list of parts")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and "image" in part:
            images.append(part["image"])
        elif kind == "image_url":
            images.append(_data_url(part.get("image_url"), turn))
        else:
            raise ValueError(f"chat: message {turn} has a part {str(part)[:80]!r}, want type 'text' with text, 'image' with image, or 'image_url'")
    return (DEFAULT_IMAGE_TOKEN + "\n") * len(images) + "\n".join(texts), images


def _data_url(value: object, turn: int) -> bytes:
    url = value.get("url") if isinstance(value, Mapping) else value
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise ValueError(f"chat: message {turn} has the image_url {str(url)[:60]!r}; want data:image/...;base64,...: nothing is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"chat: message {turn} has an image_url that is not base64: {error}") from error


# ---- turn by turn ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turn:
    text: str
    pixels: list[np.ndarray]
    answer: Generation


class Reply(Iterator[str]):
    """The answer of one turn: pieces of text, as they come. It may be left at any time, also by Ctrl-C; what came is part of the conversation."""

    def __init__(self, session: ChatSession, answers: Answers) -> None:
        self._session, self._pieces = weakref.ref(session), (text for _, _, text in answers if text)  # weak: a cycle would keep gigabytes
        [self.generation] = answers.generations

    def __next__(self) -> str:
        session = self._session()
        if session is not None and session.reply is not self:  # the conversation went on
            raise StopIteration
        return next(self._pieces)

    def finish(self) -> Generation:
        """The whole answer."""
        for _ in self:
            pass
        return self.generation


class ChatSession:
    """A conversation in which each turn computes only what is new: the rows of the turns before keep their keys and values.

    The answer to every turn is, bit for bit, that of a fresh model given the whole conversation: where an answer's text is not tokenised the way it
    was drawn, or a turn is interrupted, the rows from there on are computed again. What the model computes with must not change between turns, but
    for `disable_adapters`; `reset` after training.

    Args:
        template: conversation template; default: `guess_conv_mode` of the checkpoint. system: another system text.
        seed: turn number k, from 0, is drawn with ``item_seed(seed, k)``.
        settings: fields of `DecodingSettings`; they may be set anew between turns (`session.settings`). The template's stop strings always end an
            answer. `rows_computed` says how many rows the last turn's prompt cost.
    """

    def __init__(self, model: LlavaModel, template: str | Conversation | None = None, *, system: str | None = None, seed: int = 0,
                 **settings: Any) -> None:
        self.model, self.seed, self.settings = model, seed, DecodingSettings(**settings)
        chosen = as_template(template or guess_conv_mode(model.config))
        self.template = chosen if system is None else chosen.with_system(system)
        self.reply: Reply | None = None
        self.rows_computed = 0
        self._turns: list[_Turn] = []
        self._decoder: stllava_c.Generator | None = None
        self._adapters = model.adapters_enabled
        self._prompt: list[tuple[int, Hashable]] = []  # (token, picture) of what the decoder was given last

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as `chat` takes it; a turn whose answer was interrupted before its first word is not part of it."""
        return [{"role": role, "content": text} for turn in self._kept() for role, text in (("user", turn.text), ("assistant", turn.answer.text))]

    def send(self, text: str, images: Seq[Picture] = ()) -> Reply:
        """The user's next turn; the answer comes while it is iterated over. Images go before the text unless it has ``<image>`` markers.

        Raises:
            ValueError: no room in the model's context, markers and images do not match, a picture that cannot be read; the conversation is then as
                before, as it is after an interrupt.
        """
        if not text and not images:
            raise ValueError("chat: nothing to send: the text is empty and there is no image")
        if images and DEFAULT_IMAGE_TOKEN not in text:
            text = (DEFAULT_IMAGE_TOKEN + "\n") * len(images) + text
        turns = [*self._kept(), _Turn(text, list(self.model.pixels(images)) if images else [], Generation("", [], [], False))]
        dialogue = self.template.copy()
        for turn in turns:
            dialogue.append_message(dialogue.roles[0], turn.text)
            said = turn.answer.text.replace(DEFAULT_IMAGE_TOKEN, "")  # a model may say anything, but show nothing
            dialogue.append_message(dialogue.roles[1], said if turn is not turns[-1] else None)
        ids = encode_conversation(dialogue, self.model.tokenizer)
        pixels = [array for turn in turns for array in turn.pixels]
        limit = min(self.settings.max_new_tokens, room_for_answer(self.model, ids, len(pixels), "chat: the conversation"))
        self._begin(ids, pixels, limit, item_seed(self.seed, len(turns) - 1))
        assert self._decoder is not None
        stop = (*self.settings.stops, *self.template.stop_strings())
        answers = Answers(self.model, self._decoder, stop, end_ids(self.model, None), [limit])
        self.reply = Reply(self, answers)
        self._turns = [*turns[:-1], replace(turns[-1], answer=self.reply.generation)]
        return self.reply

    def reset(self) -> None:
        """Forgets the conversation and frees its memory."""
        self._turns, self.reply, self._prompt = [], None, []
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def _kept(self) -> list[_Turn]:
        return [turn for turn in self._turns if turn.answer.text or turn.answer.finished]

    def _begin(self, ids: list[int], pixels: list[np.ndarray], limit: int, seed: int) -> None:
        """Makes the decoder ready to draw what follows `ids`, computing what it has not computed before."""
        if self._adapters != self.model.adapters_enabled:
            self._decoder, self._adapters = None, self.model.adapters_enabled
        pictures = iter([hashlib.sha256(array.tobytes()).digest() for array in pixels])
        wanted: list[tuple[int, Hashable]] = [(token, next(pictures) if token == IMAGE_TOKEN_INDEX else None) for token in ids]
        keep, keep_rows = self._computed(wanted)
        new_pixels = pixels[sum(1 for token in ids[:keep] if token == IMAGE_TOKEN_INDEX):]
        _trees, batch = self.model.batch([Sequence(ids[keep:], None, tuple(range(len(new_pixels))))])
        options = dict(pixels=self.model.pixels(new_pixels) if new_pixels else None, eos_ids=end_ids(self.model, None), max_new_tokens=limit,
                       seeds=[seed], **self.settings.core_arguments())
        self._prompt, self.reply = wanted[:keep], None  # what holds whatever happens now
        if self._decoder is None:
            self._decoder = stllava_c.Generator(self.model.core, batch, adapters=self._adapters, **options)
        else:
            self._decoder.extend(batch, keep_rows=keep_rows, **options)
        self._prompt, self.rows_computed = wanted, batch.n_rows

    def _computed(self, wanted: list[tuple[int, Hashable]]) -> tuple[int, int]:
        """How many tokens at the beginning of `wanted` have rows in the decoder, and how many rows. One token is left: it gives the logits."""
        if self._decoder is None:
            return 0, 0
        said = [] if self.reply is None else self.reply.generation.ids
        per_image, n_rows, tokens, rows = self.model.core.tokens_per_image, self._decoder.n_rows, 0, 0
        for was, wants in zip([*self._prompt, *((token, None) for token in said)], wanted[:-1], strict=False):
            size = per_image if was[0] == IMAGE_TOKEN_INDEX else 1
            if was != wants or rows + size > n_rows:
                break
            tokens, rows = tokens + 1, rows + size
        return tokens, rows
