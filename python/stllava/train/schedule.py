"""The learning rate's multiplier at every update, for each of transformers' `lr_scheduler_type`s that is a function of the update's number.

Formulas: transformers 5.23, optimization.py (the first six are the same since 4.31). The core has constant, linear and cosine; the rest is here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import stllava_c
from stllava.errors import ConfigError

__all__ = ["DEEPSPEED_SCHEDULES", "SCHEDULES", "Schedule", "check_schedule"]

_ADAPTIVE = ("reduce_lr_on_plateau", "greedy")  # what they do depends on the run so far, which a resumed run would have to have seen
_RAMPS: dict[str, Callable[[float], float]] = {  # 0 -> 1
    "linear": lambda x: x, "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)), "1-sqrt": lambda x: 1 - math.sqrt(1 - x)}


class Schedule:
    """`schedule(step)` is what every group's rate is multiplied with at update `step`, from 0.

    Args:
        kind: one of SCHEDULES. total, warmup: numbers of updates. rate: the rate of the first group, which `min_lr` and `lr_end` are given for.
        floor: `min_lr_ratio`, where linear and cosine end. options: `lr_scheduler_kwargs`, the keyword arguments of transformers' function.

    Raises:
        ConfigError: naming the option.
    """

    def __init__(self, kind: str, total: int, warmup: int, rate: float, *, floor: float = 0.0, options: Mapping[str, Any] | None = None) -> None:
        self.kind, self.total, self.rate, self.floor = kind, total, rate, floor
        self.warmup = 0 if kind == "constant" else warmup
        self.options = check_schedule(kind, options)
        if floor and kind not in ("linear", "cosine"):
            raise ConfigError(f"min_lr_ratio is {floor}, but lr_scheduler_type {kind!r} does not end there; for linear and cosine only",
                              field="min_lr_ratio")
        self(self.warmup), self(total)

    def __call__(self, step: int) -> float:
        try:
            return _FUNCTIONS[self.kind](self, step, **self.options)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ConfigError(f"lr_scheduler_kwargs {dict(self.options)} are not for {self.kind!r} over {self.total} updates: {error}",
                              field="lr_scheduler_kwargs") from error

    @property
    def n_decaying(self) -> int:
        return max(1, self.total - self.warmup)

    def _ratio(self, min_lr: float | None, min_lr_rate: float | None) -> float:
        if (min_lr is None) == (min_lr_rate is None):
            raise ValueError("want min_lr or min_lr_rate")
        return min_lr / self.rate if min_lr is not None else min_lr_rate or 0.0


def _of_the_core(schedule: Schedule, step: int) -> float:
    return stllava_c.schedule(schedule.kind, step, schedule.warmup, schedule.total, floor=schedule.floor)


def _constant_with_warmup(schedule: Schedule, step: int) -> float:
    return stllava_c.schedule("constant", step, schedule.warmup, schedule.total)


def _cosine(schedule: Schedule, step: int, *, num_cycles: float = 0.5) -> float:
    if num_cycles == 0.5:
        return _of_the_core(schedule, step)
    return schedule.floor + (1 - schedule.floor) * _wave(schedule, step, num_cycles) if step >= schedule.warmup else _rise(schedule, step)


def _cosine_with_restarts(schedule: Schedule, step: int, *, num_cycles: int = 1) -> float:
    if step < schedule.warmup:
        return _rise(schedule, step)
    progress = (step - schedule.warmup) / schedule.n_decaying
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((num_cycles * progress) % 1.0)))


def _polynomial(schedule: Schedule, step: int, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
    if not schedule.rate > lr_end:
        raise ValueError(f"lr_end {lr_end} must be below learning_rate {schedule.rate}")
    if step < schedule.warmup:
        return _rise(schedule, step)
    left = 1 - min(step - schedule.warmup, schedule.n_decaying) / schedule.n_decaying
    return float(((schedule.rate - lr_end) * left**power + lr_end) / schedule.rate)


def _inverse_sqrt(schedule: Schedule, step: int, *, timescale: int | None = None) -> float:
    if step < schedule.warmup:
        return _rise(schedule, step)
    scale = timescale or schedule.warmup or 10_000
    return 1 / math.sqrt((step + scale - schedule.warmup) / scale)


def _cosine_with_min_lr(schedule: Schedule, step: int, *, num_cycles: float = 0.5, min_lr: float | None = None,
                        min_lr_rate: float | None = None) -> float:
    least = schedule._ratio(min_lr, min_lr_rate)
    return _rise(schedule, step) if step < schedule.warmup else max(0.0, _wave(schedule, step, num_cycles) * (1 - least) + least)


def _cosine_warmup_with_min_lr(schedule: Schedule, step: int, *, num_cycles: float = 0.5, min_lr: float | None = None,
                               min_lr_rate: float | None = None, warmup_lr_rate: float | None = None) -> float:
    least = schedule._ratio(min_lr, min_lr_rate)
    if step >= schedule.warmup:
        return max(0.0, _wave(schedule, step + 1, num_cycles) * (1 - least) + least)
    if warmup_lr_rate is None:
        return (step + 1) / schedule.warmup
    return warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, schedule.warmup - 1)


def _warmup_stable_decay(schedule: Schedule, step: int, *, num_decay_steps: int, num_stable_steps: int | None = None, warmup_type: str = "linear",
                         decay_type: str = "cosine", min_lr_ratio: float = 0.0, num_cycles: float = 0.5) -> float:
    for name, value in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if value not in _RAMPS:
            raise ValueError(f"{name} is {value!r}, supported: {', '.join(_RAMPS)}")
    stable = schedule.total - schedule.warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    since = step - schedule.warmup - stable  # the decay began
    if step < schedule.warmup:
        height = _RAMPS[warmup_type](_rise(schedule, step))
    elif since < 0:
        return 1.0
    elif since >= num_decay_steps:
        return min_lr_ratio
    elif decay_type == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * num_cycles * 2 * since / max(1, num_decay_steps)))
    else:
        x = since / max(1, num_decay_steps)
        height = 1 - (math.sqrt(x) if decay_type == "1-sqrt" else x)
    return max(0.0, height * (1 - min_lr_ratio) + min_lr_ratio)


def _rise(schedule: Schedule, step: int) -> float:
    return step / max(1, schedule.warmup)


def _wave(schedule: Schedule, step: int, num_cycles: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * num_cycles * 2 * (step - schedule.warmup) / schedule.n_decaying)))


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": _of_the_core, "cosine": _cosine, "cosine_with_restarts": _cosine_with_restarts, "polynomial": _polynomial, "constant": _of_the_core,
    "constant_with_warmup": _constant_with_warmup, "inverse_sqrt": _inverse_sqrt, "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr, "warmup_stable_decay": _warmup_stable_decay}


def _deepspeed_gamma(schedule: Schedule, step: int, warmup_type: str) -> float | None:
    """How far the warm-up is; None behind it. The scheduler steps after the update, so that the first two have the least rate."""
    if warmup_type not in ("log", "linear"):
        raise ValueError(f"warmup_type is {warmup_type!r}, supported: log, linear")
    warmup, done = max(2, schedule.warmup), max(step - 1, 0)
    if done >= warmup:
        return None
    return math.log(done + 1) / math.log(warmup) if warmup_type == "log" else done / warmup


def _warmup_lr(schedule: Schedule, step: int, *, warmup_min_lr: float = 0.0, warmup_type: str = "log") -> float:
    gamma = _deepspeed_gamma(schedule, step, warmup_type)
    least = warmup_min_lr / schedule.rate if schedule.rate else 0.0
    return least + (1 - least) * (1.0 if gamma is None else gamma)


def _warmup_decay_lr(schedule: Schedule, step: int, *, warmup_min_lr: float = 0.0, warmup_type: str = "log",
                     total_num_steps: int | None = None) -> float:
    gamma = _deepspeed_gamma(schedule, step, warmup_type)
    least = warmup_min_lr / schedule.rate if schedule.rate else 0.0
    if gamma is None:
        total = total_num_steps or schedule.total
        gamma = max(0.0, (total - (step - 1)) / max(1, total - max(2, schedule.warmup)))
    return least + (1 - least) * gamma


def _warmup_cosine_lr(schedule: Schedule, step: int, *, warmup_min_ratio: float = 0.0, warmup_type: str = "log", cos_min_ratio: float = 0.0001,
                      total_num_steps: int | None = None) -> float:
    gamma = _deepspeed_gamma(schedule, step, warmup_type)
    if step == 0:
        return 0.0
    if gamma is not None:
        return warmup_min_ratio + (1 - warmup_min_ratio) * gamma
    warmup = max(2, schedule.warmup)
    done = min(1.0, (step - 1 - warmup + 1) / max(1, (total_num_steps or schedule.total) - warmup))
    return max(0.0, cos_min_ratio + (1 - cos_min_ratio) * (1 + math.cos(math.pi * done)) / 2)


DEEPSPEED_SCHEDULES: dict[str, Callable[..., float]] = {
    "WarmupLR": _warmup_lr, "WarmupDecayLR": _warmup_decay_lr, "WarmupCosineLR": _warmup_cosine_lr}
"""DeepSpeed's own (0.19, lr_schedules.py), which a file of `train.deepspeed` asks for."""
_FUNCTIONS = {**SCHEDULES, **DEEPSPEED_SCHEDULES}


def check_schedule(kind: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options, if this schedule has all of them. Raises ConfigError."""
    if kind not in _FUNCTIONS:
        why = "; it follows the run's own numbers, so that a resumed run could not go on the same way" if kind in _ADAPTIVE else ""
        raise ConfigError(f"lr_scheduler_type is {kind!r}, supported: {', '.join(SCHEDULES)}{why}", field="lr_scheduler_type")
    parameters = {name: p for name, p in inspect.signature(_FUNCTIONS[kind]).parameters.items() if p.kind is p.KEYWORD_ONLY}
    given = dict(options or {})
    if unknown := [name for name in given if name not in parameters]:
        raise ConfigError(f"lr_scheduler_kwargs has {unknown[0]!r}; {kind!r} takes {', '.join(parameters) or 'none'}", field="lr_scheduler_kwargs")
    if lacking := [name for name, p in parameters.items() if p.default is p.empty and name not in given]:
        raise ConfigError(f"lr_scheduler_kwargs: {kind!r} needs {lacking[0]!r}", field="lr_scheduler_kwargs")
    if kind.endswith("min_lr") and (given.get("min_lr") is None) == (given.get("min_lr_rate") is None):
        raise ConfigError(f"lr_scheduler_kwargs: {kind!r} needs one of min_lr and min_lr_rate", field="lr_scheduler_kwargs")
    return given
