"""Tokens by what they are for: the words a row is trained on, coloured in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from stllava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from stllava.data.formats import images_of
from stllava.text.interface import AnyTokenizer
from stllava.text.labels import Sample

from .rows import dialogues_of
from .tokens import TokenRules

__all__ = ["MEANING", "Masked", "Part", "choose_rows", "masked"]

_HALF = "\N{REPLACEMENT CHARACTER}"
Role: TypeAlias = Literal["context", "target", "asked", "cut"]
MEANING: dict[Role, str] = {"context": "context, masked", "target": "target", "asked": "self-asked question, a target",
                            "cut": "behind the limit, not seen"}


class Part(NamedTuple):
    """Neighbouring tokens with one meaning, as text."""

    role: Role
    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Masked:
    """One sequence of a row: title says which."""

    row: int
    title: str
    parts: list[Part]


def choose_rows(rows: Sequence[int], n: int, seed: int) -> list[int]:
    """`n` of the rows, the same for the same seed."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xC4EC]))
    return sorted(rows[i] for i in rng.permutation(len(rows))[:n])


def masked(record: Mapping[str, Any], row: int, rules: TokenRules) -> list[Masked]:
    """The row's sequences as epoch 0 sees them. Raises ConversationError for a row that the template cannot hold."""
    found = []
    for side, turns in dialogues_of(record).items():
        switched = set() if side else rules.switches(record, row)
        sample = rules.sample(turns, len(images_of(record)), switched)
        found.append(Masked(row, side, list(_parts(sample, switched, rules))))
    return found


def _parts(sample: Sample, switched: set[int], rules: TokenRules) -> Iterator[Part]:
    roles: list[Role] = ["context" if label == IGNORE_INDEX else "target" for label in sample.labels]
    for span in sample.spans:
        if span.turn in switched:
            roles[span.begin:span.end] = ["asked"] * (span.end - span.begin)
    budget = rules.budget(sample)
    roles[budget:] = ["cut"] * (len(roles) - budget)
    begin = 0
    texts = _texts(sample.input_ids, rules)
    for end in range(1, len(roles) + 1):
        if end == len(roles) or roles[end] != roles[begin]:
            yield Part(roles[begin], "".join(texts[begin:end]), end - begin)
            begin = end


def _texts(ids: Sequence[int], rules: TokenRules) -> list[str]:
    """What each id adds to the text; joined, they are the whole. Of a character's tokens the last has all of it."""
    special = {i: text for text, i in rules.tokenizer.special_ids.items()} | {IMAGE_TOKEN_INDEX: f"[image: {rules.tokens_per_image} rows]"}
    texts: list[str] = []
    run: list[int] = []
    for i in (*ids, None):
        if i is None or i in special:
            texts += _texts_of_run(run, rules.tokenizer)
            texts += [] if i is None else [special[i]]
            run = []
        else:
            run.append(i)
    return texts


def _texts_of_run(run: list[int], tokenizer: AnyTokenizer) -> list[str]:
    """As `stllava.text.stream` does it: the newest tokens are decoded with those before them that their text may depend on."""
    texts = [""] * len(run)
    begin = end = 0
    for n in range(1, len(run) + 1):
        known, text = tokenizer.decode(run[begin:end], False), tokenizer.decode(run[begin:n], False)
        if len(text) > len(known) and (n == len(run) or not text.endswith(_HALF)):
            texts[n - 1] = text[len(known):]
            begin, end = end, n
    return texts
