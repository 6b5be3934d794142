"""transformers' fields in the loop: best model, early stopping, when to log and save, trackers, state that transformers reads, rates as each version logs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peers
import pytest
from tiny import dpo_records, sft_records, tiny_model, write_pictures

from stllava.checkpoint.peft import LoraConfig
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.errors import ConfigError
from stllava.train.arguments import SFTConfig
from stllava.train.callbacks import EarlyStoppingCallback, TrainerCallback
from stllava.train.sft import SFTTrainer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return folder, write_pictures(folder)


def trainer(out, pictures, metric=None, **settings):
    """Five records, one update per record. metric: `eval_score` of each evaluation, by its update."""
    folder, names = pictures
    model = tiny_model()
    model.add_lora(LoraConfig(r=2, lora_alpha=4), "llm")
    data = SFTDataset(sft_records(names), model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=16)
    args = SFTConfig(str(out), **{"max_steps": 5, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "disable_tqdm": True, "seed": 1,
                                  "lr_scheduler_type": "constant", "dataloader_num_workers": 0, "allow_untrained": True, **settings})
    compute = None if metric is None else lambda run: {"eval_score": metric[run.state.global_step]}
    return SFTTrainer(model, args, data, data if args.eval_strategy != "no" else None, compute_metrics=compute)


def checkpoints(out):
    return sorted(int(path.name.partition("-")[2]) for path in Path(out).glob("checkpoint-*"))


SCORES = {1: 0.3, 2: 0.7, 3: 0.5, 4: 0.7, 5: 0.1}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "score", "load_best_model_at_end": True}


def test_the_best_model_is_kept_and_loaded(tmp_path, pictures):
    run = trainer(tmp_path, pictures, SCORES, **BEST, save_total_limit=2)
    seen = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = kwargs["model"].theta.copy()
    run.callbacks.append(Remember())
    run.train()
    np.testing.assert_array_equal(run.model.theta, seen[2])
    assert not np.array_equal(seen[2], seen[5]) and checkpoints(tmp_path) == [2, 5]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"], state["best_model_checkpoint"]) == (0.7, 2, str(tmp_path / "checkpoint-2"))
    assert state["global_step"] == 5 and state["log_history"] == run.state.log_history


def test_a_resumed_run_knows_the_best(tmp_path, pictures):
    """Stopped behind the best evaluation, resumed from before it and from behind it: same weights, same files."""
    def run(stop=0, resume=None):
        made = trainer(tmp_path / "out", pictures, SCORES, **BEST)

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop
        made.add_callback(Stop)
        made.train(resume_from_checkpoint=resume)
        return made.model.theta.copy(), {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}

    weights, written = run()
    for resume_at in (1, 3):
        (tmp_path / "out").rename(tmp_path / f"before {resume_at}")
        run(stop=4)
        again = run(resume=str(tmp_path / "out" / f"checkpoint-{resume_at}"))
        np.testing.assert_array_equal(again[0], weights)
        assert again[1] == written


def test_a_checkpoint_of_another_run_is_not_the_best(tmp_path, pictures):
    """The best evaluation is at update 2, which is not saved; what lies in checkpoint-2 is of a run before."""
    trainer(tmp_path, pictures, save_strategy="steps", save_steps=2, max_steps=2, learning_rate=0.5).train()
    run = trainer(tmp_path, pictures, SCORES, **{**BEST, "save_steps": 3, "max_steps": 5})
    run.train()
    assert checkpoints(tmp_path) == [2, 3] and (run.state.best_global_step, run.state.best_model_checkpoint) == (2, None)
    with pytest.raises(ConfigError, match="pass eval_dataset"):
        trainer(tmp_path, pictures).evaluate()


def test_save_strategy_best(tmp_path, pictures):
    run = trainer(tmp_path, pictures, SCORES, **{**BEST, "save_strategy": "best"})
    run.train()
    assert checkpoints(tmp_path) == [1, 2] and run.state.best_metric == 0.7


def test_lower_is_better_for_a_loss(tmp_path, pictures):
    run = trainer(tmp_path, pictures, **{**BEST, "metric_for_best_model": None}, save_total_limit=1)
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert len(losses) == 5 and run.state.best_metric == min(losses)
    assert checkpoints(tmp_path) == sorted({5, 1 + losses.index(min(losses))})


def test_a_metric_that_is_not_there_is_named(tmp_path, pictures):
    with pytest.raises(ConfigError, match="'score'; an evaluation gives eval_loss"):
        trainer(tmp_path, pictures, **BEST).train()


@pytest.mark.parametrize("patience, threshold, last", [(1, 0.0, 3), (2, 0.0, 4), (3, 0.0, 5), (1, 0.5, 2)])
def test_early_stopping(tmp_path, pictures, patience, threshold, last):
    run = trainer(tmp_path, pictures, SCORES, **{**BEST, "load_best_model_at_end": False, "save_strategy": "no"}, early_stopping_patience=patience,
                  early_stopping_threshold=threshold)
    assert run.train().global_step == last


def test_early_stopping_counts_on_after_a_resume(tmp_path, pictures):
    settings = {**BEST, "early_stopping_patience": 2, "load_best_model_at_end": False}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3
    broken = trainer(tmp_path, pictures, SCORES, **settings)
    broken.callbacks.append(Stop())
    assert broken.train().global_step == 3
    again = trainer(tmp_path, pictures, SCORES, **settings)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert (again.state.best_metric, again.state.best_global_step) == (0.7, 2)


def test_early_stopping_needs_evaluations(tmp_path, pictures):
    run = trainer(tmp_path, pictures)
    run.callbacks.append(EarlyStoppingCallback())
    with pytest.raises(ConfigError, match="metric_for_best_model"):
        run.train()
    with pytest.raises(ConfigError, match="no eval_dataset"):
        SFTTrainer(run.model, SFTConfig(str(tmp_path), eval_strategy="steps"), run.train_dataset)


def test_hooks_come_in_the_order_of_transformers(tmp_path, pictures):
    calls = []

    class Recorder(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda args, state, control, **kwargs: calls.append(name.removeprefix("on_"))
            return object.__getattribute__(self, name)

    run = trainer(tmp_path, pictures, per_device_train_batch_size=3, max_steps=3, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2,
                  logging_steps=2)
    run.add_callback(Recorder)
    run.train()
    step = ["step_begin", "step_end"]
    assert calls == ["train_begin", "epoch_begin", *step, *step, "epoch_end", "log", "save", "epoch_begin", *step, "log", "evaluate", "log", "train_end"]


@pytest.mark.parametrize("settings, logged", [
    ({"logging_steps": 2}, [2, 4, 5]), ({"logging_steps": 2, "logging_first_step": True}, [1, 2, 4, 5]), ({"logging_strategy": "no"}, [5]),
    ({"logging_steps": 0.4}, [2, 4, 5]), ({"logging_strategy": "epoch", "max_steps": 6, "per_device_train_batch_size": 3}, [2, 4, 6])])
def test_when_to_log(tmp_path, pictures, settings, logged):
    run = trainer(tmp_path, pictures, **settings)
    run.train()
    assert [row["step"] for row in run.state.log_history] == logged


def test_warmup_below_one_is_a_share(tmp_path, pictures):
    run = trainer(tmp_path, pictures, warmup_steps=0.4, lr_scheduler_type="constant_with_warmup")
    run.train()
    assert [row["learning_rate"] for row in run.state.log_history] == [0.0, 5e-4, 1e-3, 1e-3, 1e-3]


def test_431_logs_the_rate_of_the_next_update(tmp_path, pictures):
    """Spec D63; the weights are the same."""
    runs = [trainer(tmp_path / version, pictures, hf_compat=version, loss_reduction="micro_mean", lr_scheduler_type="linear") for version in ("4.31", "latest")]
    for run in runs:
        run.train()
    old, new = ([row["learning_rate"] for row in run.state.log_history] for run in runs)
    assert old[:-1] == new[1:] and old[-1] == 0 and new[0] == 1e-3
    np.testing.assert_array_equal(runs[0].model.theta, runs[1].model.theta)


def test_loss_reduction_of_each_version(tmp_path, pictures):
    """Notes 2.8: the mean of micro-batches' means, or the mean over all targets of the update."""
    losses = {}
    for version in ("4.31", "latest"):
        run = trainer(tmp_path / version, pictures, hf_compat=version, gradient_accumulation_steps=5, max_steps=1, shuffle=False)
        run.train()
        losses[version] = run.state.log_history[0]["loss"]
    run = trainer(tmp_path / "each", pictures, shuffle=False, learning_rate=0.0)
    run.train()
    means, tokens = ([row[key] for row in run.state.log_history] for key in ("loss", "num_tokens"))
    assert losses["4.31"] == pytest.approx(np.mean(means), rel=1e-6) and losses["latest"] == pytest.approx(np.average(means, weights=tokens), rel=1e-6)
    assert abs(losses["4.31"] - losses["latest"]) > 1e-4


def test_updates_of_one_modality(tmp_path, pictures):
    run = trainer(tmp_path, pictures, group_by_modality_length=True, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=-1)
    assert all(n > 0 for n in run.plan.lengths[:4]) and run.plan.lengths[4] < 0
    first, last = ([i for micro in run.plan.update(step) for i, _ in micro] for step in (0, 1))
    assert sorted(first + last) == [0, 1, 2, 3, 4]
    assert run.train().global_step == 2


def test_pairs_have_lengths(pictures):
    """In the original they do not: KeyError (spec D7)."""
    folder, names = pictures
    model = tiny_model()
    data = DPODataset(dpo_records(names), model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=16)
    assert data.modality_lengths == [4 + 4 + 4 + 6] * 4 and data.lengths == [n + 16 for n in data.modality_lengths]


def test_tensorboard_gets_every_row(tmp_path, pictures, capsys):
    pytest.importorskip("tensorboardX")
    trainer(tmp_path, pictures, SCORES, **BEST, report_to="tensorboard").train()
    [events] = (tmp_path / "runs").iterdir()
    data = events.read_bytes()
    assert data.count(b"train/loss") == 5 and data.count(b"eval/score") == 5 and data.count(b"train/learning_rate") == 5
    assert capsys.readouterr().err == ""


def test_wandb_is_offline_unless_told_otherwise(tmp_path, pictures, monkeypatch):
    calls = []
    fake = SimpleNamespace(__spec__=SimpleNamespace(name="wandb"), init=lambda **settings: calls.append(settings) or SimpleNamespace(
        log=calls.append, finish=lambda: calls.append("end")))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trainer(tmp_path, pictures, report_to=["wandb"], run_name="first", max_steps=2).train()
    assert calls[0]["mode"] == "offline" and calls[0]["name"] == "first" and calls[0]["config"]["learning_rate"] == 1e-3 and calls[-1] == "end"
    assert [row["train/global_step"] for row in calls[1:-1]] == [1, 2] and "train/grad_norm" in calls[1]
    monkeypatch.setenv("WANDB_MODE", "online")
    trainer(tmp_path, pictures, report_to=["wandb"], max_steps=1).train()
    assert calls[4]["mode"] is None  # then wandb asks the environment itself


@pytest.mark.long
def test_wandb_itself(tmp_path, pictures, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trainer(tmp_path, pictures, report_to="wandb", max_steps=2).train()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_a_missing_tracker_is_one_line(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert trainer(tmp_path, pictures, report_to="wandb", max_steps=1).train().global_step == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'stllava[wandb]'" in error


def test_transformers_reads_the_state(tmp_path, pictures):
    """Its TrainerState takes no field that it does not know."""
    trainer(tmp_path, pictures, SCORES, **BEST).train()
    if not Path(peers.PYTHON).exists():
        pytest.skip(f"no {peers.PYTHON}: STLLAVA_PEERS may name an interpreter with transformers")
    script = "import sys; from transformers import TrainerState; s = TrainerState.load_from_json(sys.argv[1]); print(s.best_global_step, s.global_step)"
    for folder, wanted in ((tmp_path, "2 5"), (tmp_path / "checkpoint-3", "2 3")):
        found = subprocess.run([peers.PYTHON, "-c", script, str(folder / "trainer_state.json")], capture_output=True, text=True, check=True)
        assert found.stdout.split("\n")[0] == wanted
