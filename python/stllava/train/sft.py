"""Stage 1: negative log-likelihood of answers and of self-asked questions. loss = - sum logp / N, so d loss / d logp = -1/N."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np

from stllava.data.sft import SFTDataset
from stllava.model import LlavaModel
from stllava.tree import Sequence

from .arguments import SFTConfig, TrainingArguments
from .loop import Trainer
from .update import Micro

__all__ = ["PictureDataset", "SFTObjective", "SFTTrainer", "SequenceDataset", "collate_sequences"]


class PictureDataset(Protocol):
    """Items whose sequences name pictures. A method `ids(item)` may say what messages call an item."""

    def __len__(self) -> int: ...

    def pixels(self, key: object) -> np.ndarray: ...


class SequenceDataset(PictureDataset, Protocol):
    """What SFT trains on. An item is one sample, or all samples of one image."""

    def sequences(self, item: int, epoch: int) -> list[Sequence]: ...


def collate_sequences(model: LlavaModel, sequences: Seq[Sequence], dataset: PictureDataset, items: list[tuple[int, int]], *,
                      share: bool) -> Micro:
    """Packs sequences and stacks the pictures they name."""
    trees, batch = model.batch(sequences, share=share)
    pictures = model.pixels(dataset.pixels(key) for key in trees.image_keys) if trees.image_keys else None
    return Micro(trees, batch, pictures, items, dataset)


class SFTObjective:
    """`loss_reduction`: micro_mean divides by the micro-batch's own target tokens and averages micro-batches (the original); token_mean divides by
    the target tokens of the whole update (transformers >= 4.46)."""

    def __init__(self, model: LlavaModel, args: TrainingArguments) -> None:
        self.model, self.args = model, args

    def collate(self, dataset: SequenceDataset, items: list[tuple[int, int]]) -> Micro:
        sequences = [sequence for item, epoch in items for sequence in dataset.sequences(item, epoch)]
        return collate_sequences(self.model, sequences, dataset, items, share=self.args.share_prefixes)

    def step(self, micro: Micro, update: list[Micro], step: int) -> dict[str, float]:
        n = micro.batch.n_targets
        if self.args.loss_reduction == "token_mean":
            divisor, share = sum(m.batch.n_targets for m in update), 1.0
        else:
            divisor, share = n, 1.0 / len(update)
        if divisor == 0:
            return {"loss": 0.0, "tokens": 0}
        logp = self.model.run.forward(micro.batch, pixels=micro.pixels, train=True, vision_grad=self.args.vit_grad, dropout=True,
                                      seed=self.args.seed, step=step)
        self.model.run.backward(np.full(n, -share / divisor))
        return {"loss": -float(logp.sum()) / divisor, "tokens": n}

    def combine(self, metrics: list[dict[str, float]]) -> dict[str, float]:
        losses = [m["loss"] for m in metrics]
        return {"loss": sum(losses) if self.args.loss_reduction == "token_mean" else sum(losses) / len(losses),
                "num_tokens": sum(m["tokens"] for m in metrics)}

    def evaluate(self, micro: Micro) -> tuple[float, int, dict[str, float]]:
        """Summed loss and its weight (target tokens); nothing else is measured."""
        logp = self.model.run.forward(micro.batch, pixels=micro.pixels)
        return -float(logp.sum()), micro.batch.n_targets, {}


class SFTTrainer(Trainer):
    """Visual self-questioning SFT (or any SFT: the data set says what the targets are).

    Args as :class:`Trainer`; `train_dataset` and `eval_dataset` are `SequenceDataset`s, or what :class:`stllava.data.sft.SFTDataset` is made of.
    """

    Config = SFTConfig

    def make_dataset(self, data: Any, *args: Any, **settings: Any) -> SFTDataset:
        return SFTDataset(data, *args, seed=self.args.seed, **settings)

    def make_objective(self) -> SFTObjective:
        return SFTObjective(self.model, self.args)
