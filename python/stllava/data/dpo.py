"""Preference pairs (spec 6.2): the original's JSON, its alias, and the judge's record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stllava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from stllava.conversation import ConversationError, as_template
from stllava.images import ImageError, ImageProcessor
from stllava.text.interface import AnyTokenizer
from stllava.text.labels import Sample, build_sample
from stllava.tree import Sequence

from .pictures import Pictures
from .records import check_records, read_records
from .sft import n_words, sequence_of, text_budget

__all__ = ["DPODataset", "normalise_pair"]


def normalise_pair(record: dict[str, Any]) -> dict[str, Any]:
    """Any accepted layout as ``{"id"?, "image"?, "chosen_conversations", "reject_conversations"}``; other records come back unchanged.

    Accepted: the original's JSON, `rejected_conversations` for `reject_conversations`, and the judge's ``{"q", "img", "p", "r"}``.
    """
    if "rejected_conversations" in record and "reject_conversations" not in record:
        record = {**record, "reject_conversations": record["rejected_conversations"]}
    if {"q", "p", "r"} <= record.keys():
        image = record.get("img")
        question = record["q"] if image is None or DEFAULT_IMAGE_TOKEN in str(record["q"]) else f"{DEFAULT_IMAGE_TOKEN}\n{record['q']}"
        sides = {side: [{"from": "human", "value": question}, {"from": "gpt", "value": record[key]}] for side, key in
                 (("chosen_conversations", "p"), ("reject_conversations", "r"))}
        record = {**({"image": image} if image is not None else {}), **({"id": record["id"]} if "id" in record else {}), **sides}
    return record


class DPODataset:
    """Pairs of conversations that differ in the last answer only.

    Args as :class:`stllava.data.sft.SFTDataset`; questions are never switched to the virtual user, whatever the template (spec D16).
    """

    def __init__(self, data: str | Path | Iterable[dict[str, Any]], tokenizer: AnyTokenizer, image_processor: ImageProcessor, *,
                 image_folder: str | Path | None = None, template: str = "v1", max_length: int | None = 2048, tokens_per_image: int,
                 on_bad_sample: str = "error") -> None:
        self.tokenizer, self.template = tokenizer, as_template(template)
        self.max_length, self.tokens_per_image = max_length, tokens_per_image
        self._pictures = Pictures(image_folder, image_processor)
        self.records = [normalise_pair(record) for record in read_records(data)]
        self.rows, self.problems = check_records(self.records, self._check, on_bad_sample, data if isinstance(data, (str, Path)) else "data")

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, item: int, epoch: int) -> tuple[Sequence, Sequence]:
        row = self.rows[item]
        image = self.records[row].get("image")
        chosen, rejected = (self._sample(self.records[row], side) for side in ("chosen_conversations", "reject_conversations"))
        return sequence_of(chosen, image, row), sequence_of(rejected, image, row)

    def pixels(self, key: object) -> np.ndarray:
        return self._pictures(key)

    def ids(self, item: int) -> list[object]:
        """What messages call the pair: its "id", else its row."""
        return [self.records[self.rows[item]].get("id", self.rows[item])]

    @property
    def modality_lengths(self) -> list[int]:
        """LLaVA's, of both answers with their prompts (spec D7): words of each pair, negative where it has no picture."""
        records = [self.records[row] for row in self.rows]
        return [sum(n_words(record[side]) for side in ("chosen_conversations", "reject_conversations")) * (-1 if record.get("image") is None else 1)
                for record in records]

    @property
    def lengths(self) -> list[int]:
        """Words of each pair, and the rows of its picture, which both answers share."""
        return [abs(n) + (n > 0) * self.tokens_per_image for n in self.modality_lengths]

    def _sample(self, record: dict[str, Any], side: str) -> Sample:
        has_image = record.get("image") is not None
        return build_sample(record[side], self.template, self.tokenizer, has_image=has_image,
                            max_length=text_budget(self.max_length, int(has_image), self.tokens_per_image))

    def _check(self, row: int, record: dict[str, Any]) -> tuple[str, str] | None:
        for side in ("chosen_conversations", "reject_conversations"):
            if not isinstance(record.get(side), list) or not record[side]:
                return "turns", f"key {side!r} is missing or empty, found {sorted(record)}"
        chosen, rejected = record["chosen_conversations"], record["reject_conversations"]
        try:
            samples = [self._sample(record, side) for side in ("chosen_conversations", "reject_conversations")]
            if record.get("image") is not None:
                self.pixels(record["image"])
        except ConversationError as error:
            return "conversation", str(error)
        except ImageError as error:
            return "image", str(error)
        if chosen[:-1] != rejected[:-1]:
            return "prompt", "the prompts of chosen and rejected differ; a pair may differ in the last answer only"
        if chosen[-1]["value"].strip() == rejected[-1]["value"].strip():
            return "same", f"chosen and rejected are the same answer: {chosen[-1]['value']!r}"
        for side, sample in zip(("chosen", "rejected"), samples, strict=True):
            if all(label == IGNORE_INDEX for label in sample.labels[1:]):
                return "length", f"no target of the {side} answer is left within max_length {self.max_length} ({sample.n_cut} ids were cut)"
        return None
