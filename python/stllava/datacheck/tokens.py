"""What a row is for the model: its length, its targets, what the limit cuts, and what the original's label builder would have made of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from stllava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from stllava.conversation import Conversation, ConversationError, SeparatorStyle
from stllava.data.formats import images_of
from stllava.data.sft import self_asked, text_budget
from stllava.text.interface import AnyTokenizer
from stllava.text.labels import Sample, build_sample
from stllava.text.labels_compat import preprocess_compat

from .kinds import Found
from .rows import dialogues_of

__all__ = ["Length", "TokenRules", "remembering", "tokenise"]

_NO_LIMIT = 1 << 30
_REMEMBERED = 4096


class Length(NamedTuple):
    """One sequence in rows of the model, image rows included. `n_cut` of them lie behind the limit; targets are those before it.

    n_asked: targets that are self-asked questions. n_lost: targets behind the limit. n_later: later questions of a dialogue with image, n_switched:
    those that the model asks.
    """

    n_rows: int
    n_cut: int
    n_targets: int
    n_images: int
    n_asked: int
    n_lost: int
    n_later: int
    n_switched: int


@dataclass(frozen=True)
class TokenRules:
    """How rows become tokens. `sq_r` is 0 for templates without a virtual user and for pairs. compare: with the original's labels."""

    tokenizer: AnyTokenizer
    template: Conversation
    max_length: int | None
    tokens_per_image: int
    sq_r: float
    seed: int
    compare: bool = True

    def remembering(self) -> TokenRules:
        return TokenRules(remembering(self.tokenizer), self.template, self.max_length, self.tokens_per_image, self.sq_r, self.seed,
                          self.compare and self.template.sep_style is not SeparatorStyle.SINGLE)

    def switches(self, record: Mapping[str, Any], row: int) -> set[int]:
        """The questions that the model asks itself in epoch 0, as training draws them."""
        return self_asked(record, row, self.sq_r, self.seed, epoch=0) if self.sq_r else set()

    def sample(self, turns: list[dict[str, Any]], n_images: int, switched: set[int]) -> Sample:
        return build_sample(turns, self.template, self.tokenizer, has_image=n_images > 0, n_images=n_images, switched=switched)

    def budget(self, sample: Sample) -> int:
        limit = text_budget(self.max_length, sample.input_ids.count(IMAGE_TOKEN_INDEX), self.tokens_per_image)
        return len(sample.input_ids) if limit is None else max(min(limit, len(sample.input_ids)), 0)


def remembering(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """The same tokenizer with the latest stretches remembered: the system text is in every row, and the two label builders read the same ones."""
    twin, known = copy.copy(tokenizer), lru_cache(_REMEMBERED)(tokenizer.encode_piecewise)
    one_way = getattr(tokenizer, "legacy", False) is True  # whatever stands before a stretch, its ids are the same

    def encode_piecewise(text: str, after_special: bool = False) -> tuple[list[int], list[int]]:
        return known(text, after_special and not one_way)

    object.__setattr__(twin, "encode_piecewise", encode_piecewise)
    return twin


def tokenise(record: Mapping[str, Any], row: int, rules: TokenRules) -> tuple[list[Length], list[Found]]:
    """Lengths of a row's sequences (a pair has two) and what is to be said about them. `record` has passed the checks of `rows` without an error."""
    lengths, found = [], []
    for side, turns in dialogues_of(record).items():
        prefix = f"{side}: " if side else ""
        try:
            switched = set() if side else rules.switches(record, row)
            sample = rules.sample(turns, len(images_of(record)), switched)
        except ConversationError as error:
            found.append(("conversation", f"{prefix}{error}"))
            continue
        lengths.append(_measure(sample, rules, switched, 0 if side else len(turns)))
        findings = [*_cut_findings(sample, rules), *(_original_findings(sample, turns, rules, switched) if rules.compare else ())]
        found += [(kind, prefix + text) for kind, text in findings]
    return lengths, found


def _measure(sample: Sample, rules: TokenRules, switched: set[int], n_turns: int) -> Length:
    n_ids, n_images, budget = len(sample.input_ids), sample.input_ids.count(IMAGE_TOKEN_INDEX), rules.budget(sample)
    n_targets = sum(min(span.end, budget) - span.begin for span in sample.spans if span.begin < budget)
    return Length(n_rows=n_ids + n_images * (rules.tokens_per_image - 1), n_cut=n_ids - budget, n_targets=n_targets, n_images=n_images,
                  n_asked=sum(min(span.end, budget) - span.begin for span in sample.spans if span.begin < budget and span.turn in switched),
                  n_lost=sum(span.end - span.begin for span in sample.spans) - n_targets,
                  n_later=len(range(2, n_turns - n_turns % 2, 2)) if n_images else 0, n_switched=len(switched))


def _cut_findings(sample: Sample, rules: TokenRules) -> Iterator[Found]:
    budget = rules.budget(sample)
    if budget == len(sample.input_ids):
        return
    text = f"{len(sample.input_ids) - budget} of {len(sample.input_ids)} ids lie behind {rules.max_length} rows"
    if IMAGE_TOKEN_INDEX in sample.input_ids[budget:]:
        yield "image_cut", text
    if all(label == IGNORE_INDEX for label in sample.labels[1:budget]):
        yield "no_target", text
    elif lost := sum(span.begin >= budget for span in sample.spans):
        yield "answer_lost", f"{text}: {lost} of {len(sample.spans)} answers lost"
    elif sample.spans[-1].end > budget:
        yield "answer_cut", f"{text}: {sample.spans[-1].end - budget} of {sample.spans[-1].end - sample.spans[-1].begin} ids of the last answer"


def _original_findings(sample: Sample, turns: list[dict[str, Any]], rules: TokenRules, switched: set[int]) -> Iterator[Found]:
    """Both without a limit: the original cuts elsewhere by design (spec D15)."""
    if sample.n_leading_dropped or sample.input_ids.count(IMAGE_TOKEN_INDEX) > 1:
        return  # the first is reported, and the original renders it otherwise; the second it cannot read
    draws, has_image = {i: 0.0 if i in switched else 1.0 for i in range(2, len(turns), 2)}, IMAGE_TOKEN_INDEX in sample.input_ids
    try:
        theirs = preprocess_compat(turns, rules.template, rules.tokenizer, has_image, sq_r=0.5, draws=draws, max_length=_NO_LIMIT)
    except ConversationError as error:
        yield "original_labels", f"the original stops at this row: {error}"
        return
    if theirs["mismatch"]:
        yield "original_mismatch", str(theirs["mismatch_message"])
    elif theirs["labels"] != sample.labels:
        original, ours = (f"{sum(label != IGNORE_INDEX for label in labels)} of {len(labels)} ids" for labels in (theirs["labels"], sample.labels))
        yield "original_labels", f"targets of the original are {original}, here {ours}"
