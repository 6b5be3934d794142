"""A tiny random model with all three parts, straight from stllava_c, for tests of the binding (28 px, 16 image tokens, width 64, 128 token ids)."""

from __future__ import annotations

import numpy as np

import stllava_c

VISION = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "n_layers": 3, "n_heads": 4, "intermediate_size": 48, "activation": "quick_gelu",
          "layer_norm_eps": 1e-5, "select_layer": -2, "select_feature": "patch"}
PROJECTOR = {"kind": "cluster", "in_size": 32, "out_size": 64, "depth": 0, "n_centers": 4, "n_rounds": 2}
DECODER = {"vocab_size": 128, "hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "intermediate_size": 96,
           "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 0, "tie_word_embeddings": False}
CONFIG = {"vision": VISION, "projector": PROJECTOR, "decoder": DECODER}
NUMPY = {"f32": np.float32, "f64": np.float64}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def bind_all(model: stllava_c.Model, seed: int = 0) -> stllava_c.Model:
    rng = np.random.default_rng(seed)
    for info in model.tensors():
        model.bind(info.name, rng.normal(0, 0.2, info.shape).astype(NUMPY[model.dtype]))
    return model


def tiny(dtype: str = "f32", **parts) -> stllava_c.Model:
    return bind_all(stllava_c.Model({**CONFIG, **parts}, dtype=dtype))


def pixels(n: int = 1, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 28, 28)).astype(np.float32)


def text_batch(model: stllava_c.Model, ids=(1, 5, 7, 9)) -> stllava_c.Batch:
    """One sequence without images; every token but the first is a target."""
    return stllava_c.Batch(model, parent=[-1], begin=[0, len(ids)], ids=list(ids), labels=[-100, *ids[1:]])


def pair_batch(model: stllava_c.Model) -> stllava_c.Batch:
    """One image prefix of 3 tokens and two answers of 2 and 1 tokens."""
    return stllava_c.Batch(model, parent=[-1, 0, 0], begin=[0, 3, 5, 6], ids=[1, -200, 4, 11, 12, 13], labels=[-100, -100, -100, 11, 12, 13],
                           sample=[7, 7, 8], image=[0], n_images=1)
