"""Preference pairs (spec 6.2): the original's JSON, its alias, the judge's record, and TRL's rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from stllava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from stllava.conversation import ConversationError, as_template
from stllava.errors import FormatError
from stllava.images import ImageError, ImageProcessor
from stllava.text.interface import AnyTokenizer
from stllava.text.labels import Sample, build_sample
from stllava.tree import Sequence

from .formats import images_of, neutral, why_not
from .formats.layouts import layout_of
from .record_images import RecordImages
from .records import check_records, read_records
from .sft import n_words, sequence_of, text_budget

if TYPE_CHECKING:
    from stllava.model import LlavaModel

__all__ = ["DPODataset", "normalise_pair"]

_SIDES = ("chosen_conversations", "reject_conversations")


def normalise_pair(record: dict[str, Any]) -> dict[str, Any]:
    """Any accepted layout as ``{"id"?, "image"?, "chosen_conversations", "reject_conversations", ...}``; other records come back unchanged.

    Accepted: the original's JSON, `rejected_conversations` for `reject_conversations`, the judge's ``{"q", "img", "p", "r"}``, and TRL's
    preference rows (`prompt`, `chosen`, `rejected`, `images`; conversational, plain, or without a prompt).
    """
    layout = layout_of(record.keys())
    try:
        return neutral(record) if layout is not None and layout.kind == "pair" else record
    except FormatError:
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
        self._images = RecordImages(image_folder, image_processor, data)
        self.records = read_records(data, "train")
        self.rows, self.problems = check_records(self.records, self._check, on_bad_sample, data if isinstance(data, (str, Path)) else "data")

    @classmethod
    def for_model(cls, model: LlavaModel, data: str | Path | Iterable[dict[str, Any]], **options: Any) -> Self:
        """With the tokenizer, the image processor and the rows per image of `model`; the other arguments are those above."""
        return cls(data, model.tokenizer, model.image_processor, tokens_per_image=model.core.tokens_per_image, **options)

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, item: int, epoch: int) -> tuple[Sequence, Sequence]:
        row = self.rows[item]
        record, images = self.records[row], self._images.keys(self.records[row])
        chosen, rejected = (sequence_of(self._sample(record, side), images, row) for side in _SIDES)
        return chosen, rejected

    def pixels(self, key: Hashable) -> np.ndarray:
        return self._images.pixels(key)

    def ids(self, item: int) -> list[object]:
        """What messages call the pair: its "id", else its row."""
        return [self.records[self.rows[item]].get("id", self.rows[item])]

    @property
    def modality_lengths(self) -> list[int]:
        """LLaVA's, of both answers with their prompts (spec D7): words of each pair, negative where it has no picture."""
        records = [self.records[row] for row in self.rows]
        return [sum(n_words(record[side]) for side in _SIDES) * (1 if images_of(record) else -1) for record in records]

    @property
    def lengths(self) -> list[int]:
        """Words of each pair, and the rows of its pictures, which both answers share."""
        n_images = [len(images_of(self.records[row])) for row in self.rows]
        return [abs(words) + n * self.tokens_per_image for words, n in zip(self.modality_lengths, n_images, strict=True)]

    def _sample(self, record: dict[str, Any], side: str) -> Sample:
        n_images = len(images_of(record))
        return build_sample(record[side], self.template, self.tokenizer, has_image=n_images > 0, n_images=n_images,
                            max_length=text_budget(self.max_length, n_images, self.tokens_per_image))

    def _check(self, row: int, record: dict[str, Any]) -> tuple[str, str] | None:
        for side in _SIDES:
            if not isinstance(record.get(side), list) or not record[side]:
                return "turns", why_not(record, "pair") or f"key {side!r} is missing or empty, found {sorted(record)}"
        chosen, rejected = record["chosen_conversations"], record["reject_conversations"]
        try:
            samples = [self._sample(record, side) for side in _SIDES]
            for key in self._images.keys(record):
                self.pixels(key)
        except ConversationError as error:
            return "conversation", str(error)
        except ImageError as error:
            return "image", str(error)
        if chosen[:-1] != rejected[:-1]:
            return "prompt", "the prompts of chosen and rejected differ; a pair may differ in the last answer only"
        if chosen[-1]["value"].strip() == rejected[-1]["value"].strip():
            return "same", f"chosen and rejected are the same answer: {chosen[-1]['value']!r}"
        for side, sample in zip(("chosen", "rejected"), samples, strict=True):
            if all(label == IGNORE_INDEX for label in sample.labels[1:]) or sample.input_ids.count(IMAGE_TOKEN_INDEX) < len(images_of(record)):
                return "length", f"no target of the {side} answer is left within max_length {self.max_length} ({sample.n_cut} ids were cut)"
        return None
