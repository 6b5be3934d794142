"""Text out of a model: many prompts at once, every shared prefix computed once, one decoding batch for all continuations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import stllava_c

from .constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from .conversation import conv_templates
from .text.encode import encode_conversation, tokenizer_image_token
from .tree import Sequence, build_trees

if TYPE_CHECKING:
    from .images import Picture
    from .model import LlavaModel

__all__ = ["Generation", "generate", "chat", "score"]


@dataclass(slots=True)
class Generation:
    """One continuation. `ids` includes the end token when there was one; `text` has neither it nor the stop string."""

    text: str
    ids: list[int]
    logps: list[float]
    finished: bool


def generate(model: LlavaModel, prompts: Seq[str] | Seq[Seq[int]], images: Seq[Picture | tuple[Picture, ...] | None] | None = None, *,
             max_new_tokens: int = 1024, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, num_return_sequences: int = 1,
             seeds: Seq[int] | None = None, stop: Seq[str] = (), eos_token_id: int | Seq[int] | None = None, batch_size: int = 32,
             on_batch: Callable[[int], None] | None = None) -> list[list[Generation]]:
    """Continues every prompt.

    Args:
        prompts: texts with ``<image>`` markers, or id lists with -200; one image marker per image.
        images: per prompt one image (path, bytes, PIL image, RGB array, or (3, S, S) float array), a tuple of several, or None.
            Prompts that name the same object share its encoding.
        max_new_tokens: >= 1. temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. Order: temperature, top-k, top-p (spec 1.4).
        num_return_sequences: continuations per prompt, drawn with different seeds from one prefix.
        seeds: one per continuation (len(prompts) * num_return_sequences); default 0, 1, 2, ...: an item's draws depend on its own seed only.
        stop: texts that end an answer. eos_token_id: default the tokenizer's; text prompts need a tokenizer.
        batch_size: prompts decoded together. on_batch: called with the number of prompts finished.

    Returns:
        for each prompt, `num_return_sequences` generations.

    Raises:
        ValueError: markers and images do not match (the prompt is named), bad settings.
    """
    n = num_return_sequences
    if len(prompts) == 0:
        return []
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"generate: {len(prompts)} prompts but {len(images)} entries in images; give one per prompt (None for no image)")
    if seeds is not None and len(seeds) != len(prompts) * n:
        raise ValueError(f"generate: {len(seeds)} seeds for {len(prompts)} prompts x {n} sequences")
    eos = _eos(model, eos_token_id)
    seeds = list(range(len(prompts) * n)) if seeds is None else [int(s) for s in seeds]
    results: list[list[Generation]] = []
    for start in range(0, len(prompts), batch_size):
        chosen = range(start, min(start + batch_size, len(prompts)))
        sequences: list[Sequence] = []
        pictures: dict[Hashable, Picture] = {}
        for i in chosen:
            given = None if images is None else images[i]
            mine = () if given is None else given if isinstance(given, tuple) else (given,)
            keys = tuple(image if isinstance(image, str) else id(image) for image in mine)
            pictures.update(zip(keys, mine, strict=True))
            sequences.append(Sequence(_ids(model, prompts[i], i), None, keys))
        trees = build_trees(sequences)
        batch = stllava_c.Batch(model.core, **trees.core_arguments())
        by_leaf = [0] * len(chosen)
        for local, leaf in enumerate(trees.order):
            by_leaf[leaf] = local
        decoder = stllava_c.Generator(
            model.core, batch, pixels=model.pixels(pictures[key] for key in trees.image_keys) if trees.image_keys else None,
            adapters=model.adapters_enabled, temperature=temperature, top_k=top_k, top_p=top_p, n_per_sequence=n,
            max_new_tokens=max_new_tokens, eos_ids=eos,
            seeds=np.array([seeds[(start + local) * n + j] for local in by_leaf for j in range(n)], np.uint64))
        found = _decode(model, decoder, stop, eos)
        results.extend([found[leaf * n + j] for j in range(n)] for leaf in trees.order)
        if on_batch is not None:
            on_batch(len(chosen))
    return results


def _decode(model: LlavaModel, decoder: stllava_c.Generator, stop: Seq[str], eos: Seq[int]) -> list[Generation]:
    ids: list[list[int]] = [[] for _ in range(decoder.n)]
    logps: list[list[float]] = [[] for _ in range(decoder.n)]
    stopped: dict[int, str] = {}
    while decoder.n_active:
        tokens, values = decoder.step()
        for i in np.flatnonzero(tokens >= 0).tolist():
            ids[i].append(int(tokens[i]))
            logps[i].append(float(values[i]))
            if stop and ids[i][-1] not in eos:
                text = model.tokenizer.decode(ids[i])
                cut = min((at for at in (text.find(word) for word in stop) if at >= 0), default=-1)
                if cut >= 0:
                    stopped[i] = text[:cut]
                    decoder.finish(i)
    out = []
    for i, mine in enumerate(ids):
        ended = bool(mine) and mine[-1] in eos
        body = mine[:-1] if ended else mine
        text = stopped[i] if i in stopped else model.tokenizer.decode(body) if model.has_tokenizer else ""
        out.append(Generation(text.strip(), mine, logps[i], ended or i in stopped))
    return out


def _eos(model: LlavaModel, eos_token_id: int | Seq[int] | None) -> list[int]:
    if eos_token_id is None:
        return [model.tokenizer.eos_token_id] if model.has_tokenizer else []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _ids(model: LlavaModel, prompt: str | Seq[int], i: int) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if not model.has_tokenizer:
        raise ValueError(f"generate: prompt {i} is a text, but the model has no tokenizer; pass ids")
    return tokenizer_image_token(prompt, model.tokenizer, IMAGE_TOKEN_INDEX)


def score(model: LlavaModel, prompt: str, answers: Seq[str], images: Seq[Picture] = ()) -> NDArray[np.float64]:
    """See :meth:`LlavaModel.score`. An answer's tokens are those of its text after the prompt, with the end token."""
    head = _ids(model, prompt, 0)
    pictures = dict(enumerate(model.pixels(images))) if images else {}
    sequences = []
    for answer in answers:
        tail = [*model.tokenizer.encode(answer, add_bos=False, parse_special=False), model.tokenizer.eos_token_id]
        sequences.append(Sequence(head + tail, [-100] * len(head) + tail, tuple(pictures)))
    return model.logps(sequences, pictures)


def chat(model: LlavaModel, messages: Seq[Mapping[str, str]], images: Seq[Picture] = (), *, template: str | None = None,
         **options: Any) -> str:
    """Answers a conversation.

    Args:
        messages: ``{"role": "user" | "assistant", "content": text}``, last one from the user. Images go to the front of the first user
            message unless the text has ``<image>`` markers.
        template: conversation template; default: what the checkpoint names, else ``v1``.
        options: as for `generate` (max_new_tokens, temperature, ...).

    Raises:
        ValueError: roles that do not alternate, or a last message that is not the user's.
    """
    conversation = conv_templates[template or model.config.extra.get("conversation_template", "v1")].copy()
    for turn, message in enumerate(messages):
        wanted = "user" if turn % 2 == 0 else "assistant"
        if message.get("role") != wanted:
            raise ValueError(f"chat: message {turn} has role {message.get('role')!r}, want {wanted!r}: user and assistant take turns")
        text = message["content"]
        if turn == 0 and images and DEFAULT_IMAGE_TOKEN not in text:
            text = (DEFAULT_IMAGE_TOKEN + "\n") * len(images) + text
        conversation.append_message(conversation.roles[turn % 2], text)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("chat: the last message must be the user's")
    conversation.append_message(conversation.roles[1], None)
    [[answer]] = generate(model, [encode_conversation(conversation, model.tokenizer, len(images))], [tuple(images)], **options)
    return answer.text


def stream(model: LlavaModel, prompt: str, images: Seq[Picture] = (), **options: Any) -> Iterator[str]:
    """Yields the text of one continuation piece by piece (options as for the core's Generator: max_new_tokens, temperature, ...)."""
    _trees, batch = model.batch([Sequence(_ids(model, prompt, 0), None, tuple(range(len(images))))])
    decoder = stllava_c.Generator(model.core, batch, pixels=model.pixels(images) if images else None, adapters=model.adapters_enabled,
                                  eos_ids=[model.tokenizer.eos_token_id], **options)
    ids: list[int] = []
    shown = ""
    while decoder.n_active:
        ids.append(int(decoder.step()[0][0]))
        text = model.tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character is not shown
            yield text[len(shown):]
            shown = text
