"""DeepSpeed's JSON file, for a trainer of one process: which of its keys mean something here, and as which settings.

"auto" takes the setting's value, as in transformers. A number takes effect where the setting is not given, and must be the same where it is.
Source: transformers' deepspeed integration, DeepSpeed's configuration and lr_schedules.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stllava.checkpoint import strict_json
from stllava.errors import ConfigError

__all__ = ["KNOWN_KEYS", "apply_deepspeed"]

SHIPPED = ("zero2.json", "zero3.json")
"""Files that LLaVA has under these names set nothing with an effect in one process; the original names one of them and does not ship it."""

_ZERO = ("stage", "overlap_comm", "contiguous_gradients", "sub_group_size", "reduce_bucket_size", "reduce_scatter", "allgather_partitions",
         "allgather_bucket_size", "prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance",
         "gather_16bit_weights_on_model_save", "round_robin_gradients", "ignore_unused_parameters", "offload_optimizer", "offload_param",
         "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
         "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save", "zero_hpz_partition_size", "zero_quantized_weights",
         "zero_quantized_gradients", "cpu_offload")
_FP16 = ("enabled", "auto_cast", "loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "consecutive_hysteresis", "min_loss_scale")
_OPTIMIZER = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
_WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type")
_SCHEDULERS = {"WarmupLR": _WARMUP, "WarmupDecayLR": (*_WARMUP, "total_num_steps"),
               "WarmupCosineLR": ("warmup_min_ratio", "warmup_num_steps", "warmup_type", "cos_min_ratio", "total_num_steps")}
_BATCH = {"train_micro_batch_size_per_gpu": "per_device_train_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps"}
KNOWN_KEYS: dict[str, tuple[str, ...]] = {
    "zero_optimization": _ZERO, "fp16": _FP16, "bf16": ("enabled",), "bfloat16": ("enabled",), "optimizer": ("type", "params"),
    "scheduler": ("type", "params"), **dict.fromkeys((*_BATCH, "train_batch_size", "gradient_clipping", "steps_per_print", "wall_clock_breakdown",
    "prescale_gradients", "gradient_predivide_factor", "communication_data_type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "activation_checkpointing", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comms_logger", "dump_state", "amp", "aio", "data_types",
    "memory_breakdown", "sparse_gradients", "train_steps"), ())}
"""Top-level keys, and those of their sections."""


def apply_deepspeed(file: str, given: dict[str, Any], default: Callable[[str], Any], say: Callable[[str], None], *, compat: bool) -> None:
    """Puts what the file says into `given`.

    Args:
        given: settings that were given, by name; those of the file are added. default: a setting's default. say: takes each line of the mapping.
        compat: without the key gradient_clipping gradients are not clipped, as with the DeepSpeed of the original's time.

    Raises:
        ConfigError, FormatError, FileNotFoundError: naming file and key.
    """
    content: dict[str, Any] = {}
    if Path(file).exists() or Path(file).name not in SHIPPED:
        if not Path(file).exists():
            raise FileNotFoundError(f"deepspeed {file}: no such file; leave the flag out, or give the file: one process needs none")
        content = strict_json.read_object(Path(file))
    else:
        say(f"deepspeed {file}: no such file, and the original does not ship it; going on as with LLaVA's file of that name, which sets nothing "
            "that has an effect in one process (leave the flag out to be rid of this line)")
    _Mapping(file, given, default, say, compat).apply(content)


class _Mapping:
    def __init__(self, file: str, given: dict[str, Any], default: Callable[[str], Any], say: Callable[[str], None], compat: bool) -> None:
        self.file, self.given, self.default, self.compat = file, given, default, compat
        self._say = say
        self.explicit = frozenset(given)
        self.without_effect: list[str] = []

    def apply(self, content: dict[str, Any]) -> None:
        for section, value in content.items():
            self.check_names(section, value)
        self.precision(content)
        self.zero(content.pop("zero_optimization", {}))
        for key, name in _BATCH.items():
            if (value := content.pop(key, "auto")) != "auto":
                self.set(key, name, self.number(key, value, whole=True, low=1))
        self.batch(content.pop("train_batch_size", "auto"))
        self.clipping(content.pop("gradient_clipping", None))
        one_rate = [key for key in ("optimizer", "scheduler") if key in content]
        self.optimizer(content.pop("optimizer", None))
        self.scheduler(content.pop("scheduler", None))
        rates = [name for name in ("mm_projector_lr", "vision_tower_lr") if self.given.get(name)]
        if one_rate and rates:
            for name in rates:
                self.given[name] = None
            self.say(f"{' and '.join(one_rate)} of the file -> one rate for everything, as DeepSpeed does: {' and '.join(rates)} have no effect")
        self.without_effect += content
        if self.without_effect:
            self.say(f"without effect in one process: {', '.join(self.without_effect)}")

    # ---- the parts ---------------------------------------------------------------------------------------------------------------

    def check_names(self, section: str, value: Any) -> None:
        """A name close to a known one is a slip of the pen; others are listed among those without effect."""
        self.known(section, KNOWN_KEYS)
        inner = KNOWN_KEYS.get(section)
        if inner and not isinstance(value, dict):
            raise self.wrong(section, value, "an object")
        for key in value if inner else ():
            self.known(f"{section}.{key}", [f"{section}.{name}" for name in inner or ()])

    def known(self, key: str, names: Any) -> None:
        close = difflib.get_close_matches(key, list(names), n=1, cutoff=0.85)
        if key not in names and close:
            raise ConfigError(f"{self.file}: unknown key {key!r}; did you mean {close[0]}?", path=self.file, field=key)

    def precision(self, content: dict[str, Any]) -> None:
        enabled = {}
        for kind, sections in (("fp16", ("fp16",)), ("bf16", ("bf16", "bfloat16"))):
            for section in sections:
                if section not in content:
                    continue
                value = content.pop(section).get("enabled", False)
                if value != "auto" and not isinstance(value, bool):
                    raise self.wrong(f"{section}.enabled", value, 'true, false or "auto"')
                flag = self.given.get(kind)
                if value != "auto" and flag is not None and flag != value:
                    raise self.against(f"{section}.enabled", value, kind, flag)
                enabled[kind] = bool(flag) if value == "auto" else value
                self.without_effect.append(f"{section} ({'f32 is computed, weights stay as stored' if enabled[kind] else 'off'})")
        if enabled.get("fp16") and enabled.get("bf16"):
            raise ConfigError(f"{self.file}: fp16.enabled and bf16.enabled are both true; switch one off", path=self.file, field="fp16.enabled")
        if enabled.get("fp16"):
            raise ConfigError(f"{self.file}: fp16.enabled is true, but f16 training needs loss scaling, which is not there and which f32 "
                              "arithmetic has no need of; set it to false", path=self.file, field="fp16.enabled")

    def zero(self, section: dict[str, Any]) -> None:
        stage = section.get("stage", 0)
        if type(stage) is not int or not 0 <= stage <= 3:
            raise self.wrong("zero_optimization.stage", stage, "0, 1, 2 or 3")
        for key in ("offload_optimizer", "offload_param"):
            device = section.get(key, {}).get("device", "none") if isinstance(section.get(key, {}), dict) else section[key]
            if device not in ("none", "cpu", "nvme"):
                raise self.wrong(f"zero_optimization.{key}.device", device, "none, cpu or nvme")
        if section:
            self.without_effect.append(f"zero_optimization (stage {stage}: one process has nothing to share out; moments are in main memory, "
                                       "weights in a memory map)")

    def batch(self, total: Any) -> None:
        if total == "auto":
            return
        total = self.number("train_batch_size", total, whole=True, low=1)
        micro, steps = self.value("per_device_train_batch_size"), self.value("gradient_accumulation_steps")
        if "gradient_accumulation_steps" not in self.given and total % micro == 0:
            steps = total // micro
            self.set("train_batch_size", "gradient_accumulation_steps", steps)
        if micro * steps != total:
            raise ConfigError(f"{self.file}: train_batch_size is {total}, but one process makes per_device_train_batch_size {micro} x "
                              f"gradient_accumulation_steps {steps} = {micro * steps}; change one of them, or set it to \"auto\"", path=self.file,
                              field="train_batch_size")

    def clipping(self, value: Any) -> None:
        if value is None:
            if self.compat and "max_grad_norm" not in self.explicit:
                self.given["max_grad_norm"] = 0.0
                self.say("no gradient_clipping -> max_grad_norm 0: gradients are not clipped, as with DeepSpeed in the original's time")
            else:
                self.say(f"no gradient_clipping -> max_grad_norm {self.value('max_grad_norm')}")
        elif value == "auto":
            self.say(f"gradient_clipping auto -> max_grad_norm {self.value('max_grad_norm')}")
        else:
            self.set("gradient_clipping", "max_grad_norm", self.number("gradient_clipping", value))

    def optimizer(self, section: dict[str, Any] | None) -> None:
        if section is None:
            return
        if str(section.get("type", "")).lower() not in ("adam", "adamw"):
            raise ConfigError(f"{self.file}: optimizer.type is {section.get('type')!r}, supported: AdamW (which DeepSpeed's Adam is too)",
                              path=self.file, field="optimizer.type")
        params = self.section("optimizer.params", section.get("params", {}))
        if params.get("adam_w_mode") is False:
            raise ConfigError(f"{self.file}: optimizer.params.adam_w_mode is false, supported: true", path=self.file, field="optimizer.params")
        for key, value in params.items():
            if key in _OPTIMIZER and value != "auto":
                self.set(f"optimizer.params.{key}", _OPTIMIZER[key], self.number(f"optimizer.params.{key}", value))
            elif key == "betas" and value != "auto":
                if not isinstance(value, list) or len(value) != 2:
                    raise self.wrong("optimizer.params.betas", value, "two numbers")
                for name, beta in zip(("adam_beta1", "adam_beta2"), value, strict=True):
                    self.set("optimizer.params.betas", name, self.number("optimizer.params.betas", beta))
            elif value != "auto" and key not in ("adam_w_mode", "torch_adam"):
                self.without_effect.append(f"optimizer.params.{key}")

    def scheduler(self, section: dict[str, Any] | None) -> None:
        """DeepSpeed's schedules replace `lr_scheduler_type`."""
        if section is None:
            return
        kind = section.get("type")
        if kind not in _SCHEDULERS:
            raise ConfigError(f"{self.file}: scheduler.type is {kind!r}, supported: {', '.join(_SCHEDULERS)}; or leave the section out and set "
                              "lr_scheduler_type", path=self.file, field="scheduler.type")
        options: dict[str, Any] = {}
        for key, value in self.section("scheduler.params", section.get("params", {})).items():
            if key not in _SCHEDULERS[kind]:
                raise ConfigError(f"{self.file}: scheduler.params has {key!r}; {kind} takes {', '.join(_SCHEDULERS[kind])}", path=self.file,
                                  field=key)
            where = f"scheduler.params.{key}"
            if value == "auto":
                continue
            if key == "warmup_type":
                if value not in ("log", "linear"):
                    raise self.wrong(where, value, "log or linear")
                options[key] = value
            elif key == "warmup_num_steps":
                if "warmup_ratio" in self.explicit:
                    raise self.against(where, value, "warmup_ratio", self.given["warmup_ratio"])
                self.set(where, "warmup_steps", self.number(where, value, whole=True, low=1))
            elif key == "warmup_max_lr":
                self.set(where, "learning_rate", self.number(where, value))
            else:
                options[key] = self.number(where, value, whole=key == "total_num_steps")
        replaced = self.value("lr_scheduler_type")
        self.given |= {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options or None}
        self.say(f"scheduler.type {kind} -> lr_scheduler_type {kind} in place of {replaced}, as DeepSpeed does")

    # ---- help --------------------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self._say(f"deepspeed {self.file}: {text}")

    def value(self, name: str) -> Any:
        return self.given.get(name, self.default(name))

    def set(self, key: str, name: str, value: Any) -> None:
        if name in self.explicit and self.given[name] != value:
            raise self.against(key, value, name, self.given[name])
        self.given[name] = value
        self.say(f"{key} -> {name} {value}")

    def section(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return value

    def number(self, key: str, value: Any, *, whole: bool = False, low: float = 0) -> Any:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < low:
            raise self.wrong(key, value, f'{"a whole" if whole else "a"} number >= {low} or "auto"')
        return value

    def wrong(self, key: str, value: Any, want: str) -> ConfigError:
        return ConfigError(f"{self.file}: {key} is {value!r}, want {want}", path=self.file, field=key)

    def against(self, key: str, value: Any, name: str, flag: Any) -> ConfigError:
        return ConfigError(f"{self.file}: {key} is {value}, but {name} is given as {flag}; make them the same, or set the key to \"auto\"",
                           path=self.file, field=key)
