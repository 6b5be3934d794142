"""DoRA (arXiv 2402.09353) in the whole model. Its operator is tested in tests/c/test_linear.c, what peft makes of it in test_peft_recorded.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import sft_records, tiny_model, write_pictures

from stllava.checkpoint import index, names, peft, rewrite
from stllava.checkpoint.directory import read_checkpoint
from stllava.checkpoint.peft import Adapter, LoraConfig
from stllava.data.sft import SFTDataset
from stllava.errors import FormatError
from stllava.model import Dtype, LlavaModel
from stllava.train.arguments import SFTConfig
from stllava.train.groups import default_trainable, parameter_groups
from stllava.train.sft import SFTTrainer
from stllava.tree import Sequence

IDS = [1, 306, -200, 242, 988, 11]
RECORDED = Path(__file__).parents[1] / "recorded"


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)


def adapted(dtype: Dtype = "f32", dropout: float = 0.0) -> LlavaModel:
    """DoRA on every linear module, with values that matter."""
    model = tiny_model(dtype)
    for part, rank in (("llm", 3), ("vit", 2)):
        model.add_lora(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=True), part, seed=1)
    for i, (name, array) in enumerate(model.lora_tensors().items()):
        rng = np.random.default_rng(i)
        if ".lora_B." in name:
            array[...] = rng.normal(0, 0.1, array.shape)
        elif "magnitude" in name:
            array *= rng.uniform(0.7, 1.4, array.shape)
    return model


def test_a_fresh_adapter_changes_nothing() -> None:
    plain, model = tiny_model(), tiny_model()
    fresh = model.add_lora(LoraConfig(r=4, lora_alpha=8, use_dora=True))
    assert fresh[:3] == [f"model.layers.0.self_attn.q_proj.{kind}.weight" for kind in ("lora_A", "lora_B", "lora_magnitude_vector")]
    np.testing.assert_array_equal(model.logits(IDS, [picture()]), plain.logits(IDS, [picture()]))


def test_magnitudes_of_a_bfloat16_base() -> None:
    base = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in tiny_model().tensors().items()}
    model = LlavaModel(tiny_model().config, base)
    before = model.logits(IDS, [tiny_model().pixels([picture()])[0]])
    model.add_lora(LoraConfig(r=2, use_dora=True))
    np.testing.assert_array_equal(model.logits(IDS, [tiny_model().pixels([picture()])[0]]), before)


def gradients(model: LlavaModel, trainable: list[str]) -> dict[str, np.ndarray]:
    """Of the sum of four log-probabilities."""
    model.set_trainable(trainable)
    _, batch = model.batch([Sequence(IDS, [-100, 306, -100, 242, 988, 11], (0,))])
    model.run.forward(batch, pixels=model.pixels([picture()]), train=True)
    model.run.backward(np.ones(batch.n_targets))
    infos = model.tensor_infos()
    return {name: model.grad[where].reshape(infos[name].shape).copy() for name, where in model.trainable_slices().items()}


@pytest.mark.parametrize("n_recompute", [0, 2])
def test_gradients_by_the_merged_weight(n_recompute: int) -> None:
    """From d loss / d weight of the merged model, by the chain rule with |V| held constant. Measured in float64: at most 3.9e-15 of a tensor's largest."""
    model = adapted("f64")
    model.run.set_recompute(n_recompute, n_recompute)
    modules = {names.lora_module(name): model.lora["vit" if names.is_tower(name) else "llm"] for name in model.lora_tensors()}
    merged = gradients(model.merge_and_unload(), [f"{module}.weight" for module in modules])
    found = gradients(model, [*(f"{module}.weight" for module in modules), *model.lora_tensors()])
    values = {name: array.copy() for name, array in model.named_parameters()}
    for module, config in modules.items():
        (name_a, name_b), name_m, name_w = names.lora_pair(module), names.lora_magnitude(module), f"{module}.weight"
        a, b, s = values[name_a], values[name_b], config.scaling(module)
        v = values[name_w] + s * b @ a
        norm = np.linalg.norm(v, axis=1)
        dv = (values[name_m] / norm)[:, None] * merged[name_w]
        wanted = {name_m: (merged[name_w] * v).sum(axis=1) / norm, name_a: s * b.T @ dv, name_b: s * dv @ a.T, name_w: dv}
        for name, gradient in wanted.items():
            assert np.abs(gradient).max() > 0 and np.abs(found[name] - gradient).max() <= 4e-14 * np.abs(gradient).max(), name


def test_merging() -> None:
    model = adapted("f64")
    wanted = model.logits(IDS, [picture()])
    np.testing.assert_allclose(model.merge_and_unload().logits(IDS, [picture()]), wanted, rtol=0, atol=4e-14)  # measured: 2.7e-15
    with model.disable_adapters():
        np.testing.assert_array_equal(model.logits(IDS, [picture()]), tiny_model("f64").logits(IDS, [picture()]))
    model.merge_lora()
    np.testing.assert_allclose(model.logits(IDS, [picture()]), wanted, rtol=0, atol=4e-14)
    model.unmerge_lora()
    np.testing.assert_array_equal(model.logits(IDS, [picture()]), wanted)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_round_trip(tmp_path: Path, format: index.Format) -> None:
    model = adapted(dropout=0.1)
    tiny_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", format=format)
    for part in (tmp_path / "adapter", tmp_path / "adapter" / "Vit-lora"):
        assert json.loads((part / "adapter_config.json").read_text())["use_dora"] is True
    again = LlavaModel.from_pretrained(tmp_path / "adapter", tmp_path / "base")
    assert again.lora["vit"].use_dora and set(again.lora_tensors()) == set(model.lora_tensors())
    np.testing.assert_array_equal(again.logits(IDS, [picture()]), model.logits(IDS, [picture()]))


def test_merged_files_equal_the_merged_model(tmp_path: Path) -> None:
    sources = RECORDED / "peft_dora", RECORDED / "peft_base"
    rewrite.rewrite(read_checkpoint(*sources), sources, tmp_path / "merged", rewrite.Target())
    found, wanted = read_checkpoint(tmp_path / "merged"), LlavaModel.from_pretrained(*sources).merge_and_unload()
    for name, array in wanted.tensors().items():
        np.testing.assert_allclose(found.tensors[name], array, rtol=0, atol=3e-7, err_msg=name)  # float32 in another order: measured 3.0e-8


def test_magnitudes_and_settings_must_agree() -> None:
    module = "model.layers.0.self_attn.q_proj"
    tensors: dict[str, Any] = dict(zip((*names.lora_pair(module), names.lora_magnitude(module)), map(np.ones, ((2, 64), (64, 2), 64)), strict=True))
    linears: names.Shapes = {module: (64, 64)}

    def check(config: LoraConfig, **changes: np.ndarray | None) -> None:
        kept = {name: array for name, array in {**tensors, **changes}.items() if array is not None}
        peft.check_pairs(Adapter(config, kept, Path("file")), linears, lambda module: True)

    dora, plain = (LoraConfig(r=2, target_modules=frozenset({"q_proj"}), use_dora=use) for use in (True, False))
    check(dora)
    with pytest.raises(FormatError, match="file: .*lora_magnitude_vector.weight is of DoRA, but adapter_config.json does not say use_dora"):
        check(plain)
    with pytest.raises(FormatError, match="lora_magnitude_vector.weight is missing"):
        check(dora, **{names.lora_magnitude(module): None})
    with pytest.raises(FormatError, match=r"lora_magnitude_vector.weight has shape \(3,\), want \(64,\)"):
        check(dora, **{names.lora_magnitude(module): np.ones(3)})
    with pytest.raises(FormatError, match="is of DoRA, but the adapter's settings do not say use_dora"):
        tiny_model().attach_lora(plain, tensors)


def test_training_moves_magnitudes(tmp_path: Path) -> None:
    model = adapted(dropout=0.1)
    before = {name: array.copy() for name, array in model.lora_tensors().items() if "magnitude" in name}
    (tmp_path / "images").mkdir()
    data = SFTDataset(sft_records(write_pictures(tmp_path / "images")), model.tokenizer, model.image_processor, image_folder=tmp_path / "images",
                      tokens_per_image=model.core.tokens_per_image)
    arguments = SFTConfig(str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=2, learning_rate=5e-3, weight_decay=0.1, disable_tqdm=True)
    SFTTrainer(model, arguments, data).train()
    log = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1] < log[0]
    assert len(before) == 14 + 12 and all((model.lora_tensors()[name] != array).all() for name, array in before.items())
    groups = parameter_groups(model, default_trainable(model), arguments)
    assert {decay for decay, group in zip(groups.weight_decay, groups.names, strict=True) for name in group if "magnitude" in name} == {0.1}
