"""Our data sets as torch's: items are padded into batches of tensors for `LlavaModule`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Seq
from typing import Any

import numpy as np
import torch

from stllava.constants import IGNORE_INDEX
from stllava.tree import Sequence

__all__ = ["TorchDataset", "collate", "collate_pairs"]

PAD_TOKEN_ID = 0  # never read, since the mask says where padding is


class TorchDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A view of an `SFTDataset` or a `DPODataset` (or of what has their methods).

    An item is ``{"sequences": [...], "pixels": [...]}``: the samples, or chosen and rejected, and the pictures that they name; transformers' Trainer
    would take these for columns that the model has no use for: ``remove_unused_columns=False``.

    Args:
        ours: the data set. epoch: what it draws for, where it draws (self-questioning); set it between epochs.
    """

    def __init__(self, ours: Any, epoch: int = 0) -> None:
        self.ours, self.epoch = ours, epoch

    def __len__(self) -> int:
        return len(self.ours)

    def __getitem__(self, item: int) -> dict[str, Any]:
        sequences = list(self.ours.pair(item, self.epoch) if hasattr(self.ours, "pair") else self.ours.sequences(item, self.epoch))
        return {"sequences": sequences, "pixels": [self.ours.pixels(key) for sequence in sequences for key in sequence.images]}


def collate(items: Seq[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels (b, t) int64, padded on the right; images (n, 3, S, S) float32 where there are any."""
    return _batch([s for item in items for s in item["sequences"]], (pixels for item in items for pixels in item["pixels"]))


def collate_pairs(items: Seq[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As TRL's collators: all chosen, then all rejected, and a `completion_mask`."""
    sides = [[item["sequences"][side] for item in items] for side in (0, 1)]
    halves = [item["pixels"][:len(item["sequences"][0].images)] if side == 0 else item["pixels"][len(item["sequences"][0].images):]
              for side in (0, 1) for item in items]
    batch = _batch(sides[0] + sides[1], (pixels for half in halves for pixels in half))
    batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
    return batch


def _batch(sequences: Seq[Sequence], pixels: Iterable[np.ndarray]) -> dict[str, torch.Tensor]:
    longest = max(len(sequence.ids) for sequence in sequences)
    batch = {name: np.full((len(sequences), longest), fill, np.int64) for name, fill in
             (("input_ids", PAD_TOKEN_ID), ("attention_mask", 0), ("labels", IGNORE_INDEX))}
    for i, sequence in enumerate(sequences):
        n = len(sequence.ids)
        batch["input_ids"][i, :n], batch["attention_mask"][i, :n] = sequence.ids, 1
        if sequence.labels is not None:
            batch["labels"][i, :n] = sequence.labels
    pictures = [np.asarray(picture, np.float32) for picture in pixels]
    return {name: torch.from_numpy(array) for name, array in batch.items()} | ({"images": torch.from_numpy(np.stack(pictures))} if pictures else {})
