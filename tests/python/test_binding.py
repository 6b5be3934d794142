"""The binding: memory shared both ways, lifetimes, states, threads, errors with their codes."""

from __future__ import annotations

import gc
import os
import resource
import threading

import numpy as np
import pytest

import stllava_c

DECODER = {"vocab_size": 50, "hidden_size": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "intermediate_size": 24,
           "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 0, "tie_word_embeddings": True}


def model(dtype="f32", seed=0):
    m = stllava_c.Model({"vision": None, "projector": None, "decoder": DECODER}, dtype=dtype)
    rng = np.random.default_rng(seed)
    for info in m.tensors():
        m.bind(info.name, rng.normal(0, 0.3, info.shape).astype(np.float32 if dtype == "f32" else np.float64))
    return m


def batch(m, ids=(1, 5, 7, 9)):
    return stllava_c.Batch(m, parent=[-1], begin=[0, len(ids)], ids=list(ids), labels=[-100, *ids[1:]])


def test_tensor_shares_memory_both_ways():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = stllava_c.Tensor.from_buffer(array)
    array[0, 0] = 9
    assert tensor.numpy()[0, 0] == 9 and tensor.shape == (2, 3) and tensor.dtype == "f32"
    tensor.numpy()[1, 2] = -1
    assert array[1, 2] == -1 and np.frombuffer(memoryview(tensor).cast("B"), np.float32)[5] == -1


def test_live_exports_forbid_free():
    tensor = stllava_c.Tensor.zeros((4,), "f64")
    view = memoryview(tensor)
    with pytest.raises(BufferError):
        tensor.free()
    view.release()
    tensor.free()


def test_model_tensors_are_views_and_moving_them_is_refused_while_they_live():
    m = model()
    m.set_trainable(["model.norm.weight"])
    flat = m.theta.numpy()
    flat[...] = 3
    assert (m.tensor("model.norm.weight").numpy() == 3).all()
    for move in (lambda: m.set_trainable([]), m.close):
        with pytest.raises(BufferError):
            move()
    del flat
    gc.collect()
    m.set_trainable([])
    assert m.theta is None and (m.tensor("model.norm.weight").numpy() == 3).all()


def test_views_and_borrowed_arrays_outlive_their_owners():
    m = model()
    run, made = stllava_c.Run(m), batch(m)
    want = run.forward(made)
    view = m.tensor("model.norm.weight").numpy()
    kept = view.copy()
    del m
    gc.collect()
    np.testing.assert_array_equal(view, kept)
    np.testing.assert_array_equal(run.forward(made), want)


@pytest.mark.parametrize("call, kind, text", [
    (lambda m: m.bind("model.bogus", np.zeros(3, np.float32)), ValueError, "model.bogus"),
    (lambda m: m.bind("model.norm.weight", np.zeros(3, np.float32)), ValueError, "model.norm.weight"),
    (lambda m: m.bind("model.norm.weight", np.zeros(16, np.float64)), (ValueError, TypeError), "model.norm.weight"),
    (lambda m: m.tensor("nothing"), ValueError, "nothing"),
    (lambda m: m.add_lora("model.norm", 4, 1.0), ValueError, "model.norm"),
    (lambda m: m.add_lora("model.layers.0.self_attn.q_proj", 0, 1.0), ValueError, "rank"),
    (lambda m: m.set_trainable(["model.norm.weight", "model.norm.weight"]), ValueError, "twice"),
    (lambda m: stllava_c.Batch(m, parent=[-1], begin=[0, 2], ids=[1, 50]), ValueError, "50"),
    (lambda m: stllava_c.Batch(m, parent=[-1, 1], begin=[0, 1, 2], ids=[1, 2]), ValueError, "parent"),
    (lambda m: stllava_c.Batch(m, parent=[-1], begin=[0, 1], ids=[-200], image=[0], n_images=1), ValueError, "image"),
    (lambda m: stllava_c.Run(m).forward(batch(m), theta=np.zeros(3, np.float32)), ValueError, "theta"),
    (lambda m: stllava_c.Generator(m, batch(m), max_new_tokens=2, temperature=-1.0), ValueError, "temperature"),
    (lambda m: stllava_c.sampling_probabilities(np.zeros(4), temperature=1.0, top_k=0, top_p=0.0), ValueError, "top_p"),
    (lambda m: stllava_c.schedule("square", 0, 0, 1), ValueError, "square"),
    (lambda m: stllava_c.Model({"vision": None, "projector": None, "decoder": {**DECODER, "n_heads": 0}}), ValueError, "n_heads"),
    (lambda m: stllava_c.image_decode(b"no picture"), stllava_c.Error, "."),
])
def test_errors_name_what_is_wrong(call, kind, text):
    with pytest.raises(kind, match=text):
        call(model())


def test_states():
    m = model()
    run = stllava_c.Run(m)
    with pytest.raises(stllava_c.Error) as caught:
        run.backward(np.zeros(3))
    assert caught.value.code == "state"
    m.set_trainable(["model.norm.weight"])
    run.forward(batch(m), train=True)
    run.backward(np.ones(3))
    with pytest.raises(stllava_c.Error):
        run.backward(np.ones(3))
    with pytest.raises(stllava_c.Error, match="not bound") as caught:
        empty = stllava_c.Model({"vision": None, "projector": None, "decoder": DECODER})
        stllava_c.Run(empty).forward(batch(empty))
    assert caught.value.code == "state"


def test_nan_is_a_numeric_error():
    m = model()
    m.bind("model.norm.weight", np.full(16, np.nan, np.float32))
    with pytest.raises(stllava_c.NumericError):
        stllava_c.Run(m).forward(batch(m))


def test_steady_steps_allocate_nothing():
    m = model()
    m.set_trainable([info.name for info in m.tensors()])
    run, made, d = stllava_c.Run(m), batch(m), np.ones(3)
    for _ in range(2):
        run.forward(made, train=True)
        run.backward(d)
    before = stllava_c.allocations()
    run.forward(made, train=True)
    run.backward(d)
    assert stllava_c.allocations() == before


def test_threads_on_own_and_shared_objects():
    m = model()
    made = batch(m)
    want = stllava_c.Run(m).forward(made)
    shared = stllava_c.Run(m)
    problems = []

    def work(run):
        for _ in range(50):
            if not np.array_equal(run.forward(made), want):
                problems.append(run)

    threads = [threading.Thread(target=work, args=(run,)) for run in (shared, shared, stllava_c.Run(m), stllava_c.Run(m))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use():
    m = model()
    run, made = stllava_c.Run(m), batch(m)
    want = run.forward(made)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(run.forward(made), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_leaks():
    def once():
        m = model()
        m.add_lora("model.layers.0.self_attn.q_proj", 2, 1.0)
        for side, shape in (("A", (2, 16)), ("B", (16, 2))):
            m.bind(f"model.layers.0.self_attn.q_proj.lora_{side}.weight", np.ones(shape, np.float32))
        m.set_trainable(["model.norm.weight"])
        run, made = stllava_c.Run(m), batch(m)
        run.forward(made, train=True)
        run.backward(np.ones(3))
        decoder = stllava_c.Generator(m, made, max_new_tokens=2)
        decoder.step()
        for bad in (lambda: m.tensor("x"), lambda: run.backward(np.ones(3)), lambda: batch(m, (99,))):
            with pytest.raises(Exception):
                bad()

    for _ in range(50):
        once()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        once()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3000  # KiB: 300 rounds of 100 KiB would show
