"""Cases of the decoder alone and of the whole model: logits, losses, every gradient, generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import attach, canonical_lora, gradients, meta, padded_rows, scalar, tensors, tiny_llava

import stllava_c
from stllava.config import LlavaConfig
from stllava.generation import generate
from stllava.model import LlavaModel
from stllava.train.groups import default_trainable

Files = dict[str, dict[str, np.ndarray]]


def _mean_loss(model: LlavaModel, sequences, pixels=None, *, vision_grad: bool = True):
    """Mean over all targets, its gradients in the model's buffer; batch and trees for looking further."""
    trees, batch = model.batch(sequences, share=False)
    stacked = None if not trees.image_keys else model.pixels(pixels[key] for key in trees.image_keys)
    train = model.core.n_trainable > 0
    logp = model.run.forward(batch, pixels=stacked, adapters=model.adapters_enabled, train=train, vision_grad=vision_grad)
    if train:
        model.core.zero_grad()
        model.run.backward(np.full(len(logp), -1.0 / len(logp)))
    return -float(logp.mean()), trees, batch


def decoder(case: Path, dtype: str) -> Files:
    info = meta(case)
    inputs = tensors(case / "inputs.safetensors")
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"]
    rows = padded_rows(ids, labels, mask)
    weights = tensors(case / "weights.safetensors")
    config = LlavaConfig.from_dict({**info["config"], **({} if "sliding_window" in info["config"] else {"sliding_window": None})})

    def logits(model: LlavaModel) -> np.ndarray:
        _, trees, batch = _mean_loss(model, rows)
        out = np.zeros((*ids.shape, config.vocab_size))
        for i in range(len(ids)):
            leaf = batch.sequence_leaf[trees.order[i]]
            span = np.arange(batch.segment_row[leaf], batch.segment_row[leaf + 1])
            out[i, :len(span)] = model.run.logits(span)
        return out

    model = LlavaModel(config, weights, dtype=dtype)
    model.set_trainable(weights)
    out: Files = {"expected": {"loss": scalar(_mean_loss(model, rows)[0])}, "grads": gradients(model, str)}
    out["expected"]["logits"] = logits(model)

    model = LlavaModel(config, weights, dtype=dtype)
    recorded = tensors(case / "lora.safetensors")
    attach(model, "llm", info["lora"], canonical_lora(recorded))
    model.set_trainable(list(model.lora_tensors()))
    expected = {"loss": scalar(_mean_loss(model, rows)[0])}
    out["grads_lora"] = gradients(model, lambda name: "base_model.model." + name)
    expected["logits"] = logits(model)
    for module in sorted({name.rsplit(".lora_", 1)[0] for name in model.lora_tensors()}):
        if module.startswith("model.layers.0."):
            expected[f"merged.{module}.weight"] = model.core.effective_weight(module)
    model.set_trainable([])
    model.merge_lora()
    expected["logits_merged"] = logits(model)
    out["expected_lora"] = expected
    return out


def llava_e2e(case: Path, dtype: str) -> Files:
    inputs = tensors(case / "inputs.safetensors")
    rows = padded_rows(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
    model = tiny_llava(case, dtype)
    model.set_trainable(default_trainable(model))
    out: Files = {}
    rename = "base_model.model.{}".format
    for file, vision_grad in (("grads", True), ("grads_reference_no_grad_tower", False)):
        loss, trees, batch = _mean_loss(model, rows, inputs["images"], vision_grad=vision_grad)
        found = gradients(model, rename)
        out[file] = found if vision_grad else {name: g for name, g in found.items() if "vision_tower" not in name}
    out["expected"] = _spliced(model, inputs, rows, trees, batch, loss)
    with model.disable_adapters():
        loss, trees, batch = _mean_loss(model, rows, inputs["images"])
        without = _spliced(model, inputs, rows, trees, batch, loss)
    out["expected_without_adapters"] = {key: without[key] for key in ("image_features", "inputs_embeds", "logits_at_predicting_positions", "loss")}
    return out


def _spliced(model: LlavaModel, inputs, rows, trees, batch, loss: float) -> dict[str, np.ndarray]:
    """The batch as the reference lays it out: rows of equal length, an image on its T positions."""
    t, width, text_length = model.core.tokens_per_image, model.config.hidden_size, inputs["input_ids"].shape[1]
    lengths = [len(row.ids) + (t - 1) * len(row.images) for row in rows]
    padded = [text_length + (t - 1) * len(row.images) for row in rows]
    total = max(padded)
    embeds = np.zeros((len(rows), total, width))
    labels = np.full((len(rows), total), -100, np.int64)
    attention = np.zeros((len(rows), total), np.uint8)
    every = model.run.embeddings
    padding = dict(model.named_parameters())["model.embed_tokens.weight"][0]
    positions, logits = [], []
    for i, leaf in enumerate(trees.order):
        segment = batch.sequence_leaf[leaf]
        first = batch.segment_row[segment]
        embeds[i, :lengths[i]] = every[first:first + lengths[i]]
        embeds[i, lengths[i]:padded[i]] = padding
        attention[i, :lengths[i]] = 1
        mine = slice(batch.sequence_begin[leaf], batch.sequence_begin[leaf + 1])
        labels[i, batch.label_row[mine] - first] = batch.target_token[mine]
        positions += [(i, int(r - first)) for r in batch.target_row[mine]]
        logits.append(model.run.logits(batch.target_row[mine]))
    pixels = model.pixels(inputs["images"])
    features = model.run.encode(pixels, adapters=model.adapters_enabled).reshape(len(rows), t, width)
    return {"inputs_embeds": embeds, "expanded_labels": labels, "expanded_attention_mask": attention, "positions": np.array(positions, np.int32),
            "logits_at_predicting_positions": np.concatenate(logits).astype(np.float64), "image_features": features, "loss": scalar(loss)}


def generation(case: Path, dtype: str) -> tuple[Files, dict]:
    info = meta(case)
    model = tiny_llava(case, dtype)
    images = tensors(case.parent / "tiny_llava" / "images.safetensors")
    images = next(iter(images.values()))
    prompts = []
    for prompt in info["prompts"]:
        picture = images[prompt["image"]]
        [[answer]] = generate(model, [prompt["input_ids"]], [picture], max_new_tokens=prompt["max_new_tokens"], eos_token_id=prompt["eos_token_id"])
        _, batch = model.batch([_prompt(prompt)])
        decoder_ = stllava_c.Generator(model.core, batch, pixels=model.pixels([picture]), max_new_tokens=prompt["max_new_tokens"],
                                       eos_ids=[prompt["eos_token_id"]])
        logits = []
        while decoder_.n_active and len(logits) < 5:
            logits.append(decoder_.logits()[0].astype(np.float64).tolist())
            decoder_.step()
        prompts.append({"new_tokens": answer.ids, "logits_first5": logits})
    recorded = tensors(case / "sampling.safetensors")
    sampling = {name: array for name, array in recorded.items() if name.startswith("logits.")}
    for i, setting in enumerate(info["sampling"]):
        sampling[f"probs.{i}"] = stllava_c.sampling_probabilities(recorded[f"logits.{i}"], temperature=setting["temperature"],
                                                                  top_k=setting["top_k"], top_p=setting["top_p"])
    return {"sampling": sampling}, {"prompts": prompts}


def _prompt(prompt: dict):
    from stllava.tree import Sequence
    return Sequence(prompt["input_ids"], None, (0,))
