"""Whole training steps against torch + transformers + peft: forward, loss, backward, clip, AdamW. `bench_step.py [part of an id]...`"""

from __future__ import annotations

from collections.abc import Iterator

from cases import CASES, Model
from harness import OURS, PEERS, Row, Worker, main, make_row, seconds_at_peak, take_turns, time_to_first

from stllava.config import LlavaConfig
from stllava.demo.base import fresh_weights
from stllava.model import LlavaModel

SELF, PEER = "ours.py", "peers/torch_steps.py"
TORCH = "torch + peft"


def ensure_weights(model: Model) -> None:
    """Random weights, written once; both sides map the same file."""
    if not model.directory.exists():
        model.directory.parent.mkdir(parents=True, exist_ok=True)
        config = LlavaConfig.from_dict(model.config)
        LlavaModel(config, fresh_weights(config, seed=0)).save_pretrained(model.directory)


def against_torch(id: str, name: str, case: str, *, rounds: int, repeat: int = 1, memory: bool = False) -> Iterator[Row]:
    ensure_weights(CASES[name].model)
    with Worker(OURS, SELF, name) as ours, Worker(PEERS, PEER, name) as peer:
        a, b = take_turns(ours, peer, rounds=rounds, repeat=repeat)
    yield make_row(id, case, a.seconds, b.seconds, TORCH, "s", limit=seconds_at_peak(CASES[name].needed_flop()))
    if memory:
        yield make_row(f"{id}_memory", f"{case}: highest resident memory", a.peak_bytes / 1e9, b.peak_bytes / 1e9, TORCH, "GB")


def two_threads() -> Iterator[Row]:
    ensure_weights(CASES["sft"].model)
    with Worker(OURS, SELF, "sft", threads=2) as two, Worker(OURS, SELF, "sft") as one:
        a, b = take_turns(two, one, rounds=3)
    yield make_row("two_threads_sft", "the step of sft_step_f32", a.seconds, b.seconds, "ourselves, 1 thread", "s", threads=2, limit=b.seconds / 2)


def start() -> Iterator[Row]:
    ensure_weights(CASES["tiny_sft"].model)
    ours, peer = time_to_first((SELF, "tiny_sft"), (PEER, "tiny_sft", "--trl"), rounds=3)
    yield make_row("start_to_first_step", "new process, tiny model, one SFT step", ours, peer, "torch, transformers, peft, trl", "s")


BENCHES = {
    "sft_step_f32": lambda: against_torch("sft_step_f32", "sft", "mid-size model, 2 x (576 + 128) tokens, 64 labels each", rounds=3, memory=True),
    "dpo_pair_f32": lambda: against_torch("dpo_pair_f32", "dpo", "mid-size model, 576 + 40 tokens, answers 100 and 200", rounds=3),
    "grouped_questions": lambda: against_torch("grouped_questions", "grouped", "2 + 2 layers, width 1024: one image, 12 questions of 48 tokens", rounds=3),
    "tiny_sft_step": lambda: against_torch("tiny_sft_step", "tiny_sft", "width 64, 2 layers, 2 x 100 tokens", rounds=7, repeat=50),
    "tiny_dpo_step": lambda: against_torch("tiny_dpo_step", "tiny_dpo", "width 64, 2 layers, a pair of at most 100 tokens", rounds=7, repeat=50),
    "start_to_first_step": start,
    "two_threads_sft": two_threads,
}

if __name__ == "__main__":
    main("step", BENCHES)
