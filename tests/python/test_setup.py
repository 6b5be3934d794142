"""The model that the original's flags describe, what of it trains, and the files that come out: names, keys and fields of the original, which load again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peers
import pytest
from tiny import TOKENIZER, VISION, config, dpo_records, sft_records, tiny_model, write_pictures

from stllava.checkpoint import directory, index, names, peft
from stllava.config import LlavaConfig
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.demo.base import fresh_weights
from stllava.errors import ConfigError, FormatError, NumericsError
from stllava.model import LlavaModel
from stllava.text.tokenizer import Tokenizer
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOTrainer
from stllava.train.script import DataArguments, ModelArguments
from stllava.train.setup import build_model, fresh_projector
from stllava.train.sft import SFTTrainer

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens" / "checkpoint_files"
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "vit_lora_enable": True, "lora_r_vit": 2, "lora_alpha_vit": 4}


def write_tower(folder: Path, seed: int = 7) -> Path:
    """A CLIP vision directory as transformers writes it."""
    tensors = {names.to_tower(name): array for name, array in fresh_weights(config(), seed).items() if names.is_tower(name)}
    folder.mkdir()
    index.write_weights(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"architectures": ["CLIPVisionModel"], **VISION}))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """llava (complete), vicuna and mistral (decoders alone), clip, clip2 (towers), images."""
    root = tmp_path_factory.mktemp("setup")
    tiny_model().save_pretrained(root / "llava")
    for name, kind in (("vicuna", "llama"), ("mistral", "mistral")):
        values = {key: value for key, value in config().to_dict().items() if not key.startswith(("mm_", "image_", "num_lat"))}
        decoder = LlavaConfig.from_dict({**values, "model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"], "num_key_value_heads": 2,
                                         "sliding_window": None})
        directory.write_full(root / name, decoder, fresh_weights(decoder, 3))
        Tokenizer(str(TOKENIZER)).save_pretrained(root / name)
    write_tower(root / "clip")
    write_tower(root / "clip2", seed=8)
    (root / "images").mkdir()
    write_pictures(root / "images")
    return root


def build(base, *, out="out", kind=SFTConfig, data=None, run=(), **flags):
    return build_model(ModelArguments(str(base), **flags), kind(str(out), **dict(run)), data)


def train(model, trainable, root, out, kind="sft", **settings):
    pictures = sorted(path.name for path in (root / "images").iterdir())
    common = {"image_folder": root / "images", "tokens_per_image": model.core.tokens_per_image}
    settings = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "mm_projector_lr": 1e-2, "vision_tower_lr": 1e-2, "disable_tqdm": True,
                "lr_scheduler_type": "constant", "dataloader_num_workers": 0, **settings}
    if kind == "sft":
        data = SFTDataset(sft_records(pictures), model.tokenizer, model.image_processor, **common)
        run = SFTTrainer(model, SFTConfig(str(out), **settings), data, trainable=trainable)
    else:
        data = DPODataset(dpo_records(pictures), model.tokenizer, model.image_processor, **common)
        run = DPOTrainer(model, DPOConfig(str(out), **settings), data, trainable=trainable)
    run.train()
    run.save_model()
    return run


def assert_same(a: LlavaModel, b: LlavaModel) -> None:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# ---- what is built ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_stays_what_it_is(root):
    model, trainable = build(root / "llava")
    assert_same(model, LlavaModel.from_pretrained(root / "llava"))
    assert model.config.mm_projector_type == "cluster" and model.config.mm_vision_select_layer == -2 and model.image_processor.aspect == "pad"
    assert not any(map(names.is_tower, trainable)) and "lm_head.weight" in trainable and "model.mm_projector.c.weight" in trainable


@pytest.mark.parametrize("base, kind, architecture, projector", [
    ("vicuna", "llava", "LlavaLlamaForCausalLM", "cluster"), ("vicuna", "llava", "LlavaLlamaForCausalLM", None),
    ("mistral", "llava_mistral", "LlavaMistralForCausalLM", "mlp2x_gelu")])
def test_a_decoder_alone_gets_a_tower_and_a_projector(root, base, kind, architecture, projector):
    flags = {"mm_projector_type": projector, "num_latents": 4, "mm_vision_select_layer": -2}
    model, _ = build(root / base, vision_tower=str(root / "clip"), **flags, data=DataArguments("x", image_aspect_ratio="pad"))
    assert model.config.model_type == kind and model.config.mm_projector_type == (projector or "linear")
    tensors = model.tensors()
    np.testing.assert_array_equal(tensors["model.norm.weight"], LlavaModel.from_pretrained(root / base).tensors()["model.norm.weight"])
    tower = {name: array for name, array in fresh_weights(config(), 7).items() if names.is_tower(name)}
    assert tower and all(np.array_equal(tensors[name], array) for name, array in tower.items())
    fresh = fresh_projector(model.config, 42)
    assert all(np.array_equal(tensors[name], fresh[name]) for name in tensors if names.is_projector(name))
    values = model.config.to_dict()
    assert (values["architectures"], values["mm_vision_tower"], values["image_aspect_ratio"]) == ([architecture], str(root / "clip"), "pad")


def test_the_default_layer_of_the_original_is_the_last(root):
    assert build(root / "vicuna", vision_tower=str(root / "clip"))[0].config.mm_vision_select_layer == -1


@pytest.mark.parametrize("kind", ["cluster", "linear", "mlp3x_gelu"])
def test_a_fresh_projector_is_drawn_as_torch_does(kind):
    """nn.Linear: weight and bias uniform within 1/sqrt(in)."""
    cfg = config(mm_projector_type=kind, hidden_size=256, num_attention_heads=4)
    tensors = fresh_projector(cfg, 0)
    again, other = fresh_projector(cfg, 0), fresh_projector(cfg, 1)
    assert {name: array.shape for name, array in tensors.items()} == names.projector_shapes(cfg)
    for name, array in tensors.items():
        if "ln_1" in name or "sim_" in name:
            assert np.unique(array).tolist() == [1.0 if name.endswith(("ln_1.weight", "sim_alpha")) else 0.0]
            continue
        bound = tensors[f"{name.rpartition('.')[0]}.weight"].shape[1] ** -0.5
        assert np.array_equal(array, again[name]) and not np.array_equal(array, other[name])
        assert 0.8 * bound < np.abs(array).max() <= bound
        assert array.std() == pytest.approx(bound / 3**0.5, rel=0.05 if array.ndim == 2 else 0.3)


def test_the_flag_wins_over_the_tower_of_the_checkpoint(root, tmp_path):
    """Spec D21; and an adapter that was trained so is loaded so, though its base holds a tower too."""
    model, trainable = build(root / "llava", vision_tower=str(root / "clip2"), **LORA)
    assert np.array_equal(model.tensors()["model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"],
                          fresh_weights(config(), 8)["model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"])
    train(model, trainable, root, tmp_path)
    assert_same(LlavaModel.from_pretrained(tmp_path, root / "llava"), model)


def test_a_name_that_the_checkpoint_knows_is_no_directory(root):
    """`--vision_tower openai/...` of a script, for a checkpoint that holds its tower."""
    assert_same(build(root / "llava", vision_tower="tiny")[0], LlavaModel.from_pretrained(root / "llava"))
    with pytest.raises(FormatError, match="'openai/clip' is not a directory here, and nothing is downloaded"):
        build(root / "llava", vision_tower="openai/clip")


def test_the_tower_that_the_checkpoint_names_stands(root, tmp_path):
    """A merged model holds a better tower than the directory it was made from, whose name it kept."""
    merged = config(mm_vision_tower=str(root / "clip2"))
    LlavaModel(merged, fresh_weights(merged, 5), tokenizer=Tokenizer(str(TOKENIZER))).save_pretrained(tmp_path / "merged")
    model, trainable = build(tmp_path / "merged", vision_tower=str(root / "clip2"), **LORA)
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    assert np.array_equal(model.tensors()[name], fresh_weights(merged, 5)[name])
    train(model, trainable, root, tmp_path / "out")
    assert_same(LlavaModel.from_pretrained(tmp_path / "out"), model)


def test_another_projector_type_is_fresh(root):
    model, _ = build(root / "llava", mm_projector_type="mlp2x_gelu")
    expected = fresh_projector(model.config, 42)
    assert {name: array.shape for name, array in model.tensors().items() if names.is_projector(name)} == {n: a.shape for n, a in expected.items()}
    assert all(np.array_equal(model.tensors()[name], array) for name, array in expected.items())


@pytest.mark.parametrize("file", ["mm_projector.bin", "non_lora_trainables.bin", "directory"])
def test_a_pretrained_projector(root, tmp_path, file):
    values = fresh_projector(config(), 99)
    rename = {"mm_projector.bin": str, "non_lora_trainables.bin": names.to_non_lora, "directory": str}[file]
    more = {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)} if "non_lora" in file else {}
    index.write_file(tmp_path / ("mm_projector.bin" if file == "directory" else file), {rename(name): array for name, array in values.items()} | more)
    model, _ = build(root / "llava", pretrain_mm_mlp_adapter=str(tmp_path if file == "directory" else tmp_path / file))
    assert all(np.array_equal(model.tensors()[name], array) for name, array in values.items())


def test_a_projector_of_the_original(root):
    """Recorded non_lora_trainables.bin of the original's own code."""
    file = GOLDENS / "adapter_bin" / "non_lora_trainables.bin"
    model, _ = build(root / "vicuna", vision_tower=str(root / "clip"), mm_projector_type="cluster", num_latents=4, mm_vision_select_layer=-2,
                     pretrain_mm_mlp_adapter=str(file))
    recorded = index.read_file(file)
    assert len(recorded) == 14 and all(np.array_equal(model.tensors()[names.from_projector_file(key)], recorded[key]) for key in recorded)


@pytest.mark.parametrize("what", ["directory", "file", "output"])
def test_a_tower_adapter_trains_on(root, tmp_path, what):
    first, trainable = build(root / "llava", **LORA)
    train(first, trainable, root, tmp_path / "first", num_train_epochs=1, max_steps=3)
    path = {"directory": tmp_path / "first" / "Vit-lora", "file": tmp_path / "first" / "Vit-lora" / "adapter_model.bin", "output": tmp_path / "first"}[what]
    model, _ = build(root / "llava", **LORA, pretrain_lora=str(path))
    before, after = first.lora_tensors(), model.lora_tensors()
    assert before.keys() == after.keys()
    for name in before:
        if names.is_tower(name):
            np.testing.assert_array_equal(before[name], after[name])
    assert any(np.abs(after[name]).max() > 0 for name in after if names.is_tower(name) and "lora_B" in name)
    assert model.lora["vit"].lora_dropout == 0.2 and build(root / "llava", kind=DPOConfig, **LORA)[0].lora["vit"].lora_dropout == 0.1


def test_an_adapter_directory_trains_on(root, tmp_path):
    first, trainable = build(root / "llava", **LORA)
    train(first, trainable, root, tmp_path / "first")
    model, names_ = build(tmp_path / "first", model_base=str(root / "llava"), **LORA, kind=DPOConfig)
    assert_same(first, model)
    assert sorted(names_) == sorted(trainable)
    train(model, names_, root, tmp_path / "second", "dpo")
    assert_same(LlavaModel.from_pretrained(tmp_path / "second", root / "llava"), model)
    with pytest.raises(ConfigError, match="has r 4 and alpha 8, the flags say 16 and 8"):
        build(tmp_path / "first", model_base=str(root / "llava"), **{**LORA, "lora_r": 16})
    with pytest.raises(ConfigError, match="set lora_enable to train it on"):
        build(tmp_path / "first", model_base=str(root / "llava"), vit_lora_enable=True, freeze_backbone=True, lora_r_vit=2, lora_alpha_vit=4)
    with pytest.raises(FormatError, match="pass model_base=DIR|not a directory here"):
        (tmp_path / "first" / "adapter_config.json").write_text(json.dumps({
            **json.loads((tmp_path / "first" / "adapter_config.json").read_text()), "base_model_name_or_path": "gone"}))
        build(tmp_path / "first", **LORA)


# ---- what trains -----------------------------------------------------------------------------------------------------------------


def kinds(trainable):
    return {f"{names.part_of(name)}{' adapter' if names.is_lora(name) else ''}" for name in trainable}


@pytest.mark.parametrize("flags, wanted", [
    ({}, {"decoder", "projector"}), ({"freeze_backbone": True}, {"projector"}), ({"freeze_mm_mlp_adapter": True}, {"decoder"}),
    ({"tune_mm_mlp_adapter": True}, {"projector"}), ({"lora_enable": True}, {"decoder adapter", "projector"}),
    ({"lora_enable": True, "freeze_mm_mlp_adapter": True}, {"decoder adapter"}), ({"lora_enable": True, "freeze_backbone": True}, {"decoder adapter", "projector"}),
    (LORA, {"decoder adapter", "vision tower adapter", "projector"}), ({"vit_lora_enable": True, "freeze_backbone": True}, {"vision tower adapter", "projector"}),
    ({**LORA, "use_dora": True}, {"decoder adapter", "vision tower adapter", "projector"}),
    ({"lora_enable": True, "lora_bias": "all"}, {"decoder adapter", "projector"})])
def test_what_trains(root, flags, wanted):
    model, trainable = build(root / "llava", **flags)
    assert kinds(trainable) == wanted and len(trainable) == len(set(trainable)) and set(trainable) <= set(model.tensor_infos())
    if "projector" in wanted:
        assert sum(names.is_projector(name) for name in trainable) == 14


@pytest.mark.parametrize("flags, message", [
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True, supported: False"), ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token"),
    ({"tune_mm_mlp_adapter": True, "lora_enable": True}, "trains the projector alone"), ({"pretrain_lora": "x"}, "set vit_lora_enable too"),
    ({"vit_lora_enable": True}, "without lora_enable"), ({**LORA, "lora_bias": "all"}, "biases of the tower"),
    ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, "nothing is left to train"),
    ({**LORA, "pretrain_lora": "nowhere"}, "pretrain_lora nowhere: no such file"), ({"pretrain_mm_mlp_adapter": "nowhere.bin"}, "nowhere.bin: no such file"),
    ({"mm_projector_type": "mlp2x_gelu", "pretrain_mm_mlp_adapter": str(GOLDENS / "adapter_bin" / "non_lora_trainables.bin")}, "another type than"),
    ({"mm_projector_type": "perceiver"}, "mm_projector_type is 'perceiver'"), ({"mm_vision_select_layer": 9}, "4 hidden states"),
    ({"num_latents": 17}, "more than the 16 tokens")])
def test_what_is_refused(root, flags, message):
    with pytest.raises((ConfigError, FormatError), match=message):
        build(root / "llava", **flags)


@pytest.mark.parametrize("where", ["tower", "projector", "adapter"])
def test_values_that_are_not_finite_are_refused(root, tmp_path, where):
    flags = {"vision_tower": str(root / "clip"), "mm_projector_type": "cluster", "num_latents": 4, "mm_vision_select_layer": -2, **LORA}
    bad = np.full(32, np.nan, np.float32)
    if where == "tower":
        write_tower(tmp_path / "clip")
        file = tmp_path / "clip" / "model.safetensors"
        index.write_file(tmp_path / "new.safetensors", {n: bad if n.endswith("class_embedding") else a for n, a in index.read_file(file).items()})
        (tmp_path / "new.safetensors").replace(file)
        flags["vision_tower"] = str(tmp_path / "clip")
    elif where == "projector":
        index.write_file(tmp_path / "mm_projector.bin", fresh_projector(config(), 1) | {"model.mm_projector.c.bias": bad})
        flags["pretrain_mm_mlp_adapter"] = str(tmp_path)
    else:
        a, b = names.lora_pair("vision_model.encoder.layers.0.mlp.fc2")
        index.write_file(tmp_path / "vit.bin", {f"base_model.model.vision_tower.{a}": np.zeros((2, 64), np.float32),
                                                f"base_model.model.vision_tower.{b}": np.stack([bad, bad], axis=1)})
        flags["pretrain_lora"] = str(tmp_path / "vit.bin")
    with pytest.raises(NumericsError, match="NaN or infinite"):
        build(root / "vicuna", **flags)


def test_bases_that_are_refused(root, tmp_path):
    with pytest.raises(ConfigError, match="pass vision_tower=DIR"):
        build(root / "vicuna")
    with pytest.raises(FormatError, match="nowhere: no such directory"):
        build("nowhere")
    with pytest.raises(ConfigError, match=r"cannot be a \.gguf file"):
        build("model.gguf")
    (tmp_path / "config.json").write_text(json.dumps(VISION))
    with pytest.raises(FormatError, match="no weights of a vision tower"):
        build(root / "vicuna", vision_tower=str(tmp_path))


# ---- the files ---------------------------------------------------------------------------------------------------------------------

COMPLETE = {"config.json", "manifest.json", "preprocessor_config.json", "tokenizer.model", "tokenizer_config.json", "trainer_state.json", "log.jsonl"}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def recorded_keys(file: str, is_wanted=lambda key: True) -> set[str]:
    return {key for key in index.read_file(GOLDENS / "adapter_bin" / file) if is_wanted(key)}


def test_lora_files_are_the_originals(root, tmp_path):
    """Against tests/parity/goldens/checkpoint_files, which the original's own code wrote for a model of this shape."""
    model, trainable = build(root / "llava", **LORA, data=DataArguments("x", image_aspect_ratio="pad"))
    train(model, trainable, root, tmp_path, save_strategy="steps", save_steps=3, hf_compat="4.31")
    adapter = {"adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "Vit-lora/adapter_config.json", "Vit-lora/adapter_model.bin"}
    special = {name for name in files(tmp_path) if name in ("special_tokens_map.json", "added_tokens.json")}
    assert {name for name in files(tmp_path) if "checkpoint-" not in name} == COMPLETE | adapter | special
    assert {name.removeprefix("checkpoint-3/") for name in files(tmp_path) if "checkpoint-" in name} == (
        COMPLETE - {"log.jsonl"} | adapter | special | {"trainer.safetensors", "run_state.json"})
    assert set(index.read_file(tmp_path / "adapter_model.bin")) == recorded_keys("adapter_model.bin", lambda key: "vision_tower" not in key)
    for file in ("non_lora_trainables.bin", "Vit-lora/adapter_model.bin"):
        assert set(index.read_file(tmp_path / file)) == recorded_keys(file)
    for part in (".", "Vit-lora"):
        ours, theirs = (json.loads((folder / part / "adapter_config.json").read_text()) for folder in (tmp_path, GOLDENS / "adapter_bin"))
        assert ours.keys() == theirs.keys() and set(ours["target_modules"]) == set(theirs["target_modules"])
        assert {key: ours[key] for key in ("auto_mapping", "task_type", "inference_mode", "peft_type", "bias")} == {
            key: theirs[key] for key in ("auto_mapping", "task_type", "inference_mode", "peft_type", "bias")}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(root / "llava")
    assert_same(LlavaModel.from_pretrained(tmp_path), model)


def test_config_has_the_originals_fields(root, tmp_path):
    model, trainable = build(root / "llava", **LORA, run={"mm_projector_lr": 2e-5, "vision_tower_lr": 5e-5}.items(), qav_loss=True, loss_alpha=0.25,
                             data=DataArguments("x", image_aspect_ratio="square", image_grid_pinpoints="[(1, 2)]"))
    train(model, trainable, root, tmp_path)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDENS / "adapter_bin"))
    of_the_decoder = {"bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "initializer_range", "pretraining_tp", "rope_scaling"}  # as the base has them
    assert theirs.keys() - of_the_decoder <= ours.keys() and {"torch_dtype", "transformers_version"} <= ours.keys()
    wanted = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "use_mm_proj": True, "mm_projector_type": "cluster", "num_latents": 4,
              "mm_hidden_size": 32, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
              "mm_use_im_patch_token": False, "mm_projector_lr": 2e-5, "vision_tower_lr": 5e-5, "image_aspect_ratio": "square",
              "image_grid_pinpoints": "[(1, 2)]", "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "qav_loss": True, "loss_alpha": 0.25,
              "use_cache": True, "torch_dtype": "float32"}
    assert {key: ours[key] for key in wanted} == wanted
    assert LlavaModel.from_pretrained(tmp_path).image_processor.aspect == "square"


def test_the_tower_adapter_twice(root, tmp_path):
    """As the original's decoder file has it (spec D23); ours is read from Vit-lora."""
    model, trainable = build(root / "llava", **LORA)
    train(model, trainable, root, tmp_path, repeat_vit_lora=True)
    assert set(index.read_file(tmp_path / "adapter_model.bin")) == recorded_keys("adapter_model.bin")
    assert_same(LlavaModel.from_pretrained(tmp_path), model)


def test_safetensors_on_demand(root, tmp_path):
    model, trainable = build(root / "llava", **LORA)
    train(model, trainable, root, tmp_path, save_safetensors=True)
    assert {"adapter_model.safetensors", "non_lora_trainables.safetensors", "Vit-lora/adapter_model.safetensors"} <= files(tmp_path)
    assert not any(name.endswith(".bin") for name in files(tmp_path))
    assert_same(LlavaModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("base", ["llava", "vicuna"])
def test_projector_only(root, tmp_path, base):
    flags = {} if base == "llava" else {"vision_tower": str(root / "clip"), "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    model, trainable = build(root / base, tune_mm_mlp_adapter=True, **flags)
    train(model, trainable, root, tmp_path, save_strategy="steps", save_steps=3)
    assert {name for name in files(tmp_path) if name.endswith((".bin", ".safetensors"))} == {
        "mm_projector.bin", "checkpoint-3/mm_projector.bin", "checkpoint-3/trainer.safetensors"}
    assert set(index.read_file(tmp_path / "mm_projector.bin")) == set(names.projector_shapes(model.config))
    assert_same(LlavaModel.from_pretrained(tmp_path, root / base), model)
    again, _ = build(root / base, **flags, pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"))
    assert_same(again, model)


def test_full_weights(root, tmp_path):
    model, trainable = build(root / "vicuna", vision_tower=str(root / "clip"), mm_projector_type="cluster", num_latents=4, mm_vision_select_layer=-2)
    train(model, trainable, root, tmp_path, allow_untrained=True)
    assert "pytorch_model.bin" in files(tmp_path) and not (tmp_path / "mm_projector.bin").exists()
    assert_same(LlavaModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_adapters_on_a_decoder_alone_come_back(root, tmp_path, kind):
    """Base, tower, adapters and projector lie in four places."""
    model, trainable = build(root / "mistral", vision_tower=str(root / "clip"), mm_projector_type="cluster", num_latents=4, mm_vision_select_layer=-2, **LORA,
                             kind=SFTConfig if kind == "sft" else DPOConfig)
    train(model, trainable, root, tmp_path, kind)
    assert_same(LlavaModel.from_pretrained(tmp_path, root / "mistral"), model)
    assert_same(LlavaModel.from_pretrained(tmp_path), model)


def test_a_resumed_run_writes_the_same_files(root, tmp_path):
    """From checkpoint-3, with a model that was built anew."""
    def run() -> None:
        model, trainable = build(root / "llava", **LORA)
        train(model, trainable, root, tmp_path, save_strategy="steps", save_steps=3, resume_from_checkpoint="auto")

    run()
    whole = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert "checkpoint-3/run_state.json" in whole and "adapter_model.bin" in whole
    (tmp_path / "adapter_model.bin").unlink()
    run()
    assert whole == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}


@pytest.mark.parametrize("save_safetensors", [False, True])
def test_peft_loads_the_decoders_adapter(root, tmp_path, save_safetensors):
    """On the base that transformers loads; the tower and the projector have no part in a text."""
    model, trainable = build(root / "vicuna", vision_tower=str(root / "clip"), mm_projector_type="cluster", num_latents=4, mm_vision_select_layer=-2, **LORA)
    train(model, trainable, root, tmp_path, save_safetensors=save_safetensors)
    ids = [1, 5, 900, 31999, 2]
    theirs = peers.logits(tmp_path, ids, root / "vicuna")
    np.testing.assert_allclose(model.logits(ids), theirs, rtol=0, atol=4e-5)
    with model.disable_adapters():
        assert np.abs(model.logits(ids) - theirs).max() > 1e-2


def test_ranks_of_the_files(root, tmp_path):
    model, trainable = build(root / "llava", **{**LORA, "lora_r": 3, "lora_r_vit": 5})
    train(model, trainable, root, tmp_path)
    decoder, tower = peft.read_config(tmp_path), peft.read_config(tmp_path / "Vit-lora")
    assert (decoder.r, tower.r, decoder.lora_dropout, tower.lora_dropout) == (3, 5, 0.05, 0.2)
