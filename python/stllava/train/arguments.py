"""What a user sets. Names and defaults are Hugging Face's and the original scripts'; each option exists once, here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import stllava_c
from stllava.errors import ConfigError

__all__ = ["TrainingArguments", "SFTConfig", "DPOConfig"]

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(slots=True)
class TrainingArguments:
    """Settings of a run (transformers.TrainingArguments, LLaVA's additions, and a few of ours, last).

    `per_device_train_batch_size` counts samples (pairs for DPO; images when the data set groups by image). Learning rates: `learning_rate` for
    everything but the projector (`mm_projector_lr`) and, only when that is set too, the tower (`vision_tower_lr`): six groups in LLaVA's order.
    `nan_policy`: an update in which a number is not finite changes nothing; ``"stop"`` raises NumericsError, ``"skip"`` logs the samples and goes on,
    at most `max_skipped` times in a row.
    """

    output_dir: str
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    mm_projector_lr: float | None = None
    vision_tower_lr: float | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    logging_steps: int = 1
    save_strategy: str = "no"
    save_steps: int = 500
    save_total_limit: int | None = None
    eval_strategy: str = "no"
    eval_steps: int | None = None
    seed: int = 42
    data_seed: int | None = None
    dataloader_num_workers: int = 1
    gradient_checkpointing: bool = False
    resume_from_checkpoint: str | bool | None = None
    disable_tqdm: bool = False
    # ours
    min_lr_ratio: float = 0.0
    loss_reduction: str = "micro_mean"
    hf_compat: str = "latest"
    share_prefixes: bool = True
    vit_grad: bool = True
    nan_policy: str = "stop"
    max_skipped: int = 10
    allow_untrained: bool = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name, low in (("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1), ("gradient_accumulation_steps", 1),
                          ("logging_steps", 1), ("save_steps", 1), ("dataloader_num_workers", 0), ("warmup_steps", 0), ("max_skipped", 0)):
            self._at_least(name, low)
        for name in ("num_train_epochs", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, want a number > 0", field=name)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            self._at_least(name, 0)
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, want a number in [0, 1)", field=name)
        self._one_of("lr_scheduler_type", ("cosine", "linear", "constant", "constant_with_warmup"))
        self._one_of("save_strategy", ("no", "steps", "epoch"))
        self._one_of("eval_strategy", ("no", "steps", "epoch"))
        self._one_of("loss_reduction", ("micro_mean", "token_mean"))
        self._one_of("hf_compat", ("latest", "4.31"))
        self._one_of("nan_policy", ("stop", "skip"))
        if self.save_total_limit is not None:
            self._at_least("save_total_limit", 1)

    def _at_least(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
            raise ConfigError(f"{name} is {value!r}, want a number >= {low}", field=name)

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name} is {getattr(self, name)!r}, supported: {', '.join(choices)}", field=name)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(slots=True)
class SFTConfig(TrainingArguments):
    """Stage 1. `sq_r`, template and lengths belong to the data set."""


@dataclass(slots=True)
class DPOConfig(TrainingArguments):
    """Stage 2 (trl.DPOConfig's names).

    `loss_type` may be a mixture with `loss_weights`. `ref_image_features`: ``"initial"`` = the reference is entirely frozen; ``"policy"`` = as the
    original wrote it, the frozen language model reads the policy's image features (spec D3). `ref_adapters` False: the reference is
    the base without adapters, whatever they were at the start.
    """

    beta: float = 0.1
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    reference_free: bool = False
    precompute_ref_log_probs: bool = False
    ref_image_features: str = "initial"
    ref_adapters: bool = True
    disable_dropout: bool = True
    learning_rate: float = 5e-6
    loss_types: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        TrainingArguments.__post_init__(self)
        self.loss_types = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        for name in self.loss_types:
            if name not in stllava_c.LOSS_TYPES:
                raise ConfigError(f"loss_type is {name!r}, supported: {', '.join(stllava_c.LOSS_TYPES)}", field="loss_type")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_types):
            raise ConfigError(f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_types)} loss types", field="loss_weights")
        self._one_of("ref_image_features", ("initial", "policy"))
        self._one_of("f_divergence_type", F_DIVERGENCES)
        if self.loss_reduction != "micro_mean":
            raise ConfigError("loss_reduction: DPO is a mean over pairs; token_mean is for SFT only", field="loss_reduction")
        if self.precompute_ref_log_probs and (self.ref_image_features == "policy" or self.reference_free):
            raise ConfigError("precompute_ref_log_probs needs a reference that does not move: ref_image_features='initial' and no reference_free",
                              field="precompute_ref_log_probs")
