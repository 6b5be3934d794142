"""NaN and Inf at every place where numbers enter an update: noticed in that update, with the samples named, and nothing changed by it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import dpo_records, sft_records, tiny_model, write_pictures

from stllava.checkpoint.peft import LoraConfig
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.errors import ConfigError, NumericsError
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.callbacks import TrainerCallback
from stllava.train.dpo import DPOTrainer
from stllava.train.sft import SFTObjective, SFTTrainer

ADAPTER = "model.layers.1.self_attn.q_proj.lora_A.weight"
PROJECTOR = "model.mm_projector.f.weight"
FIVE = ["r0", "r1", "r2", "r3", "text"]


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images", write_pictures(tmp_path / "images")


def sft_trainer(pictures, out, **settings):
    """Each update sees all five samples, two to a micro-batch."""
    folder, names = pictures
    model = tiny_model()
    model.add_lora(LoraConfig(r=2, lora_alpha=4), "llm")
    data = SFTDataset(sft_records(names), model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=model.core.tokens_per_image)
    args = SFTConfig(str(out), **{"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-3,
                                  "dataloader_num_workers": 0, "disable_tqdm": True, "allow_untrained": True, **settings})
    return SFTTrainer(model, args, data)


def dpo_trainer(pictures, out, **settings):
    folder, names = pictures
    model = tiny_model()
    model.add_lora(LoraConfig(r=2, lora_alpha=4), "llm")
    data = DPODataset(dpo_records(names), model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=model.core.tokens_per_image)
    args = DPOConfig(str(out), **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "dataloader_num_workers": 0,
                                  "disable_tqdm": True, "allow_untrained": True, **settings})
    return DPOTrainer(model, args, data, data)


def put_pixel(value):
    def put(trainer):
        trainer.train_dataset._images._pictures._kept["0.png"][1, 14, 14] = value
    return put


def put_weight(name, value, at=0):
    def put(trainer):
        trainer.model.core.tensor(name).numpy()[at, ...] = value
    return put


def put_used_embedding(trainer):
    sample = trainer.train_dataset.sample(0, 0)
    trainer.model.core.tensor("model.embed_tokens.weight").numpy()[sample.input_ids[-1], 3] = np.nan


def put_coefficient(trainer):
    class Objective(SFTObjective):
        def step(self, micro, update, step):
            numbers = super().step(micro, update, step)
            self.model.run.forward(micro.batch, pixels=micro.pixels, train=True)
            self.model.run.backward(np.full(micro.batch.n_targets, np.nan))
            return numbers
    trainer.updater.objective = Objective(trainer.model, trainer.args)


def put_loss(trainer):
    class Objective(SFTObjective):
        def step(self, micro, update, step):
            return super().step(micro, update, step) | {"loss": np.inf}
    trainer.updater.objective = Objective(trainer.model, trainer.args)


def put_gradient(value):
    def put(trainer):
        class Objective(SFTObjective):
            def combine(self, metrics):
                self.model.core.grad.numpy()[trainer.model.trainable_slices()[PROJECTOR].start + 7] = value
                return super().combine(metrics)
        trainer.updater.objective = Objective(trainer.model, trainer.args)
    return put


def put_moment(label, value):
    def put(trainer):
        getattr(trainer.updater, label)[trainer.model.trainable_slices()[ADAPTER].start] = value
    return put


def put_rate(trainer):
    trainer.groups.base_lr[0] = np.inf


MICRO, ALL = 2, 5  # samples that are named
POINTS = {  # what is put where, what the message says, how many samples it names
    "pixel NaN": (put_pixel(np.nan), "NaN or Inf in the pixels of 0.png", MICRO),
    "pixel Inf": (put_pixel(np.inf), "NaN or Inf in the pixels of 0.png", MICRO),
    "tower weight": (put_weight("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", np.inf),
                     "weights model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", MICRO),
    "frozen weight": (put_weight("model.layers.0.mlp.down_proj.weight", np.nan), "weights model.layers.0.mlp.down_proj.weight", MICRO),
    "head": (put_weight("lm_head.weight", -np.inf, at=31999), "weights lm_head.weight", MICRO),
    "embedding row": (put_used_embedding, "weights model.embed_tokens.weight", MICRO),
    "trainable weight": (put_weight(PROJECTOR, np.nan), f"weights {PROJECTOR}", MICRO),
    "adapter weight": (put_weight(ADAPTER, np.inf), f"weights {ADAPTER}", MICRO),
    "activation": (put_weight("model.layers.0.input_layernorm.weight", 3e38, at=slice(None)), "nan of target", MICRO),
    "loss": (put_loss, "the loss is inf", MICRO),
    "loss coefficient": (put_coefficient, "gradient's norm is nan", ALL),
    "gradient NaN": (put_gradient(np.nan), f"gradient's norm is nan: {PROJECTOR}; samples", ALL),
    "gradient Inf": (put_gradient(-np.inf), f"gradient's norm is inf: {PROJECTOR}; samples", ALL),
    "first moment": (put_moment("exp_avg", np.nan), f"optimiser's exp_avg is not finite: {ADAPTER}; samples", ALL),
    "second moment": (put_moment("exp_avg_sq", np.inf), f"optimiser's exp_avg_sq is not finite: {ADAPTER}; samples", ALL),
    "learning rate": (put_rate, "learning rate is inf", ALL),
}


class Put(TrainerCallback):
    """After the first update puts something in, and keeps what the weights and the optimiser were then."""

    def __init__(self, trainer, put):
        self.trainer, self.put = trainer, put
        trainer.callbacks.append(self)

    def state(self):
        updater = self.trainer.updater
        return [updater.model.core.theta.numpy().tobytes(), updater.exp_avg.tobytes(), updater.exp_avg_sq.tobytes(), updater.n_updates]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.put(self.trainer)
            self.before = self.state()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("point", POINTS)
def test_stop(tmp_path, pictures, point):
    put, message, n_named = POINTS[point]
    trainer = sft_trainer(pictures, tmp_path / "out")
    watch = Put(trainer, put)
    with pytest.raises(NumericsError) as caught:
        trainer.train()
    assert str(caught.value).startswith("update 1: ") and message in str(caught.value)
    assert set(caught.value.sample_ids) <= set(FIVE) and 1 <= len(caught.value.sample_ids) <= n_named
    assert n_named == MICRO or sorted(caught.value.sample_ids) == FIVE
    assert "pixel" not in point or "r0" in caught.value.sample_ids
    assert all(name in str(caught.value) for name in caught.value.sample_ids)
    assert watch.state() == watch.before and trainer.state.global_step == 1


@pytest.mark.parametrize("point", POINTS)
def test_skip(tmp_path, pictures, point):
    put, message, _ = POINTS[point]
    trainer = sft_trainer(pictures, tmp_path / "out", nan_policy="skip", save_strategy="steps", save_steps=3)
    watch = Put(trainer, put)
    assert trainer.train().global_step == 3
    first, *left_out = log_of(tmp_path / "out")
    assert first["step"] == 1 and [row["step"] for row in left_out] == [2, 3]
    assert all(message in row["skipped"] and row["sample_ids"] and set(row["sample_ids"]) <= set(FIVE) for row in left_out)
    assert watch.state() == watch.before
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "run_state.json").read_text())
    assert (saved["n_updates"], saved["n_skipped"], saved["n_skipped_in_a_row"]) == (1, 2, 2)


def test_a_gradient_too_large_to_square_is_noticed(tmp_path, pictures):
    """In float32 its square is Inf and would stay in the second moment for good; clipped it is fine."""
    for limit in (0.0, 1.0):
        trainer = sft_trainer(pictures, tmp_path / str(limit), max_grad_norm=limit)
        watch = Put(trainer, put_gradient(1e30))
        if limit:
            trainer.train()
            assert np.isfinite(trainer.updater.exp_avg_sq).all()
        else:
            with pytest.raises(NumericsError, match="update 1: the square of the gradient's norm 1e.30 is beyond float32; set max_grad_norm"):
                trainer.train()
            assert watch.state() == watch.before


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_reference_log_probability(tmp_path, pictures, policy):
    trainer = dpo_trainer(pictures, tmp_path / "out", precompute_ref_log_probs=True, nan_policy=policy)

    def put(trainer):
        trainer.objective.precomputed[1][2, 0] = np.nan

    watch = Put(trainer, put)
    if policy == "stop":
        with pytest.raises(NumericsError, match=r"update 1: preference loss: pair \d .*samples: .*p2"):
            trainer.train()
    else:
        trainer.train()
        assert [row["step"] for row in log_of(tmp_path / "out") if "skipped" in row] == [2, 3]
    assert watch.state() == watch.before


def test_after_a_skipped_update_training_goes_on(tmp_path, pictures):
    """The run is that of a data set without the update: its number counts, its gradient and AdamW's step do not."""
    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            pixels = trainer.train_dataset._images._pictures._kept["0.png"]
            if state.global_step == 1:
                self.kept = pixels.copy()
                pixels[:] = np.nan
            elif state.global_step == 2:
                pixels[:] = self.kept

    trainer = sft_trainer(pictures, tmp_path / "out", nan_policy="skip", max_steps=4)
    trainer.callbacks.append(Once())
    trainer.train()
    assert ["skipped" in row for row in log_of(tmp_path / "out")] == [False, True, False, False]
    assert (trainer.updater.n_updates, trainer.updater.n_skipped, trainer.updater.n_skipped_in_a_row) == (3, 1, 0)
    assert np.isfinite(trainer.model.core.theta.numpy()).all() and np.isfinite(trainer.updater.exp_avg_sq).all()


def test_too_many_in_a_row_stop_the_run_also_over_a_resume(tmp_path, pictures):
    def trainer(**settings):
        made = sft_trainer(pictures, tmp_path / "out", nan_policy="skip", max_skipped=2, max_steps=9, save_strategy="steps", save_steps=2, **settings)
        Put(made, put_pixel(np.nan))
        return made

    with pytest.raises(NumericsError, match="3 updates in a row were left out, more than max_skipped=2; the last: update 3: .*r0") as caught:
        trainer().train()
    assert "r0" in caught.value.sample_ids and [row["step"] for row in log_of(tmp_path / "out")] == [1, 2, 3, 4]
    again = trainer()
    put_pixel(np.nan)(again)
    with pytest.raises(NumericsError, match="3 updates in a row"):  # one before the checkpoint at step 2, two after
        again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in log_of(tmp_path / "out")] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="max_skipped"):
        SFTConfig("out", max_skipped=-1)


def test_an_evaluation_names_its_samples(tmp_path, pictures):
    trainer = sft_trainer(pictures, tmp_path / "out", per_device_eval_batch_size=2)
    put_pixel(np.nan)(trainer)
    with pytest.raises(NumericsError, match="evaluation: .*pixels of 0.png; samples: r0, r1"):
        trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize("when", ["precomputed", "evaluation"])
def test_pairs_are_named_too(tmp_path, pictures, when):
    trainer = dpo_trainer(pictures, tmp_path / "out", precompute_ref_log_probs=when == "precomputed", per_device_train_batch_size=1)
    put_pixel(np.nan)(trainer)
    with pytest.raises(NumericsError, match="pixels of 0.png; samples: p0") as caught:
        trainer.train() if when == "precomputed" else trainer.evaluate()
    assert caught.value.sample_ids == (["p0"] if when == "precomputed" else ["p0", "p1", "p2", "p3"])
