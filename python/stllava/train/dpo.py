"""Stage 2: DPO and its relatives. One prefix with two branches per pair; the reference is a snapshot of the trainable buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import stllava_c
from stllava.data.dpo import DPODataset
from stllava.model import LlavaModel, sequence_sums
from stllava.tree import Sequence

from .arguments import DPOConfig
from .loop import Trainer
from .numerics import explained
from .sft import PictureDataset, collate_sequences
from .update import Micro

__all__ = ["DPOObjective", "DPOTrainer", "PairDataset"]


class PairDataset(PictureDataset, Protocol):
    """What DPO trains on. An item is a pair."""

    def pair(self, item: int, epoch: int) -> tuple[Sequence, Sequence]:
        """(chosen, rejected), the same prompt."""


@dataclass(frozen=True, slots=True)
class PairNumbers:
    """What one micro-batch gave, (n_pairs,) each but for the loss."""

    loss: float
    losses: np.ndarray
    policy_chosen: np.ndarray
    policy_rejected: np.ndarray
    reference_chosen: np.ndarray
    reference_rejected: np.ndarray
    chosen_rewards: np.ndarray
    rejected_rewards: np.ndarray
    chosen_logits: np.ndarray
    rejected_logits: np.ndarray
    dchosen: np.ndarray
    drejected: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        """Means under TRL's names and, where they differ, the original's (`policy_logps`, and `referece_logps` as it is spelt there)."""
        values = {
            "loss": self.loss, "rewards/chosen": self.chosen_rewards, "rewards/rejected": self.rejected_rewards,
            "rewards/accuracies": self.chosen_rewards > self.rejected_rewards, "rewards/margins": self.chosen_rewards - self.rejected_rewards,
            "logps/chosen": self.policy_chosen, "logps/rejected": self.policy_rejected,
            "policy_logps/chosen": self.policy_chosen, "policy_logps/rejected": self.policy_rejected,
            "referece_logps/chosen": self.reference_chosen, "referece_logps/rejected": self.reference_rejected,
            "logits/chosen": self.chosen_logits, "logits/rejected": self.rejected_logits}
        return {key: float(np.mean(value)) for key, value in values.items()}


class DPOObjective:
    """Loss per pair from sequence log-probs. The model as it is now, adapters and projector included, becomes the reference."""

    def __init__(self, model: LlavaModel, args: DPOConfig) -> None:
        self.model, self.args = model, args
        theta = model.core.theta
        self.reference = None if theta is None else np.array(theta.numpy())
        self.reference_run = stllava_c.Run(model.core)
        self.precomputed: tuple[PairDataset, np.ndarray] | None = None  # (data set, (n_pairs, 2) chosen and rejected)

    def collate(self, dataset: PairDataset, items: list[tuple[int, int]]) -> Micro:
        pairs = [dataset.pair(item, epoch) for item, epoch in items]
        sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        return collate_sequences(self.model, sequences, dataset, items, share=self.args.share_prefixes)

    def precompute(self, dataset: PairDataset, batch_size: int) -> None:
        """Reference log-probs of every pair once, before training."""
        values = np.empty((len(dataset), 2))
        for start in range(0, len(dataset), batch_size):
            items = [(item, 0) for item in range(start, min(start + batch_size, len(dataset)))]
            micro = self.collate(dataset, items)
            with explained("reference log-probabilities", micro, self.model):
                values[start:start + len(items)] = np.stack(self._reference(micro, None), axis=1)
        self.precomputed = (dataset, values)

    def step(self, micro: Micro, update: list[Micro], step: int) -> dict[str, float]:
        pairs = self.forward(micro, train=True, step=step)
        self.backward(micro, pairs, 1.0 / len(update))
        return pairs.metrics

    def evaluate(self, micro: Micro) -> tuple[float, int, dict[str, float]]:
        values = self.forward(micro, train=False, step=0).metrics
        n = len(micro.items)
        return values.pop("loss") * n, n, values

    def combine(self, metrics: list[dict[str, float]]) -> dict[str, float]:
        return {key: sum(m[key] for m in metrics) / len(metrics) for key in metrics[0]}

    def forward(self, micro: Micro, *, train: bool, step: int) -> PairNumbers:
        """Log-probs of policy and reference, the loss and its derivatives. With `train`, `backward` may follow."""
        args, run, batch, order = self.args, self.model.run, micro.batch, micro.trees.order
        reference = self._reference(micro, None) if args.ref_image_features == "initial" else None
        logp = run.forward(batch, pixels=micro.pixels, train=train, vision_grad=args.vit_grad, mean_logit=True,
                           dropout=train and not args.disable_dropout, seed=args.seed, step=step)
        if reference is None:
            reference = self._reference(micro, None if micro.pixels is None else run.features)
        counts = np.diff(batch.sequence_begin)
        chosen, rejected = np.split(sequence_sums(batch, logp)[order], 2)
        chosen_tokens, rejected_tokens = np.split(counts[order].astype(np.float64), 2)
        names = {} if args.reference_free else {"reference_chosen": reference[0], "reference_rejected": reference[1]}
        loss, per_pair, dchosen, drejected = stllava_c.preference_loss(
            loss_types=args.loss_types, weights=args.loss_weights, beta=args.beta, label_smoothing=args.label_smoothing,
            discopop_tau=args.discopop_tau, f_divergence=args.f_divergence_type, alpha=args.f_alpha_divergence_coef,
            reference_free=args.reference_free, policy_chosen=chosen, policy_rejected=rejected, chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens, **names)
        mean_logit = run.mean_logit
        assert mean_logit is not None  # asked for above
        chosen_logits, rejected_logits = np.split((sequence_sums(batch, mean_logit) / counts)[order], 2)
        return PairNumbers(loss, np.asarray(args.loss_weights or [1.0] * len(args.loss_types)) @ per_pair, chosen, rejected, *reference,
                           args.beta * (chosen - reference[0]), args.beta * (rejected - reference[1]), chosen_logits, rejected_logits,
                           dchosen, drejected)

    def backward(self, micro: Micro, pairs: PairNumbers, share: float) -> None:
        """Gradients of `share` times the loss."""
        coefficients = np.empty(2 * len(micro.items))
        coefficients[micro.trees.order] = share * np.concatenate([pairs.dchosen, pairs.drejected])
        self.model.run.backward(np.repeat(coefficients, np.diff(micro.batch.sequence_begin)))

    def _reference(self, micro: Micro, features: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected) log-probs under the snapshot; with `features`, of its language model alone."""
        if self.precomputed is not None and micro.dataset is self.precomputed[0]:
            chosen, rejected = self.precomputed[1][[item for item, _ in micro.items]].T
            return chosen, rejected
        logp = self.reference_run.forward(micro.batch, pixels=micro.pixels if features is None else None, features=features, theta=self.reference,
                                            adapters=self.args.ref_adapters)
        chosen, rejected = np.split(sequence_sums(micro.batch, logp)[micro.trees.order], 2)
        return chosen, rejected


class DPOTrainer(Trainer):
    """Preference training on `PairDataset`s, or on what :class:`stllava.data.dpo.DPODataset` is made of.

    Args as :class:`stllava.train.loop.Trainer`. The model at construction is the reference.
    """

    Config = DPOConfig
    args: DPOConfig
    objective: DPOObjective

    def make_dataset(self, data: Any, *args: Any, **settings: Any) -> DPODataset:
        return DPODataset(data, *args, **settings)

    def make_objective(self) -> DPOObjective:
        return DPOObjective(self.model, self.args)

    def before_training(self) -> None:
        if self.args.precompute_ref_log_probs:
            self.objective.precompute(self.train_dataset, self.args.per_device_train_batch_size)
