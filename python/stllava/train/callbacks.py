"""Hooks into the loop, with transformers' names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .arguments import TrainingArguments

__all__ = ["TrainerCallback", "TrainerControl", "TrainerState"]


@dataclass(slots=True)
class TrainerState:
    """Where the run is; saved as trainer_state.json. `window`: numbers of the updates since the last log line; `total_loss`: sum over all updates."""

    max_steps: int = 0
    global_step: int = 0
    epoch: float = 0.0
    num_train_epochs: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    window: list[dict[str, Any]] = field(default_factory=list)
    total_loss: float = 0.0


@dataclass(slots=True)
class TrainerControl:
    """What a callback may ask for; looked at after every update."""

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False


class TrainerCallback:
    """Override what you need. Every hook gets (args, state, control, **kwargs) with `model` and, where there is one, `logs` or `metrics`."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None: ...
