"""Training end to end on a tiny model: it learns, resumes bit for bit, guards what does not train, refuses bad data before the first update."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import dpo_records, sft_records, tiny_model, write_pictures

import stllava_c
from stllava.checkpoint.peft import LoraConfig
from stllava.data.dpo import DPODataset
from stllava.data.records import DataError
from stllava.data.sft import SFTDataset, summary
from stllava.errors import ConfigError
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.callbacks import TrainerCallback
from stllava.train.dpo import DPOTrainer
from stllava.train.guard import UntrainedError
from stllava.train.sft import SFTTrainer


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images", write_pictures(tmp_path / "images")


def with_adapters(dtype="f32", dropout=0.0):
    model = tiny_model(dtype)
    model.add_lora(LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout), "llm")
    model.add_lora(LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, use_dora=dropout > 0), "vit")
    return model


def sft_data(model, pictures, records=None, **kw):
    folder, names = pictures
    return SFTDataset(sft_records(names) if records is None else records, model.tokenizer, model.image_processor, image_folder=folder,
                      tokens_per_image=model.core.tokens_per_image, **kw)


def sft_args(folder, **kw):
    return SFTConfig(str(folder), **{"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
                                     "mm_projector_lr": 1e-3, "vision_tower_lr": 2e-3, "warmup_steps": 1, "disable_tqdm": True, **kw})


def dpo_trainer(model, pictures, folder, **kw):
    image_folder, names = pictures
    data = DPODataset(dpo_records(names), model.tokenizer, model.image_processor, image_folder=image_folder,
                      tokens_per_image=model.core.tokens_per_image)
    return DPOTrainer(model, DPOConfig(str(folder), **{"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "disable_tqdm": True, **kw}),
                      data, data)


def weights(model):
    return np.array(model.core.theta.numpy())


def test_sft_learns_and_logs(tmp_path, pictures):
    model = with_adapters()
    trainer = SFTTrainer(model, sft_args(tmp_path / "out", max_steps=12, warmup_steps=2), sft_data(model, pictures))
    result = trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert result.global_step == 12 == len(rows) and rows == trainer.state.log_history
    assert rows[0]["learning_rate"] == 0 and {"loss", "grad_norm", "epoch", "step", "num_tokens"} <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_tower_adapters_train(tmp_path, pictures):
    """Spec D1: in the original B of the tower's adapters stays 0 forever."""
    model = with_adapters()
    before = {name: np.array(a) for name, a in model.lora_tensors().items()}
    SFTTrainer(model, sft_args(tmp_path / "out", max_steps=2), sft_data(model, pictures)).train()
    moved = {name for name, a in model.lora_tensors().items() if ".lora_B." in name and np.abs(a).max() > 0}
    assert {name for name in before if ".lora_B." in name and "encoder.layers.0" in name} <= moved
    assert not any("encoder.layers.2" in name for name in before)  # behind the feature layer: none attached (D2)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resume_is_bit_identical(tmp_path, pictures, kind, dropout):
    def trainer(folder, **kw):
        model = with_adapters(dropout=dropout)
        if kind == "sft":
            return SFTTrainer(model, sft_args(folder, save_strategy="steps", save_steps=3, **kw), sft_data(model, pictures))
        return dpo_trainer(model, pictures, folder, save_strategy="steps", save_steps=3, disable_dropout=False, **kw)

    whole = trainer(tmp_path / "whole")
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    broken = trainer(tmp_path / "broken")
    broken.callbacks.append(Stop())
    broken.train()
    again = trainer(tmp_path / "broken")
    assert again.train(resume_from_checkpoint=True).global_step == 6
    np.testing.assert_array_equal(weights(whole.model), weights(again.model))
    np.testing.assert_array_equal(whole.updater.exp_avg_sq, again.updater.exp_avg_sq)
    assert (tmp_path / "whole" / "log.jsonl").read_bytes() == (tmp_path / "broken" / "log.jsonl").read_bytes()


def test_a_resume_between_two_log_lines_logs_the_whole_window(tmp_path, pictures):
    def train(folder, stop=0, resume=None):
        model = with_adapters()
        trainer = SFTTrainer(model, sft_args(folder, max_steps=7, save_strategy="steps", save_steps=2, logging_steps=3, dataloader_num_workers=0),
                             sft_data(model, pictures))

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop
        trainer.callbacks.append(Stop())
        return trainer.train(resume_from_checkpoint=resume)

    whole = train(tmp_path / "whole")
    train(tmp_path / "broken", stop=5)
    assert train(tmp_path / "broken", resume=True).training_loss == whole.training_loss
    assert (tmp_path / "whole" / "log.jsonl").read_bytes() == (tmp_path / "broken" / "log.jsonl").read_bytes()


def test_a_resumed_run_may_miss_the_updates_in_which_a_tensor_trained(tmp_path, pictures):
    """The projector trains in updates 0 to 2; the guard's patience ends after update 4, and a run resumed at 3 saw only text."""
    _folder, names = pictures
    text = sft_records(names)[-1]
    records = [*sft_records(names)[:3], text, {**text, "id": "text 2"}, {**text, "id": "text 3"}]

    def trainer(**kw):
        model = tiny_model()
        args = sft_args(tmp_path / "out", per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=6, shuffle=False, save_strategy="steps",
                        save_steps=3, **kw)
        return SFTTrainer(model, args, sft_data(model, pictures, records), trainable=["model.norm.weight", "model.mm_projector.f.weight"])

    trainer().train()
    (tmp_path / "out" / "checkpoint-6" / "manifest.json").unlink()
    assert trainer().train(resume_from_checkpoint=True).global_step == 6


def test_resume_refuses_another_runs_checkpoint(tmp_path, pictures):
    model = with_adapters()
    SFTTrainer(model, sft_args(tmp_path, save_strategy="steps", save_steps=3), sft_data(model, pictures)).train()
    other = with_adapters()
    with pytest.raises(ConfigError, match="plan differs"):
        SFTTrainer(other, sft_args(tmp_path, gradient_accumulation_steps=1), sft_data(other, pictures)).train(resume_from_checkpoint=True)


def test_results_do_not_depend_on_threads_or_sharing(tmp_path, pictures):
    before = stllava_c.get_num_threads()
    results = {}
    try:
        for threads, share in ((1, True), (2, True), (1, False)):
            stllava_c.set_num_threads(threads)
            model = with_adapters("f64")
            SFTTrainer(model, sft_args(tmp_path / f"{threads}{share}", share_prefixes=share), sft_data(model, pictures)).train()
            results[threads, share] = weights(model)
    finally:
        stllava_c.set_num_threads(before)
    np.testing.assert_array_equal(results[1, True], results[2, True])
    np.testing.assert_allclose(results[1, True], results[1, False], atol=1e-9)


def test_gradient_checkpointing_changes_nothing(tmp_path, pictures):
    results = []
    for flag in (False, True):
        model = with_adapters()
        SFTTrainer(model, sft_args(tmp_path / str(flag), gradient_checkpointing=flag), sft_data(model, pictures)).train()
        results.append(weights(model))
    np.testing.assert_array_equal(*results)


def test_first_dpo_step_is_ln2(tmp_path, pictures):
    model = with_adapters()
    trainer = dpo_trainer(model, pictures, tmp_path / "out")
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0
    assert last["loss"] < first["loss"] and last["rewards/accuracies"] == 1
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 1 and metrics["eval_loss"] < np.log(2)


def test_reference_does_not_move(tmp_path, pictures):
    """Spec D3: reference log-probs are the same before and after training; precomputed ones give the same run."""
    logged = []
    for precompute in (False, True):
        model = with_adapters()
        trainer = dpo_trainer(model, pictures, tmp_path / str(precompute), precompute_ref_log_probs=precompute)
        micro = trainer.objective.collate(trainer.train_dataset, [(i, 0) for i in range(4)])
        before = trainer.objective._reference(micro, None)
        trainer.train()
        np.testing.assert_allclose(before, trainer.objective._reference(micro, None), rtol=0, atol=0)
        logged.append([row["loss"] for row in trainer.state.log_history])
    assert logged[0] == logged[1]


def test_guard_names_tensors_without_gradient(tmp_path, pictures):
    model = tiny_model()
    text_only = [sft_records(pictures[1])[-1]]
    args = sft_args(tmp_path / "out", per_device_train_batch_size=1)
    with pytest.raises(UntrainedError, match="received no gradient: model.mm_projector"):
        SFTTrainer(model, args, sft_data(model, pictures, text_only), trainable=["model.norm.weight", "model.mm_projector.f.weight"]).train()
    args.allow_untrained = True
    model = tiny_model()
    SFTTrainer(model, args, sft_data(model, pictures, text_only), trainable=["model.norm.weight", "model.mm_projector.f.weight"]).train()


BAD = {
    "roles": ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "want 'gpt'"),
    "empty": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, "empty"),
    "marker": ({"image": "0.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "0 <image> markers for 1 images"),
    "missing": ({"image": "none.png", "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]}, "none.png"),
    "truncated": ({"image": "cut.png", "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]}, "cut.png"),
    "key": ({"image": "0.png"}, "'conversations' is missing"),
    "long": ({"conversations": [{"from": "human", "value": "word " * 400}, {"from": "gpt", "value": "b"}]}, "no target is left"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_records_are_listed_before_the_first_update(pictures, kind):
    folder, names = pictures
    (folder / "cut.png").write_bytes((folder / names[0]).read_bytes()[:200])
    record, message = BAD[kind]
    model = tiny_model()
    records = [*sft_records(names), {"id": "bad", **record}]
    with pytest.raises(DataError, match=r"1 of 6 records") as caught:
        sft_data(model, pictures, records, max_length=200)
    assert "row 5 (id bad): " in str(caught.value) and message in str(caught.value)
    skipped = sft_data(model, pictures, records, max_length=200, on_bad_sample="skip")
    assert len(skipped) == 5 and sum(summary(skipped.problems).values()) == 1


@pytest.mark.parametrize("change, message", [
    (lambda r: r["reject_conversations"][0].update(value="<image>\nAnother?"), "prompts of chosen and rejected differ"),
    (lambda r: r["reject_conversations"][1].update(value=r["chosen_conversations"][1]["value"]), "the same answer"),
    (lambda r: r.pop("reject_conversations"), "'reject_conversations' is missing"),
    (lambda r: r["chosen_conversations"][1].update(value=""), "empty"),
])
def test_bad_pairs(pictures, change, message):
    folder, names = pictures
    model = tiny_model()
    records = dpo_records(names)
    change(records[2])
    with pytest.raises(DataError, match=message):
        DPODataset(records, model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=16)
    assert len(DPODataset(records, model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=16, on_bad_sample="skip")) == 3


def test_judge_records_and_aliases_are_read(pictures):
    folder, names = pictures
    model = tiny_model()
    records = [{"q": "What?", "img": names[0], "p": "yes", "r": "no"}, dpo_records(names)[1]]
    records[1]["rejected_conversations"] = records[1].pop("reject_conversations")
    data = DPODataset(records, model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=16)
    assert len(data) == 2 and data.pair(0, 0)[0].images == (names[0],)


def test_questions_switch_anew_in_every_epoch_and_reproducibly(pictures):
    model = tiny_model()
    data = sft_data(model, pictures, sq_r=0.5, seed=3)
    labels = [[data.sample(row, epoch).labels for row in range(4)] for epoch in range(6)]
    assert labels == [[sft_data(model, pictures, sq_r=0.5, seed=3).sample(row, epoch).labels for row in range(4)] for epoch in range(6)]
    assert any(labels[0] != later for later in labels[1:])


def test_unwritable_output_directory(tmp_path, pictures):
    (tmp_path / "file").write_text("x")
    model = with_adapters()
    with pytest.raises(OSError):
        SFTTrainer(model, sft_args(tmp_path / "file" / "out"), sft_data(model, pictures)).train()


@pytest.mark.parametrize("setting, value", [("learning_rate", -1), ("lr_scheduler_type", "greedy"), ("per_device_train_batch_size", 0),
                                            ("loss_reduction", "sum"), ("adam_beta2", 1.0), ("nan_policy", "ignore"), ("optim", "sgd"),
                                            ("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0), ("push_to_hub", True), ("report_to", "comet_ml"),
                                            ("save_steps", 0), ("early_stopping_patience", 0), ("logging_strategy", "best")])
def test_settings_are_checked(setting, value):
    with pytest.raises(ConfigError, match=setting):
        SFTConfig("out", **{setting: value})


@pytest.mark.parametrize("settings, message", [
    ({"load_best_model_at_end": True}, "need evaluations"), ({"early_stopping_patience": 2}, "need evaluations"), ({"save_strategy": "best"}, "need eval"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"}, "must be saved"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 3, "eval_steps": 2}, "not a multiple"),
    ({"evaluation_strategy": "epoch", "eval_strategy": "steps"}, "one setting"), ({"group_by_length": True, "group_by_modality_length": True}, "exclude")])
def test_settings_that_contradict(settings, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig("out", **settings)


def test_settings_that_follow_from_others():
    """Rules of transformers.TrainingArguments.__post_init__."""
    args = SFTConfig("out", evaluation_strategy="steps", save_strategy="steps", load_best_model_at_end=True, logging_steps=5, save_steps=10)
    assert (args.eval_strategy, args.eval_steps, args.metric_for_best_model, args.greater_is_better) == ("steps", 5, "loss", False)
    assert SFTConfig("out", metric_for_best_model="eval_accuracy").greater_is_better is True
    assert [SFTConfig("out", hf_compat=version).loss_reduction for version in ("4.31", "latest")] == ["micro_mean", "token_mean"]
    assert DPOConfig("out").loss_reduction == "micro_mean"
    strategies = [SFTConfig("out", train_sampling_strategy=name) for name in ("random", "sequential", "group_by_length")]
    assert [(args.shuffle, args.group_by_length) for args in strategies] == [(True, False), (False, False), (True, True)]
    assert SFTConfig("out", report_to="all").report_to == ["tensorboard", "wandb"] and SFTConfig("out", report_to=["none"]).report_to == []
    args = SFTConfig("out", warmup_steps=0.25, logging_steps=0.1, save_steps=7)
    assert (args.n_warmup(10), args.steps_of("logging_steps", 95), args.steps_of("save_steps", 95)) == (3, 10, 7)
    assert SFTConfig("out", warmup_ratio=0.03).n_warmup(101) == 4 and SFTConfig("out", warmup_ratio=0.03, warmup_steps=2).n_warmup(101) == 2


def test_dpo_settings_are_checked():
    for options, message in (({"loss_type": "dpo"}, "loss_type"), ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
                             ({"precompute_ref_log_probs": True, "ref_image_features": "policy"}, "precompute")):
        with pytest.raises(ConfigError, match=message):
            DPOConfig("out", **options)
