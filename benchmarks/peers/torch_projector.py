"""The cluster projector as the original writes it, in torch: similarities and sums by broadcasting over (centres, tokens, width). A worker."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from cases import CLUSTER
from torch.nn import functional
from worker import serve


def forward(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """x (B, tokens, width) -> (B, tokens, out). Source: SQ-LLaVA's prototype extractor, as its checkpoints need it."""

    def linear(name: str, data: torch.Tensor) -> torch.Tensor:
        return functional.linear(data, p[f"{name}.weight"], p[f"{name}.bias"])

    def pool(data: torch.Tensor) -> torch.Tensor:
        return functional.adaptive_avg_pool1d(data.transpose(1, 2), CLUSTER.centers).transpose(1, 2)

    values, features = linear("v", x), linear("f", x)
    centers, center_features = pool(x), pool(features)
    values = functional.normalize(values.transpose(1, 2), dim=-1)  # over tokens
    for _ in range(CLUSTER.rounds):
        centers = functional.normalize(linear("c", centers), dim=-1)
        centers = (centers @ values).softmax(dim=1) @ features
    cosine = functional.normalize(centers, dim=-1) @ functional.normalize(x, dim=-1).transpose(1, 2)
    similarity = torch.sigmoid(p["sim_beta"] + p["sim_alpha"] * cosine)  # (B, centres, tokens)
    mask = torch.zeros_like(similarity).scatter_(1, similarity.argmax(dim=1, keepdim=True), 1.0)
    similarity = similarity * mask
    gathered = (features.unsqueeze(1) * similarity.unsqueeze(-1)).sum(dim=2)
    gathered = (gathered + center_features) / (mask.sum(dim=-1, keepdim=True) + 1.0)
    spread = (gathered.unsqueeze(2) * similarity.unsqueeze(-1)).sum(dim=1)
    hidden = linear("mlp.0", x + spread)
    return linear("mlp.2", hidden * torch.sigmoid(1.702 * hidden))


def projector_step() -> Callable[[], float]:
    parameters = {name: torch.from_numpy(array).requires_grad_() for name, array in CLUSTER.tensors().items()}
    x, dout = (torch.from_numpy(array) for array in CLUSTER.arrays())
    x.requires_grad_()
    for tensor in (x, *parameters.values()):
        tensor.grad = torch.full_like(tensor, 0.0)  # there before the first step: what a step needs beyond them is measured

    def step() -> float:
        for tensor in (x, *parameters.values()):
            tensor.grad.zero_()
        forward(x, parameters).backward(dout)
        return x.grad.square().mean().sqrt().item()

    return step


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve(projector_step)
