"""Instruction data (spec 4.1, 6.1) with visual self-questioning (spec 2.2)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from stllava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from stllava.conversation import ConversationError, as_template
from stllava.images import ImageError, ImageProcessor
from stllava.text.interface import AnyTokenizer
from stllava.text.labels import Sample, build_sample, draw_switches
from stllava.tree import Sequence

from .formats import images_of, why_not
from .record_images import RecordImages
from .records import Problem, check_records, read_records

if TYPE_CHECKING:
    from stllava.model import LlavaModel

__all__ = ["SFTDataset", "n_words", "self_asked", "sequence_of", "text_budget"]


def text_budget(max_length: int | None, n_images: int, tokens_per_image: int) -> int | None:
    """Ids a sample may have: each image stands on `tokens_per_image` rows, and images are never cut (spec D15)."""
    return None if max_length is None else max_length - n_images * (tokens_per_image - 1)


def sequence_of(sample: Sample, images: tuple[Hashable, ...], key: int) -> Sequence:
    return Sequence(sample.input_ids, sample.labels, images, sample=key)


class SFTDataset:
    """Instruction data in any layout that `read_records` knows: LLaVA's ``{"id", "image" (optional), "conversations"}``, messages, VQA sets.

    A record has no image, one, or several (`image` a list, or `images`), each with its ``<image>`` in a question.

    Args:
        data: file, directory or records; of a set that holds several splits, the train split. tokenizer, image_processor: the model's.
        image_folder: where `image` names start; None: where the data directory is, or here.
        template: conversation template; ``v1_sq`` for self-questioning. sq_r: probability that a later question of a sample with image becomes a
            target; drawn from (seed, epoch, sample id, turn), so anew in every epoch and the same after a resume.
        max_length: rows a sample may take, image rows included (None: no limit). tokens_per_image: rows of one image.
        on_bad_sample: ``"error"`` lists every bad record and stops; ``"skip"`` leaves them out, see `problems`.
        group_by_image: an item is an image with all its samples, which then share its rows.

    Raises:
        DataError, FormatError.
    """

    def __init__(self, data: str | Path | Iterable[dict[str, Any]], tokenizer: AnyTokenizer, image_processor: ImageProcessor, *,
                 image_folder: str | Path | None = None, template: str = "v1_sq", sq_r: float = 0.5, seed: int = 42,
                 max_length: int | None = 2048, tokens_per_image: int, on_bad_sample: str = "error", group_by_image: bool = False) -> None:
        self.tokenizer, self.template = tokenizer, as_template(template)
        self.sq_r = sq_r if len(self.template.roles) > 2 else 0.0
        self.seed, self.max_length, self.tokens_per_image = seed, max_length, tokens_per_image
        self._images = RecordImages(image_folder, image_processor, data)
        self.records = read_records(data, "train")
        rows, self.problems = check_records(self.records, self._check, on_bad_sample, data if isinstance(data, (str, Path)) else "data")
        self.items = self._by_image(rows) if group_by_image else [[row] for row in rows]

    @classmethod
    def for_model(cls, model: LlavaModel, data: str | Path | Iterable[dict[str, Any]], **options: Any) -> Self:
        """With the tokenizer, the image processor and the rows per image of `model`; the other arguments are those above."""
        return cls(data, model.tokenizer, model.image_processor, tokens_per_image=model.core.tokens_per_image, **options)

    def __len__(self) -> int:
        return len(self.items)

    def sequences(self, item: int, epoch: int) -> list[Sequence]:
        return [sequence_of(self.sample(row, epoch), self._images.keys(self.records[row]), row) for row in self.items[item]]

    def pixels(self, key: Hashable) -> np.ndarray:
        return self._images.pixels(key)

    def ids(self, item: int) -> list[object]:
        """What messages call the item's samples: their "id", else their row."""
        return [self.records[row].get("id", row) for row in self.items[item]]

    @property
    def modality_lengths(self) -> list[int]:
        """LLaVA's: words of each item, negative where it has no picture."""
        return [sum(n_words(self.records[row]["conversations"]) for row in rows) * (1 if self._n_pictures(rows) else -1) for rows in self.items]

    @property
    def lengths(self) -> list[int]:
        """Words of each item, and the rows of its pictures."""
        return [abs(n) + self._n_pictures(rows) * self.tokens_per_image for n, rows in zip(self.modality_lengths, self.items, strict=True)]

    def _n_pictures(self, rows: list[int]) -> int:
        return len({key for row in rows for key in self._images.keys(self.records[row])})

    def sample(self, row: int, epoch: int) -> Sample:
        """The sample as epoch `epoch` sees it."""
        record = self.records[row]
        turns: list[dict[str, Any]] = record["conversations"]  # a list, or `_check` had left the record out
        n_images = len(images_of(record))
        return build_sample(turns, self.template, self.tokenizer, has_image=n_images > 0, n_images=n_images,
                            switched=self_asked(record, row, self.sq_r, self.seed, epoch),
                            max_length=text_budget(self.max_length, n_images, self.tokens_per_image))

    def _check(self, row: int, record: dict[str, Any]) -> tuple[str, str] | None:
        try:
            if not isinstance(record.get("conversations"), list):
                return "turns", why_not(record, "instruction") or f"key 'conversations' is missing or not a list, found {sorted(record)}"
            sample = self.sample(row, 0)
            for key in self._images.keys(record):
                self.pixels(key)
        except ConversationError as error:
            return "conversation", str(error)
        except ImageError as error:
            return "image", str(error)
        if sample.input_ids.count(IMAGE_TOKEN_INDEX) < len(images_of(record)):
            return "length", f"the {DEFAULT_IMAGE_TOKEN} marker lies behind max_length {self.max_length}"
        if all(label == IGNORE_INDEX for label in sample.labels[1:]):
            return "length", f"no target is left within max_length {self.max_length} ({sample.n_cut} ids were cut)"
        return None

    def _by_image(self, rows: list[int]) -> list[list[int]]:
        groups: dict[Hashable, list[int]] = {}
        for row in rows:
            groups.setdefault(self._images.keys(self.records[row]) or ("text", row), []).append(row)
        return list(groups.values())


def self_asked(record: Mapping[str, Any], row: int, sq_r: float, seed: int, epoch: int) -> set[int]:
    """The questions that the model asks itself in an epoch, for `build_sample`; none without an image."""
    turns, n_images = record["conversations"], len(images_of(record))
    switched = draw_switches(len(turns), sq_r, seed, epoch, record.get("id", row)) if n_images else set()
    if n_images > 1:  # the model asks itself, but it does not show itself pictures
        lead = len(turns) % 2
        switched = {turn for turn in switched if DEFAULT_IMAGE_TOKEN not in str(turns[turn + lead])}
    return switched


def n_words(turns: Iterable[dict[str, Any]]) -> int:
    return sum(len(str(turn["value"]).split()) for turn in turns)


def summary(problems: list[Problem]) -> dict[str, int]:
    """Number of records left out, by kind."""
    counts: dict[str, int] = {}
    for problem in problems:
        counts[problem.kind] = counts.get(problem.kind, 0) + 1
    return counts
