"""Models as llama.cpp keeps them: GGUF files of architecture "llama" (LLaMA, Mistral), and LLaVA's tower and projector in a second file (mmproj).

What differs from a checkpoint directory is names, the order of the rows of q and k (llama.cpp rotates neighbouring channels, checkpoints the two
halves of a head), and where the settings lie. A key that changes the maths and is not implemented is an error, as in `config`.
The tokenizer inside the file: `stllava.text.gguf_tokenizer`. Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stllava.checkpoint import gguf_container, gguf_mmproj, names
from stllava.checkpoint.directory import Checkpoint, check_finite_values, check_shapes
from stllava.checkpoint.gguf_container import GgufFile, Value
from stllava.checkpoint.gguf_metadata import check_architecture, check_neutral, integer, number, refuse_other_keys
from stllava.checkpoint.rounding import round_tensor, wide
from stllava.checkpoint.tensor_file import NUMPY_DTYPES, Deferred, Tensor
from stllava.config import LlavaConfig
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_LAYERS, MAX_WIDTH
from stllava.progress import progress_bar
from stllava.text import gguf_tokenizer

if TYPE_CHECKING:
    from stllava.model import LlavaModel
    from stllava.text.interface import AnyTokenizer

Dtype = Literal["f32", "f16", "bf16"]
PathLike = str | os.PathLike[str]

_PREFIX = "llama."
_USED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
         "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "vocab_size")
# Other keys of the architecture, with the values under which they do not change the maths; () stands for any value.
_NEUTRAL: Mapping[str, tuple[Value, ...]] = {
    "expert_count": (0,), "expert_used_count": (0,), "rope.scaling.type": ("none",), "rope.scaling.factor": (0.0, 1.0), "rope.scale_linear": (1.0,),
    "rope.scaling.original_context_length": (), "rope.scaling.finetuned": (), "rope.scaling.attn_factor": (1.0,), "attention.sliding_window": (0,),
    "attention.causal": (True,), "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0), "attention.scale": (0.0,), "use_parallel_residual": (False,),
    "tensor_data_layout": ()}

_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_IN_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}
_TO_LAYER = {canonical: short for short, canonical in _IN_LAYER.items()}
_TO_OUTER = {canonical: short for short, canonical in _OUTER.items()}
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # llama.cpp's names for "all f32", "mostly f16", "mostly bf16"


def read_gguf(path: PathLike, mmproj: PathLike | None = None, *, check_finite: bool | None = None, show_progress: bool = False) -> Checkpoint:
    """Read a decoder, and with `mmproj` the vision tower and projector that belong to it.

    Tensors of f32, f16 and bf16 stay what they are: read-only views on the mapped file, but for q and k, whose rows are put in order. Quantised ones
    become f32. A LLaVA mmproj file has no layers behind the one whose output is used, so `mm_vision_select_layer` is -1 here.

    Args:
        path: the .gguf file of the decoder. mmproj: the one of the tower.
        check_finite: as in `read_checkpoint`. show_progress: a bar while quantised tensors are unpacked.

    Raises FormatError, ConfigError or NumericsError naming the file and the key or tensor; OSError from the system.
    """
    file = gguf_container.read(path)
    config = read_config(file)
    checkpoint = Checkpoint(config)
    places: dict[str, tuple[GgufFile, str]] = {}
    for name in file.tensors:
        canonical = from_gguf(file, name)
        if canonical is None:
            checkpoint.ignored.append(f"{file.path}: {name}: recomputed, not a weight of this model")
        else:
            places[canonical] = file, name
    if mmproj is not None:
        tower = gguf_container.read(mmproj)
        config = checkpoint.config = gguf_mmproj.add_vision(config, tower)
        places |= {canonical: (tower, name) for canonical, name in gguf_mmproj.canonical_names(config, tower)}
    checkpoint.sources = {canonical: source.path for canonical, (source, _) in places.items()}
    shapes = {canonical: source.tensors[name].shape for canonical, (source, name) in places.items()}
    check_shapes(config, shapes, checkpoint.sources, [Path(path), *([] if mmproj is None else [Path(mmproj)])])
    n_quantized = sum(source.tensors[name].is_quantized for source, name in places.values())
    with progress_bar(n_quantized, label="unpacking", unit="tensor", show=show_progress and n_quantized > 0) as bar:
        for canonical, (source, name) in places.items():
            checkpoint.tensors[canonical] = reorder_rows(canonical, source.array(name), config, to_file=False)
            bar.update(source.tensors[name].is_quantized)
    check_finite_values(checkpoint, check_finite)
    return checkpoint


def read_config(file: GgufFile) -> LlavaConfig:
    """The configuration of the decoder in `file`. Raises ConfigError for what is not implemented, FormatError for keys that are missing or wrong."""
    check_architecture(file, "llama")
    for key in ("split.count", "adapter.type"):
        if file.metadata.get(key, 0) not in (0, 1):
            raise ConfigError(f"{file.path}: {key} is {file.metadata[key]!r}: want one whole model (llama-gguf-split --merge joins the files)",
                              path=file.path, field=key)
    refuse_other_keys(file, _PREFIX, {*_USED, *_NEUTRAL})
    check_neutral(file, _PREFIX, _NEUTRAL)
    d, n_heads = integer(file, "llama.embedding_length", MAX_WIDTH), integer(file, "llama.attention.head_count", MAX_WIDTH)
    head_dim = integer(file, "llama.attention.key_length", MAX_WIDTH, default=d // n_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (found := integer(file, key, MAX_WIDTH, default=head_dim)) != head_dim:
            raise ConfigError(f"{file.path}: {key} is {found}, supported: the width of a head, {head_dim}", path=file.path, field=key)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError(f"{file.path}: token_embd.weight is missing: no model, or a part of one", path=file.path, field="token_embd.weight")
    vocab_size = embedding.shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != vocab_size:
        raise FormatError(f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} tokens, token_embd.weight {vocab_size} rows",
                          path=file.path, field="tokenizer.ggml.tokens")
    values: dict[str, Any] = {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": d, "head_dim": head_dim, "num_attention_heads": n_heads,
        "intermediate_size": integer(file, "llama.feed_forward_length", MAX_WIDTH),
        "num_hidden_layers": integer(file, "llama.block_count", MAX_LAYERS),
        "num_key_value_heads": integer(file, "llama.attention.head_count_kv", MAX_WIDTH, default=n_heads),
        "max_position_embeddings": integer(file, "llama.context_length", MAX_WIDTH),
        "rms_norm_eps": number(file, "llama.attention.layer_norm_rms_epsilon"), "rope_theta": number(file, "llama.rope.freq_base", default=10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors}
    for key in ("bos", "eos"):
        if f"tokenizer.ggml.{key}_token_id" in file.metadata:
            values[f"{key}_token_id"] = file.metadata[f"tokenizer.ggml.{key}_token_id"]
    try:
        return LlavaConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}", path=file.path, field=error.field) from error


def from_gguf(file: GgufFile, name: str) -> str | None:
    """Canonical name of a decoder's tensor; None for a buffer. Raises ConfigError for one that changes the maths, FormatError for an unknown one."""
    if name in _OUTER:
        return _OUTER[name]
    if name == "rope_freqs.weight":
        if not np.all(file.array(name) == 1):
            raise ConfigError(f"{file.path}: {name}: factors of the rotation (rope scaling of LLaMA 3) are not implemented", path=file.path,
                              field=name)
        return None
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)\.weight", name)
    if match is None or match[2] not in _IN_LAYER:
        raise ConfigError(f"{file.path}: tensor {name} is not one of a LLaMA decoder without biases and experts", path=file.path, field=name)
    return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"


def to_gguf(canonical: str) -> str:
    """Name in the file of a decoder's canonical tensor."""
    if canonical in _TO_OUTER:
        return _TO_OUTER[canonical]
    _, _, layer, module = canonical.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_TO_LAYER[module]}.weight"


def reorder_rows(canonical: str, array: np.ndarray, config: LlavaConfig, *, to_file: bool) -> np.ndarray:
    """q and k with the rows of each head in the other order: channel i and i + half of a head are 2 i and 2 i + 1 in the file. Others as they are."""
    n_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(canonical.split(".")[-2])
    if n_heads is None or not canonical.startswith("model.layers.") or array.shape != (n_heads * config.head_dim, config.hidden_size):
        return array
    half = config.head_dim // 2
    shape = (n_heads, 2, half, -1) if to_file else (n_heads, half, 2, -1)
    ordered = array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
    ordered.flags.writeable = False
    return ordered


# ---- writing -----------------------------------------------------------------------------------------------------------------


def write_gguf(path: PathLike, model: LlavaModel | Checkpoint, tokenizer: AnyTokenizer | None = None, *, dtype: Dtype = "f16",
               mmproj: PathLike | None = None, name: str = "stllava") -> None:
    """Write a model for llama.cpp: the decoder with its tokenizer to `path`, tower and projector to `mmproj`. Each file appears whole or not at all.

    Args:
        model: adapters must be merged (`merge_and_unload`).
        tokenizer: default: the model's own; without any, the file says that it has no vocabulary, and llama.cpp takes and gives ids only. llama.cpp
            starts the text after a special token with a blank, as `legacy` tokenizers do.
        dtype: of the matrices, rounded to nearest even; vectors are f32, as llama.cpp asks. "f32" keeps every value.
        mmproj: file of the tower, for a model that has one; its projector must be mlp2x_gelu on the patch features, the one kind that
            llama.cpp knows. Layers of the tower behind the feature layer are left out.

    Raises ConfigError for a model that llama.cpp cannot run, NumericsError for a value too large for f16; OSError from the system, and then the file
    that was there before still stands.
    """
    if dtype not in _FILE_TYPES:
        raise ConfigError(f"dtype is {dtype!r}, supported: {', '.join(_FILE_TYPES)}", field="dtype")
    config = model.config
    if isinstance(model, Checkpoint):
        tensors, has_adapters = model.tensors, bool(model.lora)
    else:
        tensors, has_adapters = model.tensors(), bool(model.lora)
        tokenizer = model.tokenizer if tokenizer is None and model.has_tokenizer else tokenizer
    if has_adapters:
        raise ConfigError("the model has adapters; merge_and_unload() them first", field="lora")
    if (config.mm_vision_tower is None) != (mmproj is None):
        what = "a vision tower, which goes to a file of its own: pass mmproj=PATH" if mmproj is None else "no vision tower: leave mmproj out"
        raise ConfigError(f"the model has {what}", field="mmproj")
    if missing := [key for key in names.decoder_shapes(config) if key not in tensors]:
        raise FormatError(f"{len(missing)} tensors are missing, first {missing[0]}", field=missing[0])
    general: dict[str, Value] = {"general.name": name, "general.file_type": _FILE_TYPES[dtype]}
    vocabulary = {"tokenizer.ggml.model": "none"} if tokenizer is None else gguf_tokenizer.to_metadata(tokenizer, config.vocab_size)
    if mmproj is not None:
        gguf_mmproj.write(mmproj, config, tensors, lambda key, array: _stored(key, array, config, dtype), general)
    gguf_container.write(path, {"general.architecture": "llama", **general, **_settings(config), **vocabulary}, {
        to_gguf(key): _stored(key, tensors[key], config, dtype) for key in names.decoder_shapes(config)})


def _settings(config: LlavaConfig) -> dict[str, Value]:
    window = config.decoder_config()["sliding_window"]
    if window and window < config.max_position_embeddings:
        raise ConfigError(f"sliding_window is {window}, which llama.cpp's architecture llama does not have", field="sliding_window")
    return {
        "llama.vocab_size": config.vocab_size, "llama.context_length": config.max_position_embeddings, "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers, "llama.feed_forward_length": config.intermediate_size,
        "llama.rope.dimension_count": config.head_dim, "llama.attention.key_length": config.head_dim, "llama.attention.value_length": config.head_dim,
        "llama.attention.head_count": config.num_attention_heads, "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.freq_base": float(config.rope_theta), "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}


def _stored(key: str, array: np.ndarray, config: LlavaConfig, dtype: Dtype) -> Tensor:
    """The tensor as the file holds it, made when it is written."""
    kind = "f32" if array.ndim == 1 else dtype

    return Deferred(NUMPY_DTYPES[kind], array.shape, lambda: round_tensor(key, wide(reorder_rows(key, array, config, to_file=True)), kind))
