"""Frozen weights in float16 and bfloat16: used where they lie, with the bits of the model whose weights are widened; saved as they are stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_determinism import trained
from tiny import config, dpo_records, sft_records, tiny_model, write_pictures
from tiny_core import DECODER, tiny

import stllava_c
from stllava.checkpoint import directory, safetensors_file
from stllava.checkpoint.peft import LoraConfig
from stllava.checkpoint.tensor_file import count_nonfinite, dtype_name, round_to, to_float32
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.demo.base import fresh_weights
from stllava.errors import ConfigError, NumericsError
from stllava.model import LlavaModel
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOTrainer
from stllava.train.sft import SFTTrainer
from stllava.tree import Sequence

IDS = [1, 306, -200, 4242, 29889, 11]
UP = "model.layers.0.mlp.up_proj"


def stored(kind: str) -> dict[str, np.ndarray]:
    """The tiny model's weights in "f16", "bf16", or every third in each of f16, bf16 and f32 ("mixed"); some values subnormal."""
    tensors = {}
    for i, (name, array) in enumerate(fresh_weights(config(), 0).items()):
        values = np.array(array)
        if values.ndim > 1 and values.size > 100:
            values.flat[::37] *= 1e-5
        tensors[name] = round_to(values, kind if kind != "mixed" else ("f16", "bf16", "f32")[i % 3])
    return tensors


def model_of(tensors: dict[str, np.ndarray], dtype: str = "f32") -> LlavaModel:
    like = tiny_model()
    return LlavaModel(config(), tensors, dtype=dtype, tokenizer=like.tokenizer, image_processor=like.image_processor)


def widened(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: to_float32(array) for name, array in tensors.items()}


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)


# ---- the same bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "mixed"])
def test_logits_and_generation(kind, dtype):
    tensors = stored(kind)
    half, wide = model_of(tensors, dtype), model_of(widened(tensors), dtype)
    np.testing.assert_array_equal(half.logits(IDS, [picture()]), wide.logits(IDS, [picture()]))
    np.testing.assert_array_equal(half.encode_images([picture()]), wide.encode_images([picture()]))
    options = {"max_new_tokens": 6, "temperature": 1.0, "seeds": [3, 4], "eos_token_id": ()}
    texts = [[(g.ids, g.logps) for of_prompt in model.generate([IDS, [1, 5]], [picture(), None], **options) for g in of_prompt] for model in (half, wide)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("trainer_of", ["sft", "dpo"])
def test_training(kind, trainer_of, tmp_path):
    """Adapters of both parts and the projector; two threads against one."""
    names = write_pictures(tmp_path)
    tensors, before, bits = stored(kind), stllava_c.get_num_threads(), []
    for n_threads, weights in ((2, tensors), (1, widened(tensors))):
        model = model_of(weights)
        stllava_c.set_num_threads(n_threads)
        for part in ("llm", "vit"):
            model.add_lora(LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1), part)
        options = {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "image_folder": tmp_path,
                   "tokens_per_image": model.core.tokens_per_image}
        if trainer_of == "sft":
            trainer = SFTTrainer(model, SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=3), SFTDataset(sft_records(names), **options))
        else:
            trainer = DPOTrainer(model, DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4), DPODataset(dpo_records(names), **options))
        bits.append(trained(trainer))
        assert "model.mm_projector.f.weight" in model.trainable and model.tensors()["model.mm_projector.f.weight"].dtype == np.float32
    stllava_c.set_num_threads(before)
    assert bits[0] == bits[1]


def test_bf16_adapters_are_widened():
    wide, half = (tiny_model() for _ in range(2))
    fresh = tiny_model()
    fresh.add_lora(LoraConfig(r=2, lora_alpha=4))
    values = {name: round_to(np.random.default_rng(1).normal(0, 0.1, array.shape), "bf16") for name, array in fresh.lora_tensors().items()}
    half.attach_lora(fresh.lora["llm"], values)
    wide.attach_lora(fresh.lora["llm"], widened(values))
    np.testing.assert_array_equal(half.logits([1, 2, 3]), wide.logits([1, 2, 3]))
    assert all(array.dtype == np.float32 for array in half.lora_tensors().values())


# ---- memory ------------------------------------------------------------------------------------------------------------------------


def test_a_map_stays_a_map(tmp_path):
    tensors = stored("bf16")
    safetensors_file.write(tmp_path / "w.safetensors", tensors)
    mapped = dict(safetensors_file.read(tmp_path / "w.safetensors"))
    models, costs = [], []
    for weights in (mapped, widened(tensors)):
        before = stllava_c.allocations()
        models.append(model_of(weights))
        costs.append(stllava_c.allocations() - before)
        models[-1].logits(IDS, [picture()])
    assert costs[0] == costs[1] and models[0].run.arena_bytes == models[1].run.arena_bytes
    for name, array in models[0].tensors().items():
        assert array.dtype == np.uint16 and array.ctypes.data == mapped[name].ctypes.data and not array.flags.writeable


def test_the_core_takes_no_memory_for_a_binding():
    model = stllava_c.Model({"vision": None, "projector": None, "decoder": DECODER})
    before = stllava_c.allocations()
    for info in model.tensors():
        model.bind(info.name, np.zeros(info.shape, np.float16 if info.size % 3 else np.uint16))
    assert stllava_c.allocations() == before
    assert {info.dtype for info in model.tensors()} == {"f16", "bf16"}


@pytest.mark.parametrize("change", [lambda a: np.asfortranarray(a), lambda a: a.astype(a.dtype.newbyteorder(">")), lambda a: np.repeat(a, 2, -1)[..., ::2],
                                    lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)],
                         ids=["fortran", "big endian", "strided", "unaligned"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_arrays_that_cannot_stay_are_copied(kind, change):
    tensors = stored(kind)
    want = model_of(tensors)
    model = model_of({name: change(array) for name, array in tensors.items()})
    for name, array in model.tensors().items():
        np.testing.assert_array_equal(array, want.tensors()[name])
        assert array.dtype == want.tensors()[name].dtype


# ---- the core's door ---------------------------------------------------------------------------------------------------------------


def test_views_and_table_tell_the_stored_dtype():
    model = tiny()
    for kind, numpy, format in (("f16", np.float16, "e"), ("bf16", np.uint16, "H"), ("f32", np.float32, "f")):
        array = round_to(np.random.default_rng(0).normal(size=(96, 64)), kind)
        model.bind(f"{UP}.weight", array)
        tensor = model.tensor(f"{UP}.weight")
        assert tensor.dtype == kind and tensor.numpy().dtype == numpy and memoryview(tensor).format == format
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert {info.name: info.dtype for info in model.tensors()}[f"{UP}.weight"] == kind
    model.bind(f"{UP}.weight", np.ones((96, 64), np.float16))
    model.set_trainable([f"{UP}.weight"])
    assert model.tensor(f"{UP}.weight").dtype == "f32" and (model.theta.numpy() == 1).all()
    model.bind(f"{UP}.weight", round_to(np.full((96, 64), 3.0), "bf16"))
    assert (model.theta.numpy() == 3).all()


@pytest.mark.parametrize("dtype, array, kind, message", [
    ("f32", np.zeros(64), TypeError, r"want f32, f16 or bf16 \(as uint16\), got f64"), ("f32", np.zeros(64, np.int16), TypeError, "got h"),
    ("f32", np.zeros(64, ">f2"), TypeError, "got >e"), ("f32", np.zeros(64, ">u2"), TypeError, "got >H"), ("f64", np.zeros(64, np.int32), TypeError, "f64, f32"),
    ("f32", np.zeros(63, np.float16), ValueError, "63 elements, want 64"), ("f32", np.zeros((64, 2), np.uint16)[:, 0], ValueError, "contiguous"),
    ("f32", np.frombuffer(bytes(129), np.uint8)[1:].view(np.uint16), ValueError, "multiple of its 2-byte"), ("f32", [1.0] * 64, TypeError, "buffer protocol"),
])
def test_bind_refuses(dtype, array, kind, message):
    model = tiny(dtype)
    with pytest.raises(kind, match=f"model.norm.weight.*{message}"):
        model.bind("model.norm.weight", array)
    assert model.tensor("model.norm.weight").dtype == dtype


def test_nan_is_noticed_and_named(tmp_path):
    tensors = stored("bf16")
    tensors[f"{UP}.weight"][3, 5] = 0x7FC1
    model = model_of(tensors)
    names = write_pictures(tmp_path)
    with pytest.raises(stllava_c.NumericError, match="NaN or Inf"):
        model.logps([Sequence([1, 2, 3], [-100, 2, 3])])
    data = SFTDataset(sft_records(names), model.tokenizer, model.image_processor, image_folder=tmp_path, tokens_per_image=model.core.tokens_per_image)
    trainer = SFTTrainer(model, SFTConfig(str(tmp_path / "out"), max_steps=1, disable_tqdm=True), data)
    with pytest.raises(NumericsError, match=f"weights {UP}.weight"):
        trainer.train()


# ---- files and merging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "mixed"])
def test_what_is_saved_keeps_its_dtype(kind, format, tmp_path):
    tensors = stored(kind)
    model_of(tensors).save_pretrained(tmp_path / "m", format=format)
    found = directory.read_checkpoint(tmp_path / "m")
    for name, array in found.tensors.items():
        assert dtype_name(array) == dtype_name(tensors[name])
        np.testing.assert_array_equal(array, tensors[name])
    embed = dtype_name(tensors["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[embed]
    again = LlavaModel.from_pretrained(tmp_path / "m")
    np.testing.assert_array_equal(again.logits(IDS, [picture()]), model_of(widened(tensors)).logits(IDS, [picture()]))


def adapted(tensors: dict[str, np.ndarray]) -> LlavaModel:
    model = model_of(tensors)
    for name in model.add_lora(LoraConfig(r=4, lora_alpha=8)):
        model.core.bind(name, np.random.default_rng(len(name)).normal(0, 0.1, model.tensor_infos()[name].shape).astype(np.float32))
    return model


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_merging_rounds_to_the_base_dtype_unless_told_otherwise(kind):
    model = adapted(stored(kind))
    exact, base = model.core.effective_weight(UP), model.tensors()
    assert exact.dtype == np.float32
    other = "f16" if kind == "bf16" else "bf16"
    for dtype, want in ((None, round_to(exact, kind)), (other, round_to(exact, other)), ("f32", exact)):
        merged = model.merge_and_unload(dtype=dtype)
        np.testing.assert_array_equal(merged.tensors()[f"{UP}.weight"], want)
        assert merged.tensors()[f"{UP}.weight"].dtype == want.dtype
        untouched = merged.tensors()["model.embed_tokens.weight"]
        assert untouched.ctypes.data == base["model.embed_tokens.weight"].ctypes.data
        del merged, untouched
    merged = model.merge_and_unload(dtype="f32").logits(IDS, [picture()])
    want = model.logits(IDS, [picture()])
    np.testing.assert_allclose(merged, want, atol=2e-5 * np.abs(want).max(), rtol=0)
    with pytest.raises(ConfigError, match="'f8'"):
        model.merge_and_unload(dtype="f8")


def test_a_merged_weight_that_does_not_fit_f16_is_named():
    model = adapted(stored("f16"))
    model.core.bind(f"{UP}.lora_A.weight", np.full((4, 64), 1e6, np.float32))
    with pytest.raises(NumericsError, match=f"{UP}.weight: .* is too large for f16; choose another dtype: bf16"):
        model.merge_and_unload()
    assert count_nonfinite(model.merge_and_unload(dtype="bf16").tensors()[f"{UP}.weight"]) == 0


# ---- rounding ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rounding_is_to_nearest_even_for_every_pair_of_neighbours(kind):
    """Between two neighbours of the type: the middle goes to the even one, everything else to the nearer."""
    bits = np.arange(0x7C00 if kind == "f16" else 0x7F80, dtype=np.uint16)  # finite, positive
    values = bits.view(np.float16).astype(np.float32) if kind == "f16" else to_float32(bits)
    low, high, even = values[:-1], values[1:], np.where(bits[:-1] % 2, bits[1:], bits[:-1])
    middle = (low.astype(np.float64) + high) / 2
    exact = middle.astype(np.float32)
    assert (exact == middle).all()  # f32 holds the middle of f16's and bf16's neighbours
    for sign in (1, -1):
        def rounded(x, sign=sign):
            return round_to(sign * x, kind).view(np.uint16) & 0x7FFF
        np.testing.assert_array_equal(rounded(values), bits)
        np.testing.assert_array_equal(rounded(exact), even)
        np.testing.assert_array_equal(rounded(np.nextafter(exact, np.float32(np.inf))), bits[1:])
        np.testing.assert_array_equal(rounded(np.nextafter(exact, np.float32(0))), bits[:-1])


def test_rounding_of_what_is_no_number():
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 3.4e38, 65520, 65519], np.float32)
    bits = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    for kind in ("f16", "bf16"):
        assert np.isnan(to_float32(round_to(bits, kind))).all()
    np.testing.assert_array_equal(to_float32(round_to(special, "bf16"))[:5], np.array([np.nan, np.nan, np.inf, -np.inf, np.inf], np.float32))
    np.testing.assert_array_equal(round_to(special, "f16"), np.array([np.nan, np.nan, np.inf, -np.inf, np.inf, np.inf, 65504], np.float16))
