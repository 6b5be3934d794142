"""Signals: Ctrl-C ends a long step early, SIGTERM ends a run after a checkpoint, and neither loses anything.

Each test sends a signal to a child, which sets its handlers itself: the background job of a shell starts with SIGINT ignored.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# A model whose passes take seconds. `interrupted(call)` sends SIGINT `delay` seconds after the call began and returns for how long it went on.
SLOW = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from tiny_core import *
signal.signal(signal.SIGINT, signal.default_int_handler)
decoder = {**DECODER, "n_layers": 2, "hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}
model = tiny(decoder=decoder, projector={**PROJECTOR, "out_size": 256})
stllava_c.set_num_threads(2)
model.set_trainable(["model.embed_tokens.weight"])
run, batch, small = stllava_c.Run(model), text_batch(model, tuple(np.arange(12000) % 128)), text_batch(model)

def interrupted(call, delay=0.2):
    def send():
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    times = []
    timer = threading.Timer(delay, send)
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        return time.monotonic() - times[0]
    sys.exit("the call came to its end first")


def refused(call):
    try:
        call()
    except stllava_c.Error as error:
        return error.code == "state"
    return False
"""


def child(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_interrupt_ends_a_long_pass():
    """12,000 rows: seconds on two cores. Control is back within half a second on an idle machine; here, others may be computing. That a pass ended
    early is seen from what it left: nothing."""
    child(SLOW + """
want = run.forward(small)
assert interrupted(lambda: run.forward(batch, train=True)) < 2
assert refused(lambda: run.logits([0]))
np.testing.assert_array_equal(run.forward(small), want)
assert interrupted(lambda: stllava_c.Generator(model, batch, max_new_tokens=4)) < 2

middle = text_batch(model, tuple(np.arange(6000) % 128))
logp = run.forward(middle, train=True)
assert interrupted(lambda: run.backward(np.ones_like(logp)), delay=0.1) < 2
assert not model.grad.numpy().any()  # the embedding's gradient comes last
assert refused(lambda: run.backward(np.ones_like(logp)))
model.zero_grad()
logp = run.forward(small, train=True)
run.backward(np.ones_like(logp))
assert np.isfinite(model.grad.numpy()).all()
""")


def test_a_handler_runs_inside_a_call_and_cannot_use_its_model():
    child(SLOW + """
seen = []
generator = stllava_c.Generator(model, small, max_new_tokens=4)

def handler(number, frame):
    for use in (lambda: run.forward(small), lambda: model.theta, model.close, generator.step, generator.close):
        try:
            use()
        except stllava_c.Error as error:
            seen.append(error.code)
    other = tiny()
    seen.append(stllava_c.Run(other).forward(text_batch(other)).shape)

signal.signal(signal.SIGUSR1, handler)
middle = text_batch(model, tuple(np.arange(4000) % 128))
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
calls = 0
while not seen:
    logp = run.forward(middle)
    calls += 1
assert seen == ["state"] * 5 + [(3,)], seen
np.testing.assert_array_equal(run.forward(middle), logp)
""")
