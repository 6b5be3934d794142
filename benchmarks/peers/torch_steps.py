"""The same steps on torch, transformers and peft: `torch_steps.py CASE`, a worker. `--trl` imports trl too, as a training script does.

Better than a stock script in three things, so that the comparison is about the engine: the tower has no unused layer, an image is encoded once however many
sequences show it, and the DPO reference reads the policy's image features.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from cases import BETA, CASES, IGNORE, LEARNING_RATE, MAX_GRAD_NORM, PROJECTOR, TOWER, Case, Model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from worker import serve


class Llava(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        weights = load_file(model.directory / "model.safetensors")
        self.tower = CLIPVisionModel(CLIPVisionConfig(**model.config["mm_vision_config"])).requires_grad_(False)
        self.projector = nn.Sequential(nn.Linear(model.tower_width, model.width), nn.GELU(), nn.Linear(model.width, model.width))
        decoder = LlamaForCausalLM(LlamaConfig(**model.decoder_settings, use_cache=False))
        for part, prefix in ((self.tower, TOWER), (self.projector, PROJECTOR), (decoder, "")):
            names = [name for name in weights if name.startswith(prefix)] if prefix else list(weights)
            part.load_state_dict({name.removeprefix(prefix): weights.pop(name) for name in names}, assign=True)
        self.projector.requires_grad_(True)
        self.decoder = with_adapters(decoder, model)

    def embed(self, pixels: torch.Tensor, images: list[int], ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        return torch.cat([self.projector(features)[images], self.decoder.get_input_embeddings()(ids)], dim=1)


def with_adapters(decoder: nn.Module, model: Model) -> PeftModel:
    targets = [name.rsplit(".", 1)[1] for name in model.linears()]
    adapted = get_peft_model(decoder, LoraConfig(r=model.rank, lora_alpha=2 * model.rank, target_modules=targets))
    for module, a, b in model.adapters():
        layer = adapted.base_model.model.get_submodule(module)
        layer.lora_A["default"].weight.data = torch.from_numpy(a)
        layer.lora_B["default"].weight.data = torch.from_numpy(b)
    return adapted.train()


def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed over each sequence's labels; without the (rows, vocabulary) copy of a log_softmax, as trl does it."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = logits.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2) - torch.stack([row.logsumexp(-1) for row in logits])
    return (chosen * (labels != IGNORE)).sum(1)


def training_step(case: Case) -> Callable[[], float]:
    model = Llava(case.model)
    samples = case.samples()
    pixels, images = torch.from_numpy(case.pixels()), [s.image for s in samples]
    text = nn.utils.rnn.pad_sequence([torch.from_numpy(s.ids) for s in samples], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([torch.from_numpy(s.labels) for s in samples], batch_first=True, padding_value=IGNORE)
    labels = nn.functional.pad(labels, (case.model.image_tokens, 0), value=IGNORE)
    lengths = torch.tensor([case.model.image_tokens + len(s.ids) for s in samples])
    mask = None if len(set(lengths.tolist())) == 1 else (torch.arange(labels.shape[1]) < lengths[:, None]).long()

    def sft_loss() -> torch.Tensor:
        return model.decoder(inputs_embeds=model.embed(pixels, images, text), labels=labels, attention_mask=mask).loss

    def dpo_loss() -> torch.Tensor:
        embedded = model.embed(pixels, images, text)
        with torch.no_grad(), model.decoder.disable_adapter():
            reference = log_probs(model.decoder(inputs_embeds=embedded, attention_mask=mask).logits, labels)
        gain = log_probs(model.decoder(inputs_embeds=embedded, attention_mask=mask).logits, labels) - reference
        return -nn.functional.logsigmoid(BETA * (gain[0] - gain[1]))

    loss_of = dpo_loss if case.kind == "dpo" else sft_loss
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    if "--trl" in sys.argv:
        from trl import SFTTrainer  # noqa: F401
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve(lambda: training_step(CASES[sys.argv[1]]))
