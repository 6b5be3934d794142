"""peft: adapter_config.json of every PEFT version, scaling rules, and the refusal of what would change the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stllava.checkpoint import index, names, peft
from stllava.checkpoint.peft import Adapter, LoraConfig
from stllava.errors import ConfigError, FormatError

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "checkpoint_files"
KEYS_OF_0_4 = {"auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
               "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
               "revision", "target_modules", "task_type"}
# What a current PEFT writes for a plain adapter, beyond the keys of 0.4.
NEW_DEFAULTS = {"alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "corda_config": None,
                "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "layer_replication": None,
                "loftq_config": {}, "lora_bias": False, "megatron_config": None, "megatron_core": "megatron.core",
                "peft_version": "0.18.0", "qalora_group_size": 16, "rank_pattern": {}, "target_parameters": None,
                "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False}
Q = "model.layers.0.self_attn.q_proj"


def values(**changes: Any) -> dict[str, Any]:
    return {**json.loads((GOLDEN / "adapter_bin" / "adapter_config.json").read_text()), **changes}


@pytest.mark.parametrize("directory", ["adapter_bin", "adapter_bin/Vit-lora", "adapter_safetensors"])
def test_golden_config_round_trip(directory: str) -> None:
    wanted = json.loads((GOLDEN / directory / "adapter_config.json").read_text())
    found = peft.read_config(GOLDEN / directory).to_dict()
    assert set(found) == KEYS_OF_0_4
    assert {**found, "target_modules": set(found["target_modules"])} == {**wanted, "target_modules": set(wanted["target_modules"])}


def test_plain_adapter_of_a_new_peft_is_plain() -> None:
    config = LoraConfig.from_dict(values(**NEW_DEFAULTS))
    assert config == LoraConfig.from_dict(values())
    assert set(config.to_dict()) == KEYS_OF_0_4


def test_newer_keys_are_written_only_when_used() -> None:
    config = LoraConfig.from_dict(values(use_rslora=True, use_dora=True, rank_pattern={"q_proj": 4}))
    assert set(config.to_dict()) == KEYS_OF_0_4 | {"use_rslora", "use_dora", "rank_pattern"}
    assert LoraConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("key, value", [
    ("use_dora", "yes"), ("lora_bias", True), ("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]), ("bias", "all"),
    ("modules_to_save", "lm_head"), ("modules_to_save", [".*"]), ("exclude_modules", 3), ("exclude_modules", "(a"), ("layers_pattern", ["a|b"]),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "lora_ga"), ("kasa_config", {"beta": 1}), ("use_bdlora", {"nblocks": 2}), ("peft_type", "LOHA"), ("target_parameters", ["w"]), ("a_key_of_the_future", 1),
    ("r", 0), ("r", True), ("r", 8.0), ("r", 65537), ("lora_alpha", 0), ("lora_alpha", "16"), ("lora_dropout", 1),
    ("lora_dropout", -0.1), ("use_rslora", 1), ("target_modules", 3), ("target_modules", [1]), ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", {"q_proj": "8"}), ("rank_pattern", {"(a": 4}), ("alpha_pattern", {r"(a)\1": 4}),
    ("layers_to_transform", ["0"]), ("layers_to_transform", True),
])
def test_what_would_change_the_result_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(values(**{key: value})))
    with pytest.raises(ConfigError, match=key) as error:
        peft.read_config(tmp_path)
    assert "adapter_config.json" in str(error.value)


def test_scaling() -> None:
    plain = LoraConfig(r=8, lora_alpha=16)
    assert plain.scaling(Q) == 2.0
    assert LoraConfig(r=16, lora_alpha=16, use_rslora=True).scaling(Q) == 4.0
    pattern = LoraConfig(r=8, lora_alpha=16, rank_pattern={"layers.0.self_attn.q_proj": 4, "up_proj": 2},
                         alpha_pattern={r"self_attn\.q_proj": 1})
    assert (pattern.rank(Q), pattern.scaling(Q)) == (4, 0.25)
    assert pattern.rank("model.layers.10.self_attn.q_proj") == 8
    assert pattern.scaling("model.layers.1.mlp.up_proj") == 8.0
    assert pattern.rank("model.layers.1.mlp.not_up_proj") == 8


def test_targets() -> None:
    config = LoraConfig(target_modules=frozenset({"q_proj", "mlp.fc1"}), layers_to_transform=(0, 2))
    assert config.targets(Q)
    assert not config.targets("model.layers.1.self_attn.q_proj")
    assert not config.targets("model.layers.0.self_attn.my_q_proj")
    assert LoraConfig(target_modules=".*q_proj").targets(Q) and not LoraConfig(target_modules="q_proj").targets(Q)
    assert LoraConfig(target_modules="all-linear").targets(Q)
    for excluded in (frozenset({"self_attn.q_proj"}), r".*\.0\..*"):
        config = LoraConfig(target_modules=frozenset({"q_proj"}), exclude_modules=excluded)
        assert not config.targets(Q) and config.targets("model.layers.1.mlp.q_proj")
    assert not LoraConfig(target_modules="all-linear", modules_to_save=("layers.0",)).targets(Q)
    whole = LoraConfig(target_modules=frozenset({Q, "k_proj"}), layers_to_transform=(1,))  # a whole name is taken in any layer
    assert whole.targets(Q) and not whole.targets(Q.replace("q_proj", "k_proj"))
    assert LoraConfig(target_modules=frozenset({"q_proj"}), layers_to_transform=(3,), layers_pattern=("blocks", "layers")).targets("a.layers.3.q_proj")
    assert not LoraConfig(target_modules=frozenset({"q_proj"}), layers_to_transform=(3,), layers_pattern=("blocks",)).targets("a.layers.3.q_proj")


def test_a_linear_module_makes_fan_in_fan_out_and_velora_harmless() -> None:
    assert LoraConfig.from_dict(values(fan_in_fan_out=True, velora_config={"num_groups": 4})) == LoraConfig.from_dict(values())


def test_settings_in_names_of_ours() -> None:
    """PEFT knew the modules under other beginnings, and the expressions are about those."""
    modules = {f"model.layers.{i}.{name}": f"model.language_model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r"model\.language_model.*(q|up)_proj", exclude_modules=r".*layers\.1\.mlp.*",
                        rank_pattern={r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 4}, alpha_pattern={"^model.layers.0.mlp.up_proj": 1, "q_proj": 2})
    found = config.resolved(modules, ["lm_head"])
    wanted = {"model.layers.0.self_attn.q_proj": 0.5, "model.layers.1.self_attn.q_proj": 0.25, "model.layers.0.mlp.up_proj": 2.0}
    assert {module: found.scaling(module) for module in modules if found.targets(module)} == wanted
    assert found.is_plain and not config.is_plain and found.modules_to_save == ("lm_head",)
    assert LoraConfig.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("directory, mapping, prefix, n", [
    ("adapter_bin", names.from_decoder_adapter, "model.", 64), ("adapter_safetensors", names.from_decoder_adapter, "model.", 64),
    ("adapter_bin/Vit-lora", names.from_tower_adapter, names.TOWER, 36),
    ("adapter_safetensors/Vit-lora", names.from_tower_adapter, names.TOWER, 36)])
def test_golden_adapters(directory: str, mapping: Any, prefix: str, n: int) -> None:
    adapter = peft.read_adapter(GOLDEN / directory, mapping)
    assert len(adapter.tensors) == n and all(name.startswith(prefix) for name in adapter.tensors)


def test_bin_and_safetensors_are_the_same_adapter() -> None:
    one, two = (peft.read_adapter(GOLDEN / d, names.from_decoder_adapter) for d in ("adapter_bin", "adapter_safetensors"))
    assert set(one.tensors) == set(two.tensors)
    for name in one.tensors:
        np.testing.assert_array_equal(one.tensors[name], two.tensors[name])


@pytest.mark.parametrize("format", ["bin", "safetensors"])
def test_round_trip(tmp_path: Path, format: index.Format) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=frozenset({"q_proj"}), use_rslora=True)
    tensors = {Q + ".lora_A.weight": np.ones((2, 3), np.float32), Q + ".lora_B.weight": np.full((5, 2), 0x3F80, np.uint16)}
    peft.write_adapter_files(tmp_path, config, tensors, names.to_decoder_adapter, format)
    assert "base_model.model." + Q + ".lora_A.weight" in index.read_file(tmp_path / f"adapter_model.{format}")
    adapter = peft.read_adapter(tmp_path, names.from_decoder_adapter)
    assert adapter.config == config
    for name, array in tensors.items():
        np.testing.assert_array_equal(adapter.tensors[name], array)


@pytest.mark.parametrize("key, message", [
    ("base_model.model." + Q + ".lora_magnitude.weight", "nor a lora_magnitude_vector"), ("base_model.model." + Q + ".lora_B.bias", "lora_bias"),
    ("base_model.model." + Q + ".lora_embedding_A", "LoRA on an embedding"),
    ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices"), (Q + ".lora_A.weight", "base_model.model."),
])
def test_foreign_keys(tmp_path: Path, key: str, message: str) -> None:
    peft.write_adapter_files(tmp_path, LoraConfig(), {key: np.ones((1, 1))}, str)
    with pytest.raises(FormatError, match=message):
        peft.read_adapter(tmp_path, names.from_decoder_adapter)


def test_module_to_save_that_is_not_there(tmp_path: Path) -> None:
    pair = {name: np.ones((1, 1)) for name in names.lora_pair(Q)}
    config = LoraConfig(r=1, target_modules=frozenset({"q_proj"}), modules_to_save=("lm_head",))
    peft.write_adapter_files(tmp_path, config, pair, names.to_decoder_adapter)
    with pytest.raises(FormatError, match="modules_to_save names 'lm_head', but no such tensor"):
        peft.read_adapter(tmp_path, names.from_decoder_adapter)
    peft.write_adapter_files(tmp_path, config, {**pair, "lm_head.weight": np.ones((2, 2))}, names.to_decoder_adapter)
    adapter = peft.read_adapter(tmp_path, names.from_decoder_adapter)
    assert set(adapter.saved) == {"lm_head.weight"} and set(adapter.tensors) == set(pair)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


def test_integer_adapter_and_missing_weights(tmp_path: Path) -> None:
    peft.write_adapter_files(tmp_path, LoraConfig(), {Q + ".lora_A.weight": np.ones((1, 1), np.int64)}, names.to_decoder_adapter)
    with pytest.raises(FormatError, match="dtype i64"):
        peft.read_adapter(tmp_path, names.from_decoder_adapter)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FormatError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        peft.read_adapter(tmp_path, names.from_decoder_adapter)


def test_check_pairs() -> None:
    config = LoraConfig(r=2, target_modules=frozenset({"q_proj"}))
    linears = {Q: (5, 3), Q.replace("0", "1"): (5, 3)}
    good = {name: np.zeros(shape) for module in linears
            for name, shape in zip(names.lora_pair(module), ((2, 3), (5, 2)), strict=True)}

    def check(changes: dict[str, Any]) -> None:
        tensors = {name: array for name, array in {**good, **changes}.items() if array is not None}
        peft.check_pairs(Adapter(config, tensors, Path("file")), linears, lambda module: True)

    a, b = names.lora_pair(Q)
    check({})
    for changes, message in (({b: None}, "lora_B.weight is missing"), ({a: None, b: None}, "no adapter for " + Q),
                             ({a: np.zeros((3, 3))}, r"want \(2, 3\)"), ({b: np.zeros((5, 3))}, r"want \(5, 2\)"),
                             ({"model.norm.lora_A.weight": np.zeros((2, 3))}, "model.norm")):
        with pytest.raises(FormatError, match=message):
            check(changes)
