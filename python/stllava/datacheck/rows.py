"""What a row says about itself: turns, roles, markers, characters, the two sides of a pair. Needs neither tokenizer nor pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stllava.checkpoint.strict_json import is_text
from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.conversation import Conversation, SeparatorStyle
from stllava.data.formats import images_of, why_not
from stllava.limits import MAX_ROW_CHARS

from .kinds import Found

__all__ = ["PAIR_SIDES", "TextRules", "dialogues_of", "pair_findings", "printable", "quoted", "row_findings", "short"]

PAIR_SIDES, _SIDES = ("chosen_conversations", "reject_conversations"), ("chosen", "rejected")
MANY_TIMES, MANY_WORDS = 8, 50  # one answer of a pair is longer by this factor, and by this many words

_SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<im_start>",
            "<im_end>", "<im_patch>")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff]")
_MOJIBAKE = re.compile("Ã[\u0080-\u00bf]|Â[\u00a0-\u00bf]|â€[\u0080-\u2122]")
_NOT_A_WORD = re.compile(r"[\W_]+")


class TextRules:
    """What must not stand in somebody's words, for one template and tokenizer."""

    def __init__(self, template: Conversation, special: Sequence[str] = ()) -> None:
        tokens = sorted({*_SPECIAL, *special} - {DEFAULT_IMAGE_TOKEN, ""}, key=len, reverse=True)
        tags = "|".join(re.escape(role) for role in template.roles if role.strip())
        self.special = re.compile("|".join(map(re.escape, tokens)))
        has_tags = tags and template.sep_style not in (SeparatorStyle.PLAIN, SeparatorStyle.LLAMA_2)
        self.tags = re.compile(rf"(?:^|(?<=\s))(?:{tags}):") if has_tags else None


def dialogues_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The dialogues of a neutral record: "" of an instruction row, "chosen" and "rejected" of a pair."""
    return {"": record["conversations"]} if PAIR_SIDES[0] not in record else {side: record[key] for side, key in zip(_SIDES, PAIR_SIDES, strict=True)}


def row_findings(record: Mapping[str, Any], rules: TextRules) -> Iterator[Found]:
    """Findings of an instruction row or a VQA item."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        yield "no_turns", why_not(record, "instruction") or f"'conversations' is {_kind_of(turns)}, the row has the keys {_keys(record)}"
        return
    if (kind := record.get("answer_type")) is not None and kind not in ("OPEN", "CLOSED"):
        yield "answer_type", f"{quoted(str(kind))}"
    yield from _turn_findings(turns, len(images_of(record)), rules)


def pair_findings(record: Mapping[str, Any], rules: TextRules) -> Iterator[Found]:
    """Findings of a preference pair, as `stllava.data.dpo.normalise_pair` returns it."""
    missing = [side for side in PAIR_SIDES if not isinstance(record.get(side), list) or not record[side]]
    if missing:
        yield "pair_side", (why_not(record, "pair") or
                            f"{' and '.join(map(repr, missing))} missing or empty, the row has the keys {_keys(record)}")
        return
    chosen, rejected = (list(_turn_findings(record[side], len(images_of(record)), rules)) for side in PAIR_SIDES)
    common = set(chosen) & set(rejected)
    yield from (found for found in chosen if found in common)
    for side, found in zip(_SIDES, (chosen, rejected), strict=True):
        yield from ((kind, f"{side}: {text}") for kind, text in found if (kind, text) not in common)
    if any(kind in ("turn_shape", "half_character") for kind, _ in chosen + rejected):
        return
    a, b = (record[side] for side in PAIR_SIDES)
    if a[:-1] != b[:-1]:
        turn = next((i for i, (x, y) in enumerate(zip(a[:-1], b[:-1], strict=False)) if x != y), min(len(a), len(b)) - 1)
        yield "pair_prompt", f"the sides differ from turn {turn} on"
    yield from _answer_findings(a[-1]["value"], b[-1]["value"])


def _answer_findings(chosen: str, rejected: str) -> Iterator[Found]:
    if not chosen.strip() or not rejected.strip():
        return  # reported as an empty turn
    if chosen.strip() == rejected.strip():
        yield "pair_same", f"both answer {quoted(chosen)}"
    elif (words := _NOT_A_WORD.sub(" ", chosen.casefold()).split()) == _NOT_A_WORD.sub(" ", rejected.casefold()).split() and words:
        yield "pair_same_normalised", f"{quoted(chosen)} and {quoted(rejected)}"
    else:
        n, m = len(chosen.split()), len(rejected.split())
        if max(n, m) >= MANY_TIMES * min(n, m) and abs(n - m) >= MANY_WORDS:
            yield "pair_length", f"the chosen answer has {n} words, the rejected one {m}"


def _turn_findings(turns: list[Any], n_images: int, rules: TextRules) -> Iterator[Found]:
    shapes = [_shape_of(turn) for turn in turns]
    if any(shapes):
        yield from (("turn_shape", f"turn {i} {shape}") for i, shape in enumerate(shapes) if shape)
        return
    if (n := sum(len(turn["value"]) for turn in turns)) > MAX_ROW_CHARS:
        yield "row_too_long", f"{n} characters, limit {MAX_ROW_CHARS}"
        return
    yield from _role_findings(turns)
    if turns[1:] or turns[0]["from"] != "gpt":
        yield from _marker_findings(turns, n_images)
    for i, turn in enumerate(turns):
        yield from ((kind, f"turn {i}: {text}") for kind, text in _word_findings(turn["value"], rules))


def _shape_of(turn: Any) -> str | None:
    if not isinstance(turn, dict):
        return f"is {_kind_of(turn)}, want an object"
    for key in ("from", "value"):
        if key not in turn:
            return f"has no {key!r}, it has the keys {_keys(turn)}"
        if not isinstance(turn[key], str):
            return f"has {_kind_of(turn[key])} under {key!r}, want text"
    return None


def _role_findings(turns: list[dict[str, str]]) -> Iterator[Found]:
    roles = [turn["from"] for turn in turns]
    unknown = [(i, role) for i, role in enumerate(roles) if role not in ("human", "gpt")]
    if unknown:
        yield "role_unknown", ", ".join(f"turn {i}: {quoted(role)}" for i, role in unknown[:5])
    first = int(roles[0] == "gpt")
    if first:
        yield "starts_with_gpt", "turn 0 is from 'gpt'"
    if len(turns) == first:
        yield "no_turns", "there is nothing but one answer"
    elif not unknown:
        wrong = next((i for i in range(first, len(roles)) if roles[i] != ("human", "gpt")[(i - first) % 2]), None)
        if wrong is not None:
            yield "role_order", f"turns {wrong - 1} and {wrong} are both from {quoted(roles[wrong])}"
        elif roles[-1] == "human":
            yield "ends_with_question", f"turn {len(roles) - 1} is the last, and from 'human'"
    for i, turn in enumerate(turns[first:], first):
        if not turn["value"].strip():
            yield "turn_empty", f"turn {i}, from {quoted(turn['from'])}, is {quoted(turn['value'])}"


def _marker_findings(turns: list[dict[str, str]], n_images: int) -> Iterator[Found]:
    """One image: a marker in the first question. Several: as many markers, in any questions."""
    first = int(turns[0]["from"] == "gpt")
    counts = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns[first:]]
    if not n_images:
        if sum(counts):
            yield "marker_without_image", f"{DEFAULT_IMAGE_TOKEN} {sum(counts)} times, and no image"
    elif not sum(counts):
        yield "marker_missing", f"no {DEFAULT_IMAGE_TOKEN} in {len(counts)} turns"
    elif sum(counts[1:] if n_images == 1 else counts[1::2]):
        wrong = [i for i, n in enumerate(counts) if n and (i if n_images == 1 else i % 2)]
        yield "marker_place", f"{DEFAULT_IMAGE_TOKEN} in turn {', '.join(str(i + first) for i in wrong)}"
    elif n_images > 1 and sum(counts) != n_images:
        yield "marker_count", f"{sum(counts)} times {DEFAULT_IMAGE_TOKEN} for {n_images} images"
    elif n_images == 1 and counts[0] > 1:
        yield "marker_repeated", f"{counts[0]} times {DEFAULT_IMAGE_TOKEN}"


def _word_findings(value: str, rules: TextRules) -> Iterator[Found]:
    if found := sorted(set(rules.special.findall(value))):
        yield "special_token_text", " ".join(map(quoted, found))
    if rules.tags is not None and (found := sorted(set(rules.tags.findall(value)))):
        yield "role_tag_text", " ".join(map(quoted, found))
    if value.isascii() and value.isprintable():
        return
    if found := sorted(set(_CONTROL.findall(value))):
        yield "characters", ", ".join(f"U+{ord(character):04X}" for character in found[:8])
    if not is_text(value):
        yield "half_character", quoted(value)
    if (match := _MOJIBAKE.search(value)) is not None:
        yield "mojibake", quoted(value[max(match.start() - 20, 0):match.end() + 20])


def short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit - 3]}..."


def printable(text: str) -> str:
    """With everything that is no printable character spelt out: names come from files, and go to terminals."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """In quotes, cut, and with everything that is no printable character spelt out."""
    return repr(short(text))


def _kind_of(value: Any) -> str:
    return "missing" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"


def _keys(record: Mapping[str, Any]) -> str:
    return short(", ".join(sorted(map(str, record))), 120) or "none"
