"""Large weight gradients, which go through OpenBLAS below AVX-512: right, the same bits at any thread count, and no idle threads."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import stllava_c

SIZE = 2048  # the smallest weight whose gradient does


def gradient(threads: int) -> tuple[np.ndarray, np.ndarray]:
    before = stllava_c.get_num_threads()
    stllava_c.set_num_threads(threads)
    try:
        model = stllava_c.Model({"vision": None, "decoder": None, "projector": {"kind": "linear", "depth": 1, "in_size": SIZE, "out_size": SIZE,
                                                                                "n_centers": 1, "n_rounds": 1}}, dtype="f32")
        rng = np.random.default_rng(0)
        weight, bias = rng.normal(size=(SIZE, SIZE)).astype(np.float32), np.zeros(SIZE, np.float32)
        model.bind("model.mm_projector.weight", weight)
        model.bind("model.mm_projector.bias", bias)
        model.set_trainable(["model.mm_projector.weight"])
        run = stllava_c.Run(model)
        x, d = (rng.normal(size=(1, 37, SIZE)).astype(np.float32) for _ in range(2))
        run.projector_forward(x, train=True)
        run.projector_backward(d, want_input_grad=False)
        return np.array(model.grad.numpy()).reshape(SIZE, SIZE), d[0].astype(np.float64).T @ x[0].astype(np.float64)
    finally:
        stllava_c.set_num_threads(before)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_value_and_threads(level):
    """A machine without a level uses its best."""
    subprocess.run([sys.executable, __file__], env={**os.environ, "STLLAVA_CPU": level}, check=True, timeout=120)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_import_starts_no_threads():
    code = "import os, numpy; n = len(os.listdir('/proc/self/task')); import stllava_c; print(len(os.listdir('/proc/self/task')) - n)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0


if __name__ == "__main__":
    got, want = gradient(1)
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()  # 37 products summed in f32: measured 2e-7
    np.testing.assert_array_equal(got, gradient(2)[0])
