"""Learning-rate multipliers: those of transformers at every update (tests/recorded/make_schedules.py), and settings that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stllava.errors import ConfigError
from stllava.train.arguments import SFTConfig
from stllava.train.schedule import SCHEDULES, Schedule

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "schedules.json").read_text())


def test_every_schedule_is_recorded():
    assert {case["kind"] for case in RECORDED["schedules"]} == set(SCHEDULES)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_values_of_transformers(kind):
    for case in (case for case in RECORDED["schedules"] if case["kind"] == kind):
        schedule = Schedule(kind, case["total"], case["warmup"], RECORDED["rate"], options=case["options"])
        n = case["total"] + (case["total"] > case["warmup"])  # where all is warm-up, no update is at its end
        np.testing.assert_allclose([schedule(step) for step in range(n)], case["values"][:n], rtol=1e-12, atol=1e-15, err_msg=str(case))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_floor_is_where_the_curve_ends(kind):
    schedule, plain = Schedule(kind, 20, 3, 1e-3, floor=0.1), Schedule(kind, 20, 3, 1e-3)
    assert [schedule(step) for step in range(4)] == [plain(step) for step in range(4)] and schedule(20) == 0.1
    assert schedule(11) == pytest.approx(0.1 + 0.9 * plain(11))


@pytest.mark.parametrize("kind, options, message", [
    ("reduce_lr_on_plateau", {}, "a resumed run"), ("square", {}, "supported: linear, cosine"), ("cosine", {"cycles": 1}, "'cycles'; 'cosine' takes num_cycles"),
    ("constant", {"power": 1}, "takes none"), ("warmup_stable_decay", {}, "needs 'num_decay_steps'"), ("cosine_with_min_lr", {}, "min_lr and min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "min_lr and min_lr_rate"), ("polynomial", {"lr_end": 1.0}, "lr_end 1.0 must be below"),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "decay_type is 'steep'"), ("cosine", {"num_cycles": "many"}, "num_cycles|cosine")])
def test_what_cannot_be_used(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(kind, 20, 3, 1e-3, options=options)


def test_settings_are_checked_before_the_data_is_read():
    with pytest.raises(ConfigError, match="needs 'num_decay_steps'"):
        SFTConfig("out", lr_scheduler_type="warmup_stable_decay")
    assert SFTConfig("out", lr_scheduler_type="polynomial", lr_scheduler_kwargs='{"power": 2.0}').lr_scheduler_kwargs == {"power": 2.0}
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs"):
        SFTConfig("out", lr_scheduler_kwargs="power=2")
