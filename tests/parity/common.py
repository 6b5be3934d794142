"""What the cases share: reading inputs, building the small models, packing recorded rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import stllava_c
from stllava.checkpoint import names, safetensors_file
from stllava.checkpoint.peft import LoraConfig
from stllava.config import LlavaConfig
from stllava.model import NUMPY_DTYPE, LlavaModel
from stllava.tree import Sequence

TOWER = "model.vision_tower.vision_tower."


def meta(case: Path) -> dict:
    return json.loads((case / "meta.json").read_text())


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in safetensors_file.read(path).items()}


def tiny_llava(case: Path, dtype: str, *, zero_b: bool = False) -> LlavaModel:
    """The model of the case `tiny_llava` next to `case`, both adapters attached; zero_b: as at the start of training."""
    folder = case.parent / "tiny_llava"
    info = meta(folder)
    values = {**info["config"], "mm_vision_config": info["vision_config"]}
    values.setdefault("rope_theta", info.get("rope_theta", 10000.0))
    model = LlavaModel(LlavaConfig.from_dict(values), tensors(folder / "weights.safetensors"), dtype=dtype)
    for part, file in (("llm", "lora_llm"), ("vit", "lora_vit")):
        adapter = canonical_lora(tensors(folder / f"{file}.safetensors"))
        if zero_b:
            adapter = {name: np.zeros_like(array) if ".lora_B." in name else array for name, array in adapter.items()}
        attach(model, part, info[file], adapter)
    return model


def attach(model: LlavaModel, part: str, lora: dict, adapter: dict[str, np.ndarray]) -> None:
    """Adapters as recorded, on the modules the recording names."""
    model.attach_lora(LoraConfig(r=lora["r"], lora_alpha=lora["alpha"]), adapter, part)


def canonical_lora(adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {canonical_lora_name(name): array for name, array in adapter.items()}


def canonical_lora_name(name: str) -> str:
    """A recorded adapter name, seen from the language model or from the tower, as a full checkpoint would write it."""
    bare = name.removeprefix("base_model.model.")
    if bare.startswith("vision_model."):
        return TOWER + bare
    if bare.startswith("vision_tower."):
        return "model.vision_tower." + bare
    return bare


def padded_rows(ids: np.ndarray, labels: np.ndarray, mask: np.ndarray, images=None) -> list[Sequence]:
    """One sequence per row of a padded batch; picture i belongs to row i."""
    rows = []
    for i in range(len(ids)):
        keep = mask[i].astype(bool)
        has_image = bool((ids[i][keep] == -200).any())
        rows.append(Sequence(ids[i][keep], labels[i][keep], (i,) if has_image else (), sample=i))
    return rows


def gradients(model: LlavaModel, rename) -> dict[str, np.ndarray]:
    """Gradient of every trainable tensor that an output depends on, under `rename(name)`."""
    flat = model.core.grad.numpy()
    out = {}
    for info in model.core.tensors():
        if info.offset >= 0 and info.influences:
            out[rename(info.name)] = flat[info.offset:info.offset + info.size].reshape(info.shape).astype(np.float64)
    return out


def core_model(config: dict, weights: dict[str, np.ndarray], dtype: str) -> stllava_c.Model:
    """A tower, projector or decoder alone."""
    model = stllava_c.Model({"vision": None, "projector": None, "decoder": None, **config}, dtype=dtype)
    for name, array in weights.items():
        model.bind(name, np.ascontiguousarray(array, NUMPY_DTYPE[dtype]))
    return model


def scalar(value: float) -> np.ndarray:
    return np.array([value], np.float64)


__all__ = ["LlavaModel", "NUMPY_DTYPE", "TOWER", "attach", "canonical_lora", "canonical_lora_name", "core_model", "gradients", "meta", "names",
           "padded_rows", "scalar", "tensors", "tiny_llava"]
