"""Every public name, called rightly and in every wrong way, again and again: reference counts, blocks and bytes in use stay where they were.

Wrong ways: every argument replaced by each of JUNK, an argument missing, one too many; and under STATES the right call at the wrong moment.
"""

from __future__ import annotations

import ctypes
import gc
import io
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_stub import CLASSES, FUNCTIONS, OWN
from tiny_core import CONFIG, Q_PROJ, bind_all, pair_batch, pixels, text_batch, tiny

import stllava_c
from stllava_c import _core

NORM = "model.norm.weight"
TEXT = {**CONFIG, "vision": None, "projector": None}


class Strange:
    """Nothing takes it."""


class Array(np.ndarray):
    """NumPy's own repr, which error messages show, leaves its caches behind."""

    def __repr__(self):
        return "array"


FROZEN = np.zeros(64, np.float32).view(Array)
FROZEN.flags.writeable = False
JUNK = (Strange(), None, "junk", "", b"bytes", -1, 1.5, float("nan"), 2**70, [], [1, "a"], (1, 2, 3), {}, {"a": Strange()}, np.zeros((2, 3)).view(Array),
        np.zeros(3, np.complex64).view(Array), np.zeros((4, 4), np.float32)[:, ::2].view(Array), FROZEN, [Strange()] * 3)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, "PNG")
    return file.getvalue()


def world() -> SimpleNamespace:
    """One of everything, ready to be used."""
    model = tiny()
    model.set_trainable([NORM])
    w = SimpleNamespace(model=model, text=bind_all(stllava_c.Model(TEXT)), run=stllava_c.Run(model), batch=pair_batch(model), pixels=pixels(),
                        array=np.ones(64, np.float32), m=np.zeros(64, np.float32), v=np.zeros(64, np.float32), tensor=stllava_c.Tensor.zeros((2, 3)),
                        png=png(), rgb=np.zeros((5, 7, 3), np.uint8), ranges=[(0, 32, 1e-3, 0.0), (32, 64, 1e-3, 0.1)])
    w.words = text_batch(model)
    w.text_batch = text_batch(w.text)
    w.text.add_lora(Q_PROJ, 2, 1.0)
    for side, shape in (("A", (2, 64)), ("B", (64, 2))):
        w.text.bind(f"{Q_PROJ}.lora_{side}.weight", np.ones(shape, np.float32))
    w.generator = stllava_c.Generator(model, w.words, max_new_tokens=4)
    w.run.forward(w.batch, pixels=w.pixels, mean_logit=True)
    w.vision = stllava_c.Run(model)
    w.projector = stllava_c.Run(model)
    w.vision.vision_forward(w.pixels, all_layers=True)
    w.projector.projector_forward(np.ones((1, 16, 32), np.float32))
    return w


def backward(w):
    def call(**arguments):
        w.run.forward(w.batch, pixels=w.pixels, train=True)
        w.run.backward(**arguments)
    return call


def vision_backward(w):
    def call(**arguments):
        w.vision.vision_forward(w.pixels, train=True)
        w.vision.vision_backward(**arguments)
    return call


def projector_backward(w):
    def call(**arguments):
        w.projector.projector_forward(np.ones((1, 16, 32), np.float32), train=True)
        return w.projector.projector_backward(**arguments)
    return call


def merge(w):
    def call():
        w.text.merge_lora()
        w.text.unmerge_lora()
    return call


def fresh_generator(method: str):
    def made(w):
        def call(**arguments):
            return getattr(stllava_c.Generator(w.model, w.words, max_new_tokens=1), method)(**arguments)
        return call
    return made


IMAGE = dict(size=6, pad=True, background=(1, 2, 3))
PAIRS = {name: [-1.0, -2.0] for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")}
FORWARD = dict(pixels=None, features=None, theta=None, adapters=True, train=False, vision_grad=True, dropout=False, seed=1, step=2, mean_logit=True)

# name -> (world -> callable, world -> right arguments by name); properties are added below
CALLS: dict[str, tuple[Callable, Callable]] = {
    "adamw_step": (lambda w: stllava_c.adamw_step, lambda w: dict(model=w.model, m=w.m, v=w.v, ranges=w.ranges, beta1=0.9, beta2=0.99, eps=1e-8, step=1,
                                                                  grad_scale=1.0)),
    "allocations": (lambda w: stllava_c.allocations, lambda w: {}),
    "build_info": (lambda w: stllava_c.build_info, lambda w: {}),
    "fill_uniform": (lambda w: stllava_c.fill_uniform, lambda w: dict(out=w.m, low=0.0, high=1.0, seed=1, stream=2)),
    "get_num_threads": (lambda w: stllava_c.get_num_threads, lambda w: {}),
    "grad_norm": (lambda w: stllava_c.grad_norm, lambda w: dict(model=w.model, ranges=w.ranges)),
    "image_decode": (lambda w: stllava_c.image_decode, lambda w: dict(data=w.png)),
    "image_preprocess": (lambda w: stllava_c.image_preprocess, lambda w: dict(rgb=w.rgb, **IMAGE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))),
    "image_probe": (lambda w: stllava_c.image_probe, lambda w: dict(data=w.png)),
    "image_resize_crop": (lambda w: stllava_c.image_resize_crop, lambda w: dict(rgb=w.rgb, **IMAGE)),
    "preference_loss": (lambda w: stllava_c.preference_loss, lambda w: dict(
        loss_types=["sigmoid", "ipo"], weights=[1.0, 0.5], beta=0.1, label_smoothing=0.1, discopop_tau=0.05, f_divergence="reverse_kl", alpha=0.5,
        reference_free=False, **PAIRS, chosen_tokens=[3, 4], rejected_tokens=[5, 6])),
    "sampling_probabilities": (lambda w: stllava_c.sampling_probabilities, lambda w: dict(logits=[1.0, 2.0, 3.0], temperature=1.0, top_k=2, top_p=0.9)),
    "schedule": (lambda w: stllava_c.schedule, lambda w: dict(kind="cosine", step=1, warmup=2, total=5, floor=0.1)),
    "set_num_threads": (lambda w: stllava_c.set_num_threads, lambda w: dict(n=stllava_c.get_num_threads())),
    "Tensor.free": (lambda w: lambda: stllava_c.Tensor.zeros(3).free(), lambda w: {}),
    "Tensor.from_buffer": (lambda w: stllava_c.Tensor.from_buffer, lambda w: dict(obj=w.array)),
    "Tensor.numpy": (lambda w: w.tensor.numpy, lambda w: {}),
    "Tensor.zeros": (lambda w: stllava_c.Tensor.zeros, lambda w: dict(shape=(2, 3), dtype="i64")),
    "Model": (lambda w: stllava_c.Model, lambda w: dict(config=CONFIG, dtype="f64")),
    "Model.add_lora": (lambda w: lambda **a: stllava_c.Model(TEXT).add_lora(**a), lambda w: dict(module=Q_PROJ, rank=2, scale=0.5, dropout=0.1, dora=True)),
    "Model.bind": (lambda w: w.text.bind, lambda w: dict(name=NORM, array=w.array)),
    "Model.close": (lambda w: lambda: bind_all(stllava_c.Model(TEXT)).close(), lambda w: {}),
    "Model.effective_weight": (lambda w: w.text.effective_weight, lambda w: dict(module=Q_PROJ)),
    "Model.linear_modules": (lambda w: w.model.linear_modules, lambda w: {}),
    "Model.merge_lora": (merge, lambda w: {}),
    "Model.set_trainable": (lambda w: w.text.set_trainable, lambda w: dict(names=[NORM, "lm_head.weight"])),
    "Model.tensor": (lambda w: w.model.tensor, lambda w: dict(name="lm_head.weight")),
    "Model.tensors": (lambda w: w.model.tensors, lambda w: {}),
    "Model.unmerge_lora": (merge, lambda w: {}),
    "Model.zero_grad": (lambda w: w.model.zero_grad, lambda w: {}),
    "Batch": (lambda w: stllava_c.Batch, lambda w: dict(model=w.model, parent=[-1, 0, 0], begin=[0, 3, 5, 6], ids=[1, -200, 4, 11, 12, 13],
                                                        labels=[-100, -100, -100, 11, 12, 13], sample=[7, 7, 8], image=[0], n_images=1)),
    "Run": (lambda w: stllava_c.Run, lambda w: dict(model=w.model)),
    "Run.backward": (backward, lambda w: dict(dlogp=[1.0, 1.0, 1.0])),
    "Run.cluster_assignment": (lambda w: w.projector.cluster_assignment, lambda w: {}),
    "Run.cluster_margin": (lambda w: w.projector.cluster_margin, lambda w: {}),
    "Run.encode": (lambda w: stllava_c.Run(w.model).encode, lambda w: dict(pixels=w.pixels, theta=w.array, adapters=False)),
    "Run.estimate": (lambda w: w.run.estimate, lambda w: dict(batch=w.batch, **{**FORWARD, "pixels": w.pixels, "theta": w.array})),
    "Run.forward": (lambda w: w.run.forward, lambda w: dict(batch=w.words, **{**FORWARD, "theta": w.array})),
    "Run.logits": (lambda w: w.run.logits, lambda w: dict(rows=[0, 3])),
    "Run.projector_backward": (projector_backward, lambda w: dict(dout=np.ones(16 * 64, np.float32), want_input_grad=True)),
    "Run.projector_forward": (lambda w: w.projector.projector_forward, lambda w: dict(x=np.ones((1, 16, 32), np.float32), theta=w.array, train=False)),
    "Run.set_recompute": (lambda w: w.run.set_recompute, lambda w: dict(n_vision_layers=0, n_decoder_layers=0)),
    "Run.vision_backward": (vision_backward, lambda w: dict(dfeatures=np.ones(16 * 32, np.float32))),
    "Run.vision_forward": (lambda w: stllava_c.Run(w.model).vision_forward,
                           lambda w: dict(pixels=w.pixels, all_layers=True, theta=w.array, adapters=True, train=True)),
    "Run.vision_hidden": (lambda w: w.vision.vision_hidden, lambda w: dict(i=1)),
    "Run.vision_pooled": (lambda w: w.vision.vision_pooled, lambda w: {}),
    "Generator": (lambda w: stllava_c.Generator, lambda w: dict(
        model=w.model, batch=w.words, pixels=None, features=None, theta=w.array, adapters=True, temperature=0.5, top_k=3, top_p=0.9,
        repetition_penalty=1.2, n_per_sequence=2, max_new_tokens=2, min_new_tokens=1, seeds=[3, 2**63], eos_ids=[2])),
    "Generator.close": (fresh_generator("close"), lambda w: {}),
    "Generator.extend": (fresh_generator("extend"), lambda w: dict(
        batch=w.words, keep_rows=2, pixels=None, features=None, temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.2, max_new_tokens=2,
        min_new_tokens=1, seeds=[2**63], eos_ids=[2])),
    "Generator.finish": (fresh_generator("finish"), lambda w: dict(i=0)),
    "Generator.logits": (lambda w: w.generator.logits, lambda w: {}),
    "Generator.step": (fresh_generator("step"), lambda w: {}),
}
OBJECTS = {"Tensor": "tensor", "Model": "model", "Batch": "batch", "Run": "run", "Generator": "generator"}


def public_names() -> tuple[set[str], set[str]]:
    """(what can be called, properties) according to the stub."""
    calls, properties = {name for name in FUNCTIONS if not name.startswith("_")}, set()
    for name in set(CLASSES) - OWN:
        for node in CLASSES[name].body:
            if getattr(node, "name", "__init__") == "__init__":
                calls |= {name} if hasattr(node, "name") else set()
            elif any(getattr(d, "id", "") == "property" for d in node.decorator_list):
                properties.add(f"{name}.{node.name}")
            else:
                calls.add(f"{name}.{node.name}")
    return calls, properties


PROPERTIES = sorted(public_names()[1])


def refuse(kind: type[BaseException], call: Callable, *arguments, **named) -> None:
    try:
        call(*arguments, **named)
    except kind:
        return
    raise AssertionError(f"{call} did not raise {kind.__name__}")


def closed_model(w) -> None:
    model = stllava_c.Model(TEXT)
    model.close()
    for call in (model.tensors, model.linear_modules, model.zero_grad, model.merge_lora, lambda: model.theta, lambda: stllava_c.Run(model),
                 lambda: text_batch(model), lambda: model.bind(NORM, w.array), lambda: model.tensor(NORM), lambda: model.set_trainable([])):
        refuse(stllava_c.Error, call)


def closed_generator(w) -> None:
    generator = stllava_c.Generator(w.model, w.words, max_new_tokens=1)
    generator.step()
    generator.close()
    for call in (generator.step, generator.logits, lambda: generator.n_active, lambda: generator.n_rows, lambda: generator.finish(0),
                 lambda: generator.extend(w.words, keep_rows=0, max_new_tokens=1)):
        refuse(stllava_c.Error, call)


def nothing_bound(w) -> None:
    model = stllava_c.Model(TEXT)
    refuse(stllava_c.Error, stllava_c.Run(model).forward, text_batch(model))
    refuse(stllava_c.Error, stllava_c.Generator, model, text_batch(model), max_new_tokens=1)
    refuse(stllava_c.Error, model.tensor, NORM)
    refuse(stllava_c.Error, model.effective_weight, Q_PROJ)
    model.set_trainable([NORM])
    refuse(stllava_c.Error, model.tensor, NORM)


def looked_at(w) -> None:
    views = w.model.theta.numpy(), memoryview(w.model.grad), w.model.tensor("lm_head.weight").numpy()
    for call in (w.model.close, lambda: w.model.set_trainable([]), lambda: w.model.add_lora(Q_PROJ, 1, 1.0)):
        refuse(BufferError, call)
    del views
    refuse(stllava_c.Error, w.model.close)  # runs are alive


def stale_tensor(w) -> None:
    w.text.set_trainable([NORM])
    tensors = w.text.theta, w.text.grad, w.text.tensor("lm_head.weight")
    w.text.set_trainable([])
    for tensor in tensors:
        refuse(BufferError, tensor.numpy)
        refuse(BufferError, memoryview, tensor)
    w.tensor.free()
    refuse(BufferError, w.tensor.numpy)
    w.tensor = stllava_c.Tensor.zeros(3)
    view = w.tensor.numpy()
    refuse(BufferError, w.tensor.free)
    del view


def nothing_before(w) -> None:
    run = stllava_c.Run(w.model)
    for call in (lambda: run.backward([1.0]), lambda: run.logits([0]), lambda: run.mean_logit, lambda: run.features, lambda: run.embeddings,
                 run.cluster_assignment, run.cluster_margin, run.vision_pooled, lambda: run.vision_hidden(0), lambda: run.vision_backward(w.array),
                 lambda: run.projector_backward(w.array)):
        refuse(stllava_c.Error, call)
    run.forward(w.words)
    refuse(stllava_c.Error, run.backward, [1.0, 1.0, 1.0])


def other_model(w) -> None:
    refuse(ValueError, w.run.forward, w.text_batch)
    refuse(ValueError, w.run.estimate, w.text_batch)
    refuse(ValueError, stllava_c.Generator, w.model, w.text_batch, max_new_tokens=1)
    refuse(ValueError, stllava_c.Run(w.text).encode, w.pixels)
    refuse(ValueError, stllava_c.Run(w.text).projector_forward, w.pixels)


def not_finite(w) -> None:
    bad = np.full((1, 3, 28, 28), np.nan, np.float32)
    refuse(stllava_c.NumericError, w.run.forward, w.batch, pixels=bad)
    generator = stllava_c.Generator(w.model, w.words, theta=np.full(64, np.nan, np.float32), max_new_tokens=1)
    refuse(stllava_c.NumericError, generator.step)
    refuse(stllava_c.NumericError, stllava_c.sampling_probabilities, [1.0, float("nan")], temperature=1.0, top_k=0, top_p=1.0)
    refuse(ValueError, stllava_c.adamw_step, w.model, w.m, w.v, [(0, 64, float("inf"), 0.0)], step=1)


def damaged_picture(w) -> None:
    for call in (stllava_c.image_decode, stllava_c.image_probe):
        refuse(stllava_c.Error, call, b"no picture")
    refuse(stllava_c.Error, stllava_c.image_decode, w.png[:60])


def merged(w) -> None:
    w.text.merge_lora()
    refuse(stllava_c.Error, w.text.merge_lora)
    refuse(stllava_c.Error, w.text.set_trainable, [f"{Q_PROJ}.lora_A.weight"])
    w.text.unmerge_lora()
    refuse(stllava_c.Error, w.text.add_lora, Q_PROJ, 2, 1.0)


def dead_cycle(w) -> None:
    """An array that holds the run of the model that it is bound to."""
    model = stllava_c.Model(TEXT)
    array = w.array.copy().view(Array)
    array.run = stllava_c.Run(model)
    model.bind(NORM, array)


STATES = [closed_model, closed_generator, nothing_bound, looked_at, stale_tensor, nothing_before, other_model, not_finite, damaged_picture, merged,
          dead_cycle]


def bytes_in_use() -> int:
    """What malloc has given out; 0 where the C library does not tell."""
    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                                                         "keepcost")]
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0
    ask.restype = Info
    info = ask()
    return info.uordblks + info.hblkhd


def resident_bytes() -> int:
    if stllava_c.build_info()["sanitizers"] or not os.path.exists("/proc/self/statm"):
        return 0  # AddressSanitizer keeps freed memory in quarantine
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_flat(once: Callable[[], None], things: list[object], rounds: int) -> None:
    """What each round loses is found at any number of rounds. Caches that still fill, and what other threads of the process hold at the moment, do not
    grow with the rounds: one stretch of three, each longer than the one before, must be flat. The MiB is the issue's number for 10,000 rounds."""
    for _ in range(max(4, rounds // 10)):  # dead cycles wait for the collector, and memory has to have held as many before it is flat
        once()
    watched = [thing for thing in things if not isinstance(thing, (type(None), bool, int, float, str, bytes, tuple))]  # these have users elsewhere
    watched += [getattr(stllava_c, name) for name in CLASSES]
    resident = resident_bytes()
    for stretch in range(3):
        gc.collect()
        before, live = [sys.getrefcount(thing) for thing in watched], _core._live_allocations()
        used, blocks = bytes_in_use(), sys.getallocatedblocks()
        n = rounds if stretch == 0 else min(rounds, 100) * 5**stretch
        for i in range(n):
            once()
            if stretch > 0 and i % min(rounds, 100) == 0:
                gc.collect()  # no more garbage waits than in the first stretch
        gc.collect()
        used, blocks = bytes_in_use() - used, sys.getallocatedblocks() - blocks
        after = [sys.getrefcount(thing) for thing in watched]
        assert {repr(thing)[:60]: now - then for thing, then, now in zip(watched, before, after, strict=True) if now != then} == {}
        assert _core._live_allocations() == live
        if used < 8 * min(n, 2500) and blocks < min(n, 2500) // 2:  # no block of malloc is smaller than 24 bytes
            break
    else:
        raise AssertionError(f"three times blocks were left behind; the last {n} rounds left {used} bytes and {blocks} blocks")
    assert resident_bytes() - resident < 1 << 20


def test_the_tables_are_complete():
    calls, properties = public_names()
    assert set(CALLS) == calls and {name.split(".")[0] for name in properties} == set(OBJECTS)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name, amount):
    w = world()
    make, arguments = CALLS[name]
    call, right = make(w), arguments(w)
    wrong = [{**right, key: junk} for key in right for junk in JUNK]
    wrong += [{k: v for k, v in right.items() if k != key} for key in right] + [{**right, "nonsense": 1}]
    refused = 0

    def once():
        nonlocal refused
        call(**right)
        for arguments in wrong:
            try:
                call(**arguments)
            except Exception:
                refused += 1
        try:
            call(*JUNK)
        except TypeError:
            refused += 1

    check_flat(once, [*vars(w).values(), *right.values(), *JUNK], amount(20, 10_000))
    assert refused >= 2  # at least one too many, and a name that does not exist


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name, amount):
    w = world()
    cls, attribute = name.split(".")
    thing = getattr(w, OBJECTS[cls])

    def once():
        getattr(thing, attribute)
        refuse(AttributeError, setattr, thing, attribute, 1)

    check_flat(once, list(vars(w).values()), amount(200, 10_000))


@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_states(state, amount):
    w = world()
    kept = [value for key, value in vars(w).items() if key != "tensor"]
    check_flat(lambda: state(w), kept, amount(30, 10_000))
