"""directory: every form of a checkpoint reads to the same canonical tensors, and whatever does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stllava.checkpoint import atomic, index, names, peft
from stllava.checkpoint.directory import Checkpoint, read_checkpoint, write_adapter, write_full, write_projector
from stllava.errors import ConfigError, FormatError, NumericsError

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "checkpoint_files"
BASE, TOWER = GOLDEN / "full_safetensors_sharded", GOLDEN / "vision_tower"


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def read_adapted(directory: str | Path = GOLDEN / "adapter_bin") -> Checkpoint:
    return read_checkpoint(directory, BASE, TOWER)


def merged(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """W + s B A in float64, for every adapted module."""
    result = {}
    for name, weight in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        name_a, name_b = names.lora_pair(module)
        result[name] = weight.astype(np.float64)
        if name_a in checkpoint.lora:
            config = checkpoint.lora_configs[module.startswith(names.TOWER)]
            a, b = (checkpoint.lora[key].astype(np.float64) for key in (name_a, name_b))
            result[name] += config.scaling(module) * (b @ a)
    return result


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewrite(path: Path, changes: dict[str, Any]) -> None:
    """Change tensors of a weight file; None removes one."""
    tensors = {name: array for name, array in {**index.read_file(path), **changes}.items() if array is not None}
    index.write_file(path, tensors)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- reading the golden forms

@pytest.mark.parametrize("directory", ["full_safetensors_sharded", "full_bin_sharded"])
def test_full_checkpoint(directory: str) -> None:
    checkpoint = read_checkpoint(GOLDEN / directory, vision_tower=TOWER / "config.json")
    assert len(checkpoint.tensors) == 90 and checkpoint.lora == {} and checkpoint.lora_configs == (None, None)
    assert len(checkpoint.ignored) == 2 and all("inv_freq" in line for line in checkpoint.ignored)
    assert checkpoint.sources["lm_head.weight"].parent.name == directory


@pytest.mark.parametrize("directory", ["adapter_bin", "adapter_safetensors"])
def test_base_and_adapters_equal_the_merged_checkpoint(tmp_path: Path, directory: str) -> None:
    source = copy(GOLDEN / directory, tmp_path / "adapter")
    if directory == "adapter_safetensors":  # the case stores the projector once
        shutil.copy(GOLDEN / "adapter_bin" / "non_lora_trainables.bin", source)
    checkpoint = read_adapted(source)
    assert len(checkpoint.lora) == 28 + 36
    assert [config.r for config in checkpoint.lora_configs] == [8, 4]
    wanted = read_checkpoint(GOLDEN / "merged_safetensors", vision_tower=TOWER / "config.json").tensors
    found = merged(checkpoint)
    assert set(found) == set(wanted)
    # measured 4.8e-8: the golden merge is in float32
    assert max(np.abs(found[name] - wanted[name]).max() for name in wanted) < 1e-6
    assert any(np.abs(checkpoint.tensors[name] - wanted[name]).max() > 1e-3 for name in wanted)


def test_tower_inside_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    """The merged checkpoint's tower differs from the unmerged directory."""
    name = names.TOWER + "vision_model.encoder.layers.0.mlp.fc1.weight"
    inside = read_checkpoint(GOLDEN / "merged_safetensors", vision_tower=TOWER / "config.json").tensors[name]
    asked = read_checkpoint(GOLDEN / "merged_safetensors", vision_tower=TOWER).tensors[name]
    assert not np.array_equal(inside, asked)
    copy(TOWER, tmp_path / "tiny-vision-tower")  # what mm_vision_tower names, beside the checkpoint
    copied = copy(GOLDEN / "merged_safetensors", tmp_path / "merged")
    np.testing.assert_array_equal(read_checkpoint(copied).tensors[name], inside)


def test_tower_from_the_directory_the_configuration_names(tmp_path: Path) -> None:
    directory = copy(GOLDEN / "merged_safetensors", tmp_path / "m")
    removed = {key: None for key in index.read_file(directory / "model.safetensors") if key.startswith(names.TOWER)}
    rewrite(directory / "model.safetensors", removed)
    with pytest.raises(FormatError, match="tiny-vision-tower.*pass vision_tower=DIR"):
        read_checkpoint(directory)
    with pytest.raises(FormatError, match="vision_tower=DIR"):
        read_checkpoint(directory, vision_tower=TOWER / "config.json")
    copy(TOWER, tmp_path / "tiny-vision-tower")
    checkpoint = read_checkpoint(directory)
    assert len(checkpoint.tensors) == 90
    assert checkpoint.sources[names.TOWER + "vision_model.pre_layrnorm.bias"].parent.name == "tiny-vision-tower"


def test_decoder_alone(tmp_path: Path) -> None:
    tensors = {name: array for name, array in read_adapted().tensors.items()
               if not name.startswith((names.PROJECTOR, names.TOWER))}
    config = dataclasses.replace(read_adapted().config, model_type="llama", mm_vision_tower=None, vision=None)
    write_full(tmp_path / "vicuna", config, tensors)
    checkpoint = read_checkpoint(tmp_path / "vicuna")
    assert_same(checkpoint.tensors, tensors)
    assert checkpoint.config.core_config()["vision"] is None
    # the original's usual base: a plain decoder; everything else comes from the adapter's directory
    assert_same(read_checkpoint(GOLDEN / "adapter_bin", tmp_path / "vicuna", TOWER).tensors, read_adapted().tensors)


# ---- round trips

@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shard_size", [10**9, 100_000])
def test_full_round_trip(tmp_path: Path, format: index.Format, shard_size: int) -> None:
    one = read_checkpoint(BASE, vision_tower=TOWER)
    with atomic.atomic_directory(tmp_path / "full") as directory:
        write_full(directory, one.config, one.tensors, shard_size, format)
    atomic.verify(tmp_path / "full")
    two = read_checkpoint(tmp_path / "full")
    assert_same(two.tensors, one.tensors)
    assert two.config == one.config and two.ignored == []
    assert json.loads((tmp_path / "full" / "config.json").read_text())["torch_dtype"] == "float32"


def test_bf16_round_trip(tmp_path: Path) -> None:
    one = read_checkpoint(BASE, vision_tower=TOWER)
    tensors = {name: (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16) for name, array in one.tensors.items()}
    for format in ("safetensors", "bin"):
        write_full(tmp_path / format, one.config, tensors, format=format)
        assert_same(read_checkpoint(tmp_path / format).tensors, tensors)
        assert json.loads((tmp_path / format / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("format", ["bin", "safetensors"])
@pytest.mark.parametrize("compat", [False, True])
def test_adapter_round_trip(tmp_path: Path, format: index.Format, compat: bool) -> None:
    one = read_adapted()
    llm = {name: array for name, array in one.lora.items() if not name.startswith(names.TOWER)}
    vit = {name: array for name, array in one.lora.items() if name.startswith(names.TOWER)}
    projector = {name: array for name, array in one.tensors.items() if name.startswith(names.PROJECTOR)}
    write_adapter(tmp_path, one.config, llm, vit, projector, one.lora_configs, format, compat=compat)

    two = read_adapted(tmp_path)
    assert_same(two.tensors, one.tensors)
    assert_same(two.lora, one.lora)
    assert two.lora_configs == one.lora_configs and two.config == one.config
    for golden, ours in (("adapter_bin/adapter_model.bin", f"adapter_model.{format}"),
                         ("adapter_bin/Vit-lora/adapter_model.bin", f"Vit-lora/adapter_model.{format}"),
                         ("adapter_bin/non_lora_trainables.bin", f"non_lora_trainables.{format}")):
        wanted, found = dict(index.read_file(GOLDEN / golden)), dict(index.read_file(tmp_path / ours))
        if ours.startswith("adapter_model") and not compat:
            wanted = {key: array for key, array in wanted.items() if "vision_tower" not in key}
        assert_same(found, wanted)
    for name in ("adapter_config.json", "Vit-lora/adapter_config.json"):
        wanted, found = (json.loads((d / name).read_text()) for d in (GOLDEN / "adapter_bin", tmp_path))
        assert {**found, "target_modules": set(found["target_modules"])} == {**wanted, "target_modules": set(wanted["target_modules"])}


@pytest.mark.parametrize("format", ["bin", "safetensors"])
def test_projector_only_round_trip(tmp_path: Path, format: index.Format) -> None:
    one = read_adapted()
    projector = {name: array + 1 for name, array in one.tensors.items() if name.startswith(names.PROJECTOR)}
    write_projector(tmp_path, one.config, projector, format)
    two = read_checkpoint(tmp_path, BASE, TOWER)
    assert_same(two.tensors, {**one.tensors, **projector})
    assert sum("replaced by" in line for line in two.ignored if names.PROJECTOR in line) == 14
    with pytest.raises(FormatError, match="pass model_base=DIR"):
        read_checkpoint(tmp_path)


def test_tied_head_in_the_file_is_ignored(tmp_path: Path) -> None:
    one = read_checkpoint(BASE, vision_tower=TOWER)
    write_full(tmp_path, one.config, one.tensors)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    two = read_checkpoint(tmp_path)
    assert "lm_head.weight" not in two.tensors and any("lm_head" in line for line in two.ignored)


# ---- what must not pass silently

def test_unused_tensors_may_be_absent_others_not(tmp_path: Path) -> None:
    directory = copy(GOLDEN / "merged_safetensors", tmp_path / "m")
    rewrite(directory / "model.safetensors", {"model.mm_projector.ln_1.weight": None, "model.mm_projector.ln_1.bias": None})
    assert len(read_checkpoint(directory, vision_tower=TOWER / "config.json").tensors) == 88
    rewrite(directory / "model.safetensors", {"model.mm_projector.c.weight": None})
    with pytest.raises(FormatError, match=r"m: 1 tensors are missing, first model.mm_projector.c.weight"):
        read_checkpoint(directory, vision_tower=TOWER / "config.json")


@pytest.mark.parametrize("name, array, message", [
    ("model.layers.2.mlp.up_proj.weight", np.zeros((96, 64), np.float32), "this model does not have, first model.layers.2"),
    ("model.layers.0.self_attn.q_proj.bias", np.zeros(64, np.float32), "first model.layers.0.self_attn.q_proj.bias"),
    ("model.norm.weight", np.zeros(65, np.float32), r"model.norm.weight has shape \(65,\), the configuration asks for \(64,\)"),
    ("model.norm.weight", np.zeros(64, np.int32), "model.norm.weight has dtype i32"),
])
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    directory = copy(GOLDEN / "merged_safetensors", tmp_path / "m")
    rewrite(directory / "model.safetensors", {name: array})
    with pytest.raises(FormatError, match=message) as error:
        read_checkpoint(directory, vision_tower=TOWER / "config.json")
    assert "model.safetensors" in str(error.value)


def test_nan_and_infinity(tmp_path: Path) -> None:
    directory = copy(GOLDEN / "merged_safetensors", tmp_path / "m")
    bad = np.ones(64, np.float32)
    bad[[3, 5]] = np.nan, np.inf
    rewrite(directory / "model.safetensors", {"model.norm.weight": bad})
    with pytest.raises(NumericsError, match="model.norm.weight has 2 NaN or infinite values of 64"):
        read_checkpoint(directory, vision_tower=TOWER / "config.json")
    assert read_checkpoint(directory, vision_tower=TOWER / "config.json", check_finite=False).tensors["model.norm.weight"][0] == 1


def test_adapter_without_its_base_or_projector(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="tiny-base.*model_base=DIR"):
        read_checkpoint(GOLDEN / "adapter_bin", vision_tower=TOWER)
    with pytest.raises(FormatError, match="full weights, there are none"):
        read_checkpoint(GOLDEN / "adapter_bin", GOLDEN / "adapter_safetensors", TOWER)
    one = read_checkpoint(BASE, vision_tower=TOWER)
    plain = {name: array for name, array in one.tensors.items() if not name.startswith((names.PROJECTOR, names.TOWER))}
    write_full(tmp_path / "base", dataclasses.replace(one.config, mm_vision_tower=None, vision=None), plain)
    adapter = copy(GOLDEN / "adapter_bin", tmp_path / "adapter")
    (adapter / "non_lora_trainables.bin").unlink()
    with pytest.raises(FormatError, match="missing, first model.mm_projector.*non_lora_trainables"):
        read_checkpoint(adapter, tmp_path / "base", TOWER)


def test_base_named_by_the_adapter(tmp_path: Path) -> None:
    adapter = copy(GOLDEN / "adapter_bin", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(BASE))
    assert len(read_checkpoint(adapter, vision_tower=TOWER).lora) == 64


def test_decoder_of_the_base_must_agree(tmp_path: Path) -> None:
    adapter = copy(GOLDEN / "adapter_bin", tmp_path / "adapter")
    edit_json(adapter / "config.json", rope_theta=1e6)
    with pytest.raises(ConfigError, match="rope_theta is 1000000.0, but the base's"):
        read_adapted(adapter)


@pytest.mark.parametrize("file, key, array, message", [
    ("adapter_model.bin", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", None, "lora_A.weight is missing"),
    ("adapter_model.bin", "base_model.model.lm_head.lora_A.weight", np.zeros((8, 64), np.float32), "lm_head"),
    ("adapter_model.bin", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", np.zeros((4, 64), np.float32), r"want \(8, 64\)"),
    ("non_lora_trainables.bin", "base_model.model.model.extra", np.zeros(1, np.float32), "first model.extra"),
    ("Vit-lora/adapter_model.bin", "base_model.model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.lora_B.weight", None,
     "lora_B.weight is missing"),
])
def test_adapter_tensors_that_do_not_fit(tmp_path: Path, file: str, key: str, array: Any, message: str) -> None:
    adapter = copy(GOLDEN / "adapter_bin", tmp_path / "adapter")
    rewrite(adapter / file, {key: array})
    with pytest.raises(FormatError, match=message) as error:
        read_adapted(adapter)
    assert Path(file).name in str(error.value)


@pytest.mark.parametrize("layer, allowed", [(0, False), (1, False), (2, True)])
def test_only_the_unused_tower_layer_may_lack_an_adapter(tmp_path: Path, layer: int, allowed: bool) -> None:
    adapter = copy(GOLDEN / "adapter_bin", tmp_path / "adapter")
    path = adapter / "Vit-lora" / "adapter_model.bin"
    rewrite(path, {key: None for key in index.read_file(path) if f".layers.{layer}." in key})
    if allowed:
        assert len(read_adapted(adapter).lora) == 28 + 24
    else:
        with pytest.raises(FormatError, match=f"no adapter for .*layers.{layer}"):
            read_adapted(adapter)


def test_tower_adapters_in_the_decoder_file_are_listed_as_ignored(tmp_path: Path) -> None:
    adapter = copy(GOLDEN / "adapter_bin", tmp_path / "adapter")
    shutil.rmtree(adapter / "Vit-lora")
    checkpoint = read_adapted(adapter)
    assert len(checkpoint.lora) == 28 and checkpoint.lora_configs[1] is None
    assert sum("Vit-lora only" in line for line in checkpoint.ignored) == 36


def test_ambiguous_or_foreign_directories(tmp_path: Path) -> None:
    both = copy(GOLDEN / "merged_safetensors", tmp_path / "both")
    shutil.copytree(GOLDEN / "adapter_bin" / "Vit-lora", both / "Vit-lora")
    with pytest.raises(FormatError, match="full weights and an adapter"):
        read_checkpoint(both, vision_tower=TOWER)
    with pytest.raises(ConfigError, match="model_base .* is given too"):
        read_checkpoint(GOLDEN / "merged_safetensors", BASE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(FormatError, match="no such directory"):
        read_checkpoint(tmp_path / "none")


def test_wrong_tower(tmp_path: Path) -> None:
    tower = copy(TOWER, tmp_path / "tower")
    edit_json(tower / "config.json", hidden_size=64)
    with pytest.raises(ConfigError, match="mm_hidden_size 32, but the vision tower's hidden_size is 64"):
        read_checkpoint(BASE, vision_tower=tower)


def test_writers_refuse_what_could_not_be_read(tmp_path: Path) -> None:
    one = read_adapted()
    tensors = dict(one.tensors)
    del tensors["model.norm.weight"]
    with pytest.raises(FormatError, match="first model.norm.weight"):
        write_full(tmp_path / "x", one.config, tensors)
    with pytest.raises(FormatError, match="no adapter for"):
        write_adapter(tmp_path / "x", one.config, {}, {}, {}, (peft.LoraConfig(target_modules=frozenset({"q_proj"})), None))
    with pytest.raises(FormatError, match="model.nothing"):
        write_adapter(tmp_path / "x", one.config, {}, {}, {"model.nothing": np.zeros(1)}, (None, None))
    with pytest.raises(FormatError, match="model.norm.weight"):
        write_projector(tmp_path / "x", one.config, {"model.norm.weight": np.zeros(64)})
