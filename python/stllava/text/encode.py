"""Prompts with image markers -> ids.

Two ways in. `tokenizer_image_token` takes a finished string, as LLaVA does, and trusts special tokens in it.
`encode_segments` takes a rendered dialogue and keeps everything a person said as text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, overload

import numpy as np

from stllava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from stllava.conversation import Conversation, ConversationError, Segment
from stllava.text.interface import AnyTokenizer


@overload
def tokenizer_image_token(prompt: str, tokenizer: AnyTokenizer, image_token_index: int = ..., return_tensors: None = None) -> list[int]: ...
@overload
def tokenizer_image_token(prompt: str, tokenizer: AnyTokenizer, image_token_index: int = ..., *, return_tensors: Literal["np"]) -> np.ndarray: ...
def tokenizer_image_token(
    prompt: str,
    tokenizer: AnyTokenizer,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | np.ndarray:
    """Ids of `prompt` with one `image_token_index` for every "<image>"; starts with the begin-of-sequence id, where the model has one.

    Each stretch between images is tokenised on its own. return_tensors: None for a list, "np" for int64 (n,).
    Source: `llava/mm_utils.py`, function of the same name.
    """
    if return_tensors not in (None, "np"):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported, want None or 'np'")
    ids = tokenizer.encode("")
    for i, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if i > 0:
            ids.append(image_token_index)
        ids += tokenizer.encode(chunk, add_bos=False)
    return np.asarray(ids, dtype=np.int64) if return_tensors == "np" else ids


@dataclass
class EncodedSegments:
    """Three lists of one length: ids, whether the model writes the position, and whose turn it is (None: template)."""

    ids: list[int] = field(default_factory=list)
    target: list[bool] = field(default_factory=list)
    turn: list[int | None] = field(default_factory=list)

    def append(self, token_id: int, target: bool = False, turn: int | None = None) -> None:
        self.ids.append(token_id)
        self.target.append(target)
        self.turn.append(turn)


def encode_segments(
    segments: Sequence[Segment], tokenizer: AnyTokenizer, image_token_index: int = IMAGE_TOKEN_INDEX
) -> EncodedSegments:
    """Ids of a rendered dialogue; special segments become their id, "<image>" in somebody's words an image.

    Neighbouring text is joined before it is tokenised, so the ids are those of the whole prompt. A piece belongs to the
    segment in which it begins.
    """
    encoded = EncodedSegments()
    for token_id in tokenizer.encode(""):
        encoded.append(token_id)
    run: list[Segment] = []
    after_special = False

    def flush() -> None:
        text = "".join(segment.text for segment in run)
        if text:
            ids, begins = tokenizer.encode_piecewise(text, after_special)
            encoded.ids += ids
            first = 0
            ends = accumulate(len(segment.text) for segment in run)
            for segment, end in zip(run, ends, strict=True):
                last = bisect_left(begins, end, first)
                encoded.target += [segment.target] * (last - first)
                encoded.turn += [segment.turn] * (last - first)
                first = last
        run.clear()

    for segment in segments:
        if segment.special:
            flush()
            encoded.append(tokenizer.special_ids[segment.text], segment.target, segment.turn)
            after_special = True
            continue
        parts = [segment.text] if segment.turn is None else segment.text.split(DEFAULT_IMAGE_TOKEN)
        for i, text in enumerate(parts):
            if i > 0:
                flush()
                encoded.append(image_token_index, turn=segment.turn)
                after_special = False
            run.append(Segment(text, segment.turn, target=segment.target))
    flush()
    return encoded


def encode_conversation(conversation: Conversation, tokenizer: AnyTokenizer, n_images: int | None = None) -> list[int]:
    """Ids of the prompt that asks the model for its next turn (`conversation.segments()`).

    n_images: when given, the number of "<image>" markers that must be there; ConversationError otherwise.
    """
    ids = encode_segments(conversation.segments(), tokenizer).ids
    n_markers = ids.count(IMAGE_TOKEN_INDEX)
    if n_images is not None and n_markers != n_images:
        raise ConversationError(f"the prompt has {n_markers} {DEFAULT_IMAGE_TOKEN} markers for {n_images} images")
    return ids
