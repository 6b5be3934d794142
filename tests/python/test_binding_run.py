"""Batches, runs and generators: every method, what it refuses, and several threads on one object."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_core import CONFIG, DECODER, NUMPY, PROJECTOR, Q_PROJ, VISION, bind_all, pair_batch, pixels, text_batch, tiny

import stllava_c


def features_of(run: stllava_c.Run) -> np.ndarray:
    return run.encode(pixels())


# ---- batch ------------------------------------------------------------------------------------------------------------------


def test_batch_columns():
    batch = pair_batch(tiny())
    assert (batch.n_rows, batch.n_segments, batch.n_sequences, batch.n_targets, batch.n_images) == (21, 3, 2, 3, 1)
    want = {
        "row_token": [1, *[-1] * 16, 4, 11, 12, 13], "row_feature": [-1, *range(16), -1, -1, -1, -1], "row_position": [*range(20), 18],
        "row_sample": [7] * 20 + [8], "segment_row": [0, 18, 20, 21], "sequence_leaf": [1, 2], "sequence_begin": [0, 2, 3], "target_row": [17, 18, 17],
        "label_row": [18, 19, 20], "target_token": [11, 12, 13]}
    for name, values in want.items():
        np.testing.assert_array_equal(getattr(batch, name), values, err_msg=name)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64, list])
def test_batch_takes_any_integers(dtype):
    def convert(values):
        return values if dtype is list else np.array(values).astype(dtype)
    model = tiny()
    batch = stllava_c.Batch(model, parent=np.array([-1], np.int16), begin=convert([0, 2]), ids=convert([3, 4]), sample=convert([9]))
    assert batch.row_token.tolist() == [3, 4] and batch.row_sample.tolist() == [9, 9] and batch.n_targets == 0


def test_sample_keys_reach_over_the_whole_range():
    model = tiny()
    for key in (0, 2**63, 2**64 - 1):
        batch = stllava_c.Batch(model, parent=[-1], begin=[0, 1], ids=[1], sample=np.array([key], np.uint64))
        assert batch.row_sample[0] == key


GOOD = {"parent": [-1], "begin": [0, 2], "ids": [1, 2]}


@pytest.mark.parametrize("change, kind, text", [
    ({"ids": [1.5, 2.0]}, TypeError, "Batch: ids: want integers"), ({"ids": [1, 2**31]}, ValueError, "element 1 is 2147483648"),
    ({"ids": [[1, 2]]}, ValueError, r"want shape \(any,\), got \(1, 2\)"), ({"ids": [1, 2, 3]}, ValueError, "ends at 2, but there are 3 ids"),
    ({"begin": [0, 3]}, ValueError, "ends at 3"), ({"begin": [0, -2]}, ValueError, "ends at -2"), ({"begin": [1, 2]}, ValueError, r"begin\[0\] is 1"),
    ({"parent": [-1, 0], "begin": [0, 9, 2]}, ValueError, "segment 0|segment 1"), ({"parent": []}, ValueError, "got"),
    ({"begin": [2]}, ValueError, "want shape"),
    ({"labels": [1]}, ValueError, r"Batch: labels: want shape \(2,\)"), ({"labels": [-100, 128]}, ValueError, "label 128"),
    ({"sample": [-1]}, ValueError, "element 0 is -1"), ({"sample": np.zeros(2, np.uint64)}, ValueError, "sample"), ({"sample": [True]}, TypeError, "bool"),
    ({"image": [0]}, ValueError, "image"), ({"n_images": -1}, ValueError, "-1 images"),
    ({"ids": [1, -200], "image": [5], "n_images": 1}, ValueError, "image 5"),
    ({"ids": None}, TypeError, "ids is None"), ({"begin": None}, TypeError, "begin is None"), ({"parent": None}, TypeError, "parent is None"),
    ({"parent": [5]}, ValueError, "parent 5"), ({"ids": [-7, 1]}, ValueError, "id -7"),
])
def test_batch_refuses(change, kind, text):
    with pytest.raises(kind, match=text):
        stllava_c.Batch(tiny(), **{**GOOD, **change})


def test_batch_needs_its_keywords():
    model = tiny()
    for missing in GOOD:
        with pytest.raises(TypeError, match=missing):
            stllava_c.Batch(model, **{key: value for key, value in GOOD.items() if key != missing})
    with pytest.raises(TypeError):
        stllava_c.Batch(model, [-1], [0, 1], [1])
    with pytest.raises(TypeError):
        stllava_c.Batch("model", **GOOD)


# ---- forward and backward -----------------------------------------------------------------------------------------------------


def test_forward_gives_copies_that_stay():
    model = tiny()
    run, batch = stllava_c.Run(model), pair_batch(model)
    first = run.forward(batch, pixels=pixels(), mean_logit=True)
    kept, features = first.copy(), run.features
    assert first.dtype == np.float64 and first.shape == (3,) and run.mean_logit.shape == (3,)
    assert features.shape == (16, 64) and run.embeddings.shape == (21, 64)
    logits = run.logits(np.array([17, 18, 17]))
    rows = logits.astype(np.float64)
    want = [rows[i, token] - np.log(np.exp(rows[i]).sum()) for i, token in enumerate((11, 12, 13))]
    np.testing.assert_allclose(first, want, rtol=1e-5)
    np.testing.assert_array_equal(run.embeddings[1:17], features)
    run.forward(batch, pixels=pixels(seed=9))
    np.testing.assert_array_equal(first, kept)
    assert run.mean_logit is None
    np.testing.assert_array_equal(run.forward(batch, features=features), kept)
    run.forward(text_batch(model))
    assert run.features is None


def test_inputs_are_converted_and_checked():
    model = tiny("f64")
    run, batch = stllava_c.Run(model), pair_batch(model)
    image = pixels()
    want = run.forward(batch, pixels=image.astype(np.float64))
    np.testing.assert_array_equal(run.forward(batch, pixels=image), want)
    np.testing.assert_array_equal(run.forward(batch, pixels=image.astype(np.float64)[:, :, ::-1].copy()[:, :, ::-1]), want)
    np.testing.assert_array_equal(run.forward(batch, pixels=stllava_c.Tensor.from_buffer(image)), want)
    model.set_trainable(["model.norm.weight"])
    theta = np.full(64, 0.5)
    other = run.forward(batch, pixels=image, theta=theta)
    model.theta.numpy()[:] = 0.5
    np.testing.assert_array_equal(other, run.forward(batch, pixels=image))


BAD_FORWARD = [
    ({}, ValueError, "pixels|features"), ({"pixels": pixels(2)}, ValueError, r"Run.forward: pixels: want shape \(1, 3, 28, 28\), got \(2, 3, 28, 28\)"),
    ({"pixels": pixels().astype(complex)}, TypeError, "Run.forward: pixels: want real numbers"), ({"pixels": [["x"]]}, ValueError, "pixels"),
    ({"features": np.zeros((15, 64), np.float32)}, ValueError, "Run.forward: features: want 1024 elements, got 960"),
    ({"pixels": pixels(), "features": np.zeros((16, 64), np.float32)}, ValueError, "give one of the two"),
    ({"pixels": pixels(), "theta": np.zeros(3, np.float32)}, ValueError, "theta: want 0 elements"),
    ({"pixels": pixels(), "theta": np.zeros(3)}, TypeError, "theta: want f32, got f64"), ({"pixels": pixels(), "theta": [1.0]}, TypeError, "theta"),
    ({"pixels": pixels(), "seed": -1}, ValueError, r"\[0, 2\*\*64\)"), ({"pixels": pixels(), "step": 2**64}, ValueError, r"\[0, 2\*\*64\)"),
    ({"pixels": pixels(), "seed": 1.0}, TypeError, "integer"), ({"pixels": pixels(), "bogus": 1}, TypeError, "bogus"),
]


@pytest.mark.parametrize("options, kind, text", BAD_FORWARD)
@pytest.mark.parametrize("method", ["forward", "estimate"])
def test_forward_refuses(method, options, kind, text):
    model = tiny()
    run = stllava_c.Run(model)
    with pytest.raises(kind, match=text.replace("Run.forward", f"Run.{method}")):
        getattr(run, method)(pair_batch(model), **options)


def test_batches_belong_to_their_model():
    run, other = stllava_c.Run(tiny()), text_batch(tiny())
    for call in (run.forward, run.estimate, lambda batch: stllava_c.Generator(tiny(), batch, max_new_tokens=1)):
        with pytest.raises(ValueError, match="another model"):
            call(other)


def refused_forward(run, batch):
    with pytest.raises(ValueError, match="features"):
        run.forward(batch, features=[1])


@pytest.mark.parametrize("call", [
    lambda run: run.backward([1.0]), lambda run: run.logits([0]), lambda run: run.mean_logit, lambda run: run.features, lambda run: run.embeddings,
    lambda run: run.vision_hidden(0), lambda run: run.vision_pooled(), lambda run: run.vision_backward([1.0]), lambda run: run.cluster_assignment(),
    lambda run: run.cluster_margin(), lambda run: run.projector_backward([1.0])])
@pytest.mark.parametrize("before", [lambda run, batch: None, lambda run, batch: features_of(run), refused_forward])
def test_nothing_to_look_at(before, call):
    model = tiny()
    run = stllava_c.Run(model)
    before(run, pair_batch(model))
    with pytest.raises(stllava_c.Error) as caught:
        call(run)
    assert caught.value.code == "state"


def test_backward():
    model = tiny("f64")
    model.set_trainable(["model.norm.weight", "model.mm_projector.mlp.2.bias"])
    run, batch = stllava_c.Run(model), pair_batch(model)
    for wrong in ([1.0], np.ones((3, 1)), ["a", "b", "c"]):
        run.forward(batch, pixels=pixels(), train=True)
        with pytest.raises((ValueError, TypeError), match="Run.backward: dlogp"):
            run.backward(wrong)
    run.backward(np.ones(3, np.float32))
    gradient = model.grad.numpy().copy()
    assert np.isfinite(gradient).all() and gradient[:64].any() and gradient[64:].any()
    with pytest.raises(stllava_c.Error, match="already"):
        run.backward([1, 1, 1])
    run.forward(batch, pixels=pixels(), train=True)
    run.backward([1, 1, 1])
    np.testing.assert_allclose(model.grad.numpy(), 2 * gradient, rtol=1e-12)  # gradients add
    model.zero_grad()
    assert not model.grad.numpy().any()
    run.forward(batch, pixels=pixels(), train=True)
    model.set_trainable(["model.norm.weight"])
    with pytest.raises(stllava_c.Error, match="changed since"):
        run.backward([1, 1, 1])


def test_logits_refuses_rows():
    model = tiny()
    run = stllava_c.Run(model)
    run.forward(text_batch(model))
    assert run.logits([]).shape == (0, 128) and run.logits([3]).dtype == np.float32
    for rows in ([4], [-1], [[0]], [2**40]):
        with pytest.raises(ValueError, match="row"):
            run.logits(rows)


def test_estimate_and_recompute():
    model = tiny()
    model.set_trainable(["model.embed_tokens.weight"])
    run, batch = stllava_c.Run(model), pair_batch(model)
    options = {"pixels": pixels(), "train": True}
    assert run.arena_bytes == 0
    full = run.estimate(batch, **options)
    assert run.arena_bytes == 0 and full > run.estimate(batch, pixels=pixels())
    run.forward(batch, **options)
    assert run.arena_bytes >= full
    run.backward([1, 1, 1])
    want = model.grad.numpy().copy()
    run.set_recompute(3, 2)
    assert run.estimate(batch, **options) < full
    model.zero_grad()
    run.forward(batch, **options)
    run.backward([1, 1, 1])
    np.testing.assert_array_equal(model.grad.numpy(), want)
    with pytest.raises(ValueError, match="-1"):
        run.set_recompute(-1, 0)


# ---- parts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_vision_alone(dtype):
    model = bind_all(stllava_c.Model({"vision": VISION}, dtype=dtype))
    run = stllava_c.Run(model)
    features = run.vision_forward(pixels(2), all_layers=True)
    assert features.shape == (32, 32) and features.dtype == NUMPY[dtype]
    hidden = [run.vision_hidden(i).reshape(2, 17, 32) for i in range(4)]
    np.testing.assert_array_equal(hidden[2][:, 1:].reshape(32, 32), features)  # select_layer -2 of 3 layers, without the class token
    assert run.vision_pooled().shape == (2, 32)
    for i in (-1, 4):
        with pytest.raises(ValueError, match=f"i is {i}, want 0 to 3"):
            run.vision_hidden(i)
    run.vision_forward(pixels(2))
    for call in (lambda: run.vision_hidden(0), run.vision_pooled):
        with pytest.raises(stllava_c.Error, match="all_layers"):
            call()
    model.set_trainable([info.name for info in model.tensors() if info.influences])
    run.vision_forward(pixels(2), train=True)
    with pytest.raises(ValueError, match="want 1024 elements, got 3"):
        run.vision_backward(np.ones(3))
    run.vision_backward(np.ones((2, 16, 32)))
    assert model.grad.numpy().any()
    for call in (run.encode, run.vision_forward):
        with pytest.raises(TypeError, match="None"):
            call(None)
        with pytest.raises(ValueError, match="shape"):
            call(pixels()[0])
    with pytest.raises(ValueError, match="no projector"):
        run.projector_forward(np.zeros((1, 16, 32)))
    with pytest.raises(ValueError, match="decoder"):
        text_batch(model)


@pytest.mark.parametrize("kind", ["cluster", "linear", "mlp"])
def test_projector_alone(kind):
    model = bind_all(stllava_c.Model({"projector": {**PROJECTOR, "kind": kind, "depth": 2}}, dtype="f64"))
    model.set_trainable([info.name for info in model.tensors() if info.influences])
    run, x = stllava_c.Run(model), np.random.default_rng(0).normal(size=(2, 9, 32))
    out = run.projector_forward(x, train=True)
    assert out.shape == (2, 9, 64)
    if kind == "cluster":
        assert run.cluster_assignment().dtype == np.int32 and run.cluster_assignment().max() < 4 and run.cluster_margin().shape == (18,)
    else:
        for call in (run.cluster_assignment, run.cluster_margin):
            with pytest.raises(stllava_c.Error, match="cluster"):
                call()
    with pytest.raises(ValueError, match="dout: want 1152 elements"):
        run.projector_backward(np.ones(2))
    assert run.projector_backward(np.ones_like(out)).shape == x.shape and model.grad.numpy().any()
    run.projector_forward(x, train=True)
    assert run.projector_backward(np.ones_like(out), want_input_grad=False) is None
    for wrong in (np.zeros((2, 9, 31)), np.zeros((9, 32))):
        with pytest.raises(ValueError, match="Run.projector_forward: x: want shape"):
            run.projector_forward(wrong)
    with pytest.raises(ValueError, match="no vision tower"):
        run.vision_forward(pixels())


def test_encode_is_what_forward_uses():
    model = tiny()
    run = stllava_c.Run(model)
    features = run.encode(pixels(3))
    assert features.shape == (48, 64)
    run.forward(pair_batch(model), pixels=pixels(3)[:1])
    np.testing.assert_array_equal(run.features, features[:16])


# ---- adapters -----------------------------------------------------------------------------------------------------------------


def test_adapters():
    model = tiny("f64")
    run, batch = stllava_c.Run(model), text_batch(model)
    base = run.forward(batch)
    weight = model.tensor(f"{Q_PROJ}.weight").numpy().copy()
    with pytest.raises(stllava_c.Error, match="runs"):
        model.add_lora(Q_PROJ, 2, 0.5)
    del run
    for wrong, text in (((Q_PROJ, 0, 1.0), "rank"), ((Q_PROJ, 1, float("nan")), "scale"), ((Q_PROJ, 1, 1.0, 1.0), "dropout"),
                        (("model.norm", 1, 1.0), "model.norm")):
        with pytest.raises(ValueError, match=text):
            model.add_lora(*wrong)
    model.add_lora(module=Q_PROJ, rank=2, scale=0.5, dropout=0.5)
    with pytest.raises(stllava_c.Error, match="already"):
        model.add_lora(Q_PROJ, 2, 0.5)
    run = stllava_c.Run(model)
    with pytest.raises(stllava_c.Error, match="lora_A"):
        run.forward(batch)
    np.testing.assert_array_equal(run.forward(batch, adapters=False), base)
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 64)), rng.normal(size=(64, 2))
    model.bind(f"{Q_PROJ}.lora_A.weight", a)
    model.bind(f"{Q_PROJ}.lora_B.weight", b)
    adapted = run.forward(batch)
    assert np.abs(adapted - base).max() > 1e-6
    np.testing.assert_allclose(model.effective_weight(Q_PROJ), weight + 0.5 * b @ a, rtol=1e-12)
    model.merge_lora()
    with pytest.raises(stllava_c.Error):
        model.merge_lora()
    np.testing.assert_allclose(run.forward(batch), adapted, rtol=1e-9)
    np.testing.assert_array_equal(model.tensor(f"{Q_PROJ}.weight").numpy(), weight)
    model.unmerge_lora()
    with pytest.raises(stllava_c.Error):
        model.unmerge_lora()
    np.testing.assert_array_equal(run.forward(batch), adapted)
    dropped = run.forward(batch, dropout=True, seed=5, step=1)
    assert (dropped != adapted).any() and (dropped != run.forward(batch, dropout=True, seed=5, step=2)).any()
    np.testing.assert_array_equal(dropped, run.forward(batch, dropout=True, seed=5, step=1))
    with pytest.raises(ValueError, match="nothing"):
        model.effective_weight("nothing")


def test_set_trainable_refuses():
    model = tiny()
    for names, kind in (("model.norm.weight", TypeError), ([1], TypeError), (5, TypeError), (["bogus"], ValueError), (["model.norm.weight"] * 2, ValueError)):
        with pytest.raises(kind):
            model.set_trainable(names)
    assert model.n_trainable == 0


@pytest.mark.parametrize("config, kind, text", [
    ({"decoder": {**DECODER, "bogus": 1}}, ValueError, "decoder has the unknown key 'bogus'"), ({"bogus": None}, ValueError, "unknown part 'bogus'"),
    ({"decoder": {key: value for key, value in DECODER.items() if key != "head_dim"}}, ValueError, "decoder lacks 'head_dim'"),
    ({"decoder": {**DECODER, "hidden_size": 64.0}}, TypeError, "decoder.hidden_size is 64.0, want an integer"),
    ({"decoder": {**DECODER, "hidden_size": True}}, TypeError, "hidden_size is True"),
    ({"decoder": {**DECODER, "rope_theta": "1e4"}}, TypeError, "want a number"),
    ({"decoder": {**DECODER, "tie_word_embeddings": 1}}, TypeError, "want True or False"), ({"decoder": [1]}, TypeError, "want a dict"),
    ({"vision": {**VISION, "activation": "relu"}}, ValueError, "vision.activation is 'relu', supported: 'gelu', 'quick_gelu'"),
    ({"vision": {**VISION, "select_feature": 1}}, ValueError, "select_feature is 1"), ({"projector": {**PROJECTOR, "kind": "conv"}}, ValueError, "'cluster'"),
    ({"decoder": {**DECODER, "hidden_size": 2**80}}, OverflowError, "."), ({"decoder": {**DECODER, "vocab_size": 0}}, ValueError, "vocab_size"),
    ([1], TypeError, "dict"), ({}, ValueError, "."),
])
def test_config_refuses(config, kind, text):
    with pytest.raises(kind, match=text):
        stllava_c.Model(config)


def test_dtype_refuses():
    with pytest.raises(ValueError, match="bf16"):
        stllava_c.Model(CONFIG, dtype="bf16")


# ---- generator ------------------------------------------------------------------------------------------------------------------


def test_generator_steps():
    model = tiny()
    batch = pair_batch(model)
    generator = stllava_c.Generator(model, batch, pixels=pixels(), n_per_sequence=2, max_new_tokens=3)
    assert generator.n == 4 and generator.n_active == 4
    logits = generator.logits()
    tokens, logp = generator.step()
    assert tokens.dtype == np.int32 and logp.dtype == np.float64 and logits.shape == (4, 128)
    np.testing.assert_array_equal(tokens, logits.argmax(1))
    rows = logits.astype(np.float64)
    np.testing.assert_allclose(logp, rows.max(1) - np.log(np.exp(rows).sum(1)), rtol=1e-5)
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3]
    generator.finish(1)
    assert generator.n_active == 3 and generator.step()[0][1] == -1
    generator.step()
    assert generator.n_active == 0
    for wrong in (-1, 4):
        with pytest.raises(ValueError):
            generator.finish(wrong)
    generator.close()
    generator.close()
    for call in (generator.step, generator.logits, lambda: generator.n_active, lambda: generator.finish(0)):
        with pytest.raises(stllava_c.Error, match="closed"):
            call()
    assert generator.n == 4


def one_batch(model: stllava_c.Model, ids: list[int]) -> stllava_c.Batch:
    n_images = ids.count(-200)
    return stllava_c.Batch(model, parent=[-1], begin=[0, len(ids)], ids=ids, image=list(range(n_images)), n_images=n_images)


def test_generator_seeds_and_end():
    model = tiny()
    batch = text_batch(model)

    def draw(**options) -> list[list[int]]:
        generator = stllava_c.Generator(model, batch, n_per_sequence=3, max_new_tokens=8, temperature=1.0, **options)
        steps = []
        while generator.n_active:
            steps.append(generator.step()[0])
        return np.array(steps).T.tolist()

    rows = draw(seeds=[5, 2**64 - 1, 5])
    assert rows[0] == rows[2] != rows[1] and rows == draw(seeds=np.array([5, 2**64 - 1, 5], np.uint64))
    assert draw() == draw(seeds=[0, 1, 2])
    end = rows[0][2]
    stop = rows[0].index(end) + 1
    assert draw(seeds=[5, 6, 7], eos_ids=[end])[0] == rows[0][:stop] + [-1] * (len(draw(seeds=[5, 6, 7], eos_ids=[end])[0]) - stop)


@pytest.mark.parametrize("options, kind, text", [
    ({}, TypeError, "max_new_tokens"), ({"max_new_tokens": 0}, ValueError, "max_new_tokens"), ({"max_new_tokens": 2**70}, ValueError, "."),
    ({"max_new_tokens": 1, "n_per_sequence": 0}, ValueError, "n_per_sequence"), ({"max_new_tokens": 1, "n_per_sequence": 2**40}, ValueError, "n_per_sequence"),
    ({"max_new_tokens": 1, "seeds": [1, 2]}, ValueError, "seeds: want 1 elements, got 2"), ({"max_new_tokens": 1, "seeds": [-1]}, ValueError, "seeds"),
    ({"max_new_tokens": 1, "eos_ids": [1.5]}, TypeError, "eos_ids"), ({"max_new_tokens": 1, "temperature": -1.0}, ValueError, "temperature"),
    ({"max_new_tokens": 1, "repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0"), ({"max_new_tokens": 1, "min_new_tokens": -1}, ValueError, "min_"),
    ({"max_new_tokens": 1, "top_p": 0.0}, ValueError, "top_p"), ({"max_new_tokens": 1, "top_k": -1}, ValueError, "top_k"),
    ({"max_new_tokens": 1, "theta": np.zeros(3, np.float32)}, ValueError, "theta"), ({"max_new_tokens": 1, "pixels": pixels()}, ValueError, "."),
])
def test_generator_refuses(options, kind, text):
    model = tiny()
    with pytest.raises(kind, match=text):
        stllava_c.Generator(model, text_batch(model), **options)


def test_a_generator_goes_on():
    """Two turns, the first with an image and an answer that is kept, the second with another image: as if all had been one prompt."""
    model = tiny()
    draw = dict(temperature=1.0, repetition_penalty=1.3, max_new_tokens=3, seeds=[9])
    generator = stllava_c.Generator(model, one_batch(model, [1, -200, 4]), pixels=pixels(), **draw)
    answer = [int(generator.step()[0][0]) for _ in range(3)]
    assert generator.n_rows == 18 + 2  # the last token ended the answer and was not computed
    more = [answer[2], 5, -200, 6]
    generator.extend(one_batch(model, more), keep_rows=20, pixels=pixels(seed=2), **draw)
    assert generator.n_rows == 20 + 19 and generator.n_active == 1
    both = stllava_c.Batch(model, parent=[-1], begin=[0, 9], ids=[1, -200, 4, *answer[:2], *more], image=[0, 1], n_images=2)
    whole = stllava_c.Generator(model, both, pixels=np.concatenate([pixels(), pixels(seed=2)]), **draw)
    for _ in range(3):
        np.testing.assert_array_equal(generator.logits(), whole.logits())
        np.testing.assert_array_equal(generator.step(), whole.step())
    several = stllava_c.Generator(model, one_batch(model, [1, 2]), n_per_sequence=2, max_new_tokens=1)
    good = dict(batch=one_batch(model, [1]), keep_rows=0, max_new_tokens=1)
    for made, changes, kind, text in ((generator, {"keep_rows": -1}, ValueError, "n_keep"), (generator, {"keep_rows": 99}, ValueError, "want 0..41"),
                                      (several, {}, ValueError, "got 2, 1 and 1"), (generator, {"seeds": [1, 2]}, ValueError, "want 1 elements, got 2"),
                                      (generator, {"batch": pair_batch(model), "pixels": pixels()}, ValueError, "got 1, 2 and 1"),
                                      (generator, {"pixels": pixels()}, ValueError, "."), (generator, {"batch": one_batch(tiny(), [1])}, ValueError, "another"),
                                      (generator, {"top_p": 0.0}, ValueError, "top_p")):
        with pytest.raises(kind, match=text):
            made.extend(**{**good, **changes})
    assert generator.n_rows == 41 and several.n_active == 2
    for missing in good:
        with pytest.raises(TypeError, match=missing):
            generator.extend(**{key: value for key, value in good.items() if key != missing})


# ---- threads and signals ---------------------------------------------------------------------------------------------------------


def run_threads(*works) -> None:
    errors: list[BaseException] = []

    def guarded(work):
        try:
            for _ in range(30):
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_share_objects():
    """Every kind of call at once on one model, two of them on one run and one generator: each sees what it would see alone."""
    model = tiny()
    model.set_trainable(["model.norm.weight"])
    run, batch, image = stllava_c.Run(model), pair_batch(model), pixels()
    want, features = run.forward(batch, pixels=image), run.encode(image)
    generator = stllava_c.Generator(model, text_batch(model), max_new_tokens=1000)

    def forward():
        assert np.array_equal(run.forward(batch, pixels=image), want)

    def encode():
        assert np.array_equal(run.encode(image), features)

    def look():
        assert model.theta.numpy().size == 64 and len(model.tensors()) > 10 and model.tensor("lm_head.weight").numpy().shape == (128, 64)

    def make():
        assert np.array_equal(stllava_c.Run(model).forward(pair_batch(model), features=features), want)

    run_threads(forward, forward, encode, look, make, generator.step, generator.step, lambda: model.effective_weight(Q_PROJ))
    assert generator.n_active == 1


def test_closing_and_moving_while_others_call():
    """Either side may lose the race; the loser gets an exception, never freed memory."""
    model = tiny()

    def move():
        with contextlib.suppress(BufferError):
            model.set_trainable(["model.norm.weight"])

    def look():
        try:
            view = model.tensor("model.norm.weight").numpy()
        except BufferError:
            return
        assert np.isfinite(view).all()

    run_threads(move, look, look)
    done = threading.Event()

    def call():
        while not done.is_set():
            try:
                text_batch(model)
                model.tensors()
            except stllava_c.Error as error:
                assert "closed" in str(error)
                return

    thread = threading.Thread(target=call)
    thread.start()
    model.close()
    thread.join(10)
    done.set()
    assert not thread.is_alive()


def test_threads_cannot_be_changed_under_a_call():
    before = stllava_c.get_num_threads()
    model = tiny(decoder={**DECODER, "n_layers": 8, "hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}, projector={**PROJECTOR, "out_size": 256})
    run, batch = stllava_c.Run(model), text_batch(model, tuple(np.arange(1000) % 128))
    want = run.forward(batch)
    stop, refused = threading.Event(), []

    def compute():
        while not stop.is_set():
            assert np.array_equal(run.forward(batch), want)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for n in (1, 2, 3) * 50:
            try:
                stllava_c.set_num_threads(n)
            except stllava_c.Error as error:
                refused.append(error.code)
                stop.wait(0.001)
    finally:
        stop.set()
        thread.join()
        stllava_c.set_num_threads(before)
    assert refused and set(refused) == {"state"}
    np.testing.assert_array_equal(run.forward(batch), want)


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="needs POSIX signals")
def test_interrupt_between_steps():
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tiny_core import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with the signal ignored
model = tiny()
run, batch = stllava_c.Run(model), text_batch(model)
try:
    for i in range(10**9):
        run.forward(batch)
        if i == 3:
            os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print(run.forward(batch).shape)
"""
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "(3,)\n", done.stderr
