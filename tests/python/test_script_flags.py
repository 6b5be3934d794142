"""Every flag of the original's scripts and data classes, and transformers': what each spelling means, and what is said of those without effect."""

from __future__ import annotations

import json
import shlex

import pytest
from original_scripts import ZERO3

from stllava.cli import main, train
from stllava.cli.flags import flags_of
from stllava.cli.help_texts import HELP
from stllava.errors import ConfigError
from stllava.train.deepspeed import apply_deepspeed
from stllava.train.no_effect import NO_EFFECT
from stllava.train.resolve import ORIGINAL, STAGES, resolve
from stllava.train.schedule import Schedule

NEEDED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]


@pytest.fixture
def settings(monkeypatch, capsys):
    """words -> (the settings that `stllava sft|dpo` would run with, the lines on stderr)"""
    def resolved(*words: str, stage: str = "sft"):
        found = []
        monkeypatch.setattr(train, "_train", lambda settings, command: found.append(settings) or {"printed": {}})
        assert main([stage, *NEEDED, *words]) == 0
        return found[0], capsys.readouterr().err.splitlines()
    return resolved


# ---- the flags of notes/training.md 1a and 1b, with what they set ----------------------------------------------------------------

TABLE = [
    ("--lora_enable True", "model.lora_enable", True), ("--lora_r 128", "model.lora_r", 128), ("--lora_alpha 256", "model.lora_alpha", 256),
    ("--lora_dropout 0.1", "model.lora_dropout", 0.1), ("--lora_bias all", "model.lora_bias", "all"), ("--mm_projector_lr 2e-5", "training.mm_projector_lr", 2e-5),
    ("--vision_tower_lr 5e-5", "training.vision_tower_lr", 5e-5), ("--vit_lora_enable", "model.vit_lora_enable", True),
    ("--lora_r_vit 32", "model.lora_r_vit", 32), ("--lora_alpha_vit 64", "model.lora_alpha_vit", 64), ("--version v0", "data.version", "v0"),
    ("--data_path x.json", "data.data_path", "x.json"), ("--image_folder i", "data.image_folder", "i"), ("--vision_tower t", "model.vision_tower", "t"),
    ("--pretrain_mm_mlp_adapter p.bin", "model.pretrain_mm_mlp_adapter", "p.bin"), ("--mm_projector_type mlp2x_gelu", "model.mm_projector_type", "mlp2x_gelu"),
    ("--mm_vision_select_layer -2", "model.mm_vision_select_layer", -2), ("--mm_vision_select_feature cls_patch", "model.mm_vision_select_feature", "cls_patch"),
    ("--mm_use_im_start_end False", "model.mm_use_im_start_end", False), ("--mm_use_im_patch_token False", "model.mm_use_im_patch_token", False),
    ("--image_aspect_ratio pad", "data.image_aspect_ratio", "pad"), ("--group_by_modality_length True", "training.group_by_modality_length", True),
    ("--output_dir out", "training.output_dir", "out"), ("--num_train_epochs 3", "training.num_train_epochs", 3.0),
    ("--per_device_train_batch_size 8", "training.per_device_train_batch_size", 8), ("--per_device_eval_batch_size 6", "training.per_device_eval_batch_size", 6),
    ("--gradient_accumulation_steps 4", "training.gradient_accumulation_steps", 4), ("--evaluation_strategy no", "training.eval_strategy", "no"),
    ("--eval_strategy no", "training.eval_strategy", "no"), ("--save_strategy steps", "training.save_strategy", "steps"),
    ("--save_steps 50000", "training.save_steps", 50000), ("--save_total_limit 2", "training.save_total_limit", 2),
    ("--learning_rate 2e-4", "training.learning_rate", 2e-4), ("--weight_decay 0.", "training.weight_decay", 0.0),
    ("--warmup_ratio 0.03", "training.warmup_ratio", 0.03), ("--warmup_steps 10", "training.warmup_steps", 10),
    ("--lr_scheduler_type linear", "training.lr_scheduler_type", "linear"), ("--logging_steps 5", "training.logging_steps", 5),
    ("--report_to none", "training.report_to", []), ("--report_to wandb tensorboard", "training.report_to", ["wandb", "tensorboard"]),
    ("--model_max_length 1024", "data.model_max_length", 1024), ("--gradient_checkpointing True", "training.gradient_checkpointing", True),
    ("--dataloader_num_workers 8", "training.dataloader_num_workers", 8), ("--sq_r 0.25", "data.sq_r", 0.25), ("--data_aug False", "data.data_aug", False),
    ("--freeze_backbone", "model.freeze_backbone", True), ("--tune_mm_mlp_adapter True", "model.tune_mm_mlp_adapter", True),
    ("--freeze_mm_mlp_adapter yes", "model.freeze_mm_mlp_adapter", True), ("--num_latents 128", "model.num_latents", 128),
    ("--image_grid_pinpoints x", "data.image_grid_pinpoints", "x"), ("--qav_loss True", "model.qav_loss", True), ("--loss_alpha 0.3", "model.loss_alpha", 0.3),
    ("--pretrain_lora l.bin", "model.pretrain_lora", "l.bin"), ("--bits 16", "model.bits", 16), ("--quant_type fp4", "model.quant_type", "fp4"),
    ("--optim adamw_torch", "training.optim", "adamw_torch"), ("--adam_beta1 0.8", "training.adam_beta1", 0.8), ("--adam_beta2 0.9", "training.adam_beta2", 0.9),
    ("--adam_epsilon 1e-6", "training.adam_epsilon", 1e-6), ("--max_grad_norm 0.5", "training.max_grad_norm", 0.5), ("--max_steps 7", "training.max_steps", 7),
    ("--seed 1", "training.seed", 1), ("--data_seed 2", "training.data_seed", 2), ("--logging_dir l", "training.logging_dir", "l"),
    ("--run_name r", "training.run_name", "r"), ("--resume_from_checkpoint auto", "training.resume_from_checkpoint", "auto"),
    ("--dataloader_drop_last", "training.dataloader_drop_last", True), ("--save_safetensors", "training.save_safetensors", True),
    ("--group_by_length 1", "training.group_by_length", True), ("--label_smoothing_factor 0", "training.label_smoothing_factor", 0.0),
    ("--hf_compat 4.31", "training.loss_reduction", "micro_mean"), ("--hf_compat latest", "training.loss_reduction", "token_mean"),
    # spellings
    ("--double_quant", "model.double_quant", True), ("--no_double_quant", "model.double_quant", False), ("--double_quant FALSE", "model.double_quant", False),
    ("--no-share-prefixes", "training.share_prefixes", False), ("--lora-enable=Yes", "model.lora_enable", True), ("--lora_enable 0", "model.lora_enable", False),
    ("--model_path x", "model.model_name_or_path", "x"), ("--learning-rate=1E-4", "training.learning_rate", 1e-4), ("--seed 1 --seed 2", "training.seed", 2)]


@pytest.mark.parametrize("words, where, value", TABLE, ids=[row[0] for row in TABLE])
def test_a_flag_sets_its_field(words, where, value, settings):
    found, _ = settings(*words.split())
    part, name = where.split(".")
    assert getattr(getattr(found, part), name) == value


def test_every_flag_has_a_help_text(capsys):
    for stage in STAGES:
        lacking = [flag.name for flag in train.script_flags(stage) if flag.name not in HELP and flag.name not in NO_EFFECT]
        assert not lacking
        with pytest.raises(SystemExit, match="0"):
            main([stage, "--help"])
        assert "--mm_projector_lr" in capsys.readouterr().out


def test_defaults_of_the_two_stages(settings):
    sft, dpo = settings()[0], settings(stage="dpo")[0]
    assert (sft.data.version, dpo.data.version, sft.training.learning_rate, dpo.training.learning_rate) == ("v1_sq", "v1", 2e-4, 5e-6)


# ---- without effect --------------------------------------------------------------------------------------------------------------

VALUES = {bool: "True", int: "1", float: "1.0", str: "x"}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_flag_without_effect_says_what_happens_instead(name, settings, capsys):
    entry = NO_EFFECT[name]
    words = [f"--{name}", {"quant_type": "nf4"}.get(name) or str(entry.only[0] if entry.only else VALUES[entry.kind])]
    if entry.only != ("none",):
        found, said = settings(*words)
        assert len(said) == 1 and said[0].startswith(f"stllava sft: {name} {words[1]} has no effect: ") and entry.instead in said[0]
        assert found.training == settings()[0].training
    if entry.only:
        other = "True" if entry.kind is bool else "7"
        assert main(["sft", *NEEDED, f"--{name}", other]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and entry.advice in error and name in error and (not entry.secret or f" {other}" not in error)


def test_what_has_an_effect_is_not_in_the_table():
    assert not NO_EFFECT.keys() & {flag.name for stage in STAGES.values() for flag in flags_of(stage)}


TRANSFORMERS = shlex.split("""output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy prediction_loss_only per_device_train_batch_size
    per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size gradient_accumulation_steps eval_accumulation_steps eval_delay learning_rate
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type warmup_ratio warmup_steps log_level
    log_level_replica log_on_each_node logging_dir logging_strategy logging_first_step logging_steps logging_nan_inf_filter save_strategy save_steps
    save_total_limit save_safetensors save_on_each_node no_cuda use_mps_device seed data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level
    half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug dataloader_drop_last eval_steps
    dataloader_num_workers past_index run_name disable_tqdm remove_unused_columns label_names load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip sharded_ddp fsdp fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap deepspeed
    label_smoothing_factor optim optim_args adafactor group_by_length length_column_name report_to ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers dataloader_pin_memory skip_memory_metrics use_legacy_prediction_loop push_to_hub resume_from_checkpoint hub_model_id
    hub_strategy hub_token hub_private_repo gradient_checkpointing include_inputs_for_metrics fp16_backend push_to_hub_model_id
    push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size full_determinism torchdynamo ray_scope ddp_timeout torch_compile
    torch_compile_backend torch_compile_mode xpu_backend
    lr_scheduler_kwargs neftune_noise_alpha eval_strategy accelerator_config gradient_checkpointing_kwargs torch_empty_cache_steps use_cpu
    include_for_metrics batch_eval_metrics eval_on_start use_liger_kernel liger_kernel_config average_tokens_across_devices parallelism_config
    save_only_model restore_callback_states_from_checkpoint dataloader_persistent_workers dataloader_prefetch_factor train_sampling_strategy
    eval_do_concat_batches eval_use_gather_object project trackio_space_id hub_always_push hub_revision use_cache""")


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_transformers_is_known(stage):
    """Those of 4.31 and, in the last rows, of 5."""
    assert not set(TRANSFORMERS) - {flag.name for flag in train.script_flags(stage)}


# ---- the original's quirks -------------------------------------------------------------------------------------------------------


def test_original_compat_is_printed_and_each_of_it_wins_by_itself(settings):
    for stage in STAGES:
        found, said = settings("--original_compat", stage=stage)
        assert len(said) == 1 and all(f"{name} {value}" in said[0] for name, value in ORIGINAL[stage].items())
        assert all(getattr(found.training, name) == value for name, value in ORIGINAL[stage].items())
    found, said = settings("--original_compat", "--vit_grad", "--ref_image_features", "initial", stage="dpo")
    assert found.training.vit_grad and found.training.ref_image_features == "initial" and "vit_grad" not in said[0]
    assert resolve("dpo", found.given).training == found.training  # what a record keeps is enough


def test_what_differs_from_the_original_in_dpo_is_said(settings):
    assert "the original's way is disable_dropout False" in settings("--lora_enable", stage="dpo")[1][0]
    assert settings("--lora_enable", "--disable_dropout", "False", stage="dpo")[1] == settings("--lora_enable")[1] == []
    assert "sq_r has no effect" in settings("--sq_r", "0.3", stage="dpo")[1][0]


# ---- DeepSpeed's file ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def deepspeed(tmp_path, settings):
    def resolved(content, *words, **options):
        (tmp_path / "ds.json").write_text(json.dumps(content))
        return settings("--deepspeed", str(tmp_path / "ds.json"), *words, **options)
    return resolved


def test_the_mapping_is_printed(deepspeed):
    found, said = deepspeed({**ZERO3, "gradient_clipping": 0.3, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10})
    assert found.training.max_grad_norm == 0.3 and found.training.per_device_train_batch_size == 4
    assert [line.split("ds.json: ")[1] for line in said[:2]] == ["train_micro_batch_size_per_gpu -> per_device_train_batch_size 4",
                                                               "gradient_clipping -> max_grad_norm 0.3"]
    assert len(said) == 3 and "without effect in one process: fp16 (off), bf16 (off), zero_optimization (stage 3" in said[2]
    assert said[2].endswith("steps_per_print")


@pytest.mark.parametrize("content, words, clipping", [
    ({}, [], 1.0), ({}, ["--hf_compat", "4.31"], 0.0), ({}, ["--hf_compat", "4.31", "--max_grad_norm", "2"], 2.0),
    ({"gradient_clipping": "auto"}, ["--hf_compat", "4.31"], 1.0), ({"gradient_clipping": "auto"}, ["--max_grad_norm", "2"], 2.0),
    ({"gradient_clipping": 0.5}, ["--original_compat"], 0.5), ({"gradient_clipping": 0}, [], 0.0)])
def test_clipping(content, words, clipping, deepspeed):
    assert deepspeed(content, *words)[0].training.max_grad_norm == clipping


def test_numbers_of_the_file_stand_where_no_flag_is_given(deepspeed):
    found, _ = deepspeed({"train_batch_size": 32, "train_micro_batch_size_per_gpu": "auto", "optimizer": {
        "type": "AdamW", "params": {"lr": 1e-4, "betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 0.1}}}, "--mm_projector_lr", "1e-3")
    training = found.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.learning_rate) == (8, 4, 1e-4)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon, training.weight_decay) == (0.8, 0.99, 1e-7, 0.1)
    assert training.mm_projector_lr is None  # DeepSpeed's own optimiser has one group


def test_a_scheduler_of_the_file_replaces_the_cosine(deepspeed):
    """zero3_offload.json's, whose values are all "auto", and one with numbers."""
    auto = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    found, said = deepspeed({"scheduler": auto}, "--warmup_ratio", "0.5", "--vision_tower_lr", "1e-5", "--mm_projector_lr", "1e-5")
    assert found.training.lr_scheduler_type == "WarmupLR" and found.training.mm_projector_lr is None and found.training.vision_tower_lr is None
    assert any("scheduler.type WarmupLR -> lr_scheduler_type WarmupLR in place of cosine" in line for line in said)
    schedule = Schedule("WarmupLR", 10, found.training.n_warmup(10), found.training.learning_rate)
    assert [round(schedule(step), 4) for step in range(8)] == [0, 0, 0.4307, 0.6826, 0.8614, 1, 1, 1]
    found, _ = deepspeed({"scheduler": {"type": "WarmupDecayLR", "params": {
        "warmup_min_lr": 1e-5, "warmup_max_lr": 1e-4, "warmup_num_steps": 4, "warmup_type": "linear", "total_num_steps": 10}}})
    assert (found.training.learning_rate, found.training.warmup_steps) == (1e-4, 4)
    schedule = Schedule("WarmupDecayLR", 10, 4, 1e-4, options=found.training.lr_scheduler_kwargs)
    assert [round(schedule(step) * 10, 3) for step in range(10)] == [1, 1, 3.25, 5.5, 7.75, 10, 8.5, 7, 5.5, 4]
    cosine = Schedule("WarmupCosineLR", 10, 4, 1e-4, options={"warmup_type": "linear", "cos_min_ratio": 0.1})
    assert [round(cosine(step), 4) for step in range(11)] == [0, 0, 0.25, 0.5, 0.75, 0.9397, 0.775, 0.55, 0.325, 0.1603, 0.1]


def test_contradictions_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    with pytest.raises(ConfigError, match=r'gradient_clipping is 1\.0, but max_grad_norm is given as 2'):
        apply_deepspeed(str(tmp_path / "ds.json"), {"max_grad_norm": 2.0}, lambda name: None, print, compat=False)
