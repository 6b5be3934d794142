"""Stage 2: DPO and its relatives. One prefix with two branches per pair; the reference is a snapshot of the trainable buffer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import stllava_c

from stllava.model import LlavaModel
from stllava.tree import Sequence

from .arguments import DPOConfig
from .loop import Trainer
from .sft import collate_sequences
from .update import Micro

__all__ = ["DPOObjective", "DPOTrainer", "PairDataset"]


class PairDataset(Protocol):
    def __len__(self) -> int: ...

    def pair(self, item: int, epoch: int) -> tuple[Sequence, Sequence]:
        """(chosen, rejected), the same prompt."""

    def pixels(self, key: object) -> np.ndarray: ...


class DPOObjective:
    """Loss per pair from sequence log-probs; metrics under TRL's names and, where they differ, the original's (`policy_logps`, `referece_logps`)."""

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
            values[start:start + len(items)] = np.stack(self._reference(self.collate(dataset, items), None), axis=1)
        self.precomputed = (dataset, values)

    def step(self, micro: Micro, update: list[Micro], step: int) -> dict[str, float]:
        values, dchosen, drejected, run = self._forward(micro, train=True, step=step)
        share = 1.0 / len(update)
        coefficients = np.empty(2 * len(dchosen))
        coefficients[micro.trees.order] = share * np.concatenate([dchosen, drejected])
        counts = np.diff(micro.batch.sequence_begin)
        run.backward(np.repeat(coefficients, counts))
        return values

    def evaluate(self, micro: Micro) -> tuple[float, int, dict[str, float]]:
        values, dchosen, _, _ = self._forward(micro, train=False, step=0)
        return values.pop("loss") * len(dchosen), len(dchosen), values

    def combine(self, metrics: list[dict[str, float]]) -> dict[str, float]:
        return {key: sum(m[key] for m in metrics) / len(metrics) for key in metrics[0]}

    def _forward(self, micro: Micro, *, train: bool, step: int):
        args, run, batch, order = self.args, self.model.run, micro.batch, micro.trees.order
        n = len(micro.items)
        initial = args.ref_image_features == "initial"
        reference = self._reference(micro, None) if initial and not args.reference_free else None
        logp = run.forward(batch, pixels=micro.pixels, train=train, vision_grad=args.vit_grad, mean_logit=True,
                           dropout=train and not args.disable_dropout, seed=args.seed, step=step)
        if not initial and not args.reference_free:
            reference = self._reference(micro, None if micro.pixels is None else run.features)
        chosen, rejected = np.split(_sums(batch, logp)[order], 2)
        tokens = np.diff(batch.sequence_begin)[order].astype(np.float64)
        loss, _, dchosen, drejected = stllava_c.preference_loss(
            loss_types=args.loss_types, weights=args.loss_weights, beta=args.beta, label_smoothing=args.label_smoothing,
            discopop_tau=args.discopop_tau, f_divergence=args.f_divergence_type, alpha=args.f_alpha_divergence_coef,
            reference_free=args.reference_free, policy_chosen=chosen, policy_rejected=rejected,
            reference_chosen=None if reference is None else reference[0], reference_rejected=None if reference is None else reference[1],
            chosen_tokens=tokens[:n], rejected_tokens=tokens[n:])
        ref_chosen, ref_rejected = reference if reference is not None else (np.zeros(n), np.zeros(n))
        rewards_chosen, rewards_rejected = args.beta * (chosen - ref_chosen), args.beta * (rejected - ref_rejected)
        logit_chosen, logit_rejected = np.split((_sums(batch, run.mean_logit) / np.diff(batch.sequence_begin))[order], 2)
        values = {
            "loss": loss, "rewards/chosen": rewards_chosen.mean(), "rewards/rejected": rewards_rejected.mean(),
            "rewards/accuracies": (rewards_chosen > rewards_rejected).mean(), "rewards/margins": (rewards_chosen - rewards_rejected).mean(),
            "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(),
            "policy_logps/chosen": chosen.mean(), "policy_logps/rejected": rejected.mean(),
            "referece_logps/chosen": ref_chosen.mean(), "referece_logps/rejected": ref_rejected.mean(),
            "logits/chosen": logit_chosen.mean(), "logits/rejected": logit_rejected.mean()}
        return {key: float(value) for key, value in values.items()}, dchosen, drejected, run

    def _reference(self, micro: Micro, features: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected) log-probs under the snapshot; with `features`, of its language model alone."""
        if self.precomputed is not None and micro.dataset is self.precomputed[0]:
            chosen, rejected = self.precomputed[1][[item for item, _ in micro.items]].T
            return chosen, rejected
        logp = self.reference_run.forward(micro.batch, pixels=micro.pixels if features is None else None, features=features, theta=self.reference)
        chosen, rejected = np.split(_sums(micro.batch, logp)[micro.trees.order], 2)
        return chosen, rejected


def _sums(batch: stllava_c.Batch, values: np.ndarray) -> np.ndarray:
    """Sum over each sequence's targets, (n_sequences,)."""
    return np.add.reduceat(values, batch.sequence_begin[:-1])


class DPOTrainer(Trainer):
    """Preference training on `PairDataset`s, e.g. :class:`stllava.data.dpo.DPODataset`. The model at construction is the reference."""

    Config = DPOConfig

    def make_objective(self) -> DPOObjective:
        return DPOObjective(self.model, self.args)

    def before_training(self) -> None:
        if self.args.precompute_ref_log_probs:
            self.objective.precompute(self.train_dataset, self.args.per_device_train_batch_size)
