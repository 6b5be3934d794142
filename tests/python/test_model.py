"""LlavaModel: files and back, adapters, merging, prefix sharing, generation, chat, scoring."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import config, tiny_model

from stllava.checkpoint.peft import LoraConfig
from stllava.demo.base import fresh_weights
from stllava.errors import ConfigError, FormatError
from stllava.generation import stream
from stllava.model import LlavaModel
from stllava.model.summary import short_count
from stllava.tree import Sequence


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)


def adapted(dtype="f32"):
    model = tiny_model(dtype)
    for part, rank in (("llm", 4), ("vit", 2)):
        for name in model.add_lora(LoraConfig(r=rank, lora_alpha=2 * rank), part, seed=1):
            if ".lora_B." in name:
                dict(model.named_parameters())[name][...] = np.random.default_rng(len(name)).normal(0, 0.1, dict(model.named_parameters())[name].shape)
    return model


IDS = [1, 306, -200, 4242, 29889, 11]


def test_full_round_trip(tmp_path):
    model = tiny_model()
    for format in ("safetensors", "bin"):
        model.save_pretrained(tmp_path / format, format=format, shard_size=3_000_000)
        again = LlavaModel.from_pretrained(tmp_path / format)
        assert again.tokenizer is not None and again.image_processor.size == 28
        np.testing.assert_array_equal(model.logits(IDS, [picture()]), again.logits(IDS, [picture()]))


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_adapter_round_trip(tmp_path, format):
    model = adapted()
    tiny_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", format=format)
    again = LlavaModel.from_pretrained(tmp_path / "adapter", tmp_path / "base")
    np.testing.assert_array_equal(model.logits(IDS, [picture()]), again.logits(IDS, [picture()]))


def test_fresh_adapters_change_nothing_and_can_be_switched_off():
    plain, model = tiny_model(), tiny_model()
    model.add_lora(LoraConfig(r=4, lora_alpha=8))
    want = plain.logits(IDS, [picture()])
    np.testing.assert_array_equal(want, model.logits(IDS, [picture()]))
    other = adapted()
    assert np.abs(want - other.logits(IDS, [picture()])).max() > 1e-3
    with other.disable_adapters():
        np.testing.assert_array_equal(want, other.logits(IDS, [picture()]))


@pytest.mark.parametrize("dtype, tolerance", [("f64", 1e-12), ("f32", 2e-5)])
def test_merged_equals_unmerged_and_back_is_exact(dtype, tolerance):
    model = adapted(dtype)
    want = model.logits(IDS, [picture()])
    merged = model.merge_and_unload().logits(IDS, [picture()])
    np.testing.assert_allclose(merged, want, atol=tolerance * np.abs(want).max(), rtol=0)
    model.merge_lora()
    np.testing.assert_allclose(model.logits(IDS, [picture()]), want, atol=tolerance * np.abs(want).max(), rtol=0)
    model.unmerge_lora()
    np.testing.assert_array_equal(model.logits(IDS, [picture()]), want)


@pytest.mark.parametrize("dtype, tolerance", [("f64", 1e-12), ("f32", 1e-5)])
def test_shared_prefixes_equal_the_unshared_computation(dtype, tolerance):
    """Log-probs and all gradients of a batch with a system text, two images, several questions of each, a text-only sample, and a pair."""
    rng = np.random.default_rng(0)
    head = [1, *rng.integers(3, 500, 6)]
    sequences = []
    for image in "ab":
        for question in ([5, 6, 7], [5, 6, 8], [9]):
            for answer in ([20, 21, 2], [20, 22, 23, 2]):
                ids = [*head, -200, *question, *answer]
                sequences.append(Sequence(ids, [-100] * (len(ids) - len(answer)) + answer, (image,), sample=len(sequences)))
    sequences.append(Sequence([*head, 40, 41, 2], [-100] * len(head) + [40, 41, 2], sample=99))
    results = []
    for share in (True, False):
        model = adapted(dtype)
        model.set_trainable([name for name, _ in model.named_parameters()])
        pixels = {name: model.image_processor(picture(ord(name))) for name in "ab"}
        trees, batch = model.batch(sequences, share=share)
        logp = model.run.forward(batch, pixels=model.pixels(pixels[key] for key in trees.image_keys), train=True)
        bounds = batch.sequence_begin
        weights = np.concatenate([np.linspace(-1, 1, bounds[leaf + 1] - bounds[leaf]) + i for i, leaf in enumerate(trees.order)])
        per_target = np.empty(len(logp))
        at = 0
        for leaf in trees.order:
            n = bounds[leaf + 1] - bounds[leaf]
            per_target[bounds[leaf]:bounds[leaf + 1]] = weights[at:at + n]
            at += n
        model.core.zero_grad()
        model.run.backward(per_target)
        results.append((np.concatenate([logp[bounds[leaf]:bounds[leaf + 1]] for leaf in trees.order]), np.array(model.core.grad.numpy()), batch.n_rows))
    (shared_logp, shared_grad, shared_rows), (plain_logp, plain_grad, plain_rows) = results
    assert shared_rows < plain_rows / 2
    np.testing.assert_allclose(shared_logp, plain_logp, atol=tolerance * np.abs(plain_logp).max(), rtol=0)
    np.testing.assert_allclose(shared_grad, plain_grad, atol=tolerance * np.abs(plain_grad).max(), rtol=0)


def test_a_sample_alone_equals_the_sample_in_any_batch():
    model = adapted()
    sequences = [Sequence([1, -200, 5 + i, 6, 7, 2], [-100, -100, -100, 6, 7, 2], ("ab"[i % 2],)) for i in range(5)]
    pixels = {name: model.image_processor(picture(ord(name))) for name in "ab"}
    together = model.logps(sequences, pixels, share=False)
    alone = [model.logps([s], pixels)[0] for s in sequences]
    np.testing.assert_array_equal(together, alone)


def test_generation_is_greedy_argmax_of_the_logits():
    model = adapted()
    [[found]] = model.generate([IDS], [picture()], max_new_tokens=6, eos_token_id=())
    ids = list(IDS)
    for token, logp in zip(found.ids, found.logps, strict=True):
        logits = model.logits(ids, [picture()])[-1].astype(np.float64)
        assert token == int(logits.argmax())
        assert logp == pytest.approx(logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max(), abs=1e-4)
        ids.append(token)


def test_sampling_depends_on_the_items_seed_only():
    model = adapted()
    prompts, pictures = [IDS, [1, -200, 99], [1, 55, 66]], [picture(0), picture(1), None]
    options = dict(max_new_tokens=8, temperature=1.2, top_k=100, top_p=0.95, num_return_sequences=2, eos_token_id=())
    whole = model.generate(prompts, pictures, seeds=[10, 11, 12, 13, 14, 15], **options)
    again = model.generate(prompts[::-1], pictures[::-1], seeds=[14, 15, 12, 13, 10, 11], batch_size=1, **options)
    assert [[g.ids for g in item] for item in whole] == [[g.ids for g in item] for item in again[::-1]]
    assert whole[0][0].ids != whole[0][1].ids


def test_stop_ids_and_stop_strings():
    model = adapted()
    [[free]] = model.generate([IDS], [picture()], max_new_tokens=10, eos_token_id=())
    [[ended]] = model.generate([IDS], [picture()], max_new_tokens=10, eos_token_id=free.ids[3])
    assert ended.finished and ended.ids == free.ids[:free.ids.index(free.ids[3]) + 1]
    words = model.tokenizer.decode(free.ids)
    stop = words[len(words) // 2:len(words) // 2 + 3]
    [[cut]] = model.generate([IDS], [picture()], max_new_tokens=10, eos_token_id=(), stop=[stop])
    assert cut.finished and stop not in cut.text and words.startswith(cut.text)


def test_chat_score_and_stream():
    model = adapted()
    text = model.chat([{"role": "user", "content": "What is it?"}], [picture()], max_new_tokens=5)
    prompt = model.tokenizer  # the same prompt by hand
    from stllava.conversation import conv_templates
    conversation = conv_templates["v1"].copy()
    conversation.append_message("USER", "<image>\nWhat is it?")
    conversation.append_message("ASSISTANT", None)
    [[by_hand]] = model.generate([conversation.get_prompt()], [picture()], max_new_tokens=5)
    assert text == by_hand.text and prompt is not None
    assert "".join(stream(model, conversation.get_prompt(), [picture()], max_new_tokens=5)).strip().startswith(text[:3])
    scores = model.score(conversation.get_prompt(), ["yes", "no, it is not"], [picture()])
    assert scores.shape == (2,) and (scores < 0).all()
    with pytest.raises(ValueError, match="message 1 has role 'user'"):
        model.chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_what_a_model_was_made_without_is_named():
    model = LlavaModel(config(), fresh_weights(config(), 0))
    assert not model.has_tokenizer and not model.theta.size and not model.grad.size
    with pytest.raises(ConfigError, match="has no tokenizer; pass ids"):
        model.chat([{"role": "user", "content": "a"}])
    with pytest.raises(ConfigError, match="has no image processor; pass preprocessed"):
        model.encode_images([picture()])
    with pytest.raises(ValueError, match="name 1 images, but no pixels are given"):
        model.logps([Sequence([1, -200, 7], [-100, -100, 7], ("x",))])
    with pytest.raises(ValueError, match="prompt 0 is a text, but the model has no tokenizer"):
        model.generate(["a"], max_new_tokens=1)
    [[free]] = model.generate([[1, 306]], max_new_tokens=3)
    assert len(free.ids) == 3 and free.text == ""


def test_encode_images_gives_the_features_a_forward_uses():
    model = adapted()
    features = model.encode_images([picture(0), picture(1)])
    assert features.shape == (2, 16, 64)
    _trees, batch = model.batch([Sequence([1, -200, 7, 8], [-100, -100, 7, 8], ("x",))])
    with_pixels = model.run.forward(batch, pixels=model.pixels([picture(1)]))
    np.testing.assert_array_equal(with_pixels, model.run.forward(batch, features=np.ascontiguousarray(features[1])))


def test_missing_surplus_and_misshapen_tensors_are_named():
    cfg = config()
    weights = fresh_weights(cfg, 0)
    weights["model.bogus"] = np.zeros(3, np.float32)
    weights["model.norm.weight"] = np.zeros(7, np.float32)
    del weights["lm_head.weight"]
    with pytest.raises(FormatError) as caught:
        LlavaModel(cfg, weights)
    for text in ("3 tensors", "model.bogus: not a tensor", "model.norm.weight: want (64,), found (7,)", "lm_head.weight: missing, want (32000, 64)"):
        assert text in str(caught.value)


def test_adapter_errors():
    model = tiny_model()
    with pytest.raises(ConfigError, match="no linear module"):
        model.add_lora(LoraConfig(target_modules=frozenset({"nothing"})))
    model.add_lora(LoraConfig(r=2))
    with pytest.raises(ConfigError, match="adapters already"):
        model.add_lora(LoraConfig(r=2))
    other = tiny_model()
    lora = {name: np.zeros((2, 10), np.float32) for name in ("model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight")}
    with pytest.raises(FormatError, match="another base"):
        other.attach_lora(LoraConfig(r=2), lora)


def test_saved_adapters_say_where_they_sit(tmp_path):
    """PEFT finds the modules by target_modules; an empty list would attach nothing."""
    model = adapted()
    model.save_pretrained(tmp_path)
    read = {folder: set(json.loads((tmp_path / folder / "adapter_config.json").read_text())["target_modules"]) for folder in ("", "Vit-lora")}
    assert read == {"": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
                    "Vit-lora": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}}


def test_layers_to_transform_is_honoured():
    fresh = tiny_model().add_lora(LoraConfig(r=2, target_modules=frozenset({"q_proj"}), layers_to_transform=(1,)))
    assert fresh == ["model.layers.1.self_attn.q_proj.lora_A.weight", "model.layers.1.self_attn.q_proj.lora_B.weight"]


def test_a_tower_adapter_needs_a_tower():
    cfg = config(mm_vision_tower=None, mm_vision_config=None)
    model = LlavaModel(cfg, fresh_weights(cfg, 0))
    with pytest.raises(ConfigError, match="no linear module of the vit part"):
        model.add_lora(LoraConfig(r=2), "vit")


def test_a_model_says_in_one_line_what_it_is():
    model = tiny_model(vocab_size=32)
    line = repr(model)
    assert line.startswith("LlavaModel(") and "\n" not in line
    n = sum(array.size for array in model.tensors().values())
    assert f"parameters: {n / 1000:.3g} k, weights: f32, computes in: f32 on cpu, adapters: none, trainable: 0)" in line
    fresh = model.add_lora(LoraConfig(r=4, lora_alpha=8))
    model.set_trainable(fresh)
    n_lora = model.theta.size
    assert f"adapters: llm r=4, {n_lora / 1000:.3g} k, trainable: {n_lora / 1000:.3g} k)" in repr(model)
    with model.disable_adapters():
        assert "switched off" in repr(model) and "switched off" in model._repr_html_()
    assert model._repr_html_().count("<tr>") == 2 and f"<td>{n_lora / 1000:.3g} k</td>" in model._repr_html_()
    halves = LlavaModel(config(32), {name: array.astype(np.float16) for name, array in fresh_weights(config(32), 0).items()})
    assert "weights: f16, computes in: f32" in repr(halves)


@pytest.mark.parametrize(("n", "text"), [(7, "7"), (999, "999"), (1000, "1 k"), (965_124, "965 k"), (999_600, "1 M"), (7_241_732_096, "7.24 B")])
def test_counts_are_short(n, text):
    assert short_count(n) == text
