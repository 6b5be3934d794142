"""Models and data for the tests under torch."""

from __future__ import annotations

import numpy as np
from tiny import dpo_records, sft_records, tiny_model, write_pictures

from stllava.checkpoint.peft import LoraConfig
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset


def with_adapters(dtype="f32", dropout=0.0):
    """Adapters on both parts, B not 0, so that everything has a gradient."""
    model = tiny_model(dtype)
    model.add_lora(LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout), "llm")
    model.add_lora(LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout), "vit")
    for i, (name, array) in enumerate(model.lora_tensors().items()):
        if ".lora_B." in name:
            array[:] = np.random.default_rng(i).normal(0, 0.1, array.shape)
    return model


def sft_data(model, folder):
    return SFTDataset(sft_records(write_pictures(folder)), model.tokenizer, model.image_processor, image_folder=folder, template="v1",
                      tokens_per_image=model.core.tokens_per_image)


def dpo_data(model, folder):
    return DPODataset(dpo_records(write_pictures(folder)), model.tokenizer, model.image_processor, image_folder=folder,
                      tokens_per_image=model.core.tokens_per_image)
