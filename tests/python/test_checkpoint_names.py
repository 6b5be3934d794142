"""names: canonical names and shapes equal the golden checkpoint's, and every file form maps there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from stllava.checkpoint import index, names
from stllava.config import LlavaConfig, VisionConfig, known_tower

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "checkpoint_files"
CONFIG = dataclasses.replace(LlavaConfig.from_pretrained(GOLDEN / "merged_safetensors"),
                             vision=VisionConfig.from_pretrained(GOLDEN / "vision_tower"))


def test_expected_shapes_are_those_of_the_merged_checkpoint() -> None:
    file = index.read_file(GOLDEN / "merged_safetensors" / "model.safetensors")
    assert names.expected_shapes(CONFIG) == {name: array.shape for name, array in file.items()}


def test_full_files_hold_rotary_caches_besides() -> None:
    keys = [key for file in index.read_weights(GOLDEN / "full_bin_sharded") for key in file]
    mapped = {key: names.from_full(key) for key in keys}
    assert {key for key in keys if mapped[key] is None} == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in (0, 1)}
    assert {name for name in mapped.values() if name} == set(names.expected_shapes(CONFIG))


def test_tower_directory_there_and_back() -> None:
    keys = list(index.read_file(GOLDEN / "vision_tower" / "model.safetensors"))
    assert {names.from_tower(key) for key in keys} == set(names.vision_shapes(CONFIG.vision))
    assert [names.to_tower(names.from_tower(key)) for key in keys] == keys


@pytest.mark.parametrize("key", ["text_model.embeddings.token_embedding.weight", "logit_scale", "visual_projection.weight",
                                 "text_projection.weight", "vision_model.embeddings.position_ids"])
def test_useless_half_of_a_clip_model(key: str) -> None:
    assert names.from_tower(key) is None


def test_non_lora_trainables_there_and_back() -> None:
    keys = list(index.read_file(GOLDEN / "adapter_bin" / "non_lora_trainables.bin"))
    mapped = names.from_non_lora(keys)
    assert set(mapped.values()) == set(names.projector_shapes(CONFIG))
    assert [names.to_non_lora(mapped[key]) for key in keys] == keys


def test_non_lora_rule_looks_at_the_whole_file() -> None:
    assert names.from_non_lora(["model.mm_projector.0.weight"]) == {"model.mm_projector.0.weight": "model.mm_projector.0.weight"}
    assert names.from_non_lora(["base_model.model.model.mm_projector.c.bias", "base_model.model.lm_head.weight"]) == {
        "base_model.model.model.mm_projector.c.bias": "model.mm_projector.c.bias",
        "base_model.model.lm_head.weight": "lm_head.weight"}


@pytest.mark.parametrize("key", ["model.mm_projector.c.weight", "mm_projector.c.weight",
                                 "base_model.model.model.mm_projector.c.weight"])
def test_projector_file(key: str) -> None:
    assert names.from_projector_file(key) == "model.mm_projector.c.weight"


def test_adapters_there_and_back() -> None:
    decoder = list(index.read_file(GOLDEN / "adapter_bin" / "adapter_model.bin"))
    tower = list(index.read_file(GOLDEN / "adapter_bin" / "Vit-lora" / "adapter_model.bin"))
    linears = names.decoder_linears(CONFIG) | names.vision_linears(CONFIG.vision)
    wanted = {name for module in linears for name in names.lora_pair(module)}
    assert {names.from_decoder_adapter(key) for key in decoder} == wanted  # it repeats the tower's
    assert {names.from_tower_adapter(key) for key in tower} == {name for name in wanted if name.startswith(names.TOWER)}
    assert [names.to_decoder_adapter(names.from_decoder_adapter(key)) for key in decoder] == decoder
    assert [names.to_tower_adapter(names.from_tower_adapter(key)) for key in tower] == tower


def test_published_sizes() -> None:
    """Counts of the paper's model: cluster projector 24,130,562; LoRA 319,815,680 at r 128 and 14,155,776 at r 32."""
    config = LlavaConfig.from_dict({"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
                                    "mm_projector_type": "cluster", "mm_hidden_size": 1024})

    def count(shapes: names.Shapes) -> int:
        total = 0
        for shape in shapes.values():
            n = 1
            for size in shape:
                n *= size
            total += n
        return total

    assert count(names.projector_shapes(config)) == 24_130_562
    assert sum(128 * (n_out + n_in) for n_out, n_in in names.decoder_linears(config).values()) == 319_815_680
    vision = known_tower("openai/clip-vit-large-patch14-336")
    assert sum(32 * (n_out + n_in) for n_out, n_in in names.vision_linears(vision).values()) == 14_155_776
    assert count(names.decoder_shapes(config)) == 6_738_415_616


def test_projector_kinds_and_tied_head() -> None:
    def with_keys(**changes: object) -> LlavaConfig:
        return dataclasses.replace(CONFIG, **changes)

    assert names.projector_shapes(with_keys(mm_projector_type="linear")) == {
        "model.mm_projector.weight": (64, 32), "model.mm_projector.bias": (64,)}
    assert names.projector_shapes(with_keys(mm_projector_type="mlp2x_gelu")) == {
        "model.mm_projector.0.weight": (64, 32), "model.mm_projector.0.bias": (64,),
        "model.mm_projector.2.weight": (64, 64), "model.mm_projector.2.bias": (64,)}
    assert "lm_head.weight" not in names.expected_shapes(with_keys(tie_word_embeddings=True))
    assert names.decoder_linears(with_keys(num_key_value_heads=2))["model.layers.0.self_attn.k_proj"] == (32, 64)


def test_towers_of_transformers_5_have_no_vision_model() -> None:
    inner = names.TOWER + "vision_model.encoder.layers.0.mlp.fc1"
    for convert, name in ((names.from_tower, "encoder.layers.0.mlp.fc1"), (names.from_full, names.TOWER + "encoder.layers.0.mlp.fc1"),
                          (names.from_tower_adapter, "base_model.model.vision_tower.encoder.layers.0.mlp.fc1"),
                          (names.from_decoder_adapter, "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1")):
        assert convert(name) == convert(name.replace("encoder", "vision_model.encoder")) == inner


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", names.PROJECTOR + "0.bias", names.PROJECTOR + "2.weight",
                                  names.TOWER + "vision_model.embeddings.class_embedding", "model.embed_tokens.weight"])
def test_hf_names_there_and_back(name: str) -> None:
    assert names.to_hf(name) != name and names.is_hf(names.to_hf(name)) and not names.is_hf(name)
    assert names.from_full(names.to_hf(name)) == names.from_full(f"model.{names.to_hf(name)}") == names.from_full(name) == name
