"""Settings of the original's scripts and of transformers that have no meaning here, and what happens instead: the one table of them.

A script that sets them runs unchanged, and is told once per setting. A value that would change the result, and is not implemented, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stllava.errors import ConfigError

__all__ = ["NO_EFFECT", "NoEffect", "check_no_effect"]


@dataclass(frozen=True, slots=True)
class NoEffect:
    """`kind`: bool, int, float or str. `instead`: what happens. `only`: values that are accepted (default: any); `advice`: what to do about others.
    `default`: transformers'. `secret`: the value is never shown."""

    kind: type
    instead: str
    only: tuple[Any, ...] = ()
    advice: str = ""
    default: Any = None
    many: bool = False
    secret: bool = False


_ONE = "one process trains, with threads (num_threads)"
_PRECISION = "weights keep the dtype that they are stored in, and what is computed is f32"
_CPU = "training runs on the CPU"
_EVALUATION = "evaluations compute the loss and the objective's numbers (compute_metrics for more)"
_HUB = "nothing is sent anywhere"
_LOG = "messages are few and go to stderr; the log is log.jsonl"
_COMPILED = "the core is compiled already"
_LOADER = "micro-batches are built ahead by dataloader_num_workers threads of this process"
_QUANTISED = "nothing is quantised with bits 16"
_VERB = "the verb says what is done"
_SECRET = "leave it out; a command line is no place for a secret"
_NO_SCALING = ("leave it out, or use bf16 True: f16 training needs loss scaling, which is not there and which f32 arithmetic has no need of")

NO_EFFECT: dict[str, NoEffect] = {
    # the original's and LLaVA's own
    "lazy_preprocess": NoEffect(bool, "samples are always built when they are needed"),
    "is_multimodal": NoEffect(bool, "a record with a picture has a picture"),
    "data_aug": NoEffect(bool, "pictures are not changed", (False,),
                         "there is no augmentation (the original takes it for a device number); leave it out"),
    "cache_dir": NoEffect(str, "nothing is downloaded, so nothing is cached"),
    "mpt_attn_impl": NoEffect(str, "MPT is not supported; attention is the core's"),
    "double_quant": NoEffect(bool, _QUANTISED), "quant_type": NoEffect(str, _QUANTISED),
    "qav_loss": NoEffect(bool, "kept in config.json; the original does not use it either"),
    "loss_alpha": NoEffect(float, "kept in config.json; the original does not use it either"),
    "image_grid_pinpoints": NoEffect(str, "kept in config.json; pictures are not cut into tiles"),
    "remove_unused_columns": NoEffect(bool, "fields of a record that are not used do no harm"),
    "flash_attn": NoEffect(bool, "attention is the core's, which never holds the matrix of scores"),
    "attn_implementation": NoEffect(str, "attention is the core's, which never holds the matrix of scores"),
    # precision
    "bf16": NoEffect(bool, _PRECISION), "tf32": NoEffect(bool, "f32 products are full f32"),
    "bf16_full_eval": NoEffect(bool, _PRECISION), "fp16_full_eval": NoEffect(bool, _PRECISION),
    "fp16": NoEffect(bool, _PRECISION, (False,), _NO_SCALING), "fp16_opt_level": NoEffect(str, _PRECISION), "fp16_backend": NoEffect(str, _PRECISION),
    "half_precision_backend": NoEffect(str, _PRECISION),
    # processes and devices
    "local_rank": NoEffect(int, _ONE), "ddp_backend": NoEffect(str, _ONE), "ddp_timeout": NoEffect(int, _ONE),
    "ddp_find_unused_parameters": NoEffect(bool, _ONE), "ddp_bucket_cap_mb": NoEffect(int, _ONE), "ddp_broadcast_buffers": NoEffect(bool, _ONE),
    "ddp_static_graph": NoEffect(bool, _ONE), "eval_use_gather_object": NoEffect(bool, _ONE),
    "fsdp": NoEffect(str, _ONE, many=True), "fsdp_config": NoEffect(str, _ONE), "fsdp_min_num_params": NoEffect(int, _ONE),
    "fsdp_transformer_layer_cls_to_wrap": NoEffect(str, _ONE), "sharded_ddp": NoEffect(str, _ONE, many=True), "mp_parameters": NoEffect(str, _ONE),
    "parallelism_config": NoEffect(str, _ONE), "accelerator_config": NoEffect(str, _ONE), "dispatch_batches": NoEffect(bool, _ONE),
    "split_batches": NoEffect(bool, _ONE), "average_tokens_across_devices": NoEffect(bool, _ONE, default=True),
    "log_on_each_node": NoEffect(bool, _ONE, default=True), "save_on_each_node": NoEffect(bool, _ONE), "ray_scope": NoEffect(str, _ONE),
    "no_cuda": NoEffect(bool, _CPU), "use_cpu": NoEffect(bool, _CPU), "use_mps_device": NoEffect(bool, _CPU), "use_ipex": NoEffect(bool, _CPU),
    "xpu_backend": NoEffect(str, _CPU), "tpu_num_cores": NoEffect(int, _CPU), "tpu_metrics_debug": NoEffect(bool, _CPU),
    "torch_empty_cache_steps": NoEffect(int, _CPU), "skip_memory_metrics": NoEffect(bool, "memory is not reported", default=True),
    "jit_mode_eval": NoEffect(bool, _COMPILED), "torchdynamo": NoEffect(str, _COMPILED), "torch_compile": NoEffect(bool, _COMPILED),
    "torch_compile_backend": NoEffect(str, _COMPILED), "torch_compile_mode": NoEffect(str, _COMPILED), "use_liger_kernel": NoEffect(bool, _COMPILED),
    "liger_kernel_config": NoEffect(str, _COMPILED),
    "full_determinism": NoEffect(bool, "every run is deterministic: same settings, same bits"),
    "gradient_checkpointing_kwargs": NoEffect(str, "gradient_checkpointing computes each layer again"),
    # data
    "dataloader_pin_memory": NoEffect(bool, _LOADER, default=True), "dataloader_persistent_workers": NoEffect(bool, _LOADER),
    "dataloader_prefetch_factor": NoEffect(int, _LOADER), "dataloader_in_order": NoEffect(bool, _LOADER, default=True),
    "dataloader_multiprocessing_context": NoEffect(str, _LOADER), "length_column_name": NoEffect(str, "lengths are measured"),
    "label_names": NoEffect(str, "targets are built from the conversations", many=True),
    "ignore_data_skip": NoEffect(bool, "a resumed run goes on with the sample that is next, and skips nothing", (False,),
                                 "leave it out: to begin the data anew begin a run from the saved model"),
    "auto_find_batch_size": NoEffect(bool, "batch sizes are as given", (False,), "leave it out and set per_device_train_batch_size"),
    # optimiser
    "adafactor": NoEffect(bool, "the optimiser is AdamW", (False,), "leave it out: only AdamW is here"),
    "optim_args": NoEffect(str, "the optimiser is AdamW, its settings are adam_beta1, adam_beta2 and adam_epsilon"),
    "optim_target_modules": NoEffect(str, "the optimiser is AdamW for everything that trains", many=True),
    # what is done, evaluated, logged and sent
    "do_train": NoEffect(bool, _VERB), "do_eval": NoEffect(bool, _VERB), "do_predict": NoEffect(bool, _VERB),
    "overwrite_output_dir": NoEffect(bool, "a result replaces an older one in output_dir only when it is complete; checkpoints stay"),
    "prediction_loss_only": NoEffect(bool, _EVALUATION), "include_inputs_for_metrics": NoEffect(bool, _EVALUATION),
    "include_for_metrics": NoEffect(str, _EVALUATION, many=True), "eval_accumulation_steps": NoEffect(int, _EVALUATION),
    "batch_eval_metrics": NoEffect(bool, _EVALUATION), "eval_do_concat_batches": NoEffect(bool, _EVALUATION, default=True),
    "use_legacy_prediction_loop": NoEffect(bool, _EVALUATION), "past_index": NoEffect(int, _EVALUATION),
    "eval_delay": NoEffect(int, "evaluations begin at once", (0,), "leave it out"),
    "eval_on_start": NoEffect(bool, "the first evaluation is after eval_steps", (False,), "leave it out"),
    "log_level": NoEffect(str, _LOG), "log_level_replica": NoEffect(str, _LOG), "debug": NoEffect(str, _LOG, many=True),
    "logging_nan_inf_filter": NoEffect(bool, "nothing is filtered: nan_policy says what a number that is not finite does", default=True),
    "include_tokens_per_second": NoEffect(bool, _LOG), "include_num_input_tokens_seen": NoEffect(bool, _LOG), "project": NoEffect(str, _LOG),
    "save_only_model": NoEffect(bool, "every checkpoint can be resumed from", (False,), "leave it out"),
    "restore_callback_states_from_checkpoint": NoEffect(bool, "a resumed run goes on as if it had not ended"),
    "per_gpu_train_batch_size": NoEffect(int, "", ("none",), "its name is per_device_train_batch_size now"),
    "per_gpu_eval_batch_size": NoEffect(int, "", ("none",), "its name is per_device_eval_batch_size now"),
    "enable_jit_checkpoint": NoEffect(bool, "SIGTERM always writes a checkpoint"), "use_cache": NoEffect(bool, "training caches no keys"),
    "activation_checkpointing": NoEffect(bool, "", (False,), "its name is gradient_checkpointing here"),
    "activation_checkpointing_kwargs": NoEffect(str, "gradient_checkpointing computes each layer again"),
    "hub_token": NoEffect(str, _HUB, ("",), _SECRET, secret=True), "push_to_hub_token": NoEffect(str, _HUB, ("",), _SECRET, secret=True),
    "trackio_space_id": NoEffect(str, _HUB), "trackio_bucket_id": NoEffect(str, _HUB), "trackio_static_space_id": NoEffect(str, _HUB),
    "hub_model_id": NoEffect(str, _HUB), "hub_strategy": NoEffect(str, _HUB), "hub_private_repo": NoEffect(bool, _HUB),
    "hub_always_push": NoEffect(bool, _HUB), "hub_revision": NoEffect(str, _HUB), "push_to_hub_model_id": NoEffect(str, _HUB),
    "push_to_hub_organization": NoEffect(str, _HUB)}


def check_no_effect(name: str, value: Any) -> str | None:
    """What to tell about a given setting, or None where it has an effect. Raises ConfigError: the value would have one that is not there."""
    entry = NO_EFFECT.get(name)
    if entry is None:
        return None
    if entry.only and value not in entry.only:
        raise ConfigError(f"{name} is {'given' if entry.secret else repr(value)}: {entry.advice}", field=name)
    return f"{name} {value} has no effect: {entry.instead}"
