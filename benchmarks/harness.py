"""What every bench shares: two processes that take turns, the row that comes of it, the machine's limits, the table and build/bench/NAME.json.

The two sides alternate step by step, so that a machine that changes its speed changes it for both; a number is the median of its side. With one thread both
are pinned to one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from cases import BUILD
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
OURS = [sys.executable]
PEERS = [os.environ.get("STLLAVA_PEERS", str(HERE.parent / "build" / "peers" / "bin" / "python"))]
TOLERANCE = 1e-4  # of the values of both sides, f32; relative above 1


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `ratio` > 1: we are better; of an id that ends in "_memory" it is ours / peer. `limit`: what the hardware would allow, in `unit`;
    None where that means nothing."""

    id: str
    case: str
    dtype: str
    threads: int
    ours: float
    peer: float | None
    peer_name: str | None
    unit: str
    ratio: float | None
    limit: float | None


def make_row(id: str, case: str, ours: float, peer: float | None, peer_name: str | None, unit: str, *, dtype: str = "f32", threads: int = 1,
             limit: float | None = None) -> Row:
    more_is_better = unit.endswith("/s")
    ratio = None if peer is None else ours / peer if more_is_better or id.endswith("_memory") else peer / ours
    return Row(id, case, dtype, threads, ours, peer, peer_name, unit, ratio, limit)


class Worker:
    """One side: a process that serves `worker.serve`; `command` runs the script args[0], or is a program that takes all of them."""

    def __init__(self, command: list[str], *args: str, threads: int = 1, is_program: bool = False) -> None:
        self.name = " ".join(args)
        if not Path(command[0]).exists():
            raise SystemExit(f"{self.name}: no interpreter {command[0]}; `make bench` makes one, or let STLLAVA_PEERS name the full path of another")
        cores = sorted(os.sched_getaffinity(0))
        count = str(threads)
        env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count,
               "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        words = args if is_program else (str(HERE / args[0]), *args[1:])
        self.process = subprocess.Popen([*command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
                                        preexec_fn=lambda: os.sched_setaffinity(0, cores[-threads:]))  # noqa: PLW1509 - before there are threads

    def run(self, repeat: int = 1) -> dict[str, float]:
        self.process.stdin.write(f"run {repeat}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()} instead of an answer; its own message is above")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True, slots=True)
class Side:
    """Medians over the rounds; the bytes are the last."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    growth_bytes: int


def check_values(ours: str, a: float, peer: str, b: float, tolerance: float) -> None:
    if not abs(a - b) <= tolerance * max(1.0, abs(b)):
        raise SystemExit(f"{ours} has {a!r}, {peer} has {b!r}; they do not do the same work")


def take_turns(ours: Worker, peer: Worker, *, rounds: int, repeat: int = 1, tolerance: float = TOLERANCE) -> tuple[Side, Side]:
    """One uncounted turn each, then `rounds`. In the first two turns, before and after an update, both sides must have the same value; later rounding grows by
    training."""
    samples: tuple[list, list] = ([], [])
    for i_round in range(rounds + 1):
        for worker, taken in zip((ours, peer), samples, strict=True):
            taken.append(worker.run(repeat))
        a, b = (taken[-1]["value"] for taken in samples)
        if i_round < 2:
            check_values(ours.name, a, peer.name, b, tolerance)
    sides = tuple(Side(statistics.median(s["seconds"] for s in taken[1:]), statistics.median(s["cpu_seconds"] for s in taken[1:]),
                       taken[-1]["peak_bytes"], taken[-1]["growth_bytes"]) for taken in samples)
    print(f"    wall {sides[0].seconds:.4g} : {sides[1].seconds:.4g} s, cpu {sides[0].cpu_seconds:.4g} : {sides[1].cpu_seconds:.4g} s, value {a:.6f} : {b:.6f}",
          flush=True)
    return sides


def time_to_first(ours: tuple[str, ...], peer: tuple[str, ...], *, rounds: int, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Medians of the seconds from starting a process to its first finished step, whose value must be the same. Arguments: script and words of each side.
    The sides take turns; the first of each reads the disk and is not counted."""
    samples = []
    for _ in range(rounds + 1):
        times, values = [], []
        for command, words in ((OURS, ours), (PEERS, peer)):
            started = time.perf_counter()
            with Worker(command, *words) as worker:
                values.append(worker.run()["value"])
                times.append(time.perf_counter() - started)
        check_values(ours[0], values[0], peer[0], values[1], tolerance)
        samples.append(times)
    return tuple(statistics.median(side) for side in zip(*samples[1:], strict=True))


# ---- the machine --------------------------------------------------------------------------------------------------------------


def compile_c(source: str, *flags: str) -> Path:
    """benchmarks/SOURCE into build/bench, warnings as errors."""
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / Path(source).stem
    subprocess.run([os.environ.get("CC", "cc"), "-std=c11", "-O3", "-Wall", "-Wextra", "-Werror", "-pthread", str(HERE / source), "-o", str(target), *flags,
                    "-lm"], check=True)
    return target


@cache
def machine() -> dict[str, float]:
    """One core: register_peak_f32 in GFLOP/s, memory_bandwidth in GB/s."""
    core = max(os.sched_getaffinity(0))
    done = subprocess.run([compile_c("calibrate.c", "-march=native", "-ffp-contract=fast")], capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {core}))
    return json.loads(done.stdout)


def seconds_at_peak(flop: float, threads: int = 1) -> float:
    return flop / (machine()["register_peak_f32"] * 1e9 * threads)


def _machine_rows() -> list[Row]:
    return [make_row("register_peak_f32", "FMAs that stay in registers, one core", machine()["register_peak_f32"], None, None, "GFLOP/s"),
            make_row("memory_bandwidth", "reading 256 MB, one core", machine()["memory_bandwidth"], None, None, "GB/s", dtype="bytes")]


# ---- a bench ------------------------------------------------------------------------------------------------------------------


def main(name: str, rows: dict[str, Callable[[], Iterable[Row]]]) -> None:
    """Runs the benches whose key contains one of the words on the command line (none: all), prints a table and writes build/bench/NAME.json."""
    parser = argparse.ArgumentParser(description=f"the {name} benchmarks")
    parser.add_argument("words", nargs="*", help=f"parts of: {', '.join(rows)}")
    words = parser.parse_args().words
    chosen = [key for key in rows if not words or any(word in key for word in words)]
    if not chosen:
        return
    result = _machine_rows()
    for key in chosen:
        print(f"{key} ...", flush=True)
        result.extend(rows[key]())
        (BUILD / f"{name}.json").write_text(json.dumps([asdict(row) for row in result], indent=1) + "\n")  # at once: the next may take minutes
    _print(result)


def _print(rows: list[Row]) -> None:
    table = Table(title="ratio > 1: we are better (memory: ours / peer); of limit: how near we are to what the hardware allows")
    for heading in ("id", "case", "dtype", "threads", "ours", "peer", "unit", "peer is", "ratio", "of limit"):
        table.add_column(heading, justify="right" if heading in ("threads", "ours", "peer", "ratio", "of limit") else "left")
    for row in rows:
        near = None if row.limit is None else row.ours / row.limit if row.unit.endswith("/s") else row.limit / row.ours
        table.add_row(row.id, row.case, row.dtype, str(row.threads), f"{row.ours:.4g}", "" if row.peer is None else f"{row.peer:.4g}", row.unit,
                      row.peer_name or "", "" if row.ratio is None else f"{row.ratio:.2f}", "" if near is None else f"{near:.0%}")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
