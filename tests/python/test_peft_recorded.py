"""Adapters that peft made (tests/recorded/make.py): the same logits here, and peft loads what we write of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest

from stllava.checkpoint import index, names, peft
from stllava.checkpoint.directory import read_checkpoint
from stllava.errors import FormatError
from stllava.model import LlavaModel
from stllava.tree import Sequence

RECORDED = Path(__file__).parents[1] / "recorded"
BASES = {"peft_patterns": "peft_base", "peft_expression": "peft_base", "peft_saved": "peft_base", "peft_layers": "peft_base", "peft_dora": "peft_base",
         "peft_llava": "hf_llama", "peft_llava_dora": "hf_llama"}
OF_A_DECODER = [case for case in BASES if BASES[case] == "peft_base"]
# Measured in float32: at most 4.5e-6, and 1.2e-5 for peft_saved, whose new embedding and head make values before the last norm large.
TOLERANCE = 4e-5
# Of the largest in a tensor, measured in float64 against values kept as float32: at most 8.9e-7. transformers computes norms and rotary tables in float32.
GRADIENT_TOLERANCE = 5e-6


def expected(case: str) -> tuple[list[int], list[np.ndarray], np.ndarray]:
    file = index.read_file(RECORDED / case / "expected.safetensors")
    ids = file["ids"].tolist()
    return ids, list(file["pixels"]) if -200 in ids else [], file["logits"]


def load(directory: Path, case: str) -> LlavaModel:
    return LlavaModel.from_pretrained(directory, RECORDED / BASES[case])


def assert_logits(model: LlavaModel, case: str) -> None:
    ids, pictures, logits = expected(case)
    np.testing.assert_allclose(model.logits(ids, pictures), logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", BASES)
def test_logits_of_peft(tmp_path: Path, case: str) -> None:
    model = load(RECORDED / case, case)
    assert_logits(model, case)
    plain = expected(BASES[case])[2]
    ids, pictures, _ = expected(case)
    with model.disable_adapters():
        differs = np.abs(model.logits(ids, pictures) - plain).max() > 10 * TOLERANCE
    assert differs == (model.lora["llm"].modules_to_save != ())  # which stay where they are
    assert_logits(model.merge_and_unload(), case)
    model.save_pretrained(tmp_path, format="safetensors")
    assert_logits(load(tmp_path, case), case)


@pytest.mark.parametrize("case", OF_A_DECODER)
def test_settings_come_back_as_peft_wrote_them(tmp_path: Path, case: str) -> None:
    load(RECORDED / case, case).save_pretrained(tmp_path)
    wanted, found = (json.loads((directory / "adapter_config.json").read_text()) for directory in (RECORDED / case, tmp_path))
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        wanted[key], found[key] = (set(value) if isinstance(value := values.get(key) or [], list) else {value} for values in (wanted, found))
    assert all(found[key] == wanted[key] for key in found)


@pytest.mark.parametrize("case", ["peft_dora", "peft_llava_dora"])
def test_gradients_of_dora(case: str) -> None:
    """Those that peft has: |W + s B A| is a constant to them, and biases (the tower's) are not scaled."""
    model = LlavaModel.from_pretrained(RECORDED / case, RECORDED / BASES[case], dtype="f64")
    ids, pictures, _ = expected(case)
    file = index.read_file(RECORDED / case / "expected.safetensors")
    wanted = {names.from_decoder_adapter(key.removeprefix("grad.")): array for key, array in file.items() if key.startswith("grad.")}
    model.set_trainable(wanted)
    labels = [-100, *(-100 if i < 0 else i for i in ids[1:])]
    _, batch = model.batch([Sequence(ids, labels, tuple(range(len(pictures))))])
    model.run.forward(batch, pixels=model.pixels(pictures) if pictures else None, train=True)
    model.run.backward(np.ones(batch.n_targets))
    for name, where in model.trainable_slices().items():
        found = model.grad[where].reshape(wanted[name].shape)
        assert np.abs(found - wanted[name]).max() < GRADIENT_TOLERANCE * np.abs(wanted[name]).max(), name
    assert sum("magnitude" in name for name in wanted) == len(wanted) / 3 and {names.is_tower(name) for name in wanted} == {False, bool(pictures)}


def test_both_spellings_of_magnitudes(tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "peft_dora", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {f"{name}.weight" if name.endswith("magnitude_vector") else name: array.copy() for name, array in index.read_file(file).items()}
    assert sum(name.endswith("lora_magnitude_vector.weight") for name in tensors) == len(tensors) / 3
    index.write_file(file, tensors)
    model = load(tmp_path, "peft_dora")
    assert_logits(model, "peft_dora")
    model.save_pretrained(tmp_path / "again", format="safetensors")
    assert set(index.read_file(tmp_path / "again" / file.name)) == set(index.read_file(RECORDED / "peft_dora" / file.name))


def test_magnitudes_may_come_first(tmp_path: Path) -> None:
    """How names begin in the file is learnt from any of its tensors."""
    shutil.copytree(RECORDED / "peft_llava_dora", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: array.copy() for name, array in index.read_file(file).items()}
    file.unlink()
    index.write_file(tmp_path / "adapter_model.bin", {name: tensors[name] for name in sorted(tensors, key=lambda name: "magnitude" not in name)})
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "target_modules": r"model\.(language_model|vision_tower\.encoder)\.layers\.\d\.\w+\.(k_proj|v_proj|fc1)"}))
    model = load(tmp_path, "peft_llava_dora")
    assert model.lora["llm"].target_modules == {"k_proj", "v_proj"} and model.lora["vit"].target_modules == {"k_proj", "v_proj", "fc1"}
    assert_logits(model, "peft_llava_dora")


def test_an_adapter_of_the_whole_model_is_split() -> None:
    """Its settings are about names of LlavaForConditionalGeneration; ours are in ours."""
    found = read_checkpoint(RECORDED / "peft_llava", RECORDED / "hf_llama")
    decoder, tower = found.lora_configs
    assert decoder is not None and tower is not None
    assert decoder.rank_pattern == {"model.layers.0.self_attn.q_proj": 3} and tower.rank_pattern == {}
    assert decoder.modules_to_save == ("model.mm_projector.0", "model.mm_projector.2")
    assert len(found.lora) == 8 + 12 and sum(map(names.is_tower, found.lora)) == 12
    assert sum("replaced by" in line for line in found.ignored) == 4


def test_the_older_names_are_the_same_adapter(tmp_path: Path) -> None:
    """PEFT over transformers before 4.52."""
    shutil.copytree(RECORDED / "peft_llava", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace("model.model.language_model.", "model.language_model.model.").replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
               .replace("model.model.multi_modal", "model.multi_modal"): array.copy() for name, array in index.read_file(file).items()}
    index.write_file(file, tensors)
    with pytest.raises(FormatError, match=r"q_proj.lora_A.weight has shape \(3, 16\), want \(2, 16\)"):  # the pattern is about the newer names
        load(tmp_path, "peft_llava")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["rank_pattern"] = {r"language_model\.model\.layers\.0\.self_attn\.q_proj": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert_logits(load(tmp_path, "peft_llava"), "peft_llava")


# ---- adapters for another base

def edit(directory: Path, changes: dict[str, Any]) -> None:
    file = directory / "adapter_model.safetensors"
    index.write_file(file, {**{name: array.copy() for name, array in index.read_file(file).items()}, **changes})


@pytest.mark.parametrize("name, shape, message", [
    ("model.layers.0.self_attn.q_proj.lora_A.weight", (2, 32), r"has shape \(2, 32\), want \(2, 16\).*made for 'peft_base', is this another base"),
    ("model.layers.2.mlp.up_proj.lora_A.weight", (2, 16), r"adapter for model.layers.2.mlp.up_proj, which this model does not have.*peft_base"),
    ("lm_head.weight", (42, 16), r"replaces lm_head.weight, of shape \(42, 16\); the base's is \(40, 16\) .*made for 'peft_base'"),
    ("model.other.weight", (2,), "replaces model.other.weight, which this model does not have")])
def test_adapter_for_another_base(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    shutil.copytree(RECORDED / "peft_saved", tmp_path / "a")
    edit(tmp_path / "a", {f"base_model.model.{name}": np.ones(shape, np.float32)})
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "a", "peft_saved")


def test_a_base_of_another_name_is_noted(tmp_path: Path) -> None:
    assert read_checkpoint(RECORDED / "peft_saved", RECORDED / "peft_base").notes == []
    other = shutil.copytree(RECORDED / "peft_base", tmp_path / "other")
    [note] = read_checkpoint(RECORDED / "peft_saved", other).notes
    assert "made for 'peft_base'" in note and str(other) in note
    with pytest.warns(UserWarning, match="made for 'peft_base'"):
        LlavaModel.from_pretrained(RECORDED / "peft_saved", other)
    (other / "config.json").write_text(json.dumps({**json.loads((other / "config.json").read_text()), "_name_or_path": "somebody/peft_base"}))
    assert read_checkpoint(RECORDED / "peft_saved", other).notes == []
    cached = shutil.copytree(RECORDED / "peft_base", tmp_path / "models--x--peft_base" / "snapshots" / "0123")
    assert read_checkpoint(RECORDED / "peft_saved", cached).notes == []


def test_a_tied_head_cannot_be_replaced(tmp_path: Path) -> None:
    base = shutil.copytree(RECORDED / "peft_base", tmp_path / "peft_base")
    (base / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), "tie_word_embeddings": True}))
    with pytest.raises(FormatError, match="lm_head.weight, which this model ties"):
        read_checkpoint(RECORDED / "peft_saved", base)


def test_a_tower_adapter_replaces_no_weights(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=1, target_modules=frozenset({"fc1"}))
    peft.write_adapter_files(tmp_path, config, {names.TOWER + "vision_model.post_layernorm.bias": np.zeros(16)}, names.to_tower_adapter)
    shutil.copytree(RECORDED / "peft_llava", tmp_path / "a")
    shutil.copytree(tmp_path, tmp_path / "a" / "Vit-lora", ignore=lambda folder, found: [name for name in found if not name.startswith("adapter")])
    with pytest.raises(FormatError, match="remove one of them"):
        load(tmp_path / "a", "peft_llava")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a" / name).unlink()
    with pytest.raises(FormatError, match="replaces no weights"):
        load(tmp_path / "a", "peft_llava")


# ---- peft itself

@pytest.mark.parametrize("case", OF_A_DECODER)
def test_peft_loads_what_we_write(tmp_path: Path, case: str) -> None:
    load(RECORDED / case, case).save_pretrained(tmp_path, format="safetensors")
    (tmp_path / "config.json").unlink()
    ids, _, logits = expected(case)
    np.testing.assert_array_equal(peers.logits(tmp_path, ids, base=RECORDED / BASES[case]), logits)
