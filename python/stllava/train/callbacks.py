"""Hooks into the loop, with transformers' names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from stllava.errors import ConfigError

from .arguments import TrainingArguments

__all__ = ["EarlyStoppingCallback", "TrainerCallback", "TrainerControl", "TrainerState", "is_better", "metric_of"]


@dataclass(slots=True)
class TrainerState:
    """Where the run is; saved as trainer_state.json. `window`: numbers of the updates since the last log line; `total_loss`: sum over all updates."""

    max_steps: int = 0
    global_step: int = 0
    epoch: float = 0.0
    num_train_epochs: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    window: list[dict[str, Any]] = field(default_factory=list)
    total_loss: float = 0.0


@dataclass(slots=True)
class TrainerControl:
    """What a callback may ask for; looked at after every update."""

    should_training_stop: bool = False
    should_log: bool = False
    should_save: bool = False
    should_evaluate: bool = False


class TrainerCallback:
    """Override what you need. Every hook gets (args, state, control, **kwargs) with `model` and, where there is one, `logs` or `metrics`.

    `on_log` sees every row of the log but those of skipped updates; evaluations too, after `on_evaluate`.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...


def metric_of(args: TrainingArguments, metrics: dict[str, Any]) -> float:
    """`metric_for_best_model` of an evaluation, with or without ``eval_`` before it. Raises ConfigError where it is not there."""
    name = args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise ConfigError(f"metric_for_best_model is {args.metric_for_best_model!r}; an evaluation gives "
                          f"{', '.join(key for key in metrics if key.startswith('eval_'))}", field="metric_for_best_model")
    return float(metrics[name])


def is_better(args: TrainingArguments, value: float, best: float | None) -> bool:
    """NaN is never better."""
    if best is None:
        return not math.isnan(value)
    return value > best if args.greater_is_better else value < best


class EarlyStoppingCallback(TrainerCallback):
    """Ends the run after `early_stopping_patience` evaluations in a row that were not better than the best before by more than the threshold.

    Source: transformers' EarlyStoppingCallback. It counts in the run's log, so that a resumed run knows what was before.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        self.patience, self.threshold = early_stopping_patience, early_stopping_threshold

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.metric_for_best_model is None or args.eval_strategy == "no":
            raise ConfigError("EarlyStoppingCallback needs metric_for_best_model and eval_strategy 'steps' or 'epoch'", field="metric_for_best_model")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best, n_worse = None, 0
        for row in [*(row for row in state.log_history if "eval_loss" in row), kwargs["metrics"]]:
            value = metric_of(args, row)
            improved = best is None or (is_better(args, value, best) and abs(value - best) > self.threshold)
            n_worse = 0 if improved else n_worse + 1
            best = value if is_better(args, value, best) else best
        if n_worse >= self.patience:
            control.should_training_stop = True
