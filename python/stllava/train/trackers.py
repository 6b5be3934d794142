"""Curves elsewhere than in log.jsonl: TensorBoard event files, and Weights & Biases. `report_to` asks for them; a package that is not there costs one
line, not the run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from .arguments import TrainingArguments
from .callbacks import TrainerCallback, TrainerControl, TrainerState

__all__ = ["TensorBoardCallback", "WandbCallback", "trackers"]


def trackers(args: TrainingArguments) -> list[TrainerCallback]:
    """The callbacks of `args.report_to` whose packages are installed; of the others one line on stderr."""
    found: list[TrainerCallback] = []
    for name in args.report_to or ():
        package, kind = _KINDS[name]
        if importlib.util.find_spec(package) is not None:
            found.append(kind())
        else:
            print(f"stllava: report_to {name}: {package} is not installed, so nothing goes there; pip install 'stllava[{name}]'", file=sys.stderr)
    return found


def _scalars(logs: dict[str, Any]) -> dict[str, float]:
    """transformers' rewrite_logs: ``eval_x`` -> ``eval/x``, others -> ``train/x``."""
    return {f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
            for key, value in logs.items() if isinstance(value, (int, float)) and key != "step"}


class TensorBoardCallback(TrainerCallback):
    """Event files in `logging_dir`, by default ``runs`` in the output directory. A resumed run takes back what was logged after its checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
        folder = Path(args.logging_dir or Path(args.output_dir) / "runs")
        self.writer = SummaryWriter(str(folder), purge_step=state.global_step + 1 if state.global_step else None)
        self.writer.add_text("args", json.dumps(args.to_dict(), indent=2))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for key, value in _scalars(kwargs["logs"]).items():
            self.writer.add_scalar(key, value, state.global_step)
        self.writer.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.writer.close()


class WandbCallback(TrainerCallback):
    """A run in WANDB_DIR, by default the output directory. Nothing is sent unless WANDB_MODE is set to online."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        import wandb
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), name=args.run_name or Path(args.output_dir).name,
                              config=args.to_dict(), dir=os.environ.get("WANDB_DIR", args.output_dir),
                              mode=None if "WANDB_MODE" in os.environ else "offline")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.log({**_scalars(kwargs["logs"]), "train/global_step": state.global_step})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.finish()


_KINDS: dict[str, tuple[str, type[TrainerCallback]]] = {"tensorboard": ("tensorboardX", TensorBoardCallback), "wandb": ("wandb", WandbCallback)}
