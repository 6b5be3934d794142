"""Features on disk: the same bits, for everything they depend on a name of its own, and damage is computed anew."""

from __future__ import annotations

import numpy as np
import pytest
from talking import picture, talking_model
from tiny import tiny_model

from stllava.checkpoint.peft import LoraConfig
from stllava.feature_cache import FeatureCache
from stllava.generation import generate

PIXELS = np.random.default_rng(0).normal(size=(3, 3, 28, 28)).astype(np.float32)


def files(folder):
    return sorted(folder.rglob("*.features"))


def test_what_is_found_is_what_was_computed(tmp_path):
    model = tiny_model()
    want = model.encode_images(PIXELS)
    cache = FeatureCache(tmp_path, model)
    for n_computed, n_found in ((2, 0), (3, 2)):
        np.testing.assert_array_equal(cache.features(PIXELS[:n_computed]), want[:n_computed])
        assert (cache.n_computed, cache.n_found, len(files(tmp_path))) == (n_computed, n_found, n_computed)
    again = FeatureCache(tmp_path, tiny_model())  # the same weights, elsewhere
    np.testing.assert_array_equal(again.features(PIXELS[::-1]), want[::-1])
    assert (again.n_computed, again.n_found) == (0, 3)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], lambda data: data + b"x", lambda data: b""])
def test_damage_is_computed_anew(tmp_path, damage):
    model = tiny_model()
    want = FeatureCache(tmp_path, model).features(PIXELS)
    good = files(tmp_path)[1].read_bytes()
    files(tmp_path)[1].write_bytes(damage(good))
    cache = FeatureCache(tmp_path, model)
    np.testing.assert_array_equal(cache.features(PIXELS), want)
    assert (cache.n_computed, cache.n_found) == (1, 2) and files(tmp_path)[1].read_bytes() == good


def test_whatever_changes_features_changes_the_name(tmp_path):
    def changed(change):
        model = tiny_model()
        change(model)
        return model

    def adapted(model, alpha=16):
        for name in model.add_lora(LoraConfig(r=2, lora_alpha=alpha), "vit"):
            model.core.tensor(name).numpy()[...] = 0.1

    def off(model):
        adapted(model)
        model.adapters_enabled = False

    def nudge(name):
        return lambda model: model.core.tensor(name).numpy().__setitem__(..., 0.5)

    models = [tiny_model(), tiny_model(seed=1), tiny_model("f64"), tiny_model(num_latents=5), tiny_model(mm_vision_select_layer=-1), changed(adapted),
              changed(lambda model: adapted(model, alpha=8)), changed(off), changed(nudge("model.mm_projector.sim_alpha")),
              changed(nudge("model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"))]
    for n, model in enumerate(models, 1):
        pixels = PIXELS[:1].astype(np.float64 if model.dtype == "f64" else np.float32)
        np.testing.assert_array_equal(FeatureCache(tmp_path, model).features(pixels), model.encode_images(pixels))
        assert len(files(tmp_path)) == n
    model = tiny_model()
    model.add_lora(LoraConfig(r=2))  # of the decoder
    FeatureCache(tmp_path, model).features(PIXELS[:1])
    assert len(files(tmp_path)) == len(models)


def test_answers_are_the_same_with_it(tmp_path):
    model = talking_model()
    first, second = picture(0), picture(1)
    prompts, shown = [[1, -200, 5], [1, -200, -200, 7], [1, 9]], [first, (second, first), None]
    want = generate(model, prompts, shown, max_new_tokens=5)
    for n_found in (0, 2):
        cache = FeatureCache(tmp_path, model)
        assert generate(model, prompts, shown, max_new_tokens=5, feature_cache=cache) == want
        assert (cache.n_found, cache.n_found + cache.n_computed, len(files(tmp_path))) == (n_found, 2, 2)
