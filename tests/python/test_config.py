"""config: defaults as transformers has them, unknown keys kept, and an error for maths that is not implemented."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from stllava.config import LlavaConfig, VisionConfig, known_tower
from stllava.errors import ConfigError, FormatError

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "checkpoint_files"
TINY = json.loads((GOLDEN / "full_bin_sharded" / "config.json").read_text())
TINY_VISION = json.loads((GOLDEN / "vision_tower" / "config.json").read_text())


def test_golden_core_config() -> None:
    config = dataclasses.replace(LlavaConfig.from_pretrained(GOLDEN / "merged_safetensors"),
                                 vision=VisionConfig.from_pretrained(GOLDEN / "vision_tower"))
    assert config.core_config() == {
        "vision": {"image_size": 28, "patch_size": 7, "hidden_size": 32, "n_layers": 3, "n_heads": 4, "intermediate_size": 64,
                   "activation": "quick_gelu", "layer_norm_eps": 1e-5, "select_layer": -2, "select_feature": "patch"},
        "projector": {"kind": "cluster", "depth": 0, "n_centers": 4, "n_rounds": 2, "in_size": 32, "out_size": 64},
        "decoder": {"vocab_size": 128, "hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 16,
                    "intermediate_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 0,
                    "tie_word_embeddings": False, "max_position_embeddings": 256}}
    assert config.n_used_vision_layers == 2
    assert config.image_aspect_ratio == "pad"


@pytest.mark.parametrize("directory", ["adapter_bin", "full_bin_sharded", "full_safetensors_sharded", "merged_safetensors"])
def test_every_key_of_a_golden_file_is_written_back(tmp_path: Path, directory: str) -> None:
    wanted = json.loads((GOLDEN / directory / "config.json").read_text())
    LlavaConfig.from_pretrained(GOLDEN / directory).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert {key: found[key] for key in wanted} == wanted
    assert {key: found[key] for key in set(found) - set(wanted)} == {"head_dim": 16, "rope_theta": 10000.0}


def test_unknown_keys_are_kept_verbatim() -> None:
    values = {**TINY, "my_tool": {"a": [1, None, "ä"]}, "qav_loss": True}
    found = LlavaConfig.from_dict(values).to_dict()
    assert found["my_tool"] == values["my_tool"] and found["qav_loss"] is True


def test_vision_travels_inside() -> None:
    config = dataclasses.replace(LlavaConfig.from_dict(TINY), vision=VisionConfig.from_dict(TINY_VISION))
    values = json.loads(json.dumps(config.to_dict()))
    assert LlavaConfig.from_dict(values) == config
    assert {key: values["mm_vision_config"][key] for key in TINY_VISION} == TINY_VISION


def test_llama_defaults() -> None:
    assert LlavaConfig.from_dict({"model_type": "llama"}).core_config() == {
        "vision": None, "projector": None,
        "decoder": {"vocab_size": 32000, "hidden_size": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128,
                    "intermediate_size": 11008, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 0,
                    "tie_word_embeddings": False, "max_position_embeddings": 2048}}
    assert LlavaConfig.from_dict({"num_attention_heads": 16}).num_key_value_heads == 16


def test_mistral_defaults_and_window() -> None:
    decoder = LlavaConfig.from_dict({"model_type": "mistral"}).decoder_config()
    assert (decoder["intermediate_size"], decoder["n_kv_heads"], decoder["sliding_window"]) == (14336, 8, 4096)
    assert decoder["max_position_embeddings"] == 131072
    # LLaVA-Med 1.5
    decoder = LlavaConfig.from_dict({"model_type": "llava_mistral", "sliding_window": None, "rope_theta": 1e6,
                                     "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}).decoder_config()
    assert (decoder["sliding_window"], decoder["rope_theta"]) == (0, 1e6)
    # a LLaMA decoder has no window, whatever the key says; so transformers
    assert LlavaConfig.from_dict({"model_type": "llama", "sliding_window": 100}).decoder_config()["sliding_window"] == 0


def test_a_decoder_alone_gets_no_multimodal_keys() -> None:
    values = LlavaConfig.from_dict({"model_type": "llama"}).to_dict()
    assert not [key for key in values if key.startswith("mm_")] and "num_latents" not in values


def test_transformers_5_rope_parameters() -> None:
    config = LlavaConfig.from_dict({**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert config.rope_theta == 5e5
    with pytest.raises(ConfigError, match="rope_parameters"):
        LlavaConfig.from_dict({**TINY, "rope_parameters": {"rope_type": "llama3", "factor": 8}})


@pytest.mark.parametrize("kind, found", [("cluster", ("cluster", 0)), ("linear", ("linear", 0)), ("mlp2x_gelu", ("mlp", 2)),
                                         ("mlp3x_gelu", ("mlp", 3))])
def test_projector_kinds(kind: str, found: tuple[str, int]) -> None:
    assert LlavaConfig.from_dict({**TINY, "mm_projector_type": kind}).projector_kind == found


@pytest.mark.parametrize("key, value", [
    ("model_type", "mpt"), ("model_type", "qwen2"), ("hidden_act", "gelu"), ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("attention_bias", True), ("mlp_bias", True), ("attention_dropout", 0.1), ("pretraining_tp", 2), ("partial_rotary_factor", 0.5),
    ("quantization_config", {"bits": 4}), ("text_config", {}), ("mm_use_im_start_end", True), ("mm_use_im_patch_token", True),
    ("image_aspect_ratio", "anyres"), ("mm_patch_merge_type", "spatial_unpad"), ("mm_vision_resampler_type", "perceiver"),
    ("mm_projector_type", "mlp0x_gelu"), ("mm_projector_type", "mlp2x_relu"), ("mm_projector_type", 3),
    ("mm_projector_type", "identity"), ("mm_vision_select_feature", "cls"), ("mm_vision_select_layer", [-2]), ("mm_vision_tower", 3),
    ("tie_word_embeddings", 1), ("hidden_size", 0), ("hidden_size", True), ("hidden_size", 64.0), ("hidden_size", 2**20 + 1),
    ("hidden_size", 66), ("num_attention_heads", 0), ("num_key_value_heads", 3), ("num_hidden_layers", 1025), ("vocab_size", -1),
    ("rms_norm_eps", 0), ("rms_norm_eps", "1e-5"), ("rope_theta", float("inf")), ("head_dim", 15), ("num_latents", 0),
    ("mm_hidden_size", None), ("sliding_window", 0),
])
def test_unsupported_values_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        LlavaConfig.from_dict({**TINY, key: value})
    assert error.value.field is not None


@pytest.mark.parametrize("key, value", [("hidden_act", "relu"), ("model_type", "siglip_vision_model"), ("num_channels", 1),
                                        ("hidden_size", 33), ("image_size", 30), ("layer_norm_eps", -1), ("attention_dropout", 0.1)])
def test_unsupported_towers(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_VISION, key: value}))
    with pytest.raises(ConfigError, match=f"config.json: vision tower.*{key}"):
        VisionConfig.from_pretrained(tmp_path)


def test_tower_must_fit() -> None:
    vision = VisionConfig.from_dict(TINY_VISION)
    for key, value in (("mm_hidden_size", 64), ("mm_vision_select_layer", 4), ("mm_vision_select_layer", -5)):
        with pytest.raises(ConfigError, match=key):
            dataclasses.replace(LlavaConfig.from_dict({**TINY, key: value}), vision=vision)
    with pytest.raises(ConfigError, match="vision_tower=DIR"):
        LlavaConfig.from_dict(TINY).core_config()


def test_whole_clip_model_and_known_tower() -> None:
    values = {"model_type": "clip", "vision_config": {"image_size": 336, "patch_size": 14, "hidden_size": 1024,
              "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}}
    assert VisionConfig.from_dict(values) == known_tower("openai/clip-vit-large-patch14-336")
    assert known_tower("somebody/else") is None
    assert known_tower("openai/clip-vit-large-patch14-336").n_patches == 576
    with pytest.raises(ConfigError, match="want an object"):
        VisionConfig.from_dict({"model_type": "clip", "vision_config": 3})


def test_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        LlavaConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 1, "hidden_size": 2}')
    with pytest.raises(FormatError, match="duplicate key"):
        LlavaConfig.from_pretrained(tmp_path)
