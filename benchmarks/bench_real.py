"""Parts of the 7B model in their real shapes, weights in bf16: `bench_real.py [part of an id]...`

Ours keeps bf16 weights where they lie and computes in f32; the peers compute in bf16, as people run them. Values agree to bf16's rounding (TOLERANCE).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench_gemm import core_flags
from cases import CACHED, GGUF, LINEARS, REAL, Model
from harness import OURS, PEERS, Row, Worker, compile_c, machine, main, make_row, seconds_at_peak, take_turns

from stllava.checkpoint.directory import Checkpoint, read_checkpoint, write_full
from stllava.checkpoint.gguf_file import write_gguf
from stllava.checkpoint.names import decoder_shapes
from stllava.checkpoint.tensor_file import round_to
from stllava.config import LlavaConfig
from stllava.demo.base import fresh_weights

SELF, PEER = "ours_real.py", "peers/hf_real.py"
HF, LLAMACPP = "transformers, bf16", "llama.cpp (AVX2, as its wheels are), bf16"
TOLERANCE = 2e-2  # seen: 3e-3 in log-probabilities, 1e-3 in root mean squares


def ensure_weights(model: Model) -> None:
    """Random weights in bf16, 2 GB, written once; both sides map the same file."""
    if not model.directory.exists():
        model.directory.parent.mkdir(parents=True, exist_ok=True)
        config = LlavaConfig.from_dict(model.config)
        unfinished = model.directory.with_suffix(".part")
        unfinished.mkdir(exist_ok=True)
        write_full(unfinished, config, {name: round_to(array, "bf16") for name, array in fresh_weights(config, seed=0).items()})
        unfinished.rename(model.directory)


def ensure_gguf(layers: int) -> None:
    """The decoder's first layers with embeddings and head, for llama.cpp."""
    ensure_weights(REAL)
    if not GGUF[layers].exists():
        settings = {key: value for key, value in REAL.config.items() if not key.startswith("mm_")}
        config = LlavaConfig.from_dict(settings | {"model_type": "llama", "num_hidden_layers": layers})
        tensors = read_checkpoint(REAL.directory).tensors
        write_gguf(GGUF[layers], Checkpoint(config, {name: tensors[name] for name in decoder_shapes(config)}), dtype="bf16")


def against_transformers(id: str, name: str, case: str, *, rounds: int, limit: float | None = None) -> Iterator[Row]:
    ensure_weights(REAL)
    with Worker(OURS, SELF, name) as ours, Worker(PEERS, PEER, name) as peer:
        a, b = take_turns(ours, peer, rounds=rounds, tolerance=TOLERANCE)
    yield make_row(id, case, a.seconds, b.seconds, HF, "s", dtype="bf16", limit=limit)


def against_llamacpp(id: str, name: str, case: str, *, layers: int, rounds: int, limit: float) -> Iterator[Row]:
    ensure_gguf(layers)
    with Worker(OURS, SELF, name) as ours, Worker(PEERS, "peers/llamacpp.py", name) as peer:
        a, b = take_turns(ours, peer, rounds=rounds, tolerance=TOLERANCE)
    yield make_row(id, case, a.seconds, b.seconds, LLAMACPP, "s", dtype="bf16", limit=limit)


def tower() -> Iterator[Row]:
    rows, width = REAL.image_tokens + 1, REAL.tower_width
    flop = 2.0 * REAL.image_tokens * 3 * REAL.patch_size**2 * width + REAL.tower_layers * (2.0 * rows * 12 * width**2 + 4.0 * rows**2 * width)
    return against_transformers("vit_l_336_bf16", "vit", "CLIP ViT-L/14-336, 23 layers, one image", rounds=5, limit=seconds_at_peak(flop))


DECODE = f"one 7B layer and the head, one token, {CACHED} cached"


def decode_limit() -> float:
    """Every weight and every cached number is read once."""
    weights = sum(n_out * n_in for n_out, n_in in REAL.linears().values()) + REAL.vocab * REAL.width
    n_bytes = 2.0 * weights + 2 * 4.0 * CACHED * REAL.width
    return n_bytes / (machine()["memory_bandwidth"] * 1e9)


def decode() -> Iterator[Row]:
    return against_transformers("decode_bf16", "decode", DECODE, rounds=15, limit=decode_limit())


def decode_llamacpp() -> Iterator[Row]:
    return against_llamacpp("decode_bf16_llamacpp", "decode", DECODE, layers=1, rounds=15, limit=decode_limit())


def prefill_llamacpp() -> Iterator[Row]:
    linears = {name: 2.0 * n_out * n_in for name, (n_out, n_in) in REAL.linears().items()}
    last = sum(flop * (CACHED if name.endswith(("k_proj", "v_proj")) else 1) for name, flop in linears.items())
    attention = (REAL.layers - 1) * 4.0 * REAL.width * CACHED * (CACHED + 1) / 2 + 4.0 * REAL.width * CACHED
    flop = (REAL.layers - 1) * CACHED * sum(linears.values()) + last + attention + 2.0 * REAL.vocab * REAL.width
    return against_llamacpp("prefill_bf16_llamacpp", "prefill", f"two 7B layers, {CACHED} tokens, logits of the last", layers=REAL.layers, rounds=3,
                            limit=seconds_at_peak(flop))


def questions() -> Iterator[Row]:
    return against_transformers("questions_12", "questions", "one image, 12 questions of 32 tokens, answers of 20, two 7B layers; the peer one after the other",
                                rounds=1)


def linears() -> Iterator[Row]:
    """A linear layer; ours is bench_linear.c, compiled with the build's own flags."""
    program = compile_c("bench_linear.c", *core_flags())
    for id, (rows, n_out, n_in) in LINEARS.items():
        shape = (str(rows), str(n_out), str(n_in))
        with Worker([str(program)], *shape, is_program=True) as ours, Worker(PEERS, PEER, "linear", *shape) as peer:
            a, b = take_turns(ours, peer, rounds=7, repeat=3, tolerance=TOLERANCE)
        gflop = 2e-9 * rows * n_out * n_in
        yield make_row(id, f"y = x W^T, {rows} x {n_out} x {n_in}", gflop / a.seconds, gflop / b.seconds, "torch, bf16", "GFLOP/s", dtype="bf16",
                       limit=machine()["register_peak_f32"])


BENCHES = {"vit_l_336_bf16": tower, "gemm_bf16": linears, "decode_bf16": decode, "decode_bf16_llamacpp": decode_llamacpp,
           "prefill_bf16_llamacpp": prefill_llamacpp, "questions_12": questions}

if __name__ == "__main__":
    main(Path(__file__).stem.removeprefix("bench_"), BENCHES)
