"""A whole 7B decoder through transformers: open it, and one token through its first LAYERS layers and the head. `hf_open.py LAYERS`, a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from cases import OPEN, best_logp
from transformers import AutoModelForCausalLM
from worker import serve


def open_and_read(layers: int) -> Callable[[], float]:
    model = AutoModelForCausalLM.from_pretrained(OPEN, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    return lambda: best_logp(model(torch.tensor([[1]])).logits[0, -1].float().numpy())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_grad_enabled(False)
    serve(lambda: open_and_read(int(sys.argv[1])))
