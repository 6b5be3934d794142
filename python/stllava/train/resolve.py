"""What was given -> the settings of a run: quirks of the original, DeepSpeed's file, and what has no effect, each with a line that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stllava.errors import ConfigError

from .arguments import DPOConfig, SFTConfig, TrainingArguments
from .deepspeed import apply_deepspeed
from .no_effect import check_no_effect
from .script import DataArguments, ModelArguments, ScriptArguments

__all__ = ["ORIGINAL", "STAGES", "Settings", "resolve"]

STAGES: dict[str, type[TrainingArguments]] = {"sft": SFTConfig, "dpo": DPOConfig}
_TEMPLATES = {"sft": "v1_sq", "dpo": "v1"}
ORIGINAL: dict[str, dict[str, Any]] = {
    "sft": {"hf_compat": "4.31", "vit_grad": False, "allow_untrained": True, "repeat_vit_lora": True},
    "dpo": {"hf_compat": "4.31", "vit_grad": False, "allow_untrained": True, "repeat_vit_lora": True, "ref_image_features": "policy",
            "disable_dropout": False}}
"""`original_compat`, as settings: how the original runs where a corrected one is the default. Each can be given by itself, and then wins."""
_OF_FILES = ("deepspeed", "config", "original_compat")  # once resolved, what they said is in the other settings


@dataclass(frozen=True, slots=True)
class Settings:
    """`given`: all that differs from the defaults by name, enough for `resolve` to make the same again without the files that said it."""

    stage: str
    given: dict[str, Any]
    model: ModelArguments
    data: DataArguments
    script: ScriptArguments
    training: TrainingArguments

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration, part by part."""
        return {part: dataclasses.asdict(getattr(self, part)) for part in ("model", "data", "script", "training")}


def resolve(stage: str, given: dict[str, Any], say: Callable[[str], None] = lambda line: None) -> Settings:
    """The settings of `stage` ("sft" or "dpo").

    Args:
        given: what the user set, by name; say: takes each line about what a setting means here.

    Raises:
        ConfigError, FormatError, OSError: naming the setting, or file and key.
    """
    classes: dict[str, type] = {"model": ModelArguments, "data": DataArguments, "script": ScriptArguments, "training": STAGES[stage]}
    fields = {field.name: field for cls in classes.values() for field in dataclasses.fields(cls) if field.init}
    given = {"version": _TEMPLATES[stage], **given}
    for name, value in given.items():
        if line := check_no_effect(name, value):
            say(line)
    if given.get("original_compat"):
        added = {name: value for name, value in ORIGINAL[stage].items() if name not in given}
        given |= added
        say(f"original_compat: {', '.join(f'{name} {value}' for name, value in added.items()) or 'every one of its settings is given'}")
    if given.get("deepspeed"):
        apply_deepspeed(given["deepspeed"], given, lambda name: fields[name].default, say, compat=given.get("hf_compat") == "4.31")
    missing = [f"--{name}" for name, field in fields.items() if name not in given and _is_required(field)]
    if missing:
        raise ConfigError(f"required and not given: {', '.join(missing)}", field=missing[0][2:])
    parts: dict[str, Any] = {part: cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.init and f.name in given})
                             for part, cls in classes.items()}
    _check_together(parts)
    if stage == "dpo" and parts["training"].disable_dropout and (parts["model"].lora_enable or parts["model"].vit_lora_enable):
        say("adapters drop nothing in DPO, as in TRL; the original's way is disable_dropout False")
    if stage == "dpo" and "sq_r" in given:
        say("sq_r has no effect: questions of pairs are never self-asked")
    kept = {name: value for name, value in given.items() if name in fields and name not in _OF_FILES}
    return Settings(stage, kept, **parts)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_together(parts: dict[str, Any]) -> None:
    data, training = parts["data"], parts["training"]
    if training.eval_strategy != "no" and data.eval_data_path is None:
        raise ConfigError(f"eval_strategy is {training.eval_strategy!r}, but there is nothing to evaluate on: give eval_data_path, or set it to no",
                          field="eval_data_path")
    if data.eval_data_path is not None and training.eval_strategy == "no":
        raise ConfigError("eval_data_path is given, but eval_strategy is 'no': set it to steps or epoch", field="eval_strategy")
