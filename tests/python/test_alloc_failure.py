"""Without memory: every allocation of every operation fails, once and from then on. MemoryError and nothing else, no leak, and the same call again
gives the bits of a call that never failed.

Two kinds of allocations: the core's own, which `_core._fail_allocation` lets fail, and Python's, which `_testcapi.set_nomemory` lets fail."""

from __future__ import annotations

import gc
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from no_memory import failing
from tiny_core import CONFIG, Q_PROJ, bind_all, pair_batch, pixels, text_batch, tiny

import stllava_c
from stllava_c import _core

try:
    import _testcapi
except ImportError:
    _testcapi = None

Call = Callable[[], object]
NORM, HEAD = "model.norm.weight", "lm_head.weight"
PAIRS = {"policy_chosen": [-1.0, -2.0], "policy_rejected": [-3.0, -1.0], "reference_chosen": [-1.5, -2.0], "reference_rejected": [-2.0, -2.0],
         "chosen_tokens": [3, 4], "rejected_tokens": [2, 5]}


def png(colour: int, interlaced: bool = False) -> bytes:
    """8 x 8 pixels, 8 bits; grey (0), RGB (2) or palette (3)."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = 3 if colour == 2 else 1
    passes = [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)] if interlaced else [(8, 8)]  # (columns, rows) of Adam7's passes
    lines = b"".join((b"\0" + bytes(range(columns * width))) * rows for columns, rows in passes)
    palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, colour, 0, 0, interlaced)) + palette
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def bmp() -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54 + 192, 0, 54, 40, 8, 8, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(range(192))


@pytest.fixture(scope="module")
def world() -> Iterator[SimpleNamespace]:
    model = tiny()
    head = np.ones((128, 64), np.float32)
    head.flags.writeable = False  # a view of it without the hold on it would be writable
    model.bind(HEAD, head)
    model.set_trainable([NORM, "model.mm_projector.mlp.0.weight"])
    n = model.n_trainable
    gc.freeze()  # the collections below look at what is made from now on
    yield SimpleNamespace(
        model=model, batch=pair_batch(model), run=stllava_c.Run(model), pixels=pixels(), theta=np.array(model.theta.numpy()), rgb=np.arange(
            5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3), norm=np.ones(64, np.float32), m=np.zeros(n, np.float32), v=np.zeros(n, np.float32))
    gc.unfreeze()


def bare() -> stllava_c.Model:
    return stllava_c.Model(CONFIG)


def adapted() -> stllava_c.Model:
    model = bare()
    model.add_lora(Q_PROJ, 2, 0.5, 0.1)
    return bind_all(model)


def after_forward(w: SimpleNamespace, call: Call) -> Call:
    w.run.forward(w.batch, pixels=w.pixels, train=True, mean_logit=True)
    return call


def after_vision(w: SimpleNamespace, call: Call) -> Call:
    w.run.vision_forward(w.pixels, all_layers=True, train=True)
    return call


def after_projector(w: SimpleNamespace, call: Call) -> Call:
    w.run.projector_forward(np.ones((1, 5, 32), np.float32), train=True)
    return call


class WithNew:
    """What changes a model gets one of its own, and the model is its result."""

    def __init__(self, make: Callable[[], stllava_c.Model], change: Callable[[stllava_c.Model], None]) -> None:
        self.model, self.change = make(), change

    def __call__(self) -> stllava_c.Model:
        self.change(self.model)
        return self.model


def generator(w: SimpleNamespace) -> stllava_c.Generator:
    return stllava_c.Generator(w.model, w.batch, pixels=w.pixels, theta=w.theta, temperature=1.0, top_k=20, top_p=0.9, n_per_sequence=2,
                               max_new_tokens=3, seeds=[1, 2, 3, 4], eos_ids=[2])


def extension_of(w: SimpleNamespace) -> Call:
    made = stllava_c.Generator(w.model, text_batch(w.model), theta=w.theta, max_new_tokens=1)

    def extend() -> stllava_c.Generator:
        made.extend(text_batch(w.model, (7, 8)), keep_rows=3, max_new_tokens=3, seeds=[4], eos_ids=[2])
        return made

    return extend


def step_of(w: SimpleNamespace) -> Call:
    made = generator(w)
    return made.step


# name -> what prepares the call, with memory. Every public name of stllava_c is the first word of one.
OPERATIONS: dict[str, Callable[[SimpleNamespace], Call]] = {
    "Tensor.from_buffer": lambda w: lambda: stllava_c.Tensor.from_buffer(w.norm),
    "Tensor.zeros": lambda w: lambda: stllava_c.Tensor.zeros((3, 4), "f64"),
    "Tensor.numpy": lambda w: w.model.tensor(NORM).numpy,
    "Tensor.free": lambda w: stllava_c.Tensor.zeros(3).free,
    "Tensor.shape": lambda w: lambda: w.model.tensor(HEAD).shape,
    "Tensor repr": lambda w: lambda: repr(w.model.tensor(HEAD)),
    "Model": lambda w: bare,
    "Model.config": lambda w: lambda: w.model.config,
    "Model.tensors": lambda w: w.model.tensors,
    "Model.linear_modules": lambda w: w.model.linear_modules,
    "Model.tensor": lambda w: lambda: w.model.tensor(HEAD),
    "Model.theta": lambda w: lambda: w.model.theta,
    "Model.grad": lambda w: lambda: w.model.grad,
    "Model.n_trainable": lambda w: lambda: (w.model.n_trainable, w.model.tokens_per_image, w.model.dtype),
    "Model.zero_grad": lambda w: w.model.zero_grad,
    "Model.bind": lambda w: WithNew(bare, lambda model: model.bind(NORM, w.norm)),
    "Model.bind again": lambda w: WithNew(adapted, lambda model: model.bind(NORM, w.norm)),
    "Model.bind trainable": lambda w: lambda: w.model.bind(NORM, w.norm),
    "Model.add_lora": lambda w: WithNew(bare, lambda model: model.add_lora(Q_PROJ, 2, 0.5, 0.1)),
    "Model.set_trainable": lambda w: WithNew(adapted, lambda model: model.set_trainable([NORM, HEAD])),
    "Model.set_trainable to none": lambda w: WithNew(tiny_training, lambda model: model.set_trainable([])),
    "Model.merge_lora": lambda w: WithNew(adapted, stllava_c.Model.merge_lora),
    "Model.unmerge_lora": lambda w: WithNew(merged, stllava_c.Model.unmerge_lora),
    "Model.effective_weight": lambda w: lambda: w.model.effective_weight(Q_PROJ),
    "Model.close": lambda w: bare().close,
    "Batch": lambda w: lambda: pair_batch(w.model),
    "Batch.row_token": lambda w: lambda: (w.batch.row_token, w.batch.n_rows, w.batch.sequence_begin, w.batch.row_sample),
    "Run": lambda w: lambda: stllava_c.Run(w.model),
    "Run.set_recompute": lambda w: lambda: w.run.set_recompute(1, 1),
    "Run.arena_bytes": lambda w: lambda: w.run.arena_bytes > 0,
    "Run.forward": lambda w: fresh_run(w, lambda run: run.forward(w.batch, pixels=w.pixels, theta=w.theta, train=True, seed=1, step=2)),
    "Run.forward with features": lambda w: fresh_run(w, lambda run: run.forward(w.batch, features=np.ones((16, 64), np.float32))),
    "Run.estimate": lambda w: lambda: w.run.estimate(w.batch, pixels=w.pixels, train=True),
    "Run.backward": lambda w: after_forward(w, lambda: w.run.backward([1.0, 2.0, 3.0])),
    "Run.logits": lambda w: after_forward(w, lambda: w.run.logits([0, 3])),
    "Run.mean_logit": lambda w: after_forward(w, lambda: w.run.mean_logit),
    "Run.features": lambda w: after_forward(w, lambda: w.run.features),
    "Run.embeddings": lambda w: after_forward(w, lambda: w.run.embeddings),
    "Run.encode": lambda w: fresh_run(w, lambda run: run.encode(w.pixels, theta=w.theta)),
    "Run.vision_forward": lambda w: fresh_run(w, lambda run: run.vision_forward(w.pixels, all_layers=True, train=True)),
    "Run.vision_hidden": lambda w: after_vision(w, lambda: w.run.vision_hidden(1)),
    "Run.vision_pooled": lambda w: after_vision(w, lambda: w.run.vision_pooled()),
    "Run.vision_backward": lambda w: after_vision(w, lambda: w.run.vision_backward(np.ones((16, 32), np.float32))),
    "Run.projector_forward": lambda w: fresh_run(w, lambda run: run.projector_forward(np.ones((1, 5, 32), np.float32), train=True)),
    "Run.projector_backward": lambda w: after_projector(w, lambda: w.run.projector_backward(np.ones((1, 5, 64), np.float32))),
    "Run.cluster_assignment": lambda w: after_projector(w, lambda: w.run.cluster_assignment()),
    "Run.cluster_margin": lambda w: after_projector(w, lambda: w.run.cluster_margin()),
    "Generator": lambda w: lambda: generator(w),
    "Generator.step": step_of,
    "Generator.logits": lambda w: generator(w).logits,
    "Generator.n_active": lambda w: (lambda made: lambda: (made.n, made.n_active))(generator(w)),
    "Generator.finish": lambda w: (lambda made: lambda: made.finish(1))(generator(w)),
    "Generator.extend": extension_of,
    "Generator.n_rows": lambda w: (lambda made: lambda: made.n_rows)(generator(w)),
    "Generator.close": lambda w: generator(w).close,
    "adamw_step": lambda w: lambda: stllava_c.adamw_step(w.model, w.m, w.v, [[0, 8, 0.0, 0.0], (8, 9, 0.0, 0.0)], step=1),
    "grad_norm": lambda w: lambda: stllava_c.grad_norm(w.model, [[0, 8, 1e-3, 0.0]]) >= 0,
    "schedule": lambda w: lambda: stllava_c.schedule("cosine", 3, 1, 9),
    "preference_loss": lambda w: lambda: stllava_c.preference_loss(loss_types=["sigmoid", "aot"], **PAIRS),
    "preference_loss weighted": lambda w: lambda: stllava_c.preference_loss(loss_types=["ipo"], weights=[2], f_divergence="js_divergence", **PAIRS),
    "sampling_probabilities": lambda w: lambda: stllava_c.sampling_probabilities([1.0, 3.0, 2.0], temperature=1.0, top_k=2, top_p=0.9),
    "image_probe": lambda w: (lambda data: lambda: stllava_c.image_probe(data))(png(2)),
    "image_decode": lambda w: (lambda data: lambda: stllava_c.image_decode(data))(png(2)),
    "image_decode grey": lambda w: (lambda data: lambda: stllava_c.image_decode(data))(png(0)),
    "image_decode palette": lambda w: (lambda data: lambda: stllava_c.image_decode(data))(png(3)),
    "image_decode interlaced": lambda w: (lambda data: lambda: stllava_c.image_decode(data))(png(2, interlaced=True)),
    "image_decode BMP": lambda w: (lambda data: lambda: stllava_c.image_decode(data))(bmp()),
    "image_resize_crop": lambda w: lambda: stllava_c.image_resize_crop(w.rgb, 4, True, (1, 2, 3)),
    "image_preprocess": lambda w: lambda: stllava_c.image_preprocess(w.rgb, 4, False, [1, 2, 3], [0.5] * 3, [0.5] * 3),
    "fill_uniform": lambda w: lambda: stllava_c.fill_uniform(w.norm, -1, 1, 2**64 - 1, 0),
    "build_info": lambda w: stllava_c.build_info,
    "allocations": lambda w: lambda: stllava_c.allocations() > 0,
    "get_num_threads": lambda w: stllava_c.get_num_threads,
    "set_num_threads": lambda w: lambda: stllava_c.set_num_threads(2),
}


def tiny_training() -> stllava_c.Model:
    model = adapted()
    model.set_trainable([NORM])
    return model


def merged() -> stllava_c.Model:
    model = adapted()
    model.merge_lora()
    return model


def fresh_run(w: SimpleNamespace, call: Callable[[stllava_c.Run], object]) -> Call:
    run = stllava_c.Run(w.model)
    return lambda: call(run)


def bits(value: object) -> object:
    """Something that equal results have in common."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.flags.writeable, value.tobytes()
    if isinstance(value, (tuple, list)) and not hasattr(value, "offset"):
        return [bits(item) for item in value]
    if isinstance(value, stllava_c.Tensor):
        return bits(value.numpy())
    if isinstance(value, stllava_c.Model):
        return [(tuple(info), bits(value.tensor(info.name)) if info.bound else None) for info in value.tensors()]
    if isinstance(value, stllava_c.Batch):
        return bits([value.row_token, value.target_row])
    if isinstance(value, stllava_c.Run):
        return value.arena_bytes
    if isinstance(value, stllava_c.Generator):
        return bits([value.step(), value.step()])
    return value


def state_of(call: Call) -> object:
    """What a failed call must leave as it was."""
    return bits(call.model) if isinstance(call, WithNew) else None


def test_every_public_name_has_an_operation():
    names = {name.split()[0].split(".")[0] for name in OPERATIONS}
    assert set(stllava_c.__all__) - names == {"LOSS_TYPES", "Error", "NumericError", "TensorInfo"}


# ---- the core's allocations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_core_without_memory(world, name, forever):
    n_threads = stllava_c.get_num_threads()
    want, n = bits(OPERATIONS[name](world)()), 1
    gc.collect()
    live = _core._live_allocations()
    while True:
        call = OPERATIONS[name](world)
        before = state_of(call)
        error = failing(call, n, forever)
        if error is None:
            break
        assert "no memory for " in str(error) and state_of(call) == before
        assert bits(call()) == want
        n += 1
    del call
    stllava_c.set_num_threads(n_threads)
    gc.collect()
    assert _core._live_allocations() <= live  # a run gives its arena back before it wants a larger one


# ---- Python's allocations -------------------------------------------------------------------------------------------------------


def without_memory(call: Call, start: int, stop: int) -> object:
    """The call's result, or the MemoryError it raised; allocations from number `start` on (0: the first) fail, up to `stop` (0: all)."""
    error = None
    _testcapi.set_nomemory(start, stop)
    try:
        return call()
    except MemoryError as caught:
        error = caught
    finally:
        _testcapi.remove_mem_hooks()
    return error.with_traceback(None)


def every_failure(prepare: Callable[[], Call], want: object) -> None:
    """A failure may go unnoticed (a cache that is not filled), but must not change the result; so the end is 8 successes in a row."""
    for forever in (True, False):
        start = n_successes = 0
        while n_successes < 8:
            call = prepare()
            before = state_of(call)
            result = without_memory(call, start, 0 if forever else start + 1)
            n_successes = 0 if isinstance(result, MemoryError) else n_successes + 1
            if isinstance(result, MemoryError):
                assert state_of(call) == before
                result = call()
            assert bits(result) == want
            start += 1


def references(world: SimpleNamespace) -> list[int]:
    gc.collect()
    return [sys.getrefcount(value) for value in vars(world).values()]


@pytest.mark.skipif(_testcapi is None or not hasattr(_testcapi, "set_nomemory"), reason="this interpreter has no _testcapi.set_nomemory")
@pytest.mark.parametrize("name", OPERATIONS)
def test_python_without_memory(world, name):
    n_threads = stllava_c.get_num_threads()
    prepare = partial(OPERATIONS[name], world)
    want = bits(prepare()())
    every_failure(prepare, want)  # fills caches
    before = references(world)
    n_blocks = sys.getallocatedblocks()
    every_failure(prepare, want)
    gc.collect()
    assert sys.getallocatedblocks() - n_blocks <= 1  # that number; a block that one failure loses is lost twice
    stllava_c.set_num_threads(n_threads)
    assert references(world) == before
