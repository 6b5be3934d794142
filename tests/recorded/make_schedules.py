"""Records transformers' learning-rate multipliers and step counts: run by hand with an interpreter that has it, `python tests/recorded/make_schedules.py`.

Made with transformers 5.23.0, torch 2.13.0. `tests/python/test_schedule.py` and `test_train_plan.py` read the result, schedules.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

RATE = 2e-4
CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    (kind, total, warmup, options)
    for total, warmup in ((20, 3), (7, 0), (5, 5), (1, 1))
    for kind, options in (
        ("linear", {}), ("cosine", {}), ("cosine", {"num_cycles": 1.5}), ("cosine_with_restarts", {}), ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {}) if total > warmup else ("constant", {}), ("polynomial", {"power": 2.0, "lr_end": 1e-5}) if total > warmup else ("constant", {}),
        ("constant", {}), ("constant_with_warmup", {}), ("inverse_sqrt", {}), ("inverse_sqrt", {"timescale": 6}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_with_min_lr", {"min_lr": 5e-5, "num_cycles": 1.0}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_warmup_with_min_lr", {"min_lr": 5e-5, "warmup_lr_rate": 0.2}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
        ("warmup_stable_decay", {"num_decay_steps": 3, "num_stable_steps": 2, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "min_lr_ratio": 0.05}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "warmup_type": "cosine", "decay_type": "linear", "min_lr_ratio": 0.3}))]
PLANS = [(10, 2, 2, 3.0), (10, 3, 2, 1.0), (7, 2, 4, 2.0), (3, 2, 8, 2.5), (1, 1, 1, 1.0), (100, 8, 4, 1.5), (33, 4, 3, 2.7)]


def multipliers(kind: str, total: int, warmup: int, options: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=options or None)
    values = []
    for _ in range(total + 1):
        values.append(scheduler.lr_lambdas[0](scheduler.last_epoch))
        optimizer.step()
        scheduler.step()
    return values


def step_counts(n: int, batch: int, accumulation: int, epochs: float, drop_last: bool) -> list[int]:
    """Updates per epoch and in all."""
    args = TrainingArguments("unused", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs,
                             dataloader_drop_last=drop_last, use_cpu=True, report_to="none")
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=torch.utils.data.TensorDataset(torch.zeros(n, 1)))
    values = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    return [values[1], values[-1]]


if __name__ == "__main__":
    schedules = [{"kind": k, "total": t, "warmup": w, "options": o, "values": multipliers(k, t, w, o)} for k, t, w, o in CASES]
    plans = [{"n": n, "batch": b, "accumulation": g, "epochs": e, "drop_last": d, "steps": step_counts(n, b, g, e, d)}
             for n, b, g, e in PLANS for d in (False, True) if not d or n >= b]
    (Path(__file__).parent / "schedules.json").write_text(json.dumps({"rate": RATE, "schedules": schedules, "plans": plans}, indent=0) + "\n")
