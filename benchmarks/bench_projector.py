"""The cluster projector, one image of a real checkpoint's size, against the original's formulation in torch. `bench_projector.py`"""

from __future__ import annotations

from collections.abc import Iterator

from cases import CLUSTER
from harness import OURS, PEERS, Row, Worker, main, make_row, seconds_at_peak, take_turns

CASE = f"{CLUSTER.tokens} tokens of width {CLUSTER.width}, {CLUSTER.centers} centres, out {CLUSTER.out}: forward and backward"


def cluster_projector() -> Iterator[Row]:
    with Worker(OURS, "ours.py", "projector") as ours, Worker(PEERS, "peers/torch_projector.py") as peer:
        a, b = take_turns(ours, peer, rounds=5)
    yield make_row("cluster_projector", CASE, a.seconds, b.seconds, "torch, as the original", "s", limit=seconds_at_peak(CLUSTER.needed_flop()))
    yield make_row("cluster_projector_memory", f"{CASE}: growth of resident memory", a.growth_bytes / 1e9, b.growth_bytes / 1e9,
                   "torch, as the original", "GB")


if __name__ == "__main__":
    main("projector", {"cluster_projector": cluster_projector})
