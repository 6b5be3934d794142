"""Directories of transformers' LlavaForConditionalGeneration: read under every version's names, written so that transformers loads them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import tiny

from stllava import config_hf
from stllava.checkpoint import hf_processor, index, names, rewrite
from stllava.checkpoint.directory import read_checkpoint, write_full
from stllava.config import LlavaConfig, known_tower
from stllava.errors import ConfigError, FormatError
from stllava.images import ImageProcessor
from stllava.model import LlavaModel
from stllava.text.tokenizer import Tokenizer

RECORDED = Path(__file__).parents[1] / "recorded"
KINDS = ("hf_llama", "hf_mistral")
# float64 here, float32 norms and rotary tables there: measured 1.6e-6; float32 here: measured 4.5e-6, logits up to 4.7
TOLERANCE = 2e-5


def expected(kind: str) -> tuple[list[int], list[np.ndarray], np.ndarray]:
    """(ids with -200 for the image, pictures, logits) recorded by tests/recorded/make.py."""
    file = index.read_file(RECORDED / kind / "expected.safetensors")
    return file["ids"].tolist(), list(file["pixels"]), file["logits"]


def assert_logits(model: LlavaModel, kind: str) -> None:
    ids, pictures, logits = expected(kind)
    found = model.logits(ids, pictures)[:, :logits.shape[1]]
    np.testing.assert_allclose(found, logits, rtol=0, atol=TOLERANCE)


def rename(name: str, version: str) -> str:
    """From the names that transformers 5.23 writes to those of an older one; tests/recorded/make.py found both to be the same model there."""
    if version == "4.36":
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
    return name.replace("vision_tower.", "model.vision_tower.vision_model.").replace("multi_modal_projector.", "model.multi_modal_projector.")


def edited(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        owner, _, inner = key.partition("__")
        (values[owner] if inner else values)[inner or owner] = value
    (target / "config.json").write_text(json.dumps(values))
    return target


# ---- reading

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_logits_of_transformers(kind: str, dtype: Any) -> None:
    assert_logits(LlavaModel.from_pretrained(RECORDED / kind, dtype=dtype), kind)


@pytest.mark.parametrize("version", ["4.36", "4.52"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_every_version(tmp_path: Path, kind: str, version: str) -> None:
    wanted = read_checkpoint(RECORDED / kind)
    source = index.read_file(RECORDED / kind / "model.safetensors")
    index.write_file(tmp_path / "model.safetensors", {rename(name, version): array for name, array in source.items()})
    shutil.copy(RECORDED / kind / "config.json", tmp_path)
    found = read_checkpoint(tmp_path)
    assert set(found.tensors) == set(wanted.tensors) and found.ignored == []
    assert all(np.array_equal(found.tensors[name], array) for name, array in wanted.tensors.items())


def test_configuration_of_the_recorded_models() -> None:
    llama, mistral = (read_checkpoint(RECORDED / kind).config for kind in KINDS)
    assert (llama.model_type, llama.rope_theta, llama.rms_norm_eps, llama.num_key_value_heads) == ("llava", 5000.0, 1e-5, 1)
    assert (mistral.model_type, mistral.sliding_window, mistral.head_dim, mistral.tie_word_embeddings) == ("llava_mistral", 6, 12, True)
    assert llama.extra["image_token_index"] == 34 and llama.projector_kind == ("mlp", 2)


def test_keys_that_are_left_out_have_transformers_defaults() -> None:
    """What transformers 5.23 makes of the same objects: printed by LlavaConfig(...).to_dict()."""
    seven = LlavaConfig.from_dict({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    assert (seven.hidden_size, seven.intermediate_size, seven.num_hidden_layers, seven.head_dim, seven.max_position_embeddings) == (4096, 11008, 32, 128, 2048)
    assert (seven.vocab_size, seven.rms_norm_eps, seven.rope_theta, seven.num_key_value_heads) == (32000, 1e-6, 10000.0, 32)
    assert seven.vision == known_tower("openai/clip-vit-large-patch14-336") and seven.mm_vision_tower == "openai/clip-vit-large-patch14-336"
    small = LlavaConfig.from_dict({"text_config": {"model_type": "mistral"}, "vision_config": {"image_size": 64}})
    assert (small.intermediate_size, small.num_key_value_heads, small.sliding_window, small.max_position_embeddings) == (14336, 8, 4096, 131072)
    assert small.vision is not None
    assert (small.vision.hidden_size, small.vision.patch_size, small.vision.num_hidden_layers, small.vision.intermediate_size) == (768, 32, 12, 3072)
    assert small.mm_hidden_size == 768 and small.mm_vision_tower == "clip"


def test_configuration_of_llava_1_5_7b_hf() -> None:
    """The keys that the file of llava-hf/llava-1.5-7b-hf has."""
    config = LlavaConfig.from_dict({
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "float16",
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
                        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model", "num_attention_heads": 16,
                          "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}})
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (32064, 4096, 1e-5)
    assert config_hf.padded(config) is config and config.extra["pad_token_id"] == 32001


@pytest.mark.parametrize("key, value", [
    ("text_config__model_type", ["llama"]), ("vision_feature_select_strategy", ["default"]),
    ("projector_hidden_act", "relu"), ("multimodal_projector_bias", False), ("vision_feature_select_strategy", "cls"), ("vision_feature_layer", [-2, -5]),
    ("vision_feature_layer", "last"), ("image_token_index", -1), ("text_config__model_type", "qwen2"), ("vision_config__model_type", "siglip_vision_model"),
    ("text_config__rope_parameters", {"rope_type": "llama3", "factor": 8.0}), ("text_config__attention_bias", True), ("text_config", [1]),
    ("vision_config", "clip"), ("model_type", "llava_next"), ("text_config__hidden_act", "gelu"), ("vision_config__hidden_act", "relu"),
    ("mm_projector_type", "cluster")])
def test_what_would_change_the_maths_names_the_key(tmp_path: Path, key: str, value: object) -> None:
    directory = edited(RECORDED / "hf_llama", tmp_path / "m", **{key: value})
    with pytest.raises(ConfigError, match=key.rpartition("__")[2]) as caught:
        read_checkpoint(directory)
    assert "config.json" in str(caught.value)


def test_a_tower_of_transformers_5_has_no_vision_model_in_its_names(tmp_path: Path) -> None:
    one = read_checkpoint(RECORDED / "hf_llama")
    tower = {name.removeprefix(names.TOWER + "vision_model."): array + 1 for name, array in one.tensors.items() if names.is_tower(name)}
    index.write_file(tmp_path / "model.safetensors", tower)
    assert one.config.vision is not None
    one.config.vision.save_pretrained(tmp_path)
    two = read_checkpoint(RECORDED / "hf_llama", vision_tower=tmp_path)
    assert all(np.array_equal(two.tensors[name], array + names.is_tower(name)) for name, array in one.tensors.items())


# ---- writing

@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, kind: str, format: index.Format) -> None:
    """What came from that layout goes back to it under the oldest names, and through LLaVA's own layout without a difference."""
    one = LlavaModel.from_pretrained(RECORDED / kind)
    one.save_pretrained(tmp_path / "hf", layout="hf", format=format)
    assert "language_model.model.norm.weight" in index.read_weights(tmp_path / "hf")[0]
    assert "vision_tower.vision_model.pre_layrnorm.bias" in index.read_weights(tmp_path / "hf")[0]
    one.save_pretrained(tmp_path / "llava", format=format)
    assert "text_config" not in json.loads((tmp_path / "llava" / "config.json").read_text())
    for layout in ("hf", "llava"):
        two = LlavaModel.from_pretrained(tmp_path / layout)
        assert two.config == one.config
        assert_logits(two, kind)


def test_vocabulary_is_padded_by_rows_that_never_win(tmp_path: Path) -> None:
    model = tiny.tiny_model(mm_projector_type="mlp2x_gelu")
    model.save_pretrained(tmp_path, layout="hf")
    found = LlavaModel.from_pretrained(tmp_path)
    assert found.config.vocab_size == 32064 and found.config.extra["image_token_index"] == 32000 and found.config.extra["pad_token_id"] == 32001
    one, two = (m.logits([1, 2, -200, 7], [np.zeros((3, 28, 28), np.float32)]) for m in (model, found))
    np.testing.assert_array_equal(one, two[:, :32000])
    assert np.all(two[:, 32000:] < one.max(axis=1, keepdims=True))
    assert found.image_processor.aspect == "pad" and found.config.image_aspect_ratio == "pad"
    assert found.tokenizer.special_ids["<image>"] == 32000 and found.tokenizer.special_ids["<pad>"] == 32001
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["patch_size"] == 7 and settings["vision_feature_select_strategy"] == "default"
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "LlavaImageProcessor"
    found.save_pretrained(tmp_path / "again", layout="hf")
    assert LlavaModel.from_pretrained(tmp_path / "again").config == found.config


def test_rows_for_an_image_token_behind_the_vocabulary() -> None:
    """A file may leave image_token_index at its default 32000 beside 32000 rows, which transformers cannot look up."""
    config = dataclasses.replace(tiny.config(), extra={"image_token_index": 32000})
    assert config_hf.padded(config).vocab_size == 32064
    with pytest.raises(ConfigError, match="image_token_index is '<image>'"):
        config_hf.padded(dataclasses.replace(config, extra={"image_token_index": "<image>"}))


def test_padding_keeps_the_dtype(tmp_path: Path) -> None:
    config = tiny.config(24, mm_projector_type="mlp2x_gelu")
    bits = {name: np.full(shape, 0x3F80, np.uint16) for name, shape in names.expected_shapes(config).items()}
    write_full(tmp_path, config, bits, layout="hf")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    embedding = read_checkpoint(tmp_path).tensors["model.embed_tokens.weight"]
    assert embedding.shape == (64, 64) and np.all(embedding == 0x3F80)


@pytest.mark.parametrize("changes, message", [({}, "mm_projector_type is 'cluster'.*write the LLaVA layout"), ({"mm_projector_type": "linear"}, "linear"),
                                              ({"mm_vision_tower": None}, "needs a vision tower")])
def test_models_without_a_class_in_transformers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = tiny.config(24, **changes)
    config = dataclasses.replace(config, vision=None) if config.mm_vision_tower is None else config
    tensors = {name: np.zeros(shape, np.float32) for name, shape in names.expected_shapes(config).items()}
    with pytest.raises(ConfigError, match=message):
        write_full(tmp_path / "x", config, tensors, layout="hf")
    assert not list(tmp_path.glob("x/*"))


def test_layout_is_checked_and_adapters_must_be_merged(tmp_path: Path) -> None:
    from stllava.checkpoint.peft import LoraConfig
    model = tiny.tiny_model(vocab_size=24, mm_projector_type="mlp2x_gelu")
    with pytest.raises(ConfigError, match="layout 'other'"):
        model.save_pretrained(tmp_path / "m", layout="other")  # type: ignore[arg-type]
    model.add_lora(LoraConfig(r=2))
    with pytest.raises(ConfigError, match=r"merge_and_unload\(\) them first"):
        model.save_pretrained(tmp_path / "m", layout="hf")
    assert not (tmp_path / "m").exists()


# ---- the processor's files

def test_picture_settings_of_transformers_5(tmp_path: Path) -> None:
    """It writes them inside processor_config.json only."""
    ImageProcessor(size=28).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    assert hf_processor.picture_settings(tmp_path) is None
    nested = {**values, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested, "patch_size": 7}))
    assert hf_processor.pads(tmp_path) and ImageProcessor.from_pretrained(tmp_path).size == 28
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": 3}))
    with pytest.raises(FormatError, match="image_processor is a int"):
        hf_processor.picture_settings(tmp_path)


def test_padding_of_pictures_survives_both_layouts(tmp_path: Path) -> None:
    model = LlavaModel.from_pretrained(RECORDED / "hf_llama")
    assert model.image_processor.aspect == "square"
    directory = edited(RECORDED / "hf_llama", tmp_path / "hf")
    ImageProcessor(size=28).save_pretrained(directory)
    values = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").write_text(json.dumps({**values, "image_processor_type": "LlavaImageProcessor", "do_pad": True}))
    padding = LlavaModel.from_pretrained(directory)
    assert padding.image_processor.aspect == "pad"
    for layout in ("llava", "hf"):
        padding.save_pretrained(tmp_path / "again", layout=layout)
        assert LlavaModel.from_pretrained(tmp_path / "again").image_processor.aspect == "pad"


def test_a_vocabulary_that_does_not_fit_the_weights_is_named(tmp_path: Path) -> None:
    config = config_hf.padded(tiny.config(mm_projector_type="mlp2x_gelu"))
    Tokenizer(tiny.TOKENIZER, added_tokens={"<other>": 32000}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="<image> is to be token 32000, but the tokenizer has"):
        hf_processor.write_processor(tmp_path, config)


WORDS = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
         "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, "unk_token": "<unk>"}}


def with_fast_tokenizer(folder: Path) -> LlavaModel:
    """A model whose tokenizer has fewer tokens than the embedding rows, as vocabularies that were padded have."""
    model = tiny.tiny_model(vocab_size=24, mm_projector_type="mlp2x_gelu", num_key_value_heads=2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}))
    return model


def test_added_tokens_are_the_first_free_ones(tmp_path: Path) -> None:
    with_fast_tokenizer(tmp_path / "a")
    rewrite.rewrite(read_checkpoint(tmp_path / "a"), [tmp_path / "a"], tmp_path / "b", rewrite.Target("hf"))
    config = read_checkpoint(tmp_path / "b").config
    assert (config.extra["image_token_index"], config.extra["pad_token_id"], config.vocab_size) == (5, 6, 24)
    assert hf_processor.image_token_of_files(tmp_path / "b") == 5
    Tokenizer(tiny.TOKENIZER, added_tokens={"<im_start>": 32000}).save_pretrained(tmp_path / "slow")
    assert hf_processor.image_token_of_files(tmp_path / "slow") == 32001 and hf_processor.image_token_of_files(RECORDED) is None


def test_fast_tokenizer_learns_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [{"id": 0, "content": "<unk>"}], "model": {}}))
    config = config_hf.padded(tiny.config(mm_projector_type="mlp2x_gelu"))
    for _ in range(2):
        hf_processor.write_processor(tmp_path, config)
    entries = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [(entry["id"], entry["content"]) for entry in entries] == [(0, "<unk>"), (32000, "<image>"), (32001, "<pad>")]


@pytest.mark.parametrize("file, key", [("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")])
def test_tokenizer_files_that_are_none(tmp_path: Path, file: str, key: str) -> None:
    (tmp_path / file).write_text(json.dumps({key: 3}))
    with pytest.raises(FormatError, match=f"{file}: {key} is a int"):
        hf_processor.write_processor(tmp_path, config_hf.padded(tiny.config(mm_projector_type="mlp2x_gelu")))


def test_a_padding_token_of_its_own_stays(tmp_path: Path) -> None:
    Tokenizer(tiny.TOKENIZER).save_pretrained(tmp_path)
    config = dataclasses.replace(tiny.config(32064, mm_projector_type="mlp2x_gelu"), extra={"image_token_index": 32000, "pad_token_id": 2})
    hf_processor.write_processor(tmp_path, config)
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<image>": 32000}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<unk>"


# ---- transformers itself

@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_write(tmp_path: Path, kind: str) -> None:
    LlavaModel.from_pretrained(RECORDED / kind).save_pretrained(tmp_path, layout="hf")
    ids, _, logits = expected(kind)
    np.testing.assert_array_equal(peers.logits(tmp_path, ids), logits)


def test_its_processor_reads_what_convert_writes(tmp_path: Path) -> None:
    """Text and picture in, logits out: their way and ours."""
    model = with_fast_tokenizer(tmp_path / "a")
    rewrite.rewrite(read_checkpoint(tmp_path / "a"), [tmp_path / "a"], tmp_path / "b", rewrite.Target("hf"))
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    found = peers.processed(tmp_path / "b", "<s> <image> a b", picture)
    assert found["ids"].tolist() == [1, *[5] * 16, 3, 4]
    np.testing.assert_allclose(found["pixels"], model.image_processor(picture), rtol=0, atol=1e-6)  # measured 0
    np.testing.assert_allclose(found["logits"], model.logits([1, -200, 3, 4], [found["pixels"]]), rtol=0, atol=1e-5)  # measured 8.4e-7
