"""Cases of training: DPO's numbers, every preference loss, whole trajectories through the trainers' own update."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from common import gradients, meta, padded_rows, tensors, tiny_llava

import stllava_c
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOObjective
from stllava.train.groups import default_trainable, parameter_groups
from stllava.train.sft import SFTObjective
from stllava.train.update import Updater
from stllava.tree import Sequence

Files = dict[str, dict[str, np.ndarray]]


class Recorded:
    """A recorded data set of either kind, as the trainers' objectives read it."""

    def __init__(self, data: list[dict], images: np.ndarray) -> None:
        self.data, self.images = data, images

    def __len__(self) -> int:
        return len(self.data)

    def sequences(self, item: int, epoch: int) -> list[Sequence]:
        return [self._sequence(item, "")]

    def pair(self, item: int, epoch: int) -> tuple[Sequence, Sequence]:
        return self._sequence(item, "chosen_"), self._sequence(item, "reject_")

    def pixels(self, key: int) -> np.ndarray:
        return self.images[key]

    def _sequence(self, item: int, side: str) -> Sequence:
        row = self.data[item]
        ids = row[f"{side}input_ids"]
        return Sequence(ids, row[f"{side}labels"], (row["image"],) if -200 in ids else (), sample=item)


def dpo(case: Path, dtype: str) -> tuple[Files, dict]:
    info = meta(case)
    inputs = tensors(case / "inputs.safetensors")
    chosen, rejected = (padded_rows(inputs[f"{side}_input_ids"], inputs[f"{side}_labels"], inputs[f"{side}_attention_mask"])
                        for side in ("chosen", "reject"))
    data = [{"chosen_input_ids": list(c.ids), "chosen_labels": list(c.labels), "reject_input_ids": list(r.ids), "reject_labels": list(r.labels),
             "image": i} for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))]
    dataset = Recorded(data, inputs["images"])
    expected: dict[str, np.ndarray] = {}
    files: Files = {"expected": expected}
    values = {}
    for name, reference, vit_grad, grads in (("frozen", "initial", True, "grads_frozen_image_features"),
                                             ("policy", "policy", True, "grads_policy_image_features"),
                                             ("policy", "policy", False, "grads_reference_no_grad_tower")):
        model = tiny_llava(case, dtype)
        args = DPOConfig("unused", beta=info["beta"], ref_image_features=reference, ref_adapters=False, vit_grad=vit_grad)
        parameter_groups(model, default_trainable(model), args)
        objective = DPOObjective(model, args)
        micro = objective.collate(dataset, [(i, 0) for i in range(len(data))])
        model.core.zero_grad()
        pairs = objective.forward(micro, train=True, step=0)
        objective.backward(micro, pairs, 1.0)
        found = gradients(model, "base_model.model.{}".format)
        files[grads] = found if vit_grad else {key: g for key, g in found.items() if "vision_tower" not in key}
        key = f"{name}_image_features"
        expected |= {f"{key}.chosen_rewards": pairs.chosen_rewards, f"{key}.rejected_rewards": pairs.rejected_rewards,
                     f"{key}.losses": pairs.losses, f"{key}.reference_chosen_logps": pairs.reference_chosen,
                     f"{key}.reference_rejected_logps": pairs.reference_rejected, "policy_chosen_logps": pairs.policy_chosen,
                     "policy_rejected_logps": pairs.policy_rejected}
        values[f"metrics_{key}"] = {k: v for k, v in pairs.metrics.items() if not k.startswith("logps/")}
    return files, values


def dpo_losses(case: Path, dtype: str) -> dict:
    source = next(path for path in (case / "inputs.json", case / "expected.json") if path.exists())
    data = json.loads(source.read_text())
    arrays = {key: np.array(data[key], np.float64) for key in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected",
                                                                "chosen_tokens", "rejected_tokens")}
    cases = []
    for setting in data["cases"]:
        first, last = (int(part) for part in setting["rows"].split(".."))
        rows = {key: np.ascontiguousarray(value[first:last + 1]) for key, value in arrays.items()}
        loss, per_pair, dchosen, drejected = stllava_c.preference_loss(
            loss_types=setting["loss_types"], weights=setting["weights"], beta=setting["beta"], label_smoothing=setting["label_smoothing"],
            discopop_tau=setting.get("tau", 0.05), f_divergence=setting.get("fdiv", "reverse_kl"), alpha=setting.get("alpha", 0.5), **rows)
        cases.append({"loss": loss, "per_pair": per_pair.tolist(), "dloss_dchosen": dchosen.tolist(), "dloss_drejected": drejected.tolist()})
    return {"cases": cases}


def trajectory(case: Path, dtype: str) -> tuple[Files, dict]:
    """Recorded micro-batches through the trainers' own objective and update."""
    info = meta(case)
    settings, kind = info["settings"], info["kind"]
    images = next(iter(tensors(case.parent / "tiny_llava" / "images.safetensors").values()))
    dataset = Recorded(info["data"], images)
    model = tiny_llava(case, dtype, zero_b=True)
    common = dict(output_dir="unused", learning_rate=settings["lrs"]["llm"], mm_projector_lr=settings["lrs"]["projector"],
                  vision_tower_lr=settings["lrs"]["vision"], weight_decay=info["weight_decay"], max_grad_norm=settings.get("clip", 1.0),
                  warmup_steps=info.get("warmup_steps", math.ceil(0.15 * info["steps"])), vit_grad=info["gradient_through_tower"])
    if kind == "sft":
        args = SFTConfig(**common, loss_reduction="token_mean" if settings.get("token_mean") else "micro_mean")
    else:
        args = DPOConfig(**common, ref_image_features="initial" if settings.get("frozen_ref", True) else "policy")
    groups = parameter_groups(model, default_trainable(model), args)
    objective = (SFTObjective if kind == "sft" else DPOObjective)(model, args)
    updater = Updater(model, groups, objective, args, info["steps"])
    n = info["gradient_accumulation"]
    log = []
    for step in range(info["steps"]):
        micros = [objective.collate(dataset, [(item, 0) for item in items]) for items in info["micro_batches"][n * step:n * (step + 1)]]
        entry = updater.gradients(step, micros) | updater.apply(step)
        entry["grad_norm_before_clipping"] = entry.pop("grad_norm")
        log.append({"step": step, **{key: value for key, value in entry.items()
                                     if key not in ("num_tokens", "learning_rate") and not key.startswith("logps/")}})
    lora = model.lora_tensors()
    files = {
        "final_lora_llm": {f"base_model.model.{name}": array for name, array in lora.items() if "vision_tower" not in name},
        "final_lora_vit": {name.replace("model.vision_tower.", "base_model.model.", 1): array for name, array in lora.items() if "vision_tower" in name},
        "final_non_lora_trainables": {f"base_model.model.{name}": array for name, array in model.tensors().items() if "mm_projector" in name}}
    return {file: {name: array.astype(np.float64) for name, array in part.items()} for file, part in files.items()}, {"log": log}
