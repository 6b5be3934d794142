"""Parts of LLaVA-1.5-7B in their real shapes with drawn weights: what `record_real_shapes.py` feeds to transformers and `test_real_shapes.py` to us."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

TOWER = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
DECODER = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32,
           "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
TOKENS = slice(0, 576, 12)  # of the features, those that are recorded
TOP = 4


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform with variance 1/in for matrices, small for vectors, near one for norms: activations stay in a trained network's range."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.random(shape, np.float32) * np.float32(2) - np.float32(1)
    if "norm" in name and name.endswith("weight"):
        return np.float32(1) + values * np.float32(0.1)
    if "embed" in name or "embedding" in name:
        return values * np.float32(0.5)
    return values * np.float32((3 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.05)


def tower_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names below `vision_model.`, the last layer and the norm behind it left out: features come from the layer before."""
    d, f = TOWER["hidden_size"], TOWER["intermediate_size"]
    yield "embeddings.class_embedding", (d,)
    yield "embeddings.patch_embedding.weight", (d, 3, TOWER["patch_size"], TOWER["patch_size"])
    yield "embeddings.position_embedding.weight", ((TOWER["image_size"] // TOWER["patch_size"]) ** 2 + 1, d)
    yield "pre_layrnorm.weight", (d,)
    yield "pre_layrnorm.bias", (d,)
    for i in range(TOWER["num_hidden_layers"] - 1):
        layer = f"encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{layer}{norm}.weight", (d,)
            yield f"{layer}{norm}.bias", (d,)
        for name, n_out, n_in in (*((f"self_attn.{x}_proj", d, d) for x in ("q", "k", "v", "out")), ("mlp.fc1", f, d), ("mlp.fc2", d, f)):
            yield f"{layer}{name}.weight", (n_out, n_in)
            yield f"{layer}{name}.bias", (n_out,)


def decoder_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    v, d, f = DECODER["vocab_size"], DECODER["hidden_size"], DECODER["intermediate_size"]
    yield "model.embed_tokens.weight", (v, d)
    for i in range(DECODER["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield f"{layer}input_layernorm.weight", (d,)
        yield f"{layer}post_attention_layernorm.weight", (d,)
        for name, n_out, n_in in (*((f"self_attn.{x}_proj", d, d) for x in "qkvo"), ("mlp.gate_proj", f, d), ("mlp.up_proj", f, d), ("mlp.down_proj", d, f)):
            yield f"{layer}{name}.weight", (n_out, n_in)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (v, d)


def pixels() -> np.ndarray:
    """(1, 3, 336, 336) f32: smooth, as photographs are, with some noise."""
    y, x = np.mgrid[0:336, 0:336].astype(np.float32) / np.float32(336)
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(5 * x * y + 1), np.sin(7 * y - 3 * x)])
    return (waves + np.random.default_rng(1).normal(size=waves.shape) * 0.3).astype(np.float32)[None]


def ids() -> np.ndarray:
    """(48,)"""
    return np.random.default_rng(2).integers(3, DECODER["vocab_size"], 48)
