"""Training samples: a dialogue -> ids and labels, with the labels known from how the dialogue was rendered.

Targets are what the model writes: every answer with the token that ends it, and, for turns switched to the virtual user
(visual self-questioning), the question with its end token. Everything else is IGNORE_INDEX. What a person wrote is never
searched for role tags or special tokens. The original's way, with its defects, is in `stllava.text.labels_compat`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stllava.checkpoint.strict_json import is_text
from stllava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from stllava.conversation import Conversation, ConversationError, as_template
from stllava.text.encode import encode_segments
from stllava.text.interface import AnyTokenizer

Turn = Mapping[str, Any]
"""One turn of a data file: {"from": "human" | "gpt", "value": text}."""


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [begin, end) of `input_ids` that are targets; `turn` indexes the dialogue as rendered."""

    begin: int
    end: int
    turn: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised dialogue.

    input_ids, labels: same length; labels[i] is input_ids[i] or IGNORE_INDEX (the shift by one is the model's affair).
    prompt: the rendered text, without the begin-of-sequence token.
    spans: the targets, one span per turn the model writes; those beyond the cut are gone.
    n_cut: ids removed by `max_length`.  n_leading_dropped: 1 if a leading "gpt" turn was removed, else 0.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str
    spans: tuple[Span, ...]
    n_cut: int = 0
    n_leading_dropped: int = 0


def preprocess_multimodal(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Put the image first: a turn with "<image>" anywhere becomes "<image>\\n" + the stripped rest, with one marker.

    Turns without a marker stay as they are. Applying it twice changes nothing. Source: LLaVA's function of this name. For dialogues about one image:
    those about several say by their markers which image stands where.
    """
    result = []
    for turn in turns:
        value = turn["value"]
        if DEFAULT_IMAGE_TOKEN in value:
            value = f"{DEFAULT_IMAGE_TOKEN}\n{value.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
        result.append({**turn, "value": value})
    return result


def build_sample(
    conversation_turns: Sequence[Turn],
    template: str | Conversation,
    tokenizer: AnyTokenizer,
    *,
    has_image: bool,
    n_images: int = 1,
    switched: Collection[int] = frozenset(),
    max_length: int | None = None,
) -> Sample:
    """Render, tokenise and label one dialogue.

    Args:
        conversation_turns: human and gpt in turn, ending with gpt. A leading gpt turn is dropped and counted.
        template: name or template.
        has_image: the sample has one image, so exactly one "<image>" must be left after `preprocess_multimodal`,
            in the first human turn; without image, none.
        n_images: with `has_image`, so many images. More than one: as many "<image>", in any human turns, and they stay where they are.
        switched: indices of later human turns (in the dialogue without a leading gpt turn) that the model asks
            itself, see `draw_switches`; only for templates with a virtual user.
        max_length: cut ids and labels there; an image counts as one id, so leave room for its other positions.

    Raises:
        ConversationError: wrong roles or order, empty text, a marker too many or too few, switching where impossible.
        ConfigError: unknown template.
    """
    template = as_template(template)
    turns, n_leading_dropped = _checked_turns(conversation_turns)
    n_images = n_images if has_image else 0
    if n_images == 1:
        turns = preprocess_multimodal(turns)
    elif not n_images and switched:
        raise ConversationError(f"turns {sorted(switched)} cannot be switched: only samples with an image ask themselves")
    _check_markers(turns, n_images)
    segments = _render(turns, template, frozenset(switched)).training_segments()
    encoded = encode_segments(segments, tokenizer)
    length = len(encoded.ids) if max_length is None else min(max_length, len(encoded.ids))
    labels = [i if target else IGNORE_INDEX for i, target in zip(encoded.ids, encoded.target, strict=True)]
    return Sample(
        input_ids=encoded.ids[:length],
        labels=labels[:length],
        prompt="".join(segment.text for segment in segments),
        spans=tuple(_spans(encoded.target[:length], _speakers(encoded.turn))),
        n_cut=len(encoded.ids) - length,
        n_leading_dropped=n_leading_dropped,
    )


def _checked_turns(turns: Sequence[Turn]) -> tuple[Sequence[Turn], int]:
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ConversationError(f"turn {i} is a {type(turn).__name__}, want an object")
        missing = {"from", "value"} - turn.keys()
        if missing:
            raise ConversationError(f"turn {i}: key {min(missing)!r} is missing, found {sorted(turn)}")
        if not isinstance(turn["value"], str):
            raise ConversationError(f"turn {i}: value is a {type(turn['value']).__name__}, want text")
        if not is_text(turn["value"]):
            raise ConversationError(f"turn {i}: value has half a surrogate pair, which is no character")
    n_leading = int(bool(turns) and turns[0]["from"] == "gpt")
    kept = turns[n_leading:]
    for i, turn in enumerate(kept):
        expected = ("human", "gpt")[i % 2]
        if turn["from"] != expected:
            raise ConversationError(
                f"turn {i + n_leading}: from {turn['from']!r}, want {expected!r}; roles must alternate"
            )
        if not turn["value"].strip():
            what = "question" if i % 2 == 0 else "answer"
            raise ConversationError(f"turn {i + n_leading}: the {what} is empty")
    if not kept or len(kept) % 2:
        raise ConversationError(f"{len(kept)} turns besides a leading gpt turn, want pairs of question and answer")
    return kept, n_leading


def _check_markers(turns: Sequence[Turn], n_images: int) -> None:
    counts = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    if sum(counts) != n_images:
        raise ConversationError(f"{sum(counts)} {DEFAULT_IMAGE_TOKEN} markers for {n_images} images; per turn {counts}")
    if n_images == 1 and not counts[0]:
        raise ConversationError(f"the {DEFAULT_IMAGE_TOKEN} marker is in turn {counts.index(1)}, want the first turn")
    if any(counts[1::2]):
        raise ConversationError(f"an answer has an {DEFAULT_IMAGE_TOKEN} marker; per turn {counts}, want them in questions")


def _render(turns: Sequence[Turn], template: Conversation, switched: frozenset[int]) -> Conversation:
    impossible = sorted(i for i in switched if i not in range(2, len(turns), 2))
    if impossible:
        raise ConversationError(f"turns {impossible} cannot be switched, want later human turns of {len(turns)} turns")
    if switched and len(template.roles) < 3:
        raise ConversationError(
            f"template {template.name} has no virtual user, turns {sorted(switched)} cannot be switched; use v1_sq"
        )
    conversation = template.copy()
    for i, turn in enumerate(turns):
        if i in switched:
            conversation.append_message(template.roles[2], turn["value"] + (template.sep2 or ""))
        else:
            conversation.append_message(template.roles[i % 2], turn["value"])
    return conversation


def _speakers(turn_of_id: Sequence[int | None]) -> list[int]:
    """Whose turn each id is part of, end tokens included: template text counts to the last person who spoke."""
    speakers, speaker = [], -1
    for turn in turn_of_id:
        speaker = speaker if turn is None else turn
        speakers.append(speaker)
    return speakers


def _spans(target: Sequence[bool], speakers: Sequence[int]) -> Iterable[Span]:
    begin = None
    for i in range(len(target) + 1):
        is_target = i < len(target) and target[i]
        if begin is None and is_target:
            begin = i
        elif begin is not None and not is_target:
            yield Span(begin, i, speakers[begin])
            begin = None


# ---- visual self-questioning: which questions the model asks itself


def draw_uniform(seed: int, epoch: int, sample_id: str | int, turn: int) -> float:
    """A number in [0, 1) that depends on nothing but its four arguments: same run, same draw, also after a resume."""
    key = f"{seed}\x1f{epoch}\x1f{sample_id}\x1f{turn}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2.0**53


def draw_switches(n_turns: int, sq_r: float, seed: int, epoch: int, sample_id: str | int) -> set[int]:
    """Later human turns (2, 4, ...) whose role becomes the virtual user, each with probability `sq_r` in [0, 1].

    Only for samples with an image. `n_turns` may count a leading gpt turn: dialogues have pairs of turns, so an odd
    number says that one will be dropped. Source: SQ-LLaVA (arXiv 2403.11299), visual self-questioning.
    """
    if not 0.0 <= sq_r <= 1.0:
        raise ValueError(f"sq_r = {sq_r}, want a probability in [0, 1]")
    return {turn for turn in range(2, n_turns - n_turns % 2, 2) if draw_uniform(seed, epoch, sample_id, turn) < sq_r}


def switches_from_draws(draws: Mapping[int, float], sq_r: float) -> set[int]:
    """The same decision from recorded draws {turn: u}: switched iff u < sq_r."""
    return {turn for turn, u in draws.items() if u < sq_r}
