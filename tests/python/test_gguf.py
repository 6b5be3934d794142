"""GGUF files: against the package `gguf`, against rules written down here once more, and there and back."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
import tiny
from text_data import TEMPLATES, load

from stllava.checkpoint import gguf_container, names
from stllava.checkpoint.directory import Checkpoint
from stllava.checkpoint.gguf_file import read_gguf, write_gguf
from stllava.checkpoint.tensor_file import round_to, to_float32
from stllava.config import LlavaConfig
from stllava.demo.base import fresh_weights
from stllava.errors import ConfigError, FormatError, NumericsError
from stllava.model import LlavaModel
from stllava.text import Tokenizer, gguf_tokenizer
from stllava.text.fast_tokenizer import FastTokenizer
from stllava.text.sentencepiece_model import SentencePieceModel

gguf = pytest.importorskip("gguf", reason="pip install 'stllava[gguf]'")
pytest.importorskip("tokenizers", reason="pip install 'stllava[tokenizers]'")

SMALL_MODEL = Path(__file__).parent / "recorded" / "small_tokenizer.model"
TEXTS = load(Path(__file__).parent / "recorded" / "fast_tokenizer.json")["texts"]
CASES = load(Path(__file__).parent / "recorded" / "fast_tokenizer.json")["cases"]
DECODER = {"model_type": "llama", "vocab_size": 560, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
           "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 128}
VISION = tiny.VISION | {"hidden_size": 48, "intermediate_size": 64}


def decoder(tied: bool = False, **changes) -> Checkpoint:
    config = LlavaConfig.from_dict(DECODER | {"tie_word_embeddings": tied} | changes)
    return Checkpoint(config, fresh_weights(config, 0))


def llava(**changes) -> LlavaModel:
    config = LlavaConfig.from_dict(DECODER | {"model_type": "llava_llama", "mm_vision_tower": "tiny", "mm_hidden_size": 48, "mm_projector_type": "mlp2x_gelu",
                                              "mm_vision_config": VISION, "image_aspect_ratio": "pad"} | changes)
    return LlavaModel(config, fresh_weights(config, 0), tokenizer=Tokenizer(SMALL_MODEL))


@pytest.fixture
def written(tmp_path):
    write_gguf(tmp_path / "m.gguf", decoder(), Tokenizer(SMALL_MODEL), dtype="f32")
    return tmp_path / "m.gguf"


# ---- there and back --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_what_is_written_is_read_back(tmp_path, dtype, tied):
    model = decoder(tied)
    write_gguf(tmp_path / "m.gguf", model, Tokenizer(SMALL_MODEL), dtype=dtype)
    again = read_gguf(tmp_path / "m.gguf")
    assert again.config == model.config and again.config.extra["eos_token_id"] == 2
    assert again.tensors.keys() == names.decoder_shapes(model.config).keys()
    for name, array in again.tensors.items():
        want = round_to(model.tensors[name], "f32" if array.ndim == 1 else dtype)
        assert array.dtype == want.dtype and not array.flags.writeable
        np.testing.assert_array_equal(array, want, err_msg=name)
        assert array.base is not None, f"{name} is a copy"
    write_gguf(tmp_path / "again.gguf", again, Tokenizer(SMALL_MODEL), dtype=dtype)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_rounding_to_bf16_is_to_nearest_even():
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF7F0000, 0x7F800000, 0x7FFFFFFF, 0x00000001], np.uint32)
    assert round_to(bits.view(np.float32), "bf16").tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF7F, 0x7F80, 0x7FC0, 0]
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.abs(to_float32(round_to(values, "bf16")) - values).max() <= 2**-8 * np.abs(values).max()


def test_the_package_reads_what_we_write(written):
    reader, model = gguf.GGUFReader(written), decoder()
    own = gguf_container.read(written)
    assert {key: own.metadata[key] for key in ("general.architecture", "llama.block_count", "llama.attention.head_count_kv", "llama.vocab_size")} == {
        "general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count_kv": 2, "llama.vocab_size": 560}
    for key, value in own.metadata.items():
        theirs = reader.fields[key].contents()
        assert list(value) == theirs if isinstance(value, np.ndarray) else value == theirs, key
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == own.tensors.keys()
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"].data, model.tensors["model.layers.1.mlp.down_proj.weight"])
    np.testing.assert_array_equal(found["output.weight"].data, model.tensors["lm_head.weight"])
    for short, n_heads in (("q", 6), ("k", 2)):
        ours, theirs = model.tensors[f"model.layers.0.self_attn.{short}_proj.weight"], found[f"blk.0.attn_{short}.weight"].data
        for head in range(n_heads):
            for i in range(4):  # half of a head of 8 channels
                np.testing.assert_array_equal(theirs[8 * head + 2 * i], ours[8 * head + i])
                np.testing.assert_array_equal(theirs[8 * head + 2 * i + 1], ours[8 * head + 4 + i])


QUANTIZED = [kind for kind in gguf.GGML_QUANT_SIZES if kind.name.lower() not in ("f32", "f16", "f64", "bf16", "i8", "i16", "i32", "i64", "q8_1", "q8_k", "q1_0")]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_quantised_type(tmp_path, kind):
    """Blocks of random bytes: the package alone says what they mean; the file has two rows of them, and a tensor behind."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (2, 3 * n_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("a", data, raw_dtype=kind)
    writer.add_tensor("b", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_container.read(tmp_path / "q.gguf")
    assert file.tensors["a"].shape == (2, 3 * block) and file.tensors["a"].kind == kind.name.lower()
    np.testing.assert_array_equal(file.array("b"), np.arange(4))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(file.array("a"), gguf.dequantize(data, kind))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_other_alignments(tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.arange(5 + i, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_container.read(tmp_path / "a.gguf")
    for i in range(3):
        assert file.tensors[f"t{i}"].offset % alignment == 0
        np.testing.assert_array_equal(file.array(f"t{i}"), np.arange(5 + i))


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0"])
def test_types_that_the_package_does_not_unpack_are_named(tmp_path, kind):
    number, (block, n_bytes) = gguf.GGMLQuantizationType[kind], gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    header = b"GGUF" + np.array([3, 1, 0, 0, 0], "<u4").tobytes() + (1).to_bytes(8, "little") + b"a" + (1).to_bytes(4, "little")
    header += block.to_bytes(8, "little") + int(number).to_bytes(4, "little") + bytes(8)
    (tmp_path / "q.gguf").write_bytes(header + bytes(-len(header) % 32) + bytes(n_bytes))
    with pytest.raises(FormatError, match=f"tensor a has type {kind.lower()}"):
        gguf_container.read(tmp_path / "q.gguf").array("a")


def test_quantised_files_become_float32(tmp_path):
    """A decoder as llama.cpp quantises it: blocks for the matrices, f32 for the vectors."""
    model = decoder(hidden_size=64, num_attention_heads=8)
    write_gguf(tmp_path / "f.gguf", model, Tokenizer(SMALL_MODEL), dtype="f32")
    full = gguf_container.read(tmp_path / "f.gguf")
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for key, value in full.metadata.items():
        if key.startswith("llama."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, entry in full.tensors.items():
        array = full.array(name)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(entry.shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "q.gguf", show_progress=True)
    for name, array in read.tensors.items():
        want = model.tensors[name]
        assert array.dtype == np.float32
        assert np.abs(array - want).max() <= np.abs(want).max() * (1 / 254 + 2**-11), name  # half a step of 8 bits, whose size is f16
    assert gguf_tokenizer.read_tokenizer(tmp_path / "q.gguf") is None


# ---- tokenizers ------------------------------------------------------------------------------------------------------------------


def test_a_sentencepiece_model_comes_back_as_it_was(written, tmp_path):
    slow, read = Tokenizer(SMALL_MODEL), gguf_tokenizer.read_tokenizer(written)
    assert isinstance(read, Tokenizer) and read.model_max_length == 128
    for text in TEXTS:
        for special in (True, False):
            assert read.encode(text, parse_special=special) == slow.encode(text, parse_special=special)
        ids = slow.encode(text)
        assert read.decode(ids) == slow.decode(ids) and read.decode(ids, False) == slow.decode(ids, False)
    read.save_pretrained(tmp_path / "t")
    assert Tokenizer.from_pretrained(tmp_path / "t").encode("Is it large?") == slow.encode("Is it large?")


def test_the_recorded_llama_tokenizer_through_a_gguf_file(tmp_path):
    tokenizer = Tokenizer(TEMPLATES / "tokenizer.model")
    gguf_container.write(tmp_path / "t.gguf", gguf_tokenizer.to_metadata(tokenizer, 32000), {"a": np.zeros(1, np.float32)})
    read = gguf_tokenizer.read_tokenizer(tmp_path / "t.gguf")
    for entry in load(TEMPLATES / "encode_decode.json")["encode"]:
        assert read.encode(entry["text"]) == entry["input_ids"]
        assert read.decode(entry["input_ids"]) == entry["decoded"]


def test_rows_without_a_token_and_added_tokens(tmp_path):
    tokenizer = Tokenizer(SMALL_MODEL, added_tokens={"<pad>": 561})
    model = decoder(vocab_size=564)
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    metadata = gguf_container.read(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][560:] == ["[PAD560]", "<pad>", "[PAD562]", "[PAD563]"]
    assert metadata["tokenizer.ggml.token_type"][560:].tolist() == [5, 3, 5, 5]
    read = gguf_tokenizer.read_tokenizer(tmp_path / "m.gguf")
    assert read.encode("a<pad>b") == tokenizer.encode("a<pad>b") and read.special_ids["<pad>"] == 561
    assert read.encode("[PAD560] <pad>", parse_special=False) == tokenizer.encode("[PAD560] <pad>", parse_special=False)
    with pytest.raises(ConfigError, match="the id 561, but the model only 561 rows"):
        gguf_tokenizer.to_metadata(tokenizer, 561)


def test_byte_level_bpe_there_and_back(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(CASES["byte_level"]["tokenizer"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CASES["byte_level"]["config"]))
    tokenizer = FastTokenizer.from_pretrained(tmp_path)
    write_gguf(tmp_path / "m.gguf", decoder(vocab_size=400), tokenizer)
    assert gguf_container.read(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == "smollm"
    read = gguf_tokenizer.read_tokenizer(tmp_path / "m.gguf")
    assert isinstance(read, FastTokenizer) and read.special_ids == tokenizer.special_ids and read.add_bos == tokenizer.add_bos
    for text, ids in zip(TEXTS, CASES["byte_level"]["ids"], strict=True):
        assert read.encode(text) == ids and read.decode(ids) == tokenizer.decode(ids)
        assert read.encode_piecewise(text) == tokenizer.encode_piecewise(text)


# Words by the rules as their models' files spell them: gpt-2 keeps numbers whole, smollm takes them apart, LLaMA 3 cuts them at three, tekken at one.
@pytest.mark.parametrize(("pre", "words"), [
    ("gpt-2", ["I", "'ll", " see", " 12345", " HeLLO", "\n\n ", " x", "!!", "\n"]),
    ("smollm", ["I", "'ll", " see", " ", "1", "2", "3", "4", "5", " HeLLO", "\n\n ", " x", "!!", "\n"]),
    ("llama-bpe", ["I", "'ll", " see", " ", "123", "45", " HeLLO", "\n\n", " ", " x", "!!\n"]),
    ("tekken", ["I", "'ll", " see", " ", "1", "2", "3", "4", "5", " He", "LLO", "\n\n", " ", " x", "!!\n"])])
def test_rules_that_cut_texts_into_words(tmp_path, pre, words):
    text = "I'll see 12345 HeLLO\n\n  x!!\n"
    assert "".join(words) == text
    alphabet = sorted(CASES["byte_level"]["tokenizer"]["model"]["vocab"], key=len)[:256]
    assert all(len(letter) == 1 for letter in alphabet)
    tokens = [*alphabet, "<e>"]
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": np.array([1] * 256 + [3], np.int32), "tokenizer.ggml.merges": [], "tokenizer.ggml.eos_token_id": 256}
    gguf_container.write(tmp_path / "t.gguf", metadata, {"a": np.zeros(1, np.float32)})
    tokenizer = gguf_tokenizer.read_tokenizer(tmp_path / "t.gguf")
    cut = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in cut] == words
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(CASES["llama_prepend"]["tokenizer"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CASES["llama_prepend"]["config"]))
    with pytest.raises(ConfigError, match=r"no name for here.*tokenizer\.model"):
        gguf_tokenizer.to_metadata(FastTokenizer.from_pretrained(tmp_path), 560)
    model = SentencePieceModel.from_bytes(SMALL_MODEL.read_bytes())
    assert SentencePieceModel.from_bytes(model.to_bytes()) == model


# ---- a model out of a file -------------------------------------------------------------------------------------------------------


def test_a_file_is_a_decoder_that_answers(written):
    model, want = LlavaModel.from_pretrained(written), LlavaModel(decoder().config, decoder().tensors, tokenizer=Tokenizer(SMALL_MODEL))
    assert model.config.vision is None
    np.testing.assert_array_equal(model.logits([1, 5, 300, 7]), want.logits([1, 5, 300, 7]))
    [[answer]], [[wanted]] = (m.generate(["Is it large?"], max_new_tokens=5) for m in (model, want))
    assert answer.ids == wanted.ids and answer.text == wanted.text
    with pytest.raises(ConfigError, match="model_base"):
        LlavaModel.from_pretrained(written, model_base=written.parent)


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    """llama.cpp does not open a file that has no tokenizer.ggml.model."""
    write_gguf(tmp_path / "m.gguf", decoder(), dtype="f32")
    assert gguf_container.read(tmp_path / "m.gguf").metadata["tokenizer.ggml.model"] == "none"
    assert gguf_tokenizer.read_tokenizer(tmp_path / "m.gguf") is None and read_gguf(tmp_path / "m.gguf").config.vocab_size == DECODER["vocab_size"]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_file_of_half_precision_computes_with_its_values(tmp_path, dtype):
    write_gguf(tmp_path / "m.gguf", decoder(), Tokenizer(SMALL_MODEL), dtype=dtype)
    widened = {name: to_float32(array) for name, array in read_gguf(tmp_path / "m.gguf").tensors.items()}
    np.testing.assert_array_equal(LlavaModel.from_pretrained(tmp_path / "m.gguf").logits([1, 5, 7]), LlavaModel(decoder().config, widened).logits([1, 5, 7]))


def test_a_tower_comes_from_its_own_file(tmp_path):
    model = llava()
    write_gguf(tmp_path / "m.gguf", model, dtype="f32", mmproj=tmp_path / "mmproj.gguf")
    read = LlavaModel.from_pretrained(tmp_path / "m.gguf", vision_tower=tmp_path / "mmproj.gguf")
    assert read.config.image_aspect_ratio == "pad" and read.image_processor.size == 28
    assert read.config.vision == dataclasses.replace(model.config.vision, num_hidden_layers=2) and read.config.mm_vision_select_layer == -1
    pixels = np.random.default_rng(0).standard_normal((3, 28, 28)).astype(np.float32)
    np.testing.assert_array_equal(read.encode_images([pixels]), model.encode_images([pixels]))
    np.testing.assert_array_equal(read.logits([1, -200, 5], [pixels]), model.logits([1, -200, 5], [pixels]))
    read.save_pretrained(tmp_path / "directory")
    again = LlavaModel.from_pretrained(tmp_path / "directory")
    np.testing.assert_array_equal(again.logits([1, -200, 5], [pixels]), model.logits([1, -200, 5], [pixels]))


def test_the_old_spelling_of_the_towers_mlp(tmp_path):
    """Files of llama.cpp's first converter call the first matrix ffn_down, and leave feature_layer out."""
    write_gguf(tmp_path / "m.gguf", llava(), dtype="f32", mmproj=tmp_path / "new.gguf")
    new = gguf_container.read(tmp_path / "new.gguf")
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    metadata = {key: value for key, value in new.metadata.items() if key not in ("clip.vision.feature_layer", "clip.projector_type")}
    gguf_container.write(tmp_path / "old.gguf", metadata, {
        ".".join(swap.get(part, part) for part in name.split(".")): new.array(name) for name in new.tensors})
    old, want = (read_gguf(tmp_path / "m.gguf", tmp_path / name) for name in ("old.gguf", "new.gguf"))
    assert old.config.mm_vision_select_layer == -1 and old.tensors.keys() == want.tensors.keys()
    for name, array in want.tensors.items():
        np.testing.assert_array_equal(old.tensors[name], array, err_msg=name)


def test_a_feature_layer_before_the_last(tmp_path):
    write_gguf(tmp_path / "m.gguf", llava(), dtype="f32", mmproj=tmp_path / "v.gguf")
    file = gguf_container.read(tmp_path / "v.gguf")
    gguf_container.write(tmp_path / "w.gguf", file.metadata | {"clip.vision.feature_layer": np.array([1], np.int32)},
                         {name: file.array(name) for name in file.tensors})
    assert read_gguf(tmp_path / "m.gguf", tmp_path / "w.gguf").config.n_used_vision_layers == 1


# ---- what is refused -------------------------------------------------------------------------------------------------------------


def rewritten(path: Path, changes: dict, drop: tuple[str, ...] = (), tensors: dict | None = None) -> Path:
    file = gguf_container.read(path)
    metadata = {key: value for key, value in (file.metadata | changes).items() if key not in drop}
    gguf_container.write(path.with_name("x.gguf"), metadata, {name: file.array(name) for name in file.tensors} | (tensors or {}))
    return path.with_name("x.gguf")


@pytest.mark.parametrize(("changes", "names_"), [
    ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"), ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type"),
    ({"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor"), ({"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8"), ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window"),
    ({"llama.logit_scale": 0.5}, "llama.logit_scale"), ({"llama.nobody_knows": 1}, "llama.nobody_knows"),
    ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4"), ({"llama.attention.value_length": 16}, "llama.attention.value_length"),
    ({"llama.block_count": "two"}, "llama.block_count"), ({"llama.block_count": 0}, "llama.block_count"), ({"llama.block_count": 3}, "missing"),
    ({"llama.block_count": 1}, "does not have"), ({"llama.embedding_length": 96}, "shape"), ({"llama.attention.head_count": 4}, "shape"),
    ({"llama.attention.head_count_kv": np.array([2, 2], np.uint32)}, "llama.attention.head_count_kv"),
    ({"llama.rope.freq_base": -1.0}, "llama.rope.freq_base"), ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
    ({"split.count": 3}, "split.count"), ({"tokenizer.ggml.tokens": ["a"]}, "tokenizer.ggml.tokens has 1 tokens")])
def test_settings_that_change_the_maths_are_named(written, changes, names_):
    path = rewritten(written, changes)
    with pytest.raises((ConfigError, FormatError)) as caught:
        read_gguf(path)
    assert names_ in str(caught.value) and str(path) in str(caught.value) and caught.value.field


@pytest.mark.parametrize("key", ["llama.block_count", "llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count",
                                 "llama.context_length", "llama.attention.layer_norm_rms_epsilon"])
def test_missing_settings_are_named(written, key):
    with pytest.raises(FormatError, match=f"key {key} is missing"):
        read_gguf(rewritten(written, {}, (key,)))


def test_settings_that_do_not_matter_may_be_there(written):
    path = rewritten(written, {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.rope.scaling.original_context_length": 128},
                     ("llama.rope.freq_base", "llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"),
                     {"rope_freqs.weight": np.ones(4, np.float32)})
    read = read_gguf(path)
    assert read.config.rope_theta == 10000.0 and "rope_freqs.weight" in read.ignored[0]


@pytest.mark.parametrize(("name", "value", "message"), [
    ("rope_freqs.weight", np.full(4, 8, np.float32), "rope_freqs.weight"), ("blk.0.attn_q.bias", np.zeros(48, np.float32), "blk.0.attn_q.bias"),
    ("blk.0.ffn_gate_exps.weight", np.zeros((2, 4, 4), np.float32), "ffn_gate_exps"), ("blk.7.attn_norm.weight", np.ones(48, np.float32), "does not have"), ("blk.00.attn_norm.weight", np.ones(48, np.float32), "blk.00.attn_norm")])
def test_tensors_that_change_the_maths_are_named(written, name, value, message):
    with pytest.raises((ConfigError, FormatError), match=message):
        read_gguf(rewritten(written, {}, tensors={name: value}))


def test_values_that_are_not_finite(written):
    path = rewritten(written, {}, tensors={"output_norm.weight": np.full(48, np.nan, np.float32)})
    with pytest.raises(NumericsError, match=r"model\.norm\.weight has 48 NaN"):
        read_gguf(path)
    assert np.isnan(read_gguf(path, check_finite=False).tensors["model.norm.weight"]).all()


@pytest.mark.parametrize(("changes", "drop", "names_"), [
    ({"tokenizer.ggml.model": "bert"}, (), "tokenizer.ggml.model"), ({"tokenizer.ggml.add_bos_token": False}, (), "add_bos_token"),
    ({"tokenizer.ggml.add_eos_token": True}, (), "add_eos_token"), ({"tokenizer.ggml.add_eos_token": 1}, (), "add_eos_token"),
    ({}, ("tokenizer.ggml.tokens",), "tokenizer.ggml.tokens is missing"), ({}, ("tokenizer.ggml.scores",), "tokenizer.ggml.scores"),
    ({"tokenizer.ggml.scores": np.full(560, np.nan, np.float32)}, (), "tokenizer.ggml.scores"), ({}, ("tokenizer.ggml.token_type",), "token_type"),
    ({"tokenizer.ggml.eos_token_id": 560}, (), "tokenizer.ggml.eos_token_id"),
    ({"tokenizer.ggml.token_type": np.full(560, -1, np.int32)}, (), "token_type holds -1"), ({"tokenizer.ggml.remove_extra_whitespaces": True}, (), "whitespaces"),
    ({"tokenizer.ggml.tokens": ["a"] * 560}, (), "tokenizer.ggml.tokens"), ({"tokenizer.ggml.tokens": [""] * 560}, (), "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.model": "gpt2"}, (), "tokenizer.ggml.pre is 'default'"), ({"tokenizer.ggml.model": "gpt2"}, ("tokenizer.ggml.pre",), "pre is 'None'"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}, (), "tokenizer.ggml.merges is missing"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b c"]}, (), "merge 0"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["qq qq"]}, (), "merge 0"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": []}, ("tokenizer.ggml.eos_token_id",), "eos_token_id is missing")])
def test_damaged_tokenizers_are_named(written, changes, drop, names_):
    path = rewritten(written, changes, drop)
    with pytest.raises((ConfigError, FormatError)) as caught:
        gguf_tokenizer.read_tokenizer(path)
    assert names_ in str(caught.value) and str(path) in str(caught.value) and caught.value.path


@pytest.mark.parametrize(("changes", "names_"), [
    ({"clip.projector_type": "ldp"}, "clip.projector_type is ldp"), ({"clip.has_text_encoder": True}, "clip.has_text_encoder"),
    ({"clip.use_silu": True}, "clip.use_silu"), ({"clip.use_gelu": 1}, "clip.use_gelu"), ({"clip.vision.spatial_merge_size": 2}, "spatial_merge_size"),
    ({"clip.vision.feature_layer": np.array([1, 2], np.int32)}, "feature_layer"), ({"clip.vision.feature_layer": np.array([3], np.int32)}, "feature_layer"),
    ({"clip.vision.image_mean": np.array([0.5, 0.5, 0.5], np.float32)}, "clip.vision.image_mean"), ({"clip.vision.patch_size": 9}, "image_size"),
    ({"general.architecture": "llama"}, "general.architecture"), ({"clip.vision.embedding_length": 96}, "shape")])
def test_other_towers_are_refused(tmp_path, changes, names_):
    write_gguf(tmp_path / "m.gguf", llava(), dtype="f32", mmproj=tmp_path / "v.gguf")
    with pytest.raises((ConfigError, FormatError)) as caught:
        read_gguf(tmp_path / "m.gguf", rewritten(tmp_path / "v.gguf", changes))
    assert names_ in str(caught.value)


def test_models_that_llama_cpp_cannot_run_are_refused(tmp_path):
    from stllava.checkpoint.peft import LoraConfig
    out = tmp_path / "m.gguf"
    for model, options, message in (
            (llava(), {}, "pass mmproj=PATH"), (decoder(), {"mmproj": tmp_path / "v.gguf"}, "no vision tower"), (decoder(), {"dtype": "q4_0"}, "dtype is 'q4_0'"),
            (llava(mm_projector_type="cluster", num_latents=4), {"mmproj": tmp_path / "v.gguf"}, "mm_projector_type is 'cluster'"),
            (llava(mm_vision_select_feature="cls_patch"), {"mmproj": tmp_path / "v.gguf"}, "mm_vision_select_feature"),
            (decoder(model_type="mistral", sliding_window=64), {}, "sliding_window is 64")):
        with pytest.raises(ConfigError, match=message):
            write_gguf(out, model, **options)
    model = llava()
    model.add_lora(LoraConfig(r=2))
    with pytest.raises(ConfigError, match="merge_and_unload"):
        write_gguf(out, model, mmproj=tmp_path / "v.gguf")
    large = decoder()
    large.tensors["lm_head.weight"] = large.tensors["lm_head.weight"] + np.float32(1e6)
    with pytest.raises(NumericsError, match=r"lm_head\.weight: .* is too large for f16"):
        write_gguf(out, large)
    assert not list(tmp_path.iterdir())
    write_gguf(out, large, dtype="bf16")


def test_the_old_file_stands_when_the_new_one_cannot_be_written(written, monkeypatch):
    before, write = written.read_bytes(), os.write

    def full(descriptor: int, data: memoryview) -> int:
        if os.fstat(descriptor).st_size > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:5000])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"bytes are needed.*m\.gguf"):
        write_gguf(written, decoder(), Tokenizer(SMALL_MODEL), dtype="bf16")
    assert written.read_bytes() == before and list(written.parent.iterdir()) == [written]


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", np.zeros((1, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"a: type 8 is quantised; to read it: pip install 'stllava\[gguf\]'"):
        gguf_container.read(path)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_llama_cpp_says_the_same(tmp_path: Path, dtype: str) -> None:
    """Greedy ids of what we wrote, in llama.cpp itself (its wheel lives with the peers) and here."""
    program = Path(peers.__file__).parents[2] / "benchmarks" / "peers" / "llamacpp.py"
    environment = {**os.environ, "PYTHONPATH": str(program.parents[1]), "OMP_NUM_THREADS": "1"}
    if not Path(peers.PYTHON).exists() or subprocess.run([peers.PYTHON, "-c", "import xllamacpp"], check=False, capture_output=True).returncode:
        pytest.skip(f"{peers.PYTHON} has no xllamacpp; benchmarks/peers/requirements.txt names it, STLLAVA_PEERS another interpreter")
    path, ids = tmp_path / "m.gguf", [1, 5, 9, 30, 7, 7, 100]
    write_gguf(path, decoder(), Tokenizer(SMALL_MODEL), dtype=dtype)
    model = LlavaModel.from_pretrained(path)
    [[ours]] = model.generate([ids], max_new_tokens=24, eos_token_id=[])
    words = ["greedy", str(path), str(model.config.vocab_size), "24", *map(str, ids)]
    theirs = subprocess.run([peers.PYTHON, str(program), *words], env=environment, capture_output=True, text=True, check=True).stdout
    assert ours.ids == [int(word) for word in theirs.split()]
