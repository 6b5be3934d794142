"""Training scripts written for TRL and transformers, import lines changed: paths, rows, adapters' settings, their configurations and methods."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from tiny import dpo_records, sft_records, tiny_model, write_pictures

from stllava import DPOConfig, DPOTrainer, LlavaModel, LoraConfig, SFTConfig, SFTTrainer, TrainerCallback
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.errors import ConfigError
from stllava.model.builder import load_pretrained_model
from stllava.train import arguments

FEW = dict(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, disable_tqdm=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script") / "llava-v1.5-tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def names(tmp_path):
    return write_pictures(tmp_path)


def preferences(names, form):
    """The pairs of `dpo_records` as TRL's rows."""
    rows = []
    for i, name in enumerate(names):
        prompt, chosen, rejected = "What is it?", f"It is thing {i}.", "I do not know, maybe nothing."
        if form == "plain":
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": [name]})
        else:
            def said(role, text, *parts):
                return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]
            rows.append({"prompt": said("user", prompt, {"type": "image"}), "chosen": said("assistant", chosen), "rejected": said("assistant", rejected),
                         "images": [name]})
    return rows


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("form", ["plain", "conversational"])
def test_a_dpo_script_of_trl(checkpoint, names, tmp_path, form):
    # the script
    model = LlavaModel.from_pretrained(checkpoint)
    with pytest.warns(UserWarning) as told:
        args = DPOConfig(output_dir=str(tmp_path / "out"), bf16=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
                         remove_unused_columns=False, dataset_num_proc=4, max_length=None, max_prompt_length=512, beta=0.5, logging_steps=1, **FEW)
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    trainer = DPOTrainer(model, ref_model=None, args=args, train_dataset=preferences(names, form), eval_dataset=preferences(names[:2], form),
                         processing_class=model.tokenizer, peft_config=peft_config, data_collator=None, image_folder=tmp_path)
    result = trainer.train()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model(str(tmp_path / "saved"))
    # the same in our words
    ours = LlavaModel.from_pretrained(checkpoint)
    ours.add_lora(LoraConfig(r=4, lora_alpha=8, target_modules=frozenset({"q_proj", "v_proj"})), "llm", seed=args.seed)
    data = DPODataset(dpo_records(names), ours.tokenizer, ours.image_processor, image_folder=tmp_path, max_length=None,
                      tokens_per_image=ours.core.tokens_per_image)
    other = DPOTrainer(ours, arguments.DPOConfig(str(tmp_path / "other"), beta=0.5, **FEW), data, trainable=list(ours.lora_tensors()))
    other.train()
    assert losses(trainer) == losses(other) and np.array_equal(trainer.model.theta, ours.theta) and trainer.model.trainable == ours.trainable
    assert [str(warning.message).split(" has no effect")[0] for warning in told] == [
        "bf16 True", "gradient_checkpointing_kwargs {'use_reentrant': False}", "remove_unused_columns False", "dataset_num_proc 4",
        "max_prompt_length 512"]
    saved = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert saved == {**result.metrics, **metrics} and "rewards/accuracies" in " ".join(metrics)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 2
    assert LlavaModel.from_pretrained(tmp_path / "saved", checkpoint).lora.keys() == {"llm"}


def test_an_sft_script_on_a_path(checkpoint, names, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is in picture {i}?"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": f"Thing number {i}."}]}], "images": [name]}
            for i, name in enumerate(names)]
    seen = []

    class Told(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            seen.append(kwargs["logs"]["loss"])

    trainer = SFTTrainer(str(checkpoint), SFTConfig(str(tmp_path / "out"), max_length=512, **FEW), train_dataset=iter(rows), eval_dataset=rows,
                         callbacks=[Told], image_folder=tmp_path, compute_metrics=lambda trainer: {"eval_two": 2.0}, optimizers=(None, None))
    result = trainer.train()
    trainer.log_metrics("train", {"train_loss": result.training_loss, "steps": 2})
    assert capsys.readouterr().out.splitlines() == ["***** train metrics *****", "  steps      = 2", f"  train_loss = {result.training_loss:.6g}"]
    records = [{"image": name, "conversations": [{"from": "human", "value": f"<image>\nWhat is in picture {i}?"},
                                                 {"from": "gpt", "value": f"Thing number {i}."}]} for i, name in enumerate(names)]
    ours = LlavaModel.from_pretrained(checkpoint)
    data = SFTDataset(records, ours.tokenizer, ours.image_processor, image_folder=tmp_path, template="v1", tokens_per_image=ours.core.tokens_per_image)
    other = SFTTrainer(ours, arguments.SFTConfig(str(tmp_path / "other"), **FEW), data, data)
    other.train()
    assert losses(trainer) == losses(other) == seen and np.array_equal(trainer.model.theta, ours.theta)
    metrics = trainer.evaluate(eval_dataset=records)
    assert metrics == {**other.evaluate(), "eval_two": 2.0}
    assert trainer.is_world_process_zero() and trainer.processing_class is trainer.tokenizer is trainer.model.tokenizer


def test_a_file_and_what_load_pretrained_model_gives(checkpoint, names, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(sft_records(names)), encoding="utf-8")
    tokenizer, model, _, _ = load_pretrained_model(checkpoint, return_tensors="np")
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, args=SFTConfig(str(tmp_path / "out"), **FEW), train_dataset=str(tmp_path / "data.json"),
                         image_folder=tmp_path, template="v1_sq", callbacks=None)
    assert trainer.train().global_step == 2 and trainer.model is model.ours
    assert trainer.train_dataset.template.name == "v1_sq" and trainer.train_dataset.sq_r == 0.5


def test_rows_with_pictures_in_memory(checkpoint, names, tmp_path):
    """As a script has them that opens them itself, or as `datasets` decodes them: in a field, or in the part of a message where they stand."""
    def rows(picture, in_part):
        part = {"type": "image", "image": picture} if in_part else {"type": "image"}
        return [{"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A thing."}],
                 **({} if in_part else {"images": [picture]})}]

    thetas = []
    for data, folder in ((rows(names[0], False), tmp_path), (rows(Image.open(tmp_path / names[0]), False), None),
                         (rows(Image.open(tmp_path / names[0]), True), None)):
        trainer = SFTTrainer(str(checkpoint), SFTConfig(str(tmp_path / f"out{len(thetas)}"), **{**FEW, "per_device_train_batch_size": 1}), data,
                             image_folder=folder)
        trainer.train()
        thetas.append(np.array(trainer.model.theta))
    assert np.array_equal(thetas[0], thetas[1]) and np.array_equal(thetas[0], thetas[2])


def test_adapters_of_modules_to_save_train_too(checkpoint, names, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mm_projector"])
    trainer = DPOTrainer(str(checkpoint), args=DPOConfig(str(tmp_path / "out"), **FEW), train_dataset=dpo_records(names), peft_config=config,
                         image_folder=tmp_path)
    assert {name.split(".")[1] for name in trainer.model.trainable} == {"layers", "mm_projector"}


def test_pefts_own_settings_are_read(checkpoint, names, tmp_path):
    """An object with peft's `to_dict`: sets, enumerations, keys of newer versions."""
    class Kind(str):
        value = "LORA"

    class Peft:
        def to_dict(self):
            return {"peft_type": Kind("LORA"), "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": {"q_proj", "v_proj"},
                    "inference_mode": False, "init_lora_weights": True, "bias": "none", "use_rslora": True}

    trainer = DPOTrainer(str(checkpoint), args=DPOConfig(str(tmp_path / "out"), **FEW), train_dataset=dpo_records(names), peft_config=Peft(),
                         image_folder=tmp_path)
    assert trainer.model.lora["llm"].use_rslora and trainer.model.lora["llm"].r == 4
    with pytest.raises(ConfigError, match="peft_config is a int, want a LoraConfig"):
        DPOTrainer(str(checkpoint), args=DPOConfig(str(tmp_path / "out"), **FEW), train_dataset=dpo_records(names), peft_config=3)


@pytest.mark.parametrize("argument", ["ref_model", "data_collator", "optimizers", "formatting_func", "quantization_config", "model_init"])
def test_arguments_without_their_meaning_are_refused(argument, tmp_path):
    with pytest.raises(ConfigError, match=f"^{argument} is given: .*(leave it out|torch_adapter|give|nothing is quantised)"):
        DPOTrainer(tiny_model(), args=DPOConfig(str(tmp_path)), train_dataset=[], **{argument: (object(), object())})


def test_other_mistakes(tmp_path, names):
    with pytest.raises(TypeError, match="no argument 'lr'"):
        SFTTrainer(tiny_model(), SFTConfig(str(tmp_path)), [], lr=1)
    with pytest.raises(ConfigError, match="model is a dict, want a LlavaModel"):
        SFTTrainer({}, SFTConfig(str(tmp_path)), [])
    with pytest.raises(ConfigError, match="dictionary of train, test; give one of them"):
        SFTTrainer(tiny_model(), SFTConfig(str(tmp_path)), {"train": [], "test": []})
    with pytest.raises(ConfigError, match="there is no train_dataset"):
        SFTTrainer(tiny_model(), SFTConfig(str(tmp_path)))
    trainer = SFTTrainer(tiny_model(), SFTConfig(str(tmp_path)), sft_records(names), image_folder=tmp_path)
    with pytest.raises(ConfigError, match="pass eval_dataset"):
        trainer.evaluate()


def test_settings_of_trl_and_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DPOConfig().output_dir == "trainer_output" and DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1]).loss_types == ("sigmoid", "sft")
        assert SFTConfig(activation_checkpointing=True).gradient_checkpointing
        assert "max_length" not in arguments.DPOConfig.__dataclass_fields__
    for settings, message in (({"sync_ref_model": True}, "moving reference"), ({"ld_alpha": 0.5}, "LD-DPO"), ({"fp16": True}, "loss scaling"),
                              ({"generate_during_eval": True}, "on_evaluate")):
        with pytest.raises(ConfigError, match=message):
            DPOConfig("out", **settings)
    with pytest.raises(TypeError, match="DPOConfig has no setting 'learning_rat'; did you mean 'learning_rate'"):
        DPOConfig("out", learning_rat=1)
    with pytest.warns(UserWarning, match="packing True has no effect: sequences are packed"):
        assert SFTConfig("out", packing=True).max_length == 2048
