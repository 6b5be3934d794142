"""Parts of the 7B model in their real shapes against transformers (f32, recorded by record_real_shapes.py), drawn weights."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import real_shapes
from real_shapes import DECODER, TOWER, draw

import stllava_c
from stllava.checkpoint.tensor_file import round_to

RECORDED = Path(__file__).with_name("real_shapes.npz")


@pytest.fixture(scope="module")
def recorded() -> Iterator[dict[str, np.ndarray]]:
    assert zipfile.is_zipfile(RECORDED)
    with np.load(RECORDED) as file:
        yield dict(file)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def tower() -> stllava_c.Model:
    return stllava_c.Model({"projector": None, "decoder": None, "vision": {
        "image_size": TOWER["image_size"], "patch_size": TOWER["patch_size"], "hidden_size": TOWER["hidden_size"], "n_layers": TOWER["num_hidden_layers"],
        "n_heads": TOWER["num_attention_heads"], "intermediate_size": TOWER["intermediate_size"], "activation": "quick_gelu",
        "layer_norm_eps": TOWER["layer_norm_eps"], "select_layer": -2, "select_feature": "patch"}})


def decoder() -> stllava_c.Model:
    return stllava_c.Model({"vision": None, "projector": None, "decoder": {
        "vocab_size": DECODER["vocab_size"], "hidden_size": DECODER["hidden_size"], "n_layers": DECODER["num_hidden_layers"],
        "n_heads": DECODER["num_attention_heads"], "n_kv_heads": DECODER["num_key_value_heads"],
        "head_dim": DECODER["hidden_size"] // DECODER["num_attention_heads"], "intermediate_size": DECODER["intermediate_size"],
        "rms_norm_eps": DECODER["rms_norm_eps"], "rope_theta": 1e4, "sliding_window": 0, "tie_word_embeddings": False}})


def test_tower(recorded: dict[str, np.ndarray]) -> None:
    """Least cosine of a token's features: f32 1 - 4e-8, which is f16's rounding of what is recorded; weights in bf16 .99996."""
    model = tower()
    run = stllava_c.Run(model)
    for narrow, least in ((False, 1 - 1e-6), (True, 0.9995)):
        for name, shape in real_shapes.tower_shapes():
            values = draw(name, shape)
            model.bind(f"model.vision_tower.vision_tower.vision_model.{name}", round_to(values, "bf16") if narrow and len(shape) > 1 else values)
        features = np.asarray(run.vision_forward(real_shapes.pixels()))[real_shapes.TOKENS]
        assert cosines(features, recorded["features"]).min() > least


@pytest.mark.long
def test_decoder(recorded: dict[str, np.ndarray]) -> None:
    """666 million weights. f32: log-probabilities to 2e-5; weights in bf16: the largest logit is the same in 99 % of the rows, or where it is not, the
    reference has two that are as near as bf16's rounding."""
    model = decoder()
    run = stllava_c.Run(model)
    ids = real_shapes.ids()
    batch = stllava_c.Batch(model, parent=[-1], begin=[0, len(ids)], ids=ids, labels=ids)
    for narrow in (False, True):
        for name, shape in real_shapes.decoder_shapes():
            values = draw(name, shape)
            model.bind(name, round_to(values, "bf16") if narrow and len(shape) > 1 else values)
        logps = run.forward(batch)
        logits = np.asarray(run.logits(np.arange(len(ids))))
        top = recorded["top_logits"]
        found = np.take_along_axis(logits, recorded["top_ids"].astype(np.int64), axis=1)
        if narrow:
            error = np.abs(found - top).max()
            same = logits.argmax(1) == recorded["top_ids"][:, 0]
            assert (same | (top[:, 0] - top[:, 1] < 2 * error)).all()
            assert error < 0.05
        else:
            assert np.abs(logps - recorded["logps"]).max() < 2e-5
            assert np.abs(found - top).max() < 2e-5
            assert (logits.argmax(1) == recorded["top_ids"][:, 0]).all()
