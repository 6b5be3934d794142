"""Tower and projector of a LLaVA model in llama.cpp's second file (architecture "clip", projector type "mlp").

Two spellings exist of the tower's MLP: files of the old converter call fc1 `ffn_down`; the shapes tell which one a file uses, as in llama.cpp.
The file ends with the layer whose output the projector takes, and has no post-LayerNorm. `feature_layer` names that layer once more, because without
it llama.cpp stops one layer early (its issue 25817). Source: llama.cpp's tools/mtmd/clip.cpp and its convert_image_encoder_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from stllava.checkpoint import gguf_container, names
from stllava.checkpoint.gguf_container import GgufFile, Value
from stllava.checkpoint.gguf_metadata import boolean, check_architecture, check_neutral, integer, number, refuse_other_keys
from stllava.checkpoint.tensor_file import Tensor
from stllava.config import LlavaConfig, VisionConfig
from stllava.errors import ConfigError, FormatError
from stllava.images import CLIP_MEAN, CLIP_STD
from stllava.limits import MAX_LAYERS, MAX_WIDTH

_SETTINGS = ("vision.image_size", "vision.patch_size", "vision.embedding_length", "vision.feed_forward_length", "vision.block_count",
             "vision.attention.head_count", "vision.attention.layer_norm_epsilon", "vision.projection_dim", "vision.image_mean", "vision.image_std",
             "vision.feature_layer", "use_gelu", "projector_type", "vision.projector_type")
_NEUTRAL: Mapping[str, tuple[Value, ...]] = {
    "has_vision_encoder": (True,), "has_llava_projector": (True,), "has_text_encoder": (False,), "has_audio_encoder": (False,), "use_silu": (False,),
    "projector_type": ("mlp",), "vision.projector_type": ("mlp",), "vision.mm_patch_merge_type": ("flat",), "vision.image_grid_pinpoints": ()}

_OUTER = {"v.class_embd": "embeddings.class_embedding", "v.patch_embd.weight": "embeddings.patch_embedding.weight",
          "v.position_embd.weight": "embeddings.position_embedding.weight", "v.pre_ln.weight": "pre_layrnorm.weight",
          "v.pre_ln.bias": "pre_layrnorm.bias"}
_IN_LAYER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj",
             "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_TO_LAYER = {canonical: short for short, canonical in _IN_LAYER.items()}
_TO_OUTER = {canonical: short for short, canonical in _OUTER.items()}
_TOWER = names.TOWER + "vision_model."
_OTHER_SPELLING = {"mlp.fc1": "mlp.fc2", "mlp.fc2": "mlp.fc1"}


def add_vision(config: LlavaConfig, file: GgufFile) -> LlavaConfig:
    """The decoder's configuration with the tower's and the projector's. Raises ConfigError for what is not implemented."""
    check_architecture(file, "clip")
    check_neutral(file, "clip.", _NEUTRAL)
    refuse_other_keys(file, "clip.", {*_SETTINGS, *_NEUTRAL})
    if "clip.projector_type" not in file.metadata and "clip.has_llava_projector" not in file.metadata:
        raise ConfigError(f"{file.path}: clip.projector_type is missing, supported: 'mlp'", path=file.path, field="clip.projector_type")
    for key, ours in (("clip.vision.image_mean", CLIP_MEAN), ("clip.vision.image_std", CLIP_STD)):
        given = file.metadata.get(key)
        if given is not None and not (isinstance(given, np.ndarray) and given.shape == (3,) and np.allclose(given, ours, atol=1e-6)):
            raise ConfigError(f"{file.path}: {key} is {str(given)[:80]}, supported: CLIP's {ours}", path=file.path, field=key)
    n_layers = integer(file, "clip.vision.block_count", MAX_LAYERS)
    used = file.metadata.get("clip.vision.feature_layer", np.array([n_layers]))
    if not isinstance(used, np.ndarray) or used.shape != (1,) or not 1 <= used[0] <= n_layers:
        raise ConfigError(f"{file.path}: clip.vision.feature_layer is {str(used)[:80]}, supported: one layer from 1 to {n_layers}", path=file.path,
                          field="clip.vision.feature_layer")
    try:
        vision = VisionConfig(
            image_size=integer(file, "clip.vision.image_size", MAX_WIDTH), patch_size=integer(file, "clip.vision.patch_size", MAX_WIDTH),
            hidden_size=integer(file, "clip.vision.embedding_length", MAX_WIDTH), num_hidden_layers=n_layers,
            num_attention_heads=integer(file, "clip.vision.attention.head_count", MAX_WIDTH),
            intermediate_size=integer(file, "clip.vision.feed_forward_length", MAX_WIDTH),
            hidden_act="gelu" if boolean(file, "clip.use_gelu", False) else "quick_gelu",
            layer_norm_eps=number(file, "clip.vision.attention.layer_norm_epsilon"))
        return dataclasses.replace(
            config, model_type="llava_llama", mm_vision_tower=file.path.name, mm_hidden_size=vision.hidden_size, mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=int(used[0]) - n_layers - 1, vision=vision, extra={**config.extra, "image_aspect_ratio": "pad"})  # llama.cpp pads
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}", path=file.path, field=error.field) from error


def canonical_names(config: LlavaConfig, file: GgufFile) -> Iterator[tuple[str, str]]:
    """(canonical name, name in the file) of every tensor. Raises ConfigError for one that changes the maths."""
    assert config.vision is not None
    up = file.tensors.get("v.blk.0.ffn_up.weight")
    swapped = up is not None and up.shape[0] != config.vision.intermediate_size
    for name in file.tensors:
        yield _canonical(file, name, swapped), name


def _canonical(file: GgufFile, name: str, swapped: bool) -> str:
    if name in _OUTER:
        return _TOWER + _OUTER[name]
    if match := re.fullmatch(r"mm\.([02])\.(weight|bias)", name):
        return f"{names.PROJECTOR}{match[1]}.{match[2]}"
    match = re.fullmatch(r"v\.blk\.(0|[1-9]\d{0,3})\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _IN_LAYER:
        raise ConfigError(f"{file.path}: tensor {name} is not one of a CLIP tower with an MLP of two layers", path=file.path, field=name)
    module = _IN_LAYER[match[2]]
    module = _OTHER_SPELLING.get(module, module) if swapped else module
    return f"{_TOWER}encoder.layers.{match[1]}.{module}.{match[3]}"


def _to_file(canonical: str) -> str:
    """Name in the file of a canonical tensor of tower or projector."""
    if names.is_projector(canonical):
        return "mm." + canonical.removeprefix(names.PROJECTOR)
    short = canonical.removeprefix(_TOWER)
    if short in _TO_OUTER:
        return _TO_OUTER[short]
    _, _, layer, rest = short.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"v.blk.{layer}.{_TO_LAYER[module]}.{kind}"


def write(path: str | os.PathLike[str], config: LlavaConfig, given: Mapping[str, np.ndarray], convert: Callable[[str, np.ndarray], Tensor],
          general: Mapping[str, Value]) -> None:
    """Write the tower as far as it is used, and the projector. Raises ConfigError for a model that llama.cpp's "mlp" projector cannot be."""
    vision = config.vision
    if vision is None:
        raise ConfigError("the geometry of the vision tower is not known; load the checkpoint with vision_tower=DIR", field="mm_vision_tower")
    for key, wanted in (("mm_projector_type", "mlp2x_gelu"), ("mm_vision_select_feature", "patch")):
        if getattr(config, key) != wanted:
            raise ConfigError(f"{key} is {getattr(config, key)!r}; llama.cpp has only {wanted!r}", field=key)
    n_layers = config.n_used_vision_layers
    metadata: dict[str, Value] = {
        "general.architecture": "clip", **general, "clip.has_vision_encoder": True, "clip.has_text_encoder": False, "clip.has_llava_projector": True,
        "clip.projector_type": "mlp", "clip.use_gelu": vision.hidden_act == "gelu", "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size, "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size, "clip.vision.projection_dim": config.hidden_size,
        "clip.vision.block_count": n_layers, "clip.vision.feature_layer": np.array([n_layers], np.int32),
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.layer_norm_eps), "clip.vision.image_mean": np.asarray(CLIP_MEAN, np.float32),
        "clip.vision.image_std": np.asarray(CLIP_STD, np.float32)}
    used = [name for name in (*names.vision_shapes(dataclasses.replace(vision, num_hidden_layers=max(n_layers, 1))), *names.projector_shapes(config))
            if ".post_layernorm." not in name]
    if n_layers < 1:
        raise ConfigError(f"mm_vision_select_layer is {config.mm_vision_select_layer}; llama.cpp needs the output of a layer",
                          field="mm_vision_select_layer")
    if missing := [name for name in used if name not in given]:
        raise FormatError(f"{len(missing)} tensors are missing, first {missing[0]}", field=missing[0])
    gguf_container.write(path, metadata, {_to_file(name): convert(name, given[name]) for name in used})
