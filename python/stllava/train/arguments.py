"""What a user sets. Names and defaults are Hugging Face's and the original scripts'; each option exists once, here."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import stllava_c
from stllava.errors import ConfigError

from .schedule import check_schedule

__all__ = ["TrainingArguments", "SFTConfig", "DPOConfig"]

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
TRACKERS = ("tensorboard", "wandb")
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")  # one rule, several kernels
# Fields of transformers that ask for maths or services that are not here: the only value each may have, and what to do.
_ONLY: tuple[tuple[str, Any, str], ...] = (
    ("label_smoothing_factor", 0.0, "the loss looks at targets only; for preference pairs there is DPOConfig.label_smoothing"),
    ("neftune_noise_alpha", None, "embeddings get no noise; lora_dropout regularises"),
    ("push_to_hub", False, "nothing is sent anywhere; upload the output directory yourself"))


@dataclass(slots=True)
class TrainingArguments:
    """Settings of a run (transformers.TrainingArguments, LLaVA's additions, and a few of ours, last).

    `per_device_train_batch_size` counts samples (pairs for DPO; images when the data set groups by image). Learning rates: `learning_rate` for
    everything but the projector (`mm_projector_lr`) and, only when that is set too, the tower (`vision_tower_lr`): six groups in LLaVA's order.
    `logging_steps`, `save_steps`, `eval_steps` (default `logging_steps`) and `warmup_steps` below 1 are a share of all updates.
    `lr_scheduler_type`, `lr_scheduler_kwargs` (a dictionary, or its JSON): see `train.schedule`. `evaluation_strategy` is `eval_strategy`, as before.
    `metric_for_best_model`: "loss" where a best model is asked for and no metric is; `greater_is_better`: unless that name ends with "loss".
    `report_to`: "none", "all", or of "tensorboard" and "wandb". `save_safetensors`: .safetensors files in place of torch's .bin.
    `group_by_length`, `group_by_modality_length` (LLaVA's): see `train.plan`. `train_sampling_strategy` "random", "sequential", "group_by_length" is
    transformers 5's name for `shuffle` and `group_by_length`. `early_stopping_patience`: see `callbacks.EarlyStoppingCallback`.
    `hf_compat` "4.31" or "latest": that transformers' count of updates, left-over micro-batches, logged rate and, unless `loss_reduction` says
    otherwise, SFT's mean: "micro_mean" of micro-batches, or "token_mean" of all targets of an update.
    `repeat_vit_lora`: the decoder's adapter file repeats the tower's adapter, as the original's does.
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
    optim: str = "adamw_torch"
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    warmup_ratio: float = 0.0
    warmup_steps: float = 0
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    logging_strategy: str = "steps"
    logging_steps: float = 1
    logging_first_step: bool = False
    logging_dir: str | None = None
    run_name: str | None = None
    report_to: str | list[str] | None = "none"
    save_strategy: str = "no"
    save_steps: float = 500
    save_total_limit: int | None = None
    save_safetensors: bool = False
    eval_strategy: str = "no"
    evaluation_strategy: str | None = None
    eval_steps: float | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    seed: int = 42
    data_seed: int | None = None
    dataloader_num_workers: int = 1
    dataloader_drop_last: bool = False
    group_by_length: bool = False
    group_by_modality_length: bool = False
    train_sampling_strategy: str | None = None
    gradient_checkpointing: bool = False
    resume_from_checkpoint: str | bool | None = None
    push_to_hub: bool = False
    disable_tqdm: bool = False
    # ours
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    min_lr_ratio: float = 0.0
    loss_reduction: str | None = None
    hf_compat: str = "latest"
    repeat_vit_lora: bool = False
    share_prefixes: bool = True
    vit_grad: bool = True
    nan_policy: str = "stop"
    max_skipped: int = 10
    allow_untrained: bool = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name, low in (("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1), ("gradient_accumulation_steps", 1),
                          ("dataloader_num_workers", 0), ("warmup_steps", 0), ("max_skipped", 0), ("early_stopping_threshold", 0)):
            self._at_least(name, low)
        for name in ("num_train_epochs", "adam_epsilon", "logging_steps", "save_steps", "eval_steps"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name} is {value!r}, want a number > 0", field=name)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            self._at_least(name, 0)
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, want a number in [0, 1)", field=name)
        for name in ("save_total_limit", "early_stopping_patience"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        for name, value, advice in _ONLY:
            if getattr(self, name) != value:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, supported: {value!r}; {advice}", field=name)
        self._one_of("optim", ADAMW, "; only what trains has moments, so they are small beside the base: use adamw_torch")
        self._check_schedule()
        self._check_strategies()
        if self.loss_reduction is None:
            self.loss_reduction = "token_mean" if self.hf_compat == "latest" else "micro_mean"
        self._one_of("loss_reduction", ("micro_mean", "token_mean"))
        self._one_of("hf_compat", ("latest", "4.31"))
        self._one_of("nan_policy", ("stop", "skip"))
        given = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        self.report_to = [name for name in (TRACKERS if "all" in given else given) if name != "none"]
        if unknown := [name for name in self.report_to if name not in TRACKERS]:
            raise ConfigError(f"report_to has {unknown[0]!r}, supported: none, all, {', '.join(TRACKERS)}; log.jsonl is always written",
                              field="report_to")

    def _check_schedule(self) -> None:
        if isinstance(self.lr_scheduler_kwargs, str):
            try:
                self.lr_scheduler_kwargs = json.loads(self.lr_scheduler_kwargs)
            except json.JSONDecodeError as error:
                raise ConfigError(f"lr_scheduler_kwargs is {self.lr_scheduler_kwargs!r}, which is not JSON: {error}",
                                  field="lr_scheduler_kwargs") from error
        if not isinstance(self.lr_scheduler_kwargs, dict | None):
            raise ConfigError(f"lr_scheduler_kwargs is {self.lr_scheduler_kwargs!r}, want an object {{name: value}}", field="lr_scheduler_kwargs")
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)

    def _check_strategies(self) -> None:
        if self.evaluation_strategy is not None:
            if self.eval_strategy not in ("no", self.evaluation_strategy):
                raise ConfigError(f"evaluation_strategy is {self.evaluation_strategy!r}, eval_strategy {self.eval_strategy!r}; they are one setting",
                                  field="evaluation_strategy")
            self.eval_strategy, self.evaluation_strategy = self.evaluation_strategy, None
        self._one_of("logging_strategy", ("no", "steps", "epoch"))
        self._one_of("save_strategy", ("no", "steps", "epoch", "best"))
        self._one_of("eval_strategy", ("no", "steps", "epoch"))
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.train_sampling_strategy is not None:
            self._one_of("train_sampling_strategy", ("random", "sequential", "group_by_length"))
            self.shuffle = self.train_sampling_strategy != "sequential"
            self.group_by_length = self.train_sampling_strategy == "group_by_length"
        if self.group_by_length and self.group_by_modality_length:
            raise ConfigError("group_by_length and group_by_modality_length exclude each other; set one", field="group_by_length")
        needs_metric = self.load_best_model_at_end or self.save_strategy == "best" or self.early_stopping_patience is not None
        if needs_metric and self.eval_strategy == "no":
            raise ConfigError("load_best_model_at_end, save_strategy 'best' and early_stopping_patience need evaluations: set eval_strategy",
                              field="eval_strategy")
        if needs_metric and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        if self.load_best_model_at_end and self.save_strategy != "best":
            if self.save_strategy != self.eval_strategy:
                raise ConfigError(f"load_best_model_at_end: save_strategy is {self.save_strategy!r}, eval_strategy {self.eval_strategy!r}; what is "
                                  "evaluated must be saved, so make them the same", field="save_strategy")
            times = self.save_steps / self.eval_steps
            if self.save_strategy == "steps" and abs(times - round(times)) > 1e-9:
                raise ConfigError(f"load_best_model_at_end: save_steps {self.save_steps} is not a multiple of eval_steps {self.eval_steps}",
                                  field="save_steps")

    def n_warmup(self, total: int) -> int:
        """Updates of the warm-up among `total`."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(total * (self.warmup_steps or self.warmup_ratio))

    def steps_of(self, name: str, total: int) -> int:
        """`logging_steps`, `save_steps` or `eval_steps` as a number of updates, of `total`."""
        value: float = getattr(self, name)
        return int(value) if value >= 1 else math.ceil(total * value)

    def _at_least(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
            raise ConfigError(f"{name} is {value!r}, want a number >= {low}", field=name)

    def _one_of(self, name: str, choices: tuple[str, ...], advice: str = "") -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name} is {getattr(self, name)!r}, supported: {', '.join(choices)}{advice}", field=name)

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
        self.loss_reduction = self.loss_reduction or "micro_mean"
        TrainingArguments.__post_init__(self)
        self.loss_types = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        for name in self.loss_types:
            if name not in stllava_c.LOSS_TYPES:
                raise ConfigError(f"loss_type is {name!r}, supported: {', '.join(stllava_c.LOSS_TYPES)}", field="loss_type")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_types):
            raise ConfigError(f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_types)} loss types", field="loss_weights")
        if not self.beta > 0:
            raise ConfigError(f"beta is {self.beta}, want a number > 0", field="beta")
        self._one_of("ref_image_features", ("initial", "policy"))
        self._one_of("f_divergence_type", F_DIVERGENCES)
        if self.loss_reduction != "micro_mean":
            raise ConfigError("loss_reduction: DPO is a mean over pairs; token_mean is for SFT only", field="loss_reduction")
        if self.precompute_ref_log_probs and (self.ref_image_features == "policy" or self.reference_free):
            raise ConfigError("precompute_ref_log_probs needs a reference that does not move: ref_image_features='initial' and no reference_free",
                              field="precompute_ref_log_probs")
