"""Rows as TRL and Hugging Face write them (roles and contents) <-> turns as LLaVA writes them (from and value).

    preference   prompt, chosen, rejected: conversational, plain text, or without a prompt      -> a pair
    instruction  messages, or prompt and completion                                             -> conversations
    messages_of                                                                                 the way back

An image stands where its part {"type": "image"} stands, as ``<image>`` on a line of its own; where contents are plain text and hold no marker, all
images come before the first question, as in TRL's `prepare_multimodal_messages`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.errors import FormatError

__all__ = ["images_of", "instruction", "messages_of", "preference"]

Turns = list[dict[str, str]]
_ROLES = {"user": "human", "assistant": "gpt"}
_PREFERENCE_FIELDS = ("prompt", "question", "chosen", "rejected", "image", "images")


def images_of(record: Mapping[str, Any]) -> list[Any]:
    """The images of a record, in order: of `images`, else of `image`, either one image or a list. None stands for no image."""
    value = record.get("images")
    value = record.get("image") if value is None else value
    return [image for image in (value if isinstance(value, (list, tuple)) else [value]) if image is not None]


def with_images(record: dict[str, Any], images: Sequence[Any]) -> dict[str, Any]:
    """`record` with LLaVA's field: `image` is the one image, or the list of several."""
    rest = {key: value for key, value in record.items() if key not in ("image", "images")}
    return rest if not images else {**rest, "image": images[0] if len(images) == 1 else list(images)}


# ---- rows -> turns -----------------------------------------------------------------------------------------------------------


def preference(record: Mapping[str, Any]) -> dict[str, Any]:
    """A preference row as ``{"chosen_conversations", "reject_conversations", "image"?, ...}``, its other fields kept.

    prompt (or `question`, as RLAIF-V has it), chosen and rejected are text or lists of messages. Without a prompt, or where chosen and rejected
    begin with a question, the prompt is what the two begin with in common. Source: TRL's data set formats, `extract_prompt`.

    Raises:
        FormatError: naming the field.
    """
    prompt_field = "prompt" if "prompt" in record else "question"
    prompt, chosen, rejected = record.get(prompt_field), record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        prompt, chosen, rejected = _common_text(chosen, rejected)
    chosen, rejected = ([{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in (chosen, rejected))
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if prompt is not None:
        prompt = _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, prompt_field)
    if chosen[0]["role"] == rejected[0]["role"] == "user":  # the whole conversation
        n = _common_length(chosen, rejected)
        if prompt is not None and _asked(prompt) not in [_asked(chosen[:n]), _asked(chosen[:1])]:
            raise FormatError(f"field {prompt_field!r} differs from what 'chosen' and 'rejected' begin with", field=prompt_field)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if not prompt:
        raise FormatError("no prompt: field 'prompt' is missing, and 'chosen' and 'rejected' do not begin with the same question", field="prompt")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise FormatError(f"field {side!r}: nothing is left of it behind the common prompt", field=side)
    sides = []
    for messages in (chosen, rejected):
        turns, images = _turns([*prompt, *messages], images_of(record), "prompt")
        sides.append(turns)
    rest = {key: value for key, value in record.items() if key not in _PREFERENCE_FIELDS or (key == "question" and prompt_field == "prompt")}
    return {**with_images(rest, images), "chosen_conversations": sides[0], "reject_conversations": sides[1]}


def instruction(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row with `messages`, or with `prompt` and `completion`, as ``{"image"?, "conversations", ...}``. Raises FormatError naming the field."""
    if "messages" in record:
        fields, messages = ["messages"], _messages(record["messages"], "messages")
    else:
        fields, messages = ["prompt", "completion"], []
        for field, role in zip(fields, ("user", "assistant"), strict=True):
            value = record[field]
            messages += _messages([{"role": role, "content": value}] if isinstance(value, str) else value, field)
    turns, images = _turns(messages, images_of(record), fields[0])
    return {**with_images({key: value for key, value in record.items() if key not in fields}, images), "conversations": turns}


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    """`value`, checked: messages of known roles, contents text or parts."""
    if not isinstance(value, (list, tuple)) or not value:
        raise FormatError(f"field {field!r} is {_shown(value)}, want text, or a list of messages {{role, content}}", field=field)
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise FormatError(f"field {field!r}, message {number} is {_shown(message)}, want {{role, content}}", field=field)
        if message["role"] == "system":
            raise FormatError(f"field {field!r}, message {number}: a system message has no place in LLaVA's layout, where the template has the "
                              "system text; take it out, or put its text before the first question", field=field)
        if message["role"] not in tuple(_ROLES):
            raise FormatError(f"field {field!r}, message {number}: role {message['role']!r}, want user or assistant", field=field)
        if not isinstance(message["content"], (str, list, tuple)):
            raise FormatError(f"field {field!r}, message {number}: content is {_shown(message['content'])}, want text or a list of parts",
                              field=field)
    return [dict(message) for message in value]


def _turns(messages: Sequence[Mapping[str, Any]], images: list[Any], field: str) -> tuple[Turns, list[Any]]:
    """Turns, and the images in the order of their markers."""
    turns, own = [], []
    for number, message in enumerate(messages):
        value, found = _value(message["content"], f"field {field!r}, message {number}", field)
        own += found
        turns.append({"from": _ROLES[message["role"]], "value": value})
    if own and images:
        raise FormatError(f"images are in the parts of {field!r} and in a field 'images' too; want one of the two", field="images")
    images = own or images
    plain = all(isinstance(message["content"], str) for message in messages)
    first = next((turn for turn in turns if turn["from"] == "human"), None)
    n_markers = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if images and plain and not n_markers and first is not None:
        first["value"] = f"{DEFAULT_IMAGE_TOKEN}\n" * len(images) + first["value"]
    elif not plain and n_markers != len(images):
        raise FormatError(f"{n_markers} image parts for {len(images)} images", field="images")
    return turns, images


def _value(content: Any, where: str, field: str) -> tuple[str, list[Any]]:
    """A content as text with markers, and the images that its parts carry."""
    if isinstance(content, str):
        return content, []
    value, images, before = "", [], ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(text := part.get("text", part.get("content")), str):
            value += ("\n" if before == "image" else "") + text
        elif kind == "image":
            value += ("\n" if before else "") + DEFAULT_IMAGE_TOKEN
            images += [payload for key in ("image", "path") if (payload := part.get(key)) is not None][:1]
        else:
            raise FormatError(f"{where}: part {_shown(part)}, want {{type: text, text}} or {{type: image}}", field=field)
        before = kind
    return value, images


def _asked(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [_value(message["content"], "", "prompt")[0] for message in messages if message["role"] == "user"]


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)) - 1)


def _common_text(chosen: str, rejected: str) -> tuple[str | None, str, str]:
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    n -= n > 0 and chosen[n - 1] == " "
    return chosen[:n] or None, chosen[n:], rejected[n:]


def _shown(value: Any) -> str:
    return f"a {type(value).__name__} ({str(value)[:60]!r})" if value is not None else "nothing"


# ---- turns -> messages -------------------------------------------------------------------------------------------------------


def messages_of(turns: Sequence[Mapping[str, Any]], *, parts: bool) -> list[dict[str, Any]]:
    """LLaVA's turns as messages; with `parts`, contents are lists of parts and a marker becomes an image part. Raises FormatError."""
    roles = {own: role for role, own in _ROLES.items()}
    messages = []
    for number, turn in enumerate(turns):
        if turn.get("from") not in roles or not isinstance(turn.get("value"), str):
            raise FormatError(f"turn {number} is {_shown(turn)}, want {{from: human or gpt, value: text}}", field="conversations")
        messages.append({"role": roles[turn["from"]], "content": _parts(turn["value"]) if parts else turn["value"]})
    return messages


def _parts(value: str) -> list[dict[str, Any]]:
    """Text and image parts; the line breaks that set a marker off belong to the marker."""
    parts: list[dict[str, Any]] = []
    for piece in re.split(rf"(\n?{re.escape(DEFAULT_IMAGE_TOKEN)}\n?)", value):
        if piece.strip("\n") == DEFAULT_IMAGE_TOKEN:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
