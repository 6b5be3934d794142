"""Whose memory it is: buffers in and out without copying, who keeps whom alive, and what is refused while somebody looks."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from tiny_core import CONFIG, DECODER, NUMPY, Q_PROJ, bind_all, pair_batch, pixels, text_batch, tiny

import stllava_c

NORM = "model.norm.weight"


class Array(np.ndarray):
    """An array that can be watched dying."""


def watched(values: np.ndarray) -> tuple[Array, weakref.ref]:
    array = values.view(Array)
    return array, weakref.ref(array)


# ---- Tensor -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, numpy", [("f32", "f4"), ("f64", "f8"), ("f16", "f2"), ("bf16", "u2"), ("i32", "i4"), ("i64", "i8"),
                                          ("u64", "u8"), ("u8", "u1")])
def test_every_dtype_in_and_out(dtype, numpy):
    array = np.arange(12).reshape(3, 4).astype(numpy)
    tensor = stllava_c.Tensor.from_buffer(array)
    assert (tensor.dtype, tensor.shape, tensor.nbytes, tensor.name) == (dtype, (3, 4), array.nbytes, None)
    out = np.asarray(tensor)
    assert out.dtype == array.dtype and out.__array_interface__["data"] == array.__array_interface__["data"]
    zeros = stllava_c.Tensor.zeros((2, 0, 3), dtype)
    assert zeros.numpy().shape == (2, 0, 3) and zeros.numpy().dtype == array.dtype


def test_zeros_is_aligned_zero_and_writable():
    tensor = stllava_c.Tensor.zeros(1000, "f64")
    array = tensor.numpy()
    assert array.shape == (1000,) and not array.any() and array.__array_interface__["data"][0] % 64 == 0
    array[3] = 2
    assert memoryview(tensor)[3] == 2 and "f64(1000,)" in repr(tensor)


def test_read_only_stays_read_only():
    tensor = stllava_c.Tensor.from_buffer(bytes(4))
    assert not tensor.numpy().flags.writeable and memoryview(tensor).readonly
    with pytest.raises(TypeError):
        stllava_c.fill_uniform(np.zeros(3, np.int32), 0, 1, 0, 0)
    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        stllava_c.fill_uniform(frozen, 0, 1, 0, 0)
    with pytest.raises(BufferError, match="read-only"):
        stllava_c.fill_uniform(stllava_c.Tensor.from_buffer(frozen), 0, 1, 0, 0)


@pytest.mark.parametrize("value, kind, text", [
    (np.zeros((4, 4), np.float32)[:, ::2], ValueError, "contiguous"), (np.zeros(3, np.complex64), TypeError, "Z"),
    (np.zeros(3, np.int16), TypeError, "'h'"), (np.zeros(3, ">f2"), TypeError, ">e"), (np.zeros(3, ">f4"), TypeError, ">f"), (np.zeros((1,) * 9, np.float32), ValueError, "9 dimensions"),
    ([1.0, 2.0], TypeError, "bytes-like"),
])
def test_from_buffer_refuses(value, kind, text):
    with pytest.raises(kind, match=text):
        stllava_c.Tensor.from_buffer(value)


@pytest.mark.parametrize("shape, dtype, kind", [((-1,), "f32", ValueError), ((1,) * 9, "f32", ValueError), ((2,), "f8", ValueError),
                                                ((2**40, 2**40), "f32", MemoryError), ("ab", "f32", TypeError), (1.5, "f32", TypeError)])
def test_zeros_refuses(shape, dtype, kind):
    with pytest.raises(kind):
        stllava_c.Tensor.zeros(shape, dtype)


def test_free():
    array, dead = watched(np.zeros(3, np.float32))
    tensor = stllava_c.Tensor.from_buffer(array)
    del array
    view = tensor.numpy()
    with pytest.raises(BufferError, match="1 exported"):
        tensor.free()
    del view
    tensor.free()
    tensor.free()
    assert dead() is None and "freed" in repr(tensor)
    with pytest.raises(BufferError, match="freed"):
        tensor.numpy()


def test_types_are_final_immutable_and_made_by_us():
    for cls in (stllava_c.Tensor, stllava_c.Model, stllava_c.Batch, stllava_c.Run, stllava_c.Generator):
        with pytest.raises(TypeError):
            type("Sub", (cls,), {})
        with pytest.raises(TypeError):
            cls.extra = 1
    with pytest.raises(TypeError):
        stllava_c.Tensor()


# ---- what a model borrows -----------------------------------------------------------------------------------------------------


def test_bind_borrows_and_keeps_alive():
    model = stllava_c.Model({**CONFIG, "vision": None, "projector": None})
    array, dead = watched(np.ones(64, np.float32))
    model.bind(NORM, array)
    array[5] = 3
    view = model.tensor(NORM).numpy()
    assert view[5] == 3 and model.tensor(NORM).name == NORM
    view[6] = 4
    assert array[6] == 4
    del array
    assert dead() is not None
    model.bind(NORM, np.zeros(64, np.float32))
    assert dead() is not None and view[5] == 3  # the view still looks at the array bound before
    del view
    gc.collect()
    assert dead() is None and not model.tensor(NORM).numpy().any()


def test_what_trains_is_copied_and_let_go():
    model = bind_all(stllava_c.Model({**CONFIG, "vision": None, "projector": None}))
    array, dead = watched(np.full(64, 2, np.float32))
    model.bind(NORM, array)
    model.set_trainable([NORM])
    del array
    assert dead() is None
    array = np.full(64, 7, np.float32)
    model.bind(NORM, array)
    array[:] = 0
    assert (model.theta.numpy() == 7).all()
    model.set_trainable([])
    assert model.theta is None and model.grad is None and model.n_trainable == 0 and (model.tensor(NORM).numpy() == 7).all()


def test_frozen_again_the_memory_is_the_models():
    """bind would free it: refused while somebody looks, and views from before are stale afterwards."""
    model = tiny()
    model.set_trainable([NORM])
    model.set_trainable([])
    stale = model.tensor(NORM)
    view = stale.numpy()
    with pytest.raises(BufferError, match=NORM):
        model.bind(NORM, np.zeros(64, np.float32))
    with pytest.raises(BufferError):
        model.bind(NORM, view)
    del view
    model.bind(NORM, np.zeros(64, np.float32))
    with pytest.raises(BufferError, match="moved"):
        stale.numpy()


def test_read_only_weights_can_be_bound():
    model = tiny()
    array = np.ones(64, np.float32)
    array.flags.writeable = False
    model.bind(NORM, array)
    assert not model.tensor(NORM).numpy().flags.writeable
    model.set_trainable([NORM])
    assert model.tensor(NORM).numpy().flags.writeable


@pytest.mark.parametrize("look", [lambda m: m.theta.numpy(), lambda m: memoryview(m.grad), lambda m: m.tensor(NORM).numpy(),
                                  lambda m: m.tensor("lm_head.weight").numpy()[2:5, 1]])
def test_moving_memory_is_refused_while_somebody_looks(look):
    model = tiny()
    model.set_trainable([NORM])
    tensors = [model.theta, model.grad, model.tensor("lm_head.weight")]
    view = look(model)
    for move in (lambda: model.set_trainable([]), lambda: model.add_lora(Q_PROJ, 2, 1.0), model.close):
        with pytest.raises(BufferError, match="delete or copy them first"):
            move()
    del view
    model.add_lora(Q_PROJ, 2, 1.0)
    for tensor in tensors:
        with pytest.raises(BufferError, match="moved"):
            memoryview(tensor)
    model.close()


def test_close():
    model = tiny()
    array, dead = watched(np.ones(64, np.float32))
    model.bind(NORM, array)
    del array
    run = stllava_c.Run(model)
    generator = stllava_c.Generator(model, text_batch(model), max_new_tokens=1)
    with pytest.raises(stllava_c.Error, match="2 runs or generators") as caught:
        model.close()
    assert caught.value.code == "state"
    del run
    generator.close()
    batch = text_batch(model)
    model.close()
    model.close()
    assert dead() is None and model.dtype == "f32" and batch.n_rows == 4
    for call in (model.tensors, model.linear_modules, lambda: model.tensor(NORM), lambda: model.n_trainable, lambda: model.theta, model.zero_grad,
                 lambda: model.bind(NORM, np.zeros(64, np.float32)), lambda: model.add_lora(Q_PROJ, 1, 1.0), lambda: model.set_trainable([]),
                 model.merge_lora, model.unmerge_lora, lambda: model.effective_weight(Q_PROJ), lambda: stllava_c.Run(model), lambda: text_batch(model),
                 lambda: model.tokens_per_image, lambda: stllava_c.Generator(model, batch, max_new_tokens=1), lambda: stllava_c.grad_norm(model, [])):
        with pytest.raises(stllava_c.Error, match="closed"):
            call()


# ---- who keeps whom alive -----------------------------------------------------------------------------------------------------


def test_results_outlive_everything():
    model = tiny("f64")
    model.set_trainable([NORM])
    batch, run = pair_batch(model), stllava_c.Run(model)
    arrays = [run.forward(batch, pixels=pixels(), mean_logit=True), run.mean_logit, run.features, run.embeddings, run.logits([0, 1]), batch.target_row,
              batch.row_sample, model.theta.numpy(), model.grad.numpy(), model.tensor("lm_head.weight").numpy(), model.effective_weight(Q_PROJ)]
    kept = [np.array(array) for array in arrays]
    del model, batch, run
    gc.collect()
    tiny("f64")  # would reuse what was freed
    for array, copy in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_forward_keeps_its_inputs_until_the_next():
    model = tiny()
    run, batch = stllava_c.Run(model), pair_batch(model)
    model.set_trainable(["model.mm_projector.mlp.0.weight"])
    given, dead = watched(pixels())
    run.forward(batch, pixels=given, train=True)
    del given
    gc.collect()
    if sys.implementation.name == "cpython":
        assert dead() is not None
    run.backward([1.0, 1.0, 1.0])
    want = model.grad.numpy().copy()
    assert want.any()
    run.forward(text_batch(model))
    assert dead() is None


def test_batch_columns_are_views_that_cannot_be_written():
    batch = pair_batch(tiny())
    assert batch.row_token.base is batch
    with pytest.raises(ValueError):
        batch.row_token[0] = 1
    with pytest.raises(ValueError):
        batch.row_token.flags.writeable = True


def test_cycles_are_collected():
    model = tiny()
    run = stllava_c.Run(model)
    array, dead = watched(np.ones(64, np.float32))
    array.run = run  # array -> run -> model -> array
    model.bind(NORM, array)
    del model, run, array
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_config_and_table(dtype):
    model = tiny(dtype)
    assert model.config == CONFIG and model.dtype == dtype and model.tokens_per_image == 16
    alone = stllava_c.Model({"decoder": {**DECODER, "max_position_embeddings": 5}})
    assert alone.config == {"vision": None, "projector": None, "decoder": DECODER} and alone.tokens_per_image == 0
    infos = {info.name: info for info in model.tensors()}
    post = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
    assert infos["lm_head.weight"].shape == (128, 64) and infos["lm_head.weight"].size == 128 * 64 and infos["lm_head.weight"].offset == -1
    assert infos[post].optional and not infos[post].influences and all(info.bound for info in infos.values())
    assert not any(info.bound for info in alone.tensors())
    model.set_trainable([NORM, "lm_head.weight"])
    assert [(i.offset, i.name) for i in model.tensors() if i.offset >= 0] == [(0, NORM), (64, "lm_head.weight")]
    assert model.theta.numpy().dtype == NUMPY[dtype] and model.n_trainable == 64 + 128 * 64 and Q_PROJ in model.linear_modules()


@pytest.mark.parametrize("kept", ["model", "stllava_c.Run(model)", "text_batch(model)", "stllava_c.Generator(model, text_batch(model), max_new_tokens=2)",
                                  "model.tensor(Q_PROJ + '.weight')", "model.tensor(Q_PROJ + '.weight').numpy()"])
def test_python_may_end_with_a_cycle_around_anything(kept):
    """The last collection takes away the types' module before the instances that are in cycles."""
    code = f"""
import sys
sys.path.insert(0, sys.argv[1])
from tiny_core import *
class Holder: ...
model, holder = tiny(), Holder()
holder.itself, holder.kept = holder, {kept}
"""
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
