"""Records `real_shapes.npz`: `PYTHON record_real_shapes.py`, PYTHON having torch and transformers (recorded with 2.13.0 and 5.23.0, f32).

features (48, 1024) f16: tokens `real_shapes.TOKENS` of the tower's second last hidden state. top_ids, top_logits (48, TOP): the largest logits of every row.
logps (47,): of each next token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import real_shapes
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM


def load(module: torch.nn.Module, shapes: object, prefix: str = "") -> None:
    state = {prefix + name: torch.from_numpy(real_shapes.draw(name, shape)) for name, shape in shapes}
    missing = module.load_state_dict(state, strict=False, assign=True).missing_keys
    assert all("layers.23." in name or "post_layernorm" in name or "position_ids" in name for name in missing), missing


with torch.no_grad():
    tower = CLIPVisionModel(CLIPVisionConfig(**real_shapes.TOWER))
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tower.state_dict()) else ""
    load(tower, real_shapes.tower_shapes(), prefix)
    hidden = tower(torch.from_numpy(real_shapes.pixels()), output_hidden_states=True).hidden_states[-2][0, 1:]
    del tower
    decoder = LlamaForCausalLM(LlamaConfig(**real_shapes.DECODER))
    load(decoder, real_shapes.decoder_shapes())
    ids = torch.from_numpy(real_shapes.ids())
    logits = decoder(ids[None]).logits[0]
    top = logits.topk(real_shapes.TOP)
    logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
np.savez_compressed(Path(__file__).with_suffix("").with_name("real_shapes.npz"), features=hidden.numpy()[real_shapes.TOKENS].astype(np.float16),
                    top_ids=top.indices.numpy().astype(np.int32), top_logits=top.values.numpy(), logps=logps.numpy())
