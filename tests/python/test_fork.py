"""Processes made after the core has run: forked or spawned, they compute the same numbers and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from tiny_core import DECODER, PROJECTOR, pair_batch, pixels, text_batch, tiny

import stllava_c

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
NORM = "model.norm.weight"
PATIENCE = 60  # seconds until a child counts as hanging


def in_child(work) -> None:
    """Runs work() in a forked child, which must return true; a child that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        good = False
        try:
            good = bool(work())
        finally:
            os._exit(0 if good else 1)
    for _ in range(PATIENCE * 100):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child did not end within {PATIENCE} s")


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = stllava_c.get_num_threads()
    stllava_c.set_num_threads(request.param)
    yield request.param
    stllava_c.set_num_threads(before)


class Used:
    """A model whose pool, run and generator have been at work."""

    def __init__(self) -> None:
        self.model = tiny()
        self.model.set_trainable([NORM])
        self.run, self.batch, self.pixels = stllava_c.Run(self.model), pair_batch(self.model), pixels()
        self.generator = stllava_c.Generator(self.model, text_batch(self.model), max_new_tokens=1000)
        self.generator.step()
        self.want = self.step()

    def step(self) -> bytes:
        self.model.zero_grad()
        logp = self.run.forward(self.batch, pixels=self.pixels, train=True)
        self.run.backward([1.0, 1.0, 1.0])
        return logp.tobytes() + self.model.grad.numpy().tobytes()

    def same(self) -> bool:
        return self.step() == self.want


def test_forks_as_a_loader_makes_them(threads, amount):
    """One child after the other, each using what the parent used, the parent computing in between."""
    used = Used()
    for _ in range(amount(4, 100)):
        in_child(used.same)
        assert used.same()


def test_a_child_may_do_everything(threads):
    used = Used()

    def work() -> bool:
        used.generator.step()
        stllava_c.set_num_threads(threads % 4 + 1)
        fresh = Used()
        good = used.same() and fresh.same() and fresh.want == used.want
        used.generator.close()
        del used.run, used.generator
        used.model.close()
        return good

    in_child(work)
    assert used.same()


def test_a_child_of_a_child(threads):
    used = Used()

    def work() -> bool:
        in_child(used.same)
        return used.same()

    in_child(work)


def test_fork_while_another_thread_computes(amount):
    """The other thread does not exist in the child; the model it was computing with is usable there, with a run of its own."""
    before = stllava_c.get_num_threads()
    model = tiny(decoder={**DECODER, "n_layers": 4, "hidden_size": 256, "head_dim": 64, "intermediate_size": 512}, projector={**PROJECTOR, "out_size": 256})
    busy, batch = stllava_c.Run(model), text_batch(model, tuple(np.arange(400) % 128))
    want = busy.forward(batch)
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            busy.forward(batch)

    def work() -> bool:
        stllava_c.set_num_threads(2)
        run = stllava_c.Run(model)
        good = np.array_equal(run.forward(batch), want) and model.tensor(NORM).numpy().size == 256
        del run
        return good

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for i in range(amount(6, 100)):
            time.sleep(0.001 * (i % 7))
            in_child(work)
    finally:
        stop.set()
        thread.join()
        stllava_c.set_num_threads(before)
    np.testing.assert_array_equal(busy.forward(batch), want)


def spawned(n_threads: int, out) -> None:
    stllava_c.set_num_threads(n_threads)
    out.send(Used().want)


def test_spawn_after_use(threads):
    used = Used()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=spawned, args=(threads, there))
    process.start()
    try:
        assert here.poll(PATIENCE) and here.recv() == used.want
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        process.kill()
