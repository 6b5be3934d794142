"""Text out of a model: many prompts at once, every shared prefix computed once, one decoding batch for all continuations."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import stllava_c

from .constants import IMAGE_TOKEN_INDEX
from .data.steps import item_seed
from .errors import ConfigError
from .text.encode import tokenizer_image_token
from .text.stream import TextStream
from .tree import Sequence, build_trees

if TYPE_CHECKING:
    from .feature_cache import FeatureCache
    from .images import Picture
    from .model import LlavaModel

__all__ = ["Answers", "DecodingSettings", "Generation", "end_ids", "generate", "prompt_ids", "room_for_answer", "score", "stream"]


@dataclass(slots=True)
class Generation:
    """One continuation. `ids` includes the end token when there was one; `text` has neither it nor the stop string.

    logps: log-probability of each of `ids` under the model's own distribution (softmax of the logits, before penalty, temperature, top-k and top-p).
    finished: it ended by itself, with an end token or a stop string; False: at max_new_tokens, at the end of the context, or interrupted.
    """

    text: str
    ids: list[int]
    logps: list[float]
    finished: bool


@dataclass(frozen=True, slots=True)
class DecodingSettings:
    """How an answer is drawn. Order: repetition penalty, least length, temperature, top-k, top-p (spec 1.4, transformers).

    max_new_tokens: >= 1; an answer also ends where the model's context does. min_new_tokens: until then no end token is drawn.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
    repetition_penalty: 1 is off; logits of tokens in the prompt or the answer so far are divided by it, negative ones multiplied.
    stop: texts that end an answer, wherever token boundaries lie; a single one may be given as it is.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: str | Seq[str] = ()

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def core_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``stllava_c.Generator`` and its `extend`, but for max_new_tokens, seeds and eos_ids."""
        return dict(min_new_tokens=self.min_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                    repetition_penalty=self.repetition_penalty)


class Answers:
    """Steps a core generator to its end and gathers what it says; whatever interrupts it, `generations` has what came before.

    limits: per continuation, how many tokens it may have.
    """

    def __init__(self, model: LlavaModel, decoder: stllava_c.Generator, stop: Iterable[str], eos: Iterable[int], limits: Seq[int]) -> None:
        self._decoder, self._eos, self._limits = decoder, frozenset(eos), limits
        self._texts = [TextStream(model.tokenizer, stop) if model.has_tokenizer else None for _ in range(decoder.n)]
        self.generations = [Generation("", [], [], False) for _ in range(decoder.n)]

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """(continuation, token, text that is certain now and was not before), step by step. The pieces of a continuation, joined, are its text."""
        while self._decoder.n_active:
            tokens, logps = self._decoder.step()
            for i in np.flatnonzero(tokens >= 0).tolist():
                yield i, int(tokens[i]), self._take(i, int(tokens[i]), float(logps[i]))

    def run(self) -> list[Generation]:
        """All of them, to the end."""
        for _ in self:
            pass
        return self.generations

    def _take(self, i: int, token: int, logp: float) -> str:
        made, text = self.generations[i], self._texts[i]
        made.ids.append(token)
        made.logps.append(logp)
        made.finished = token in self._eos
        piece = "" if text is None or made.finished else text.add(token)
        made.finished = made.finished or (text is not None and text.stopped)
        if made.finished or len(made.ids) >= self._limits[i]:
            self._decoder.finish(i)
            piece += "" if text is None else text.close()
        made.text += piece
        return piece


def generate(model: LlavaModel, prompts: Seq[str] | Seq[Seq[int]], images: Seq[Picture | tuple[Picture, ...] | None] | None = None, *,
             max_new_tokens: int = 1024, min_new_tokens: int = 0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             repetition_penalty: float = 1.0, num_return_sequences: int = 1, seed: int | None = None, seeds: Seq[int] | None = None,
             stop: str | Seq[str] = (), eos_token_id: int | Seq[int] | None = None, batch_size: int = 32,
             on_token: Callable[[int, int, int, str], None] | None = None, on_batch: Callable[[int], None] | None = None,
             feature_cache: FeatureCache | None = None) -> list[list[Generation]]:
    """Continues every prompt.

    Args:
        prompts: texts with ``<image>`` markers, or id lists with -200; one image marker per image.
        images: per prompt one image (path, bytes, PIL image, RGB array, or (3, S, S) float array), a tuple of several, or None.
            Prompts that name the same path or object share its encoding, and all rows they begin with.
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, repetition_penalty, stop: see `DecodingSettings`.
        num_return_sequences: continuations per prompt, drawn with different seeds from one prefix.
        seed: of the whole call; continuation j of prompt i is drawn with ``item_seed(seed, i, j)`` (:func:`stllava.data.steps.item_seed`).
        seeds: instead, one per continuation (len(prompts) * num_return_sequences); default 0, 1, 2, ... An item's draws depend on its own seed only.
        eos_token_id: default the tokenizer's; text prompts need a tokenizer.
        batch_size: prompts decoded together. on_token: called with (prompt, continuation, token, new text) for each token, see `Answers`.
        on_batch: called with the number of prompts finished. feature_cache: where features of images are looked up and kept (of this model).

    Returns:
        for each prompt, `num_return_sequences` generations.

    Raises:
        ValueError: markers and images do not match, a prompt longer than the model's context (the prompt and both counts are named; nothing has been
            computed), bad settings.
    """
    n = num_return_sequences
    if len(prompts) == 0:
        return []
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"generate: {len(prompts)} prompts but {len(images)} entries in images; give one per prompt (None for no image)")
    if seed is not None and seeds is not None:
        raise ValueError("generate: seed and seeds are given; give one of the two")
    if seeds is not None and len(seeds) != len(prompts) * n:
        raise ValueError(f"generate: {len(seeds)} seeds for {len(prompts)} prompts x {n} sequences")
    settings = DecodingSettings(max_new_tokens, min_new_tokens, temperature, top_k, top_p, repetition_penalty, stop)
    eos = end_ids(model, eos_token_id)
    if seed is not None:
        seeds = [item_seed(seed, i, j) for i in range(len(prompts)) for j in range(n)]
    elif seeds is None:
        seeds = list(range(len(prompts) * n))
    shown = [_tuple(None if images is None else images[i]) for i in range(len(prompts))]
    ids = [prompt_ids(model, prompts[i], i) for i in range(len(prompts))]
    limits = [min(max_new_tokens, room_for_answer(model, ids[i], len(shown[i]), f"generate: prompt {i}")) for i in range(len(prompts))]
    results: list[list[Generation]] = []
    for start in range(0, len(prompts), batch_size):
        chosen = range(start, min(start + batch_size, len(prompts)))
        pictures: dict[Hashable, Picture] = {_key(image): image for i in chosen for image in shown[i]}
        trees = build_trees(Sequence(ids[i], None, tuple(map(_key, shown[i]))) for i in chosen)
        prompt_of = [0] * len(chosen)
        for i, leaf in zip(chosen, trees.order.tolist(), strict=True):
            prompt_of[leaf] = i
        pixels, features = _pixels_or_features(model, [pictures[key] for key in trees.image_keys], feature_cache)
        decoder = stllava_c.Generator(
            model.core, stllava_c.Batch(model.core, **trees.core_arguments()), adapters=model.adapters_enabled,
            pixels=pixels, features=features, n_per_sequence=n, eos_ids=eos, max_new_tokens=max(limits[i] for i in chosen),
            seeds=np.array([seeds[i * n + j] for i in prompt_of for j in range(n)], np.uint64), **settings.core_arguments())
        answers = Answers(model, decoder, settings.stops, eos, [limits[i] for i in prompt_of for _ in range(n)])
        for continuation, token, text in answers:
            if on_token is not None:
                on_token(prompt_of[continuation // n], continuation % n, token, text)
        results.extend(answers.generations[leaf * n:(leaf + 1) * n] for leaf in trees.order.tolist())
        if on_batch is not None:
            on_batch(len(chosen))
    return results


def stream(model: LlavaModel, prompt: str | Seq[int], images: Seq[Picture] = (), *, seed: int = 0, eos_token_id: int | Seq[int] | None = None,
           **settings: Any) -> Iterator[str]:
    """Yields the text of one continuation piece by piece; joined, the pieces are the text that `generate` returns for this prompt.

    Args:
        prompt, images: as for `generate`. seed: of the one continuation. settings: fields of `DecodingSettings`.

    Raises:
        ValueError: as `generate`, before the first piece.
    """
    how = DecodingSettings(**settings)
    ids, eos = prompt_ids(model, prompt, 0), end_ids(model, eos_token_id)
    limit = min(how.max_new_tokens, room_for_answer(model, ids, len(images), "stream: the prompt"))
    _trees, batch = model.batch([Sequence(ids, None, tuple(range(len(images))))])
    decoder = stllava_c.Generator(model.core, batch, pixels=model.pixels(images) if images else None, adapters=model.adapters_enabled, eos_ids=eos,
                                  seeds=[seed], max_new_tokens=limit, **how.core_arguments())
    return (text for _, _, text in Answers(model, decoder, how.stops, eos, [limit]) if text)


def score(model: LlavaModel, prompt: str | Seq[int], answers: Seq[str], images: Seq[Picture] = ()) -> NDArray[np.float64]:
    """See :meth:`LlavaModel.score`. An answer's tokens are those of its text after the prompt, with the end token."""
    head = prompt_ids(model, prompt, 0)
    pictures = dict(enumerate(model.pixels(images))) if images else {}
    sequences = []
    for answer in answers:
        tail = [*model.tokenizer.encode(answer, add_bos=False, parse_special=False), model.tokenizer.eos_token_id]
        sequences.append(Sequence(head + tail, [-100] * len(head) + tail, tuple(pictures)))
    return model.logps(sequences, pictures)


# ---- prompts -----------------------------------------------------------------------------------------------------------------


def room_for_answer(model: LlavaModel, ids: Seq[int], n_images: int, what: str) -> int:
    """Tokens that fit into the model's context (`max_position_embeddings`) after a prompt. `what` names it in errors.

    Raises:
        ConfigError: the image markers are not as many as the images, or the prompt leaves no room.
    """
    n_markers = sum(1 for token in ids if token == IMAGE_TOKEN_INDEX)
    if n_markers != n_images:
        raise ConfigError(f"{what} has {n_markers} image markers but {n_images} images; give one image per marker")
    per_image, context = model.core.tokens_per_image, model.config.max_position_embeddings
    n_rows = len(ids) + n_images * (per_image - 1)
    if n_rows >= context:
        raise ConfigError(f"{what} is {n_rows} tokens long ({len(ids) - n_images} of text, {n_images} images of {per_image}), but the model's "
                          f"context is {context} (max_position_embeddings); shorten it", field="max_position_embeddings")
    return context - n_rows


def end_ids(model: LlavaModel, eos_token_id: int | Seq[int] | None) -> list[int]:
    """What ends an answer: the tokenizer's end token unless something else is given."""
    if eos_token_id is None:
        return [model.tokenizer.eos_token_id] if model.has_tokenizer else []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def prompt_ids(model: LlavaModel, prompt: str | Seq[int], i: int) -> list[int]:
    """Ids of prompt number `i`."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if not model.has_tokenizer:
        raise ValueError(f"generate: prompt {i} is a text, but the model has no tokenizer; pass ids")
    return tokenizer_image_token(prompt, model.tokenizer, IMAGE_TOKEN_INDEX)


def _pixels_or_features(model: LlavaModel, pictures: Seq[Picture], cache: FeatureCache | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    pixels = model.pixels(pictures) if pictures else None
    return (pixels, None) if cache is None or pixels is None else (None, cache.features(pixels))


def _tuple(images: Picture | tuple[Picture, ...] | None) -> tuple[Picture, ...]:
    return () if images is None else images if isinstance(images, tuple) else (images,)


def _key(image: Picture) -> Hashable:
    """What two mentions of the same picture share."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)
