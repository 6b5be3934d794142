"""Records what transformers and peft compute and write: run by hand with an interpreter that has them, `python tests/recorded/make.py`.

Made with transformers 5.23.0, peft 0.21.2, torch 2.13.0. Tiny random models; weights in float32, expected logits computed from them in float64, except that
transformers computes norms and rotary tables in float32 even then, which shows as 1.6e-6 beside a float64 model. `tests/python/test_hf_layout.py` and
`test_peft_recorded.py` read the result.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

HERE = Path(__file__).parent
IMAGE, N_TOKENS = 34, 16
IDS = [1, 5, 9, -200, 7, 20, 3, 31, 2]
VISION = {"image_size": 28, "patch_size": 7, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
TEXTS = {"hf_llama": LlamaConfig(**TEXT, num_key_value_heads=1, rms_norm_eps=1e-5, rope_parameters=ROPE),
         "hf_mistral": MistralConfig(**TEXT, head_dim=12, sliding_window=6, tie_word_embeddings=True, num_key_value_heads=2)}


def pixels() -> torch.Tensor:
    return torch.sin(torch.arange(3 * 28 * 28, dtype=torch.float32) * 0.37).reshape(1, 3, 28, 28)


def logits(model: torch.nn.Module, ids: list[int] = IDS) -> torch.Tensor:
    """(rows, vocabulary) float64. An image, -200, is one row per token of the tower."""
    spread = [token for i in ids for token in ([IMAGE] * N_TOKENS if i == -200 else [i])]
    model = model.double().eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([spread]), **({"pixel_values": pixels().double()} if -200 in ids else {})).logits[0]


def randomize(model: torch.nn.Module, only: str = "") -> None:
    """Values large enough that every tensor shows in the logits, biases and norms included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.normal_(std=0.3)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)


def gradients(adapted: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """Of the summed log-probability of every text token but the first given what is before it, by A, B and magnitudes; key "grad." + name, less "default"."""
    adapted = adapted.double().eval()
    spread = [token for i in ids for token in ([IMAGE] * N_TOKENS if i == -200 else [i])]
    found = adapted(input_ids=torch.tensor([spread]), **({"pixel_values": pixels().double()} if -200 in ids else {})).logits[0].log_softmax(-1)
    sum(found[t - 1, token] for t, token in enumerate(spread) if t and token != IMAGE).backward()
    return {"grad." + name.replace(".default", ""): parameter.grad for name, parameter in adapted.named_parameters() if parameter.grad is not None}


def write(folder: str, model: Any, expected: torch.Tensor, ids: list[int] = IDS, **more: torch.Tensor) -> None:
    shutil.rmtree(HERE / folder, ignore_errors=True)
    model.float().save_pretrained(HERE / folder)
    (HERE / folder / "generation_config.json").unlink(missing_ok=True)
    (HERE / folder / "README.md").unlink(missing_ok=True)
    save_file({"logits": expected, "ids": torch.tensor(ids), "pixels": pixels(), **more}, HERE / folder / "expected.safetensors")


def rename(name: str, version: str) -> str:
    """From the names that transformers 5.23 writes."""
    if version == "4.36":  # until 4.51
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
    return name.replace("vision_tower.", "model.vision_tower.vision_model.").replace("multi_modal_projector.", "model.multi_modal_projector.")


def record_llava() -> None:
    for folder, text in TEXTS.items():
        torch.manual_seed(0)
        config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE, image_seq_length=N_TOKENS)
        model = LlavaForConditionalGeneration(config)
        randomize(model)
        expected = logits(model)
        write(folder, model, expected)
        for version in ("4.36", "4.52"):  # the names of the other versions are the same model
            with tempfile.TemporaryDirectory() as other:
                shutil.copy(HERE / folder / "config.json", other)
                weights = load_file(HERE / folder / "model.safetensors")
                save_file({rename(name, version): array for name, array in weights.items()}, Path(other) / "model.safetensors", {"format": "pt"})
                error = (logits(LlavaForConditionalGeneration.from_pretrained(other)) - expected).abs().max()
                assert error == 0, (version, error)


def record_adapters() -> None:
    """peft on a decoder alone, and on the whole model."""
    base = HERE / "peft_base"
    torch.manual_seed(1)
    model = LlamaForCausalLM(TEXTS["hf_llama"])
    randomize(model)
    ids = [i for i in IDS if i >= 0]
    write("peft_base", model, logits(model, ids), ids)
    cases = {
        "peft_patterns": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "mlp.down_proj"],
                          "rank_pattern": {r"layers\.[1-9]\d*\.self_attn\.q_proj": 2, "^model.layers.0.mlp.down_proj": 1}, "alpha_pattern": {"(q|v)_proj": 3}},
        "peft_expression": {"r": 2, "lora_alpha": 3, "target_modules": r"^(?!.*layers\.0\.mlp).*\.(?:q_proj|up_proj|gate_proj)", "exclude_modules": r".*\.1\.self_attn.*"},
        "peft_saved": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "layers_to_transform": None, "modules_to_save": ["lm_head", "embed_tokens"],
                       "exclude_modules": ["o_proj"]},
        "peft_dora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], "rank_pattern": {"v_proj": 3}, "use_dora": True},
        "peft_layers": {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "init_lora_weights": "orthogonal"},
    }
    for folder, options in cases.items():
        adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        record_adapter(folder, adapted, ids)
    whole = peft.get_peft_model(LlavaForConditionalGeneration.from_pretrained(HERE / "hf_llama"), peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"],
        rank_pattern={r"model\.language_model\.layers\.0\.self_attn\.q_proj": 3}))
    record_adapter("peft_llava", whole, IDS)
    whole = peft.get_peft_model(LlavaForConditionalGeneration.from_pretrained(HERE / "hf_llama"), peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["k_proj", "v_proj", "fc1"], use_dora=True))
    record_adapter("peft_llava_dora", whole, IDS)


def record_adapter(folder: str, adapted: Any, ids: list[int]) -> None:
    torch.manual_seed(2)
    randomize(adapted, "lora_")
    randomize(adapted, "modules_to_save")
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = Path(config.base_model_name_or_path).name  # not a path of this machine
    write(folder, adapted, logits(adapted, ids), ids, **(gradients(adapted, ids) if config.use_dora else {}))


def check(directory: str) -> None:
    """Writes the logits of a directory of ours: full weights, an adapter on `base`, or the whole way from a text and a picture; see tests/python/peers.py."""
    request = json.loads(Path(directory, "request.json").read_text())
    if "text" in request:
        inputs = AutoProcessor.from_pretrained(directory)(text=request["text"], images=np.load(Path(directory, "picture.npy")), return_tensors="pt")
        with torch.no_grad():
            found = LlavaForConditionalGeneration.from_pretrained(directory).eval()(**inputs).logits[0]
        np.savez(Path(directory, "processed.npz"), ids=inputs["input_ids"][0], pixels=inputs["pixel_values"][0], logits=found)
        return
    kind = LlavaForConditionalGeneration if -200 in request["ids"] else LlamaForCausalLM
    model = kind.from_pretrained(request.get("base", directory))
    if "base" in request:
        model = peft.PeftModel.from_pretrained(model, directory)
    np.save(Path(directory, "logits.npy"), logits(model, request["ids"]).numpy())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check(sys.argv[1])
    else:
        record_llava()
        record_adapters()
