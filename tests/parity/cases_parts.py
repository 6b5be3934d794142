"""Cases of single modules: the vision tower and the projectors. Loss: sum(output * loss_weight) / B + mean(output^2) / 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import NUMPY_DTYPE, TOWER, canonical_lora_name, core_model, meta, scalar, tensors

import stllava_c

Files = dict[str, dict[str, np.ndarray]]


def _loss(output: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    output, weight = output.astype(np.float64), weight.astype(np.float64)
    n = len(output)
    return float((output * weight).sum() / n + 0.5 * (output**2).mean()), weight / n + output / output.size


def _gradients(model: stllava_c.Model, rename) -> dict[str, np.ndarray]:
    flat = model.grad.numpy()
    return {rename(i.name): flat[i.offset:i.offset + i.size].reshape(i.shape).astype(np.float64)
            for i in model.tensors() if i.offset >= 0 and i.influences}


def clip_vision(case: Path, dtype: str) -> Files:
    info = meta(case)
    c = info["config"]
    vision = {"image_size": c["image_size"], "patch_size": c["patch_size"], "hidden_size": c["hidden_size"], "n_layers": c["num_hidden_layers"],
              "n_heads": c["num_attention_heads"], "intermediate_size": c["intermediate_size"], "activation": c["hidden_act"],
              "layer_norm_eps": c["layer_norm_eps"], "select_layer": c.get("select_layer", -2), "select_feature": "patch"}
    inputs = tensors(case / "inputs.safetensors")
    pixels = np.ascontiguousarray(inputs["pixel_values"], NUMPY_DTYPE[dtype])
    weights = {TOWER + name: array for name, array in tensors(case / "weights.safetensors").items()}
    n = len(pixels)

    model = core_model({"vision": vision}, weights, dtype)
    model.set_trainable([i.name for i in model.tensors() if i.bound])
    run = stllava_c.Run(model)
    run.vision_forward(pixels, all_layers=True)
    shape = (n, -1, c["hidden_size"])
    expected = {f"hidden_states.{i}": run.vision_hidden(i).reshape(shape) for i in (0, 1)}
    expected["last_hidden_state"] = run.vision_hidden(c["num_hidden_layers"]).reshape(shape)
    expected["pooler_output"] = run.vision_pooled()
    features = run.vision_forward(pixels, train=True).reshape(shape)
    loss, dfeatures = _loss(features, inputs["loss_weight"])
    model.zero_grad()
    run.vision_backward(np.ascontiguousarray(dfeatures, NUMPY_DTYPE[dtype]))
    expected |= {"patch_features": features, "loss": scalar(loss)}
    grads = _gradients(model, lambda name: name.removeprefix(TOWER))

    model = core_model({"vision": vision}, weights, dtype)
    adapter = {canonical_lora_name(name): (name, array) for name, array in tensors(case / "lora.safetensors").items()}
    for module in sorted({name.rsplit(".lora_", 1)[0] for name in adapter}):
        model.add_lora(module, info["lora"]["r"], info["lora"]["alpha"] / info["lora"]["r"])
    for name, (_, array) in adapter.items():
        model.bind(name, np.ascontiguousarray(array, NUMPY_DTYPE[dtype]))
    model.set_trainable(list(adapter))
    run = stllava_c.Run(model)
    features = run.vision_forward(pixels, train=True).reshape(shape)
    loss, dfeatures = _loss(features, inputs["loss_weight"])
    model.zero_grad()
    run.vision_backward(np.ascontiguousarray(dfeatures, NUMPY_DTYPE[dtype]))
    return {"expected": expected, "grads": grads, "expected_lora": {"patch_features": features, "loss": scalar(loss)},
            "grads_lora": _gradients(model, lambda name: adapter[name][0])}


def projector(case: Path, dtype: str) -> Files:
    c = meta(case)["config"]
    kind = c["type"]
    depth = int(kind[3]) if kind.startswith("mlp") else 0
    settings = {"kind": "mlp" if depth else kind, "depth": depth, "n_centers": c.get("centers", 0), "n_rounds": c.get("rounds", 2),
                "in_size": c["mm_hidden_size"], "out_size": c["out"]}
    prefix = "model.mm_projector."
    model = core_model({"projector": settings}, {prefix + name: array for name, array in tensors(case / "weights.safetensors").items()}, dtype)
    model.set_trainable([i.name for i in model.tensors() if i.bound])
    inputs = tensors(case / "inputs.safetensors")
    run = stllava_c.Run(model)
    x = np.ascontiguousarray(inputs["x"], NUMPY_DTYPE[dtype])
    output = run.projector_forward(x, train=True)
    loss, doutput = _loss(output, inputs["loss_weight"])
    model.zero_grad()
    expected = {"output": output, "loss": scalar(loss)}
    if kind == "cluster":
        expected |= {"assignment": run.cluster_assignment().reshape(x.shape[:2]).astype(np.int32), "margin": run.cluster_margin().reshape(x.shape[:2])}
    expected["grad_input"] = run.projector_backward(np.ascontiguousarray(doutput, NUMPY_DTYPE[dtype])).reshape(x.shape)
    return {"expected": expected, "grads": _gradients(model, lambda name: name.removeprefix(prefix))}
