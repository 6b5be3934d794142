"""LLaVA's `llava/model/builder.py` by its name: a checkpoint for a script that calls transformers' names."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from stllava.compat import ScriptImageProcessor, ScriptModel, ScriptTokenizer, Tensors, import_torch
from stllava.errors import ConfigError
from stllava.model import Dtype, LlavaModel

__all__ = ["load_pretrained_model"]

_WITHOUT_EFFECT = frozenset({"torch_dtype", "attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_flash_attention_2", "multimodal",
                             "offload_folder", "max_memory", "load_bf16", "attention_implementation"})


def load_pretrained_model(model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None, model_name: str | None = None,
                          load_8bit: bool = False, load_4bit: bool = False, device_map: Any = "auto", device: Any = "cuda",
                          use_flash_attn: bool = False, *, dtype: Dtype = "f32", vision_tower: str | os.PathLike[str] | None = None,
                          return_tensors: Tensors | None = None, output_has_prompt: bool = False, **kwargs: Any,
                          ) -> tuple[ScriptTokenizer, ScriptModel, ScriptImageProcessor | None, int]:
    """(tokenizer, model, image_processor, context_len), as LLaVA's function of this name gives them.

    Args:
        model_path, model_base: as for `LlavaModel.from_pretrained`. What a directory holds decides how it is read; `model_name` decides nothing.
        load_8bit, load_4bit: weights are used as they are stored instead, and a warning says so. device_map, device, use_flash_attn: no effect.
        dtype, vision_tower: as for `LlavaModel.from_pretrained`.
        return_tensors: the arrays that `process_images` gives: "np", or "pt" for torch; None: "pt" where the script has imported torch.
        output_has_prompt: `generate` gives the prompt before the answer, as LLaVA before 1.2 did: for scripts that cut `output_ids[:, n:]`.

    Returns:
        image_processor is None for a decoder alone; context_len is the configuration's max_sequence_length, else 2048, as in LLaVA.

    Raises:
        FormatError, ConfigError: naming file and key. TypeError: an unknown argument.
    """
    unknown = sorted(kwargs.keys() - _WITHOUT_EFFECT)
    if unknown:
        raise TypeError(f"load_pretrained_model: unknown argument {unknown[0]!r}")
    if load_8bit or load_4bit:
        warnings.warn(f"load_{8 if load_8bit else 4}bit: weights are not quantised here, they are used as {os.fspath(model_path)} stores them",
                      stacklevel=2)
    tensors: Tensors = return_tensors if return_tensors is not None else "pt" if "torch" in sys.modules else "np"
    if tensors not in ("np", "pt"):
        raise ConfigError(f"return_tensors is {return_tensors!r}, want 'np', 'pt' or None", field="return_tensors")
    if tensors == "pt":
        import_torch("return_tensors='pt'")
    llava = LlavaModel.from_pretrained(model_path, model_base, dtype=dtype, vision_tower=vision_tower)
    model = ScriptModel(llava, tensors, output_has_prompt=output_has_prompt)
    processor = None if llava.config.vision is None else ScriptImageProcessor(llava.image_processor, tensors)
    return ScriptTokenizer(llava.tokenizer), model, processor, int(llava.config.extra.get("max_sequence_length") or 2048)
