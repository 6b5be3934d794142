"""Parts of the 7B model in their real shapes, weights in bf16: `bench_real.py [part of an id]...`

Ours keeps bf16 weights where they lie and computes in f32; the peers compute in bf16, as people run them. Values agree to bf16's rounding (TOLERANCE).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_gemm import core_flags
from cases import CACHED, GGUF, LINEARS, OPEN, OPEN_CONFIG, REAL, Model
from harness import OURS, PEERS, Row, Worker, compile_c, machine, main, make_row, seconds_at_peak, take_turns, time_to_first

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


def seconds_to_read(layers: int, cached: int) -> float:
    """Every weight of the layers and the head, and every cached number, once."""
    weights = layers * sum(n_out * n_in for n_out, n_in in REAL.linears().values()) + REAL.vocab * REAL.width
    n_bytes = 2.0 * weights + layers * 2 * 4.0 * cached * REAL.width
    return n_bytes / (machine()["memory_bandwidth"] * 1e9)


def decode() -> Iterator[Row]:
    return against_transformers("decode_bf16", "decode", DECODE, rounds=15, limit=seconds_to_read(1, CACHED))


def decode_llamacpp() -> Iterator[Row]:
    return against_llamacpp("decode_bf16_llamacpp", "decode", DECODE, layers=1, rounds=41, limit=seconds_to_read(1, CACHED))


def prefill_llamacpp() -> Iterator[Row]:
    linears = {name: 2.0 * n_out * n_in for name, (n_out, n_in) in REAL.linears().items()}
    last = sum(flop * (CACHED if name.endswith(("k_proj", "v_proj")) else 1) for name, flop in linears.items())
    attention = (REAL.layers - 1) * 4.0 * REAL.width * CACHED * (CACHED + 1) / 2 + 4.0 * REAL.width * CACHED
    flop = (REAL.layers - 1) * CACHED * sum(linears.values()) + last + attention + 2.0 * REAL.vocab * REAL.width
    return against_llamacpp("prefill_bf16_llamacpp", "prefill", f"two 7B layers, {CACHED} tokens, logits of the last", layers=REAL.layers, rounds=3,
                            limit=seconds_at_peak(flop))


@contextmanager
def sparse_checkpoint() -> Iterator[None]:
    """OPEN: 13.5 GB of zeros in three shards that take no room on the disk. Zeros are finite weights, and every logit is 0."""
    shapes = list(decoder_shapes(LlavaConfig.from_dict(OPEN_CONFIG)).items())
    weight_map, n_bytes, n_shards = {}, 0, 3
    OPEN.mkdir(parents=True, exist_ok=True)
    try:
        for i in range(n_shards):
            shard, header, end = f"model-{i + 1:05}-of-{n_shards:05}.safetensors", {}, 0
            for name, shape in shapes[i * len(shapes) // n_shards : (i + 1) * len(shapes) // n_shards]:
                begin, end = end, end + 2 * math.prod(shape)
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
                weight_map[name] = shard
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (OPEN / shard).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(file.tell() + end)
            n_bytes += end
        (OPEN / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": n_bytes}, "weight_map": weight_map}))
        (OPEN / "config.json").write_text(json.dumps(OPEN_CONFIG))
        yield
    finally:
        shutil.rmtree(OPEN)


def open_13gb() -> Iterator[Row]:
    """Files that the system has in memory, as after a first use; both sides map them. Work beyond the first layer only adds the same reading to both:
    open_13gb_token says how much."""
    with sparse_checkpoint():
        for id, layers, work in (("open_13gb", 1, "the first layer and the head"), ("open_13gb_token", 32, "all layers")):
            ours, peer = time_to_first((SELF, "open", str(layers)), ("peers/hf_open.py", str(layers)), rounds=3)
            yield make_row(id, f"new process, a 7B decoder of 13.5 GB: from_pretrained, one token through {work}", ours, peer, HF, "s", dtype="bf16",
                           limit=seconds_to_read(layers, 0))


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
           "prefill_bf16_llamacpp": prefill_llamacpp, "questions_12": questions, "open_13gb": open_13gb}

if __name__ == "__main__":
    main(Path(__file__).stem.removeprefix("bench_"), BENCHES)
