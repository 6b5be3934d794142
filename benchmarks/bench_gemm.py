"""f32 matrix products against OpenBLAS alone, one thread: those of the mid-size SFT step as the model calls them, and small ones.

`bench_gemm.py [part of an id]...`; the timing is bench_gemm.c, compiled against the core's own sources with the build's own flags.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import scipy_openblas32
from cases import CASES
from harness import HERE, Row, compile_c, machine, main, make_row

CORE = HERE.parent / "csrc"
BUILD_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG", "-DSTV_HAVE_BLAS", "-DSTV_BLAS_BUNDLED")  # setup.py's
STRIP = 512  # of the vocabulary, in csrc/ops/logprob.c
TOLERANCE = 1e-4  # of the largest element; sums of at most 5504 products, measured 2e-6


@dataclass(frozen=True, slots=True)
class Product:
    """kind as in csrc/ops/gemm.h: "nt" y = a w^T (a linear layer), "nn" (its input gradient), "tn" (its weight gradient)."""

    kind: str
    M: int
    N: int
    K: int
    add: bool = False

    @property
    def flop(self) -> float:
        return 2.0 * self.M * self.N * self.K


SMALL = [Product("nt", 200, 64, 64), Product("nn", 200, 64, 64), Product("nt", 200, 8, 64), Product("nt", 200, 64, 8), Product("nt", 836, 128, 128),
         Product("nt", 836, 344, 128), Product("nt", 200, 512, 512), Product("nn", 200, 512, 512), Product("tn", 512, 512, 200), Product("nt", 1, 128, 128),
         Product("nt", 1, 512, 512)]


def step_products() -> Counter[Product]:
    """Products of one SFT step -> how often."""
    case, m = CASES["sft"], CASES["sft"].model
    rows = sum(m.image_tokens + len(s.ids) for s in case.samples())
    targets = case.n_images * sum(learnt for _, learnt in case.branches)
    tower_rows, image_rows, e = case.n_images * (m.image_tokens + 1), case.n_images * m.image_tokens, m.tower_width
    products: Counter[Product] = Counter()
    products[Product("nt", image_rows, e, 3 * m.patch_size**2)] += 1
    for count, n_out, n_in in ((4, e, e), (1, 4 * e, e), (1, e, 4 * e)):
        products[Product("nt", tower_rows, n_out, n_in, True)] += count * m.tower_layers  # onto the bias
    for n_in in (e, m.width):
        products[Product("nt", image_rows, m.width, n_in, True)] += 1
        products[Product("tn", m.width, n_in, image_rows, True)] += 1
    products[Product("nn", image_rows, m.width, m.width)] += 1
    for n_out, n_in in m.linears().values():
        products[Product("nt", rows, n_out, n_in)] += m.layers
        products[Product("nn", rows, n_in, n_out)] += m.layers
        products[Product("nt", rows, m.rank, n_in)] += m.layers  # the adapter: u = x A^T, y += u B^T, and back
        products[Product("nt", rows, n_out, m.rank, True)] += m.layers
        products[Product("tn", n_out, m.rank, rows, True)] += m.layers
        products[Product("nn", rows, m.rank, n_out)] += m.layers
        products[Product("tn", m.rank, n_in, rows, True)] += m.layers
        products[Product("nn", rows, n_in, m.rank, True)] += m.layers
    n_strips = m.vocab // STRIP
    products[Product("nt", targets, STRIP, m.width)] += 2 * n_strips  # the backward computes them again
    products[Product("nn", targets, m.width, STRIP, True)] += n_strips
    return products


def core_flags() -> list[str]:
    """Flags that build the core's products into a program, as setup.py builds them."""
    listed = [line.split() for line in (CORE / "sources.txt").read_text().splitlines() if line and not line.startswith("#")]
    sources = [str(CORE / name) for kind, name in listed if kind == "once" and name.startswith(("base/", "tensor/", "ops/"))]
    folder = scipy_openblas32.get_lib_dir()
    return [*BUILD_FLAGS, f"-I{CORE}", *sources, f"-L{folder}", f"-l{scipy_openblas32.get_library()}", f"-Wl,-rpath,{folder}"]


@cache
def program() -> Path:
    return compile_c("bench_gemm.c", *core_flags())


def measure(products: list[Product], rounds: int) -> list[tuple[float, float]]:
    """Seconds (ours, OpenBLAS) of each."""
    lines = "".join(f"{p.kind} {p.M} {p.N} {p.K} {int(p.add)} {rounds}\n" for p in products)
    done = subprocess.run([program()], input=lines, capture_output=True, text=True, check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    times = []
    for p, line in zip(products, done.stdout.splitlines(), strict=True):
        ours, blas, differs = map(float, line.split())
        if not differs <= TOLERANCE:
            raise SystemExit(f"{p}: we differ from OpenBLAS by {differs:g} of the largest element")
        print(f"    {p.kind} {p.M:5} {p.N:5} {p.K:5}  ours {p.flop / ours / 1e9:6.1f}  OpenBLAS {p.flop / blas / 1e9:6.1f} GFLOP/s  ratio {blas / ours:.2f}", flush=True)
        times.append((ours, blas))
    return times


def as_called() -> Iterator[Row]:
    products = step_products()
    times = measure(list(products), rounds=3)
    gflop = sum(p.flop * n for p, n in products.items()) / 1e9
    ours, blas = (sum(n * pair[side] for n, pair in zip(products.values(), times, strict=True)) for side in (0, 1))
    yield make_row("sgemm_as_called", f"the {products.total()} products of sft_step_f32", gflop / ours, gflop / blas, "OpenBLAS", "GFLOP/s",
                   limit=machine()["register_peak_f32"])


def small() -> Iterator[Row]:
    for p, (ours, blas) in zip(SMALL, measure(SMALL, rounds=31), strict=True):
        yield make_row(f"sgemm_small_{p.kind}_{p.M}_{p.N}_{p.K}", f"{p.kind} M {p.M} N {p.N} K {p.K}", p.flop / ours / 1e9, p.flop / blas / 1e9, "OpenBLAS",
                       "GFLOP/s", limit=machine()["register_peak_f32"])


if __name__ == "__main__":
    main("gemm", {"sgemm_as_called": as_called, "sgemm_small": small})
