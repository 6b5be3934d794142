"""The same parts on torch and transformers in bf16: `hf_real.py vit|decode|questions` or `hf_real.py linear ROWS OUT IN`, a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from cases import ANSWER_TOKENS, PROJECTOR, REAL, TOWER, best_logp, decode_prompt, real_pixels, real_questions
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaForCausalLM
from worker import serve


def load(module: nn.Module, prefix: str) -> nn.Module:
    """With those of the weights under `prefix` that the module has."""
    weights = load_file(REAL.directory / "model.safetensors")
    wanted = set(module.state_dict())
    chosen = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix) and name.removeprefix(prefix) in wanted}
    module.load_state_dict(chosen, assign=True)
    return module.eval()


def tower_model() -> nn.Module:
    return load(CLIPVisionModel(CLIPVisionConfig(**REAL.config["mm_vision_config"])), TOWER)


def decoder_model(layers: int) -> nn.Module:
    return load(LlamaForCausalLM(LlamaConfig(**REAL.decoder_settings | {"num_hidden_layers": layers})), "")


def vit() -> Callable[[], float]:
    tower, pixels = tower_model(), torch.from_numpy(real_pixels()).bfloat16()
    return lambda: tower(pixel_values=pixels).last_hidden_state[:, 1:].float().square().mean().sqrt().item()


def decode() -> Callable[[], float]:
    model, cache = decoder_model(1), DynamicCache()
    token = model(torch.from_numpy(decode_prompt())[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step() -> float:
        nonlocal token
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        return best_logp(logits[0, -1].float().numpy())

    return step


def questions() -> Callable[[], float]:
    """As a stock evaluation script: every question encodes its image and its whole prompt."""
    tower, decoder = tower_model(), decoder_model(REAL.layers)
    projector = load(nn.Sequential(nn.Linear(REAL.tower_width, REAL.width), nn.GELU(), nn.Linear(REAL.width, REAL.width)), PROJECTOR)
    pixels, embed = torch.from_numpy(real_pixels()).bfloat16(), decoder.get_input_embeddings()

    def answer(question: torch.Tensor) -> float:
        features = projector(tower(pixel_values=pixels).last_hidden_state[:, 1:])
        embedded = torch.cat([embed(torch.tensor([[1]])), features, embed(question[None])], dim=1)
        result = decoder.generate(inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long), max_new_tokens=ANSWER_TOKENS,
                                  min_new_tokens=ANSWER_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
        return result.logits[0].float().log_softmax(-1).max().item()

    return lambda: sum(answer(torch.from_numpy(q)) for q in real_questions()) / len(real_questions())


def linear(rows: int, n_out: int, n_in: int) -> Callable[[], float]:
    """Operands uniform in [-.5, .5), as in bench_linear.c; the value is the root mean square of the result."""
    def operand(shape: tuple[int, int], seed: int) -> torch.Tensor:
        return (torch.rand(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)) - 0.5).bfloat16()

    x, w = operand((rows, n_in), 1), operand((n_out, n_in), 2)
    return lambda: nn.functional.linear(x, w)[:64].float().square().mean().sqrt().item()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    what = sys.argv[1]
    serve(lambda: linear(*map(int, sys.argv[2:])) if what == "linear" else {"vit": vit, "decode": decode, "questions": questions}[what]())
