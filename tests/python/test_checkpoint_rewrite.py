"""rewrite, rounding, describe: checkpoints in another layout, dtype or merged, one tensor at a time, and what a directory holds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from stllava.checkpoint import describe, directory, index, names, rewrite, rounding
from stllava.checkpoint.describe import Description
from stllava.checkpoint.directory import Checkpoint, read_checkpoint
from stllava.checkpoint.rewrite import Target
from stllava.checkpoint.rounding import RoundingError, rounded
from stllava.checkpoint.tensor_file import Deferred, count_nonfinite, dtype_name, round_to, to_float32
from stllava.demo.base import fresh_weights
from stllava.errors import ConfigError, FormatError, NumericsError
from stllava.model import LlavaModel
from stllava.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "checkpoint_files"
RECORDED = Path(__file__).parents[1] / "recorded"
BASE, TOWER, ADAPTER = GOLDEN / "full_safetensors_sharded", GOLDEN / "vision_tower", GOLDEN / "adapter_bin"


# ---- rounding

def test_bf16_is_the_nearest_and_even_on_ties() -> None:
    grid = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)  # every finite bf16 from 0
    for sign in (1, -1):
        np.testing.assert_array_equal(to_float32(round_to(sign * grid, "bf16")), sign * grid)
        middle = sign * ((np.arange(0x7F7F, dtype=np.uint32) << 16) + 0x8000).view(np.float32)
        found = round_to(middle, "bf16")
        np.testing.assert_array_equal(to_float32(found), np.where(np.arange(0x7F7F) % 2 == 0, sign * grid[:-1], sign * grid[1:]))
        for step in (-1, 1):  # a bit off the middle
            near = sign * (((np.arange(0x7F7F, dtype=np.uint32) << 16) + 0x8000) + np.uint32(step % 2**32)).view(np.float32)
            np.testing.assert_array_equal(to_float32(round_to(near, "bf16")), sign * (grid[1:] if step == 1 else grid[:-1]))
    assert count_nonfinite(round_to(np.array([3.4e38], np.float32), "bf16")) == 1


def test_largest_errors_by_part() -> None:
    values = {"model.norm.weight": np.array([1, 1 + 2**-9, -3e-8, 0, 2.0], np.float32), names.PROJECTOR + "0.bias": np.array([0.5], np.float32),
              names.TOWER + "vision_model.post_layernorm.bias": np.array([0x3F80], np.uint16)}
    errors: dict[str, RoundingError] = {}
    result = rounded(values, dict.fromkeys(values, "bf16"), errors)
    assert all(isinstance(tensor, Deferred) for tensor in result.values()) and errors == {}
    made = {name: tensor.make() for name, tensor in result.items() if isinstance(tensor, Deferred)}
    assert {dtype_name(array) for array in made.values()} == {"bf16"}
    assert errors["decoder"].absolute == 2**-9 and errors["decoder"].n_to_zero == 0
    assert errors["decoder"].relative == pytest.approx(2**-9, rel=0.01) and errors["projector"] == RoundingError()
    assert "vision tower" not in errors  # it kept its dtype
    errors.clear()
    half = rounded(values, dict.fromkeys(values, "f16"), errors)["model.norm.weight"]
    assert isinstance(half, Deferred) and half.make()[2] == -np.float16(5.96e-8)
    tiny_values = {"model.norm.weight": np.array([1e-9, 1.0], np.float64)}
    half = rounded(tiny_values, {"model.norm.weight": "f16"}, errors)["model.norm.weight"]
    assert isinstance(half, Deferred) and half.make()[0] == 0
    assert errors["decoder"].n_to_zero == 1 and errors["decoder"].relative == 1.0


@pytest.mark.parametrize("value, dtype, message", [(70000.0, "f16", "model.norm.weight: 70000 is too large for f16.*bf16"),
                                                   (np.inf, "bf16", "model.norm.weight has 1 NaN or infinite"), (np.nan, "f16", "model.norm.weight has 1 NaN"),
                                                   (np.nan, "f32", "model.norm.weight has 1 NaN")])
def test_values_that_do_not_fit(value: float, dtype: str, message: str) -> None:
    tensor = rounded({"model.norm.weight": np.array([1, value, 2], np.float32)}, {"model.norm.weight": dtype}, {})["model.norm.weight"]
    assert isinstance(tensor, Deferred)
    with pytest.raises(NumericsError, match=message):
        tensor.make()


def test_mean_of_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    monkeypatch.setattr(rounding, "_CHUNK", 20)
    np.testing.assert_allclose(rounding.mean_of_rows(rows), rows.astype(np.float64).mean(axis=0), rtol=1e-12)


# ---- merging

@pytest.mark.filterwarnings("ignore:.*made for 'tiny-base'")
def test_merged_files_equal_the_merged_model(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(ADAPTER, BASE, TOWER)
    assert rewrite.rewrite(checkpoint, [ADAPTER, BASE], tmp_path / "m", Target()) == {}
    found, wanted = read_checkpoint(tmp_path / "m"), LlavaModel.from_pretrained(ADAPTER, BASE, vision_tower=TOWER).merge_and_unload()
    other = read_checkpoint(GOLDEN / "merged_safetensors", vision_tower=TOWER / "config.json")
    for name, array in wanted.tensors().items():
        # one product in float32 in another order each: measured 6.0e-8
        np.testing.assert_allclose(found.tensors[name], array, rtol=0, atol=5e-7, err_msg=name)
        np.testing.assert_allclose(found.tensors[name], other.tensors[name], rtol=0, atol=5e-7, err_msg=name)
    assert found.lora == {} and found.config == checkpoint.config


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_merge_is_rounded_once(tmp_path: Path, dtype: Any) -> None:
    """From a half-precision base: the sum in float32, then the base's dtype."""
    base = read_checkpoint(BASE, vision_tower=TOWER)
    rewrite.rewrite(base, [], tmp_path / "base", Target(dtype=dtype))
    checkpoint = read_checkpoint(ADAPTER, tmp_path / "base")
    errors = rewrite.rewrite(checkpoint, [], tmp_path / "merged", Target())
    assert set(errors) == {"decoder", "vision tower"} and all(0 < error.relative <= 1 for error in errors.values())
    found, exact = read_checkpoint(tmp_path / "merged").tensors, rewrite.merged_tensors(checkpoint)
    assert {dtype_name(array) for name, array in found.items() if not names.is_projector(name)} == {dtype}  # which non_lora_trainables has in f32
    name = "model.layers.1.mlp.down_proj.weight"
    assert isinstance(exact[name], Deferred)
    np.testing.assert_array_equal(found[name], round_to(exact[name].make(), dtype))


# ---- converting

@pytest.mark.parametrize("kind", ["hf_llama", "hf_mistral"])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_layouts_and_formats_there_and_back(tmp_path: Path, kind: str, format: Any) -> None:
    one = read_checkpoint(RECORDED / kind)
    rewrite.rewrite(one, [], tmp_path / "llava", Target("llava", "keep", format, shard_size=20_000))
    assert len(index.read_weights(tmp_path / "llava")) > 2
    rewrite.rewrite(read_checkpoint(tmp_path / "llava"), [], tmp_path / "hf", Target("hf"))
    two = read_checkpoint(tmp_path / "hf")
    assert two.config == one.config and set(two.tensors) == set(one.tensors)
    assert all(np.array_equal(two.tensors[name], array) for name, array in one.tensors.items())


def test_small_files_come_along(tmp_path: Path) -> None:
    tiny.tiny_model(mm_projector_type="mlp2x_gelu").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    rewrite.rewrite(read_checkpoint(tmp_path / "a"), [tmp_path / "a"], tmp_path / "b", Target("hf", "f16"))
    rewrite.rewrite(read_checkpoint(tmp_path / "b"), [tmp_path / "b"], tmp_path / "c", Target("llava", "f32"))
    for name in "bc":
        model = LlavaModel.from_pretrained(tmp_path / name)
        assert model.tokenizer.special_ids["<image>"] == 32000 and model.image_processor.aspect == "pad" and model.config.vocab_size == 32064
        assert (tmp_path / name / "generation_config.json").exists()
    assert (tmp_path / "b" / "processor_config.json").exists() and not (tmp_path / "c" / "processor_config.json").exists()


def test_where_to_write(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(RECORDED / "hf_llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(ConfigError, match="holds something that stllava did not write"):
            rewrite.rewrite(checkpoint, [], out, Target())
    with pytest.raises(ConfigError, match="is where the checkpoint is read from"):
        rewrite.rewrite(checkpoint, [RECORDED / "hf_llama"], RECORDED / "hf_llama", Target())
    for target in (Target(format="bin"), Target()):  # one of ours is replaced as a whole
        rewrite.rewrite(checkpoint, [], tmp_path / "ours", target)
    assert not list((tmp_path / "ours").glob("*.bin"))


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(RECORDED / "hf_llama")
    rewrite.rewrite(checkpoint, [], tmp_path / "out", Target())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    checkpoint.tensors["model.norm.weight"] = np.full(16, 1e6, np.float32)
    with pytest.raises(NumericsError, match=r"model.norm.weight: 1e\+06 is too large for f16"):
        rewrite.rewrite(checkpoint, [], tmp_path / "out", Target(dtype="f16"))
    with pytest.raises(ValueError, match="dtype 'f8'"):
        rewrite.rewrite(checkpoint, [], tmp_path / "out", Target(dtype="f8"))  # type: ignore[arg-type]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


# ---- describing

def parts(found: Description) -> dict[str, tuple[int, int]]:
    result: dict[str, tuple[int, int]] = {}
    for row in found.rows:
        n_tensors, n_bytes = result.get(row.part, (0, 0))
        result[row.part] = (n_tensors + row.n_tensors, n_bytes + row.n_bytes)
    return result


def test_adapters_on_a_base() -> None:
    found = describe.describe(ADAPTER, BASE, TOWER)
    assert found.problem is None and found.form == "adapters on a base" and "Vit-lora/adapter_config.json" in found.why
    assert {part: n for part, (n, _) in parts(found).items()} == {"decoder": 21, "projector": 14, "vision tower": 55, "decoder, adapter": 28,
                                                                  "vision tower, adapter": 36}
    assert [(adapter["part"], adapter["n_modules"], adapter["r"], adapter["lora_alpha"]) for adapter in found.adapters] == [
        ("decoder", 14, 8, 16), ("vision tower", 18, 4, 8)]
    n_values = sum(row.n_values for row in found.rows)
    assert found.memory == {"f32": 4 * n_values, "f16": 2 * n_values, "bf16": 2 * n_values}
    assert any("Vit-lora only" in line for line in found.ignored) and "made for 'tiny-base'" in found.notes[0]


@pytest.mark.parametrize("path, form", [(RECORDED / "hf_llama", "full weights in Hugging Face's layout"), (RECORDED / "peft_base", "a decoder alone"),
                                        (TOWER, "a vision tower"), (GOLDEN / "full_bin_sharded", "full weights in LLaVA's layout")])
def test_forms(path: Path, form: str) -> None:
    assert describe.describe(path).form == form


def test_what_cannot_be_loaded_is_listed_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "a")
    (tmp_path / "a" / "bad.bin").write_bytes(b"PK\x03\x04")
    found = describe.describe(tmp_path / "a")
    assert found.problem is not None and "pass model_base=DIR" in found.problem
    assert parts(found)["vision tower, adapter"][0] == 72 and any("bad.bin" in note for note in found.notes) and found.memory == {}
    shutil.copytree(BASE, tmp_path / "b")
    (tmp_path / "b" / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors is missing" in str(describe.describe(tmp_path / "b").problem)
    with pytest.raises(FormatError, match="no such"):
        describe.describe(tmp_path / "none.safetensors")


def test_a_weight_file(tmp_path: Path) -> None:
    found = describe.describe(ADAPTER / "non_lora_trainables.bin")
    assert found.form == "a weight file" and parts(found)["projector"][0] == 14
    assert found.tensors[0].keys() == {"name", "shape", "dtype", "file"}


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B model whose 13.5 GB are a hole in the file."""
    config = dataclasses.replace(tiny.config(32000, mm_vision_tower=None, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                             num_attention_heads=32), vision=None, model_type="llama")
    header: dict[str, Any] = {}
    end = 0
    for name, shape in names.expected_shapes(config).items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8))
        file.truncate(8 + len(text) + -len(text) % 8 + end)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(directory, "count_nonfinite", lambda array: pytest.fail("a weight was looked at"))
    found = describe.describe(tmp_path)
    assert found.problem is None and found.memory["f16"] == end == 13_476_831_232


def test_a_gguf_file_and_its_tower(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reads GGUF's quantised blocks")
    from stllava.checkpoint.gguf_file import write_gguf
    model, tower, config = tmp_path / "m.gguf", tmp_path / "mmproj.gguf", tiny.config(mm_projector_type="mlp2x_gelu")
    write_gguf(model, Checkpoint(config, fresh_weights(config, 0)), Tokenizer(tiny.TOKENIZER), mmproj=tower)
    assert parts(describe.describe(model)).keys() == {"decoder"}
    found = describe.describe(model, vision_tower=tower)
    assert found.problem is None and parts(found).keys() == {"decoder", "projector", "vision tower"} and found.memory["f32"] > 0
    assert "vision" in str(describe.describe(tower).problem) or "architecture" in str(describe.describe(tower).problem)
