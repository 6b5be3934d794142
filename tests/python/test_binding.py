"""The binding: memory shared both ways, lifetimes, states, threads, errors with their codes."""

from __future__ import annotations

import gc

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
    for move in (lambda: m.set_trainable([]), lambda: m.add_lora("model.layers.0.self_attn.q_proj", 2, 1.0), m.close):
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
    (lambda m: m.tensor("model.norm.weight\0"), ValueError, "null"),
    (lambda m: m.effective_weight("\ud800"), ValueError, "surrogates"),
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


PAIRS = {"loss_types": ["sigmoid"], "policy_chosen": [-1.0, -2.0], "policy_rejected": [-2.0, -2.0], "reference_chosen": [-1.0, -1.0],
         "reference_rejected": [-1.0, -1.0], "chosen_tokens": [3, 4], "rejected_tokens": [2, 2]}


@pytest.mark.parametrize("change, kind, text", [
    ({"loss_types": ["bogus"]}, ValueError, "'bogus', supported: sigmoid"), ({"loss_types": []}, ValueError, "no loss type"),
    ({"weights": [1, 2]}, ValueError, "weights: want shape"), ({"weights": [np.nan]}, ValueError, "weight 0"), ({"beta": 0}, ValueError, "beta"),
    ({"label_smoothing": 0.5}, ValueError, "label_smoothing"), ({"discopop_tau": 0}, ValueError, "discopop_tau"),
    ({"f_divergence": "tv"}, ValueError, "'tv', supported: reverse_kl"), ({"reference_free": True}, ValueError, "reference_chosen is given"),
    ({"reference_rejected": None}, ValueError, "reference_rejected is missing"), ({"policy_rejected": [-1.0]}, ValueError, "policy_rejected: want shape"),
    ({"policy_chosen": [np.nan, 0]}, stllava_c.NumericError, "pair 0"), ({"chosen_tokens": [0, 1]}, ValueError, "pair 0"),
])
def test_preference_loss_refuses(change, kind, text):
    stllava_c.preference_loss(**PAIRS)
    with pytest.raises(kind, match=text):
        stllava_c.preference_loss(**{**PAIRS, **change})


WHOLE = [(0, 16, 0.1, 0.0)]


@pytest.mark.parametrize("change, kind, text", [
    ({"step": 0}, ValueError, "step is 0"), ({"m": np.zeros(3, np.float32)}, ValueError, "m: want 16 elements, got 3"),
    ({"v": np.zeros(16)}, TypeError, "v: want f32, got f64"), ({"v": np.frombuffer(bytes(64), np.float32)}, ValueError, "adamw_step: v: .* read-only"),
    ({"m": bytes(64)}, TypeError, "m: want f32, got u8"), ({"m": np.zeros((16, 2), np.float32)[:, 0]}, ValueError, "m: .* not C-contiguous"),
    ({"ranges": [(0, 9, 0.1, 0.0), (8, 16, 0.1, 0.0)]}, ValueError, r"ranges 0 \[0, 9\) and 1 \[8, 16\)"),
    ({"ranges": [(8, 16, 0.1, 0.0), (0, 8, 0.1, 0.0)]}, ValueError, "want them ascending"),
    ({"ranges": [(0, 16, np.nan, 0.0)]}, ValueError, "lr nan"), ({"grad_scale": np.inf}, ValueError, "grad_scale is inf"),
    ({"ranges": [(0, 17, 0.1, 0.0)]}, ValueError, "range 0 is"), ({"ranges": [(4, 1, 0.1, 0.0)]}, ValueError, "range 0 is"),
    ({"ranges": [*WHOLE, (0, 4, 0.1)]}, TypeError, r"ranges\[1\]"), ({"beta1": 1.0}, ValueError, "beta1 1"), ({"eps": -1.0}, ValueError, "eps -1"),
])
def test_adamw_step_refuses_and_changes_nothing(change, kind, text):
    m = model()
    m.set_trainable(["model.norm.weight"])
    m.grad.numpy()[:] = 1
    before = m.theta.numpy().copy()
    options = {"m": np.zeros(16, np.float32), "v": np.zeros(16, np.float32), "ranges": WHOLE, "step": 1}
    with pytest.raises(kind, match=text):
        stllava_c.adamw_step(m, **{**options, **change})
    np.testing.assert_array_equal(m.theta.numpy(), before)
    stllava_c.adamw_step(m, **options)
    np.testing.assert_allclose(m.theta.numpy(), before - np.float32(0.1), rtol=1e-5, atol=1e-6)  # Adam's first step is lr * sign(gradient)


def test_nothing_trains():
    with pytest.raises(stllava_c.Error, match="nothing trains") as caught:
        stllava_c.adamw_step(model(), np.zeros(0, np.float32), np.zeros(0, np.float32), [], step=1)
    assert caught.value.code == "state"


def test_grad_norm():
    m = model()
    m.set_trainable(["model.norm.weight"])
    m.grad.numpy()[:4] = 3
    assert stllava_c.grad_norm(m, WHOLE) == 6 and stllava_c.grad_norm(m, [(4, 16, 0.0, 0.0)]) == 0
    m.grad.numpy()[0] = np.nan
    assert np.isnan(stllava_c.grad_norm(m, WHOLE))
    for ranges, kind in (([(0, 17, 0.0, 0.0)], ValueError), ([(-1, 4, 0.0, 0.0)], ValueError), ([(0, 4)], TypeError), (5, TypeError)):
        with pytest.raises(kind):
            stllava_c.grad_norm(m, ranges)


@pytest.mark.parametrize("arguments", [("linear", -1, 0, 1), ("linear", 0, -1, 1), ("cosine", 0, 0, -1)])
def test_schedule_refuses_negative_numbers(arguments):
    with pytest.raises(ValueError, match="want at least 0"):
        stllava_c.schedule(*arguments)


@pytest.mark.parametrize("logits, change, kind, text", [
    ([], {}, ValueError, "empty"), ([[1.0, 2.0]], {}, ValueError, "want shape"), (["a"], {}, TypeError, "real numbers"),
    ([np.nan, 1.0], {}, stllava_c.NumericError, "logit 0"), ([1.0, 2.0], {"temperature": np.nan}, ValueError, "temperature"),
    ([1.0, 2.0], {"top_k": -1}, ValueError, "top_k"), ([1.0, 2.0], {"top_k": 1.5}, TypeError, "float"), ([1.0, 2.0], {"top_p": 1.5}, ValueError, "top_p"),
])
def test_sampling_probabilities_refuses(logits, change, kind, text):
    with pytest.raises(kind, match=text):
        stllava_c.sampling_probabilities(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **change})


def test_number_of_threads():
    before = stllava_c.get_num_threads()
    m = model()
    run, made = stllava_c.Run(m), batch(m)
    want = run.forward(made)
    try:
        for n in (1, 3):
            stllava_c.set_num_threads(n)
            assert stllava_c.get_num_threads() == n
            np.testing.assert_array_equal(run.forward(made), want)
        stllava_c.set_num_threads(0)
        assert stllava_c.get_num_threads() >= 1
        for n, kind in ((-1, ValueError), (1.5, TypeError), (1025, ValueError), (2**40, ValueError), (2**70, ValueError)):
            with pytest.raises(kind):
                stllava_c.set_num_threads(n)
    finally:
        stllava_c.set_num_threads(before)


def test_nan_is_a_numeric_error():
    m = model()
    m.bind("model.norm.weight", np.full(16, np.nan, np.float32))
    with pytest.raises(stllava_c.NumericError) as caught:
        stllava_c.Run(m).forward(batch(m))
    assert caught.value.code == "numeric" and isinstance(caught.value, ArithmeticError)


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
