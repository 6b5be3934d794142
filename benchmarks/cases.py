"""The models and the data of the step benchmarks: what both sides compute, and how much arithmetic it needs. NumPy only: peers import it too."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BUILD = Path(__file__).resolve().parents[1] / "build" / "bench"
IMAGE_TOKEN, IGNORE = -200, -100
TOWER, PROJECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."  # how the names of their weights begin
LEARNING_RATE, MAX_GRAD_NORM, BETA = 1e-4, 1.0, 0.1


@dataclass(frozen=True)
class Model:
    """Sizes of a LLaVA model with adapters of `rank`, scaled by 2, on the seven linears of every decoder layer. The tower has only layers that are used:
    a stock tower computes one more, which would be the peer's loss."""

    image_size: int
    patch_size: int
    tower_width: int
    tower_layers: int
    tower_heads: int
    width: int
    ffn: int
    layers: int
    heads: int
    vocab: int
    rank: int

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def config(self) -> dict:
        """`config.json` of the checkpoint."""
        return {"model_type": "llava", "vocab_size": self.vocab, "hidden_size": self.width, "intermediate_size": self.ffn,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
                "mm_vision_tower": "tower", "mm_hidden_size": self.tower_width, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1,
                "mm_vision_config": {"image_size": self.image_size, "patch_size": self.patch_size, "hidden_size": self.tower_width,
                                     "num_hidden_layers": self.tower_layers, "num_attention_heads": self.tower_heads,
                                     "intermediate_size": 4 * self.tower_width, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}}

    @property
    def decoder_settings(self) -> dict:
        """Arguments of transformers' LlamaConfig."""
        return {key: value for key, value in self.config.items() if not key.startswith(("mm_", "model_type"))}

    @property
    def directory(self) -> Path:
        """Where its random weights lie; another configuration has another name."""
        return BUILD / "weights" / hashlib.sha256(json.dumps(self.config).encode()).hexdigest()[:12]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linears of a decoder layer: name -> (out, in)."""
        d, f = self.width, self.ffn
        return {**{f"self_attn.{x}_proj": (d, d) for x in "qkvo"}, "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}

    def adapters(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(module, A (rank, in), B (out, rank)). B is not zero, as after some training, so that A has a gradient and the reference differs."""
        for i in range(self.layers):
            for name, (n_out, n_in) in self.linears().items():
                module = f"model.layers.{i}.{name}"
                rng = np.random.default_rng(zlib.crc32(module.encode()))
                yield (module, rng.uniform(-1, 1, (self.rank, n_in)).astype(np.float32) / np.float32(n_in**0.5),
                       rng.uniform(-0.01, 0.01, (n_out, self.rank)).astype(np.float32))


@dataclass(frozen=True)
class Sample:
    """One sequence: the image, then `ids`; labels as long, IGNORE where nothing is learnt."""

    image: int
    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Case:
    """A step. Each of `n_images` is followed by `prompt` common tokens, then by every branch (tokens without, tokens with labels).
    kind "sft", or "dpo": the two branches are the chosen and the rejected answer."""

    kind: str
    model: Model
    n_images: int
    prompt: int
    branches: tuple[tuple[int, int], ...]

    def samples(self) -> list[Sample]:
        rng = np.random.default_rng(0)
        samples = []
        for image in range(self.n_images):
            prompt = rng.integers(3, self.model.vocab, self.prompt)
            for plain, learnt in self.branches:
                ids = np.concatenate([prompt, rng.integers(3, self.model.vocab, plain + learnt)])
                samples.append(Sample(image, ids, np.where(np.arange(len(ids)) < len(ids) - learnt, IGNORE, ids)))
        return samples

    def pixels(self) -> np.ndarray:
        """(n_images, 3, size, size) f32"""
        size = self.model.image_size
        return np.random.default_rng(1).normal(size=(self.n_images, 3, size, size)).astype(np.float32)

    def needed_flop(self) -> float:
        """Arithmetic without anything that can be left out: prefixes once, no padding, logits of targets only, in the last layer only keys and values of
        rows that predict nothing, no gradient of frozen weights, causal attention by its triangle and its backward without recomputing. A DPO step has a
        reference forward, which shares tower and projector."""
        m = self.model
        patches, prefix = m.image_tokens, m.image_tokens + self.prompt
        lengths = [plain + learnt for plain, learnt in self.branches]
        rows = self.n_images * (prefix + sum(lengths))
        targets = self.n_images * sum(learnt for _, learnt in self.branches)
        pairs_below = self.n_images * (prefix * (prefix + 1) / 2 + sum(n * (n + 1) / 2 + n * prefix for n in lengths))
        pairs_last = self.n_images * sum(learnt * (prefix + plain + (learnt - 1) / 2) for plain, learnt in self.branches)
        pairs = (m.layers - 1) * pairs_below + pairs_last
        passes = {name: (m.layers - 1) * rows + (rows if name.endswith(("k_proj", "v_proj")) else targets) for name in m.linears()}
        linears = sum(2 * passes[name] * n_out * n_in for name, (n_out, n_in) in m.linears().items())
        adapters = sum(2 * passes[name] * m.rank * (n_out + n_in) for name, (n_out, n_in) in m.linears().items())
        tower = self.n_images * (2 * patches * 3 * m.patch_size**2 * m.tower_width + m.tower_layers * (
            2 * (patches + 1) * 12 * m.tower_width**2 + 4 * (patches + 1) ** 2 * m.tower_width))
        projector = self.n_images * patches * (2 * 2 * m.tower_width * m.width + 3 * 2 * m.width**2)
        base = linears + 4 * pairs * m.width + 2 * targets * m.vocab * m.width
        backward = base + 4 * pairs * m.width  # attention has twice its forward
        reference = base if self.kind == "dpo" else 0
        return tower + projector + base + backward + reference + 3 * adapters


MID = Model(336, 14, 1024, 6, 16, 2048, 5504, 4, 16, 32000, 128)
SMALL = Model(336, 14, 1024, 2, 16, 1024, 2816, 2, 8, 8000, 64)
TINY = Model(28, 7, 64, 2, 4, 64, 172, 2, 4, 1000, 8)

CASES = {
    "sft": Case("sft", MID, 2, 0, ((64, 64),)),
    "dpo": Case("dpo", MID, 1, 40, ((0, 100), (0, 200))),
    "grouped": Case("sft", SMALL, 1, 0, ((24, 24),) * 12),
    "tiny_sft": Case("sft", TINY, 2, 0, ((42, 42),)),
    "tiny_dpo": Case("dpo", TINY, 1, 20, ((0, 32), (0, 64))),
}


@dataclass(frozen=True)
class Cluster:
    """The cluster projector alone, forward and backward, every parameter and the input with a gradient; one image."""

    width: int = 1024
    tokens: int = 576
    centers: int = 256
    rounds: int = 2
    out: int = 1024

    def tensors(self) -> dict[str, np.ndarray]:
        """Names as in checkpoints, without their prefix; linears (out, in)."""
        rng, e = np.random.default_rng(2), self.width
        tensors = {"sim_alpha": np.ones((1, 1, 1), np.float32), "sim_beta": np.zeros((1, 1, 1), np.float32)}
        for name, n_out, n_in in (("c", e, e), ("v", e, e), ("f", e, e), ("mlp.0", self.out, e), ("mlp.2", self.out, self.out)):
            tensors[f"{name}.weight"] = rng.uniform(-1, 1, (n_out, n_in)).astype(np.float32) / np.float32(n_in**0.5)
            tensors[f"{name}.bias"] = np.zeros(n_out, np.float32)
        return tensors

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """x (1, tokens, width) and the gradient of the output (1, tokens, out)."""
        rng = np.random.default_rng(3)
        return rng.normal(size=(1, self.tokens, self.width)).astype(np.float32), rng.normal(size=(1, self.tokens, self.out)).astype(np.float32)

    def needed_flop(self) -> float:
        """Matrix products; a linear has three, the first ones' input gradient included."""
        e, n, k = self.width, self.tokens, self.centers
        linears = 2 * n * (2 * e * e + e * self.out + self.out**2) + self.rounds * 2 * k * e * e
        rounds = self.rounds * 2 * 2 * n * k * e + 2 * n * k * e
        return 3.0 * (linears + rounds)


CLUSTER = Cluster()

# Parts of LLaVA-1.5-7B in their real shapes, for bench_real.py.
REAL = Model(336, 14, 1024, 23, 16, 4096, 11008, 2, 32, 32000, 0)
CACHED, ANSWER_TOKENS = 700, 20
GGUF = {n: REAL.directory / f"decoder_{n}.gguf" for n in (1, 2)}  # its first layers, with embeddings and head, for llama.cpp
OPEN = BUILD / "open_13gb"  # a whole decoder, made by bench_real.py for its row and removed again
OPEN_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": REAL.vocab, "hidden_size": REAL.width,
               "intermediate_size": REAL.ffn, "num_hidden_layers": 32, "num_attention_heads": REAL.heads, "num_key_value_heads": REAL.heads,
               "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
LINEARS = {"gemm_bf16_llama": (704, 11008, 4096), "gemm_bf16_vit": (577, 4096, 1024)}  # rows, out, in


def decode_prompt() -> np.ndarray:
    """(CACHED,)"""
    return np.random.default_rng(4).integers(3, REAL.vocab, CACHED)


def best_logp(logits: np.ndarray) -> float:
    """Log-probability of the likeliest token; logits (vocabulary,). Another context has another one, by tenths."""
    shifted = logits - logits.max()
    return -float(np.log(np.exp(shifted).sum()))


def real_questions() -> np.ndarray:
    """(12, 32)"""
    return np.random.default_rng(5).integers(3, REAL.vocab, (12, 32))


def real_pixels() -> np.ndarray:
    """(1, 3, 336, 336) f32"""
    return np.random.default_rng(6).normal(size=(1, 3, 336, 336)).astype(np.float32)


PICTURE, PICTURE_SIZE = BUILD / "picture.jpg", 336  # made by bench_image.py; side of what the tower reads
