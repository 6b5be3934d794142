"""The original's label builder, defects included: splits the rendered prompt at its separators and counts tokens.

For reproducing published training runs and their recorded samples. Known defects (spec D13, D14, D27, D57, D58, D60, D66):
role tags or "</s>" inside somebody's words move or lose targets, "<unk>" breaks the length check, a failed check masks
the whole sample, and `v0` drifts by one token per turn. Everything else uses `stllava.text.labels`.
Source: `preprocess*` in the training script of STLLaVA-Med and SQ-LLaVA; algorithm in spec 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stllava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from stllava.conversation import Conversation, ConversationError, SeparatorStyle, as_template
from stllava.errors import ConfigError
from stllava.text.encode import tokenizer_image_token
from stllava.text.interface import AnyTokenizer
from stllava.text.labels import Turn, preprocess_multimodal, switches_from_draws


@dataclass(frozen=True, slots=True)
class _Text:
    """How the original tokenises a whole prompt and measures parts of it; both depend on there being an image."""

    tokenizer: AnyTokenizer
    has_image: bool
    max_length: int

    def ids(self, prompt: str) -> list[int]:
        if self.has_image:
            return list(tokenizer_image_token(prompt, self.tokenizer))
        return self.tokenizer.encode(prompt)[: self.max_length]  # only text-only prompts are cut this early

    def length(self, part: str) -> int:
        return len(tokenizer_image_token(part, self.tokenizer) if self.has_image else self.tokenizer.encode(part))

    def count_non_pad(self, ids: Sequence[int]) -> int:
        return len(ids) - ids.count(self.tokenizer.pad_token_id)


def preprocess_compat(
    sources: Sequence[Turn],
    template: str | Conversation,
    tokenizer: AnyTokenizer,
    has_image: bool,
    *,
    sq_r: float = 0.5,
    draws: Mapping[int, float] | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Ids and labels of one dialogue as the original makes them.

    Args:
        sources: the turns of one dialogue.
        sq_r, draws: for templates with a virtual user and a sample with image: a later human turn (by index in
            `sources`) is switched iff draws[turn] < sq_r.
        max_length: limit of the text-only cut and of the length check, default the tokenizer's `model_max_length`.

    Returns:
        {"prompt", "input_ids", "labels", "mismatch": the length check failed, "mismatch_message": the original's warning
        or None}. With an image, ids beyond `max_length` are left for the collator to cut.

    Raises ConversationError where the original stops.
    """
    template = as_template(template)
    if not sources:
        raise ConversationError("the dialogue has no turns")
    for i, turn in enumerate(sources):
        if turn["from"] not in ("human", "gpt"):
            raise ConversationError(f"turn {i}: from {turn['from']!r}, want 'human' or 'gpt'")
    turns = preprocess_multimodal(sources) if has_image else [dict(turn) for turn in sources]
    text = _Text(tokenizer, has_image, tokenizer.model_max_length if max_length is None else max_length)
    if template.prompt_only:
        raise ConfigError(f"template {template.name} is for prompts only")
    if template.sep_style is SeparatorStyle.PLAIN:
        return _preprocess_plain(turns, template, tokenizer)
    if template.sep_style is SeparatorStyle.SINGLE:
        return _preprocess_lines(turns, template, text)
    if len(template.roles) == 3:
        conversation = _self_questioning(turns, template, has_image, sq_r, draws)
        return _preprocess_rounds(conversation, f" {template.roles[1]}: ", text, _mask_virtual_user(template, text))
    answer_tag = "[/INST] " if template.sep_style is SeparatorStyle.LLAMA_2 else f"{template.sep}{template.roles[1]}: "
    return _preprocess_rounds(_alternating(turns, template), answer_tag, text, None)


# ---- prompts


def _alternating(turns: Sequence[Turn], template: Conversation) -> Conversation:
    conversation = template.copy()
    for i, turn in enumerate(turns[1:] if turns[0]["from"] == "gpt" else turns):
        role = template.roles[turn["from"] == "gpt"]
        if role != template.roles[i % 2]:
            raise ConversationError(f"turn {i}: from {turn['from']!r} out of order, roles must alternate")
        conversation.append_message(role, turn["value"])
    return conversation


def _self_questioning(
    turns: Sequence[Turn], template: Conversation, has_image: bool, sq_r: float, draws: Mapping[int, float] | None
) -> Conversation:
    later = [i for i, turn in enumerate(turns) if i > 0 and turn["from"] == "human"] if has_image else []
    missing = [i for i in later if draws is None or i not in draws]
    if missing:
        raise ConversationError(f"no draw for turns {missing}; `draws` must give a number in [0, 1) for each of {later}")
    switched = switches_from_draws({i: draws[i] for i in later}, sq_r) if draws else set()
    conversation = template.copy()
    for i, turn in enumerate(turns):
        if i in switched:
            conversation.append_message(template.roles[2], turn["value"] + str(template.sep2))
        else:
            conversation.append_message(template.roles[turn["from"] == "gpt"], turn["value"])
    return conversation


# ---- labels


def _mask(labels: list[int], begin: int, count: int) -> None:
    end = min(begin + count, len(labels))
    labels[begin:end] = [IGNORE_INDEX] * (end - begin)


def _preprocess_rounds(
    conversation: Conversation, answer_tag: str, text: _Text, other_round: Callable[[str], int] | None
) -> dict[str, Any]:
    """The loop over rounds between end tokens. `other_round` says how many ids to mask in a round that does not
    split in two at `answer_tag`; without it such a round ends the loop."""
    prompt = conversation.get_prompt()
    ids = text.ids(prompt)
    labels = list(ids)
    labels[0] = IGNORE_INDEX
    position = 1
    for part in prompt.split(str(conversation.sep2)):
        if not part:
            break
        pieces = part.split(answer_tag)
        if len(pieces) == 2:
            n_masked = text.length(pieces[0] + answer_tag) - 2  # the begin token and the lone space at the end
        elif other_round is not None:
            n_masked = other_round(part)
        else:
            break
        _mask(labels, position, n_masked)
        position += text.length(part)  # its begin token stands for the end token that split() removed
    _mask(labels, position, len(labels))
    n_ids = text.count_non_pad(ids)
    mismatch = position < text.max_length and position != n_ids
    if mismatch:
        _mask(labels, 0, len(labels))
    message = f"WARNING: tokenization mismatch: {position} vs. {n_ids}. (ignored)" if mismatch else None
    return _result(prompt, ids, labels, message)


def _mask_virtual_user(template: Conversation, text: _Text) -> Callable[[str], int]:
    image_line = f"{DEFAULT_IMAGE_TOKEN}\n"

    def count(part: str) -> int:
        if image_line in part:
            return text.length(part[: part.index(image_line)] + image_line)
        return text.length(f"{template.roles[2]}: ") - 2

    return count


def _preprocess_plain(turns: Sequence[Turn], template: Conversation, tokenizer: AnyTokenizer) -> dict[str, Any]:
    conversation = template.copy()
    for i, turn in enumerate(turns):
        conversation.append_message(template.roles[i % 2], turn["value"])
    prompt = "".join(segment.text for segment in conversation.training_segments())
    ids = list(tokenizer_image_token(prompt, tokenizer))
    labels = list(ids)
    _mask(labels, 0, len(tokenizer_image_token(DEFAULT_IMAGE_TOKEN, tokenizer)))
    return _result(prompt, ids, labels, None)


def _preprocess_lines(turns: Sequence[Turn], template: Conversation, text: _Text) -> dict[str, Any]:
    """The rule for `v0`: one line per turn, every line counted with a begin token it does not have (D66)."""
    header = f"{template.system}\n\n"
    lines = [f"{template.sep} {template.roles[turn['from'] == 'gpt']}: {turn['value']}\n" for turn in turns]
    prompt = header + "".join(lines) + f"{template.sep} "
    ids = text.ids(prompt)
    labels = list(ids)

    def length(part: str) -> int:
        return text.length(part) if text.has_image else text.count_non_pad(text.ids(part))

    position = length(header)
    _mask(labels, 0, position)
    for turn, line in zip(turns, lines, strict=True):
        n_line = length(line)
        if turn["from"] == "human":
            _mask(labels, position + 2, n_line - 2)
        position += n_line
    return _result(prompt, ids, labels, None)


def _result(prompt: str, ids: list[int], labels: list[int], message: str | None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "input_ids": ids,
        "labels": labels,
        "mismatch": message is not None,
        "mismatch_message": message,
    }
