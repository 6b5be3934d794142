"""Training scripts written for transformers or TRL: their settings and their trainers' arguments, as ours.

`SFTConfig` and `DPOConfig` here are those of `train.arguments` that take every setting of transformers and TRL too, and are what `stllava` exports.
What such a script gives to a trainer (a path, rows, adapters' settings) becomes a model and data sets of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stllava.checkpoint import atomic, names
from stllava.checkpoint.peft import LoraConfig
from stllava.conv_mode import guess_conv_mode
from stllava.errors import ConfigError
from stllava.images import ImageProcessor
from stllava.model import LlavaModel

from . import arguments
from .no_effect import NoEffect, check_no_effect

__all__ = ["DPOConfig", "SFTConfig", "ScriptNames", "add_adapters", "dataset_of", "model_of", "refuse"]

_PACKED = "sequences are packed without padding, and never see one another"
_ROWS = "rows are read when the trainer is made"
_STORED = "weights are used as they are stored"
_REFERENCE = "the reference is the model as it is when the trainer is made, and stays"
_TRL: dict[str, NoEffect] = {
    "packing": NoEffect(bool, _PACKED), "eval_packing": NoEffect(bool, _PACKED), "packing_strategy": NoEffect(str, _PACKED),
    "padding_free": NoEffect(bool, _PACKED), "pad_to_multiple_of": NoEffect(int, _PACKED), "pad_token": NoEffect(str, _PACKED),
    "label_pad_token_id": NoEffect(int, _PACKED), "padding_value": NoEffect(int, _PACKED),
    "dataset_num_proc": NoEffect(int, _ROWS), "dataset_kwargs": NoEffect(str, _ROWS), "dataset_text_field": NoEffect(str, _ROWS),
    "dataset_batch_size": NoEffect(int, _ROWS), "shuffle_dataset": NoEffect(bool, "every epoch is shuffled, unless shuffle is False"),
    "completion_only_loss": NoEffect(bool, "targets are the answers", (None, True), "leave it out: questions are targets by template v1_sq and sq_r"),
    "assistant_only_loss": NoEffect(bool, "targets are the answers"),
    "truncation_mode": NoEffect(str, "what is too long loses its end", ("keep_start",), "leave it out"),
    "max_prompt_length": NoEffect(int, "a sample is cut at max_length, at its end"),
    "max_completion_length": NoEffect(int, "a sample is cut at max_length, at its end"),
    "model_init_kwargs": NoEffect(str, _STORED), "ref_model_init_kwargs": NoEffect(str, _STORED), "trust_remote_code": NoEffect(bool, _STORED),
    "use_logits_to_keep": NoEffect(bool, "logits are computed at targets only"), "activation_offloading": NoEffect(bool, "memory is the CPU's"),
    "generate_during_eval": NoEffect(bool, "evaluations compute the loss", (False,), "leave it out, and generate in a callback's on_evaluate"),
    "sync_ref_model": NoEffect(bool, _REFERENCE, (False,), "leave it out: a moving reference is not implemented"),
    "ref_model_mixup_alpha": NoEffect(float, _REFERENCE), "ref_model_sync_steps": NoEffect(int, _REFERENCE),
    "precompute_ref_batch_size": NoEffect(int, "reference log-probabilities are computed by per_device_train_batch_size pairs"),
    "use_weighting": NoEffect(bool, "pairs weigh the same", (False,), "leave it out: WPO's weights are not implemented"),
    "ld_alpha": NoEffect(float, "whole answers count", (None,), "leave it out: LD-DPO is not implemented"),
    "rpo_alpha": NoEffect(float, "preferences alone count", (None,), "use loss_type ['sigmoid', 'sft'] with loss_weights"),
    "router_aux_loss_coef": NoEffect(float, "there are no experts"), "chat_template_path": NoEffect(str, "the template is the trainer's argument"),
    "eos_token": NoEffect(str, "an answer ends as the template says"),
    "deepspeed": NoEffect(str, "one process trains; the command line reads such a file's settings (stllava sft --deepspeed FILE)"),
    "loss_type": NoEffect(str, "the loss is the targets' negative log-likelihood", ("nll", "chunked_nll"),  # of SFT; DPO has its own
                          "leave it out: only the negative log-likelihood is implemented")}


def _taking_all(cls: type) -> type:
    """Lets a configuration class take the settings that have no effect here, telling so once for each."""
    generated = cls.__init__  # type: ignore[misc]

    def __init__(self: Any, output_dir: str = "trainer_output", **settings: Any) -> None:
        if "activation_checkpointing" in settings:  # transformers 5's name
            settings["gradient_checkpointing"] = settings.pop("activation_checkpointing")
        own = {field.name for field in dataclasses.fields(cls) if field.init}
        for name in [name for name in settings if name not in own]:
            value = settings.pop(name)
            line = _line(name, value)
            if line is None:
                close = difflib.get_close_matches(name, [*own, *_TRL], 1)
                raise TypeError(f"{cls.__name__} has no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
            warnings.warn(line, stacklevel=2)
        generated(self, output_dir, **settings)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def _line(name: str, value: Any) -> str | None:
    entry = _TRL.get(name)
    if entry is None:
        return check_no_effect(name, value)
    if entry.only and value not in entry.only:
        raise ConfigError(f"{name} is {value!r}: {entry.advice}", field=name)
    return f"{name} {value} has no effect: {entry.instead}"


@_taking_all
@dataclass
class SFTConfig(arguments.SFTConfig):
    """Stage 1. `max_length`: rows of a sample, image rows included, where the trainer is given rows; None: no limit."""

    output_dir: str = "trainer_output"
    max_length: int | None = 2048


@_taking_all
@dataclass
class DPOConfig(arguments.DPOConfig):
    """Stage 2, with trl.DPOConfig's names (see `train.arguments.DPOConfig`). `max_length`: as for `SFTConfig`."""

    output_dir: str = "trainer_output"
    max_length: int | None = 2048


# ---- what a trainer is given ---------------------------------------------------------------------------------------------------------

_REFUSED = {  # arguments of their trainers that cannot have their meaning here
    "ref_model": f"{_REFERENCE}; leave it out", "data_collator": "sequences are packed, not padded, by the trainer; leave it out",
    "optimizers": "the optimiser is AdamW, set by args; for another there is stllava.torch_adapter",
    "optimizer_cls_and_kwargs": "the optimiser is AdamW, set by args; for another there is stllava.torch_adapter",
    "compute_loss_func": "losses are those of args; for one of your own there is stllava.torch_adapter",
    "formatting_func": "give rows with messages, or with prompt and completion", "model_init": "give the model",
    "preprocess_logits_for_metrics": "evaluations have no logits; compute_metrics is called with the trainer",
    "quantization_config": "nothing is quantised; use a bf16 or f16 checkpoint, or a .gguf file"}


def refuse(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument whose meaning is not here, TypeError for an unknown one; their neutral values pass."""
    for name, value in arguments.items():
        if name not in _REFUSED:
            raise TypeError(f"a trainer takes no argument {name!r}")
        if value is not None and value != (None, None):
            raise ConfigError(f"{name} is given: {_REFUSED[name]}", field=name)


def model_of(model: Any) -> LlavaModel:
    """A model, also from a path or from what `load_pretrained_model` gives."""
    if isinstance(model, (str, os.PathLike)):
        return LlavaModel.from_pretrained(model)
    llava = getattr(model, "ours", model)
    if not isinstance(llava, LlavaModel):
        raise ConfigError(f"model is a {type(model).__name__}, want a LlavaModel, or the path of one", field="model")
    return llava


def add_adapters(model: LlavaModel, peft_config: Any, seed: int) -> list[str]:
    """Adapters on the decoder by a LoraConfig, ours or peft's, and the names that then train: theirs, and those of `modules_to_save`.

    Without `target_modules` they sit on every linear module of the decoder.
    """
    if isinstance(peft_config, LoraConfig):
        config = peft_config
    elif hasattr(peft_config, "to_dict"):
        config = LoraConfig.from_dict(json.loads(json.dumps(peft_config.to_dict(), default=_plain)))
    else:
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}, want a LoraConfig", field="peft_config")
    model.add_lora(config, "llm", seed=seed)
    return [name for name, _ in model.named_parameters() if names.is_lora(name) or config.saves(name)]


def dataset_of(data: Any, make: Callable[..., Any], model: LlavaModel, tokenizer: Any, *, image_folder: str | Path | None, template: str | None,
               max_length: int | None) -> Any:
    """A data set of ours as it is; from a file, or from rows in any layout that `read_records` knows, the one that `make` makes."""
    if data is None or hasattr(data, "sequences") or hasattr(data, "pair"):
        return data
    if isinstance(data, Mapping):
        raise ConfigError(f"the data set is a dictionary of {', '.join(map(str, data))}; give one of them", field="train_dataset")
    processor = model.image_processor if model.config.vision is not None else ImageProcessor()
    tokenizer = getattr(tokenizer, "ours", tokenizer)
    return make(data if isinstance(data, (str, Path)) else [_embedded(row, processor) for row in data],
                tokenizer if hasattr(tokenizer, "encode_piecewise") else model.tokenizer, processor, image_folder=image_folder,
                template=template or guess_conv_mode(model.config), max_length=max_length, tokens_per_image=model.core.tokens_per_image)


def _plain(value: Any) -> Any:
    """peft's settings as its file has them: sets are lists, enumerations their values."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", None) or str(value)


def _embedded(value: Any, processor: ImageProcessor) -> Any:
    """A row in which pictures in memory are {"bytes", "path"}, as `datasets` stores them."""
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        Image.fromarray(processor.load(value).rgb).save(buffer, "PNG", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}
    if isinstance(value, Mapping):
        return {key: _embedded(part, processor) for key, part in value.items()}
    return [_embedded(part, processor) for part in value] if isinstance(value, (list, tuple)) else value


# ---- what scripts call afterwards ----------------------------------------------------------------------------------------------------


class ScriptNames:
    """Methods of transformers' Trainer that scripts call around `train`."""

    model: LlavaModel
    args: arguments.TrainingArguments

    @property
    def processing_class(self) -> Any:
        return self.model.tokenizer

    tokenizer = processing_class

    def is_world_process_zero(self) -> bool:
        return True

    is_local_process_zero = is_world_process_zero

    def log_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Prints them, one a line."""
        width = max(map(len, metrics), default=0)
        print(f"***** {split} metrics *****", *(f"  {name:<{width}} = {metrics[name]:.6g}" for name in sorted(metrics)), sep="\n")

    def save_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """<split>_results.json in the output directory, and all_results.json with those of every split."""
        folder = atomic.make_directory(self.args.output_dir)
        every = folder / "all_results.json"
        before = json.loads(every.read_text(encoding="utf-8")) if every.exists() else {}
        for path, values in ((folder / f"{split}_results.json", metrics), (every, {**before, **metrics})):
            atomic.write_bytes(path, (json.dumps(values, indent=4, sort_keys=True) + "\n").encode())
