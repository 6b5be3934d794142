"""Eight threads with every kind of call on shared and on their own objects: each result is the serial one, or a refusal the docstrings name."""

from __future__ import annotations

import faulthandler
import io
import threading
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from tiny_core import Q_PROJ, pair_batch, pixels, text_batch, tiny

import stllava_c

N_THREADS = 8
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def no_deadlock():
    """A deadlock ends the process with every thread's stack instead of hanging the suite."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def threads_as_before():
    before = stllava_c.get_num_threads()
    yield
    stllava_c.set_num_threads(before)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(file, "PNG")
    return file.getvalue()


def generate(model: stllava_c.Model, **options) -> np.ndarray:
    generator = stllava_c.Generator(model, text_batch(model), max_new_tokens=4, temperature=0.8, **options)
    return np.stack([generator.step()[0] for _ in range(4)])


def gradient_of_own() -> np.ndarray:
    model = tiny()
    model.set_trainable([NORM])
    run = stllava_c.Run(model)
    run.forward(pair_batch(model), pixels=pixels(), train=True)
    run.backward([1.0, 2.0, 3.0])
    return np.array(model.grad.numpy())


def preference() -> np.ndarray:
    value = [-1.0, -2.0]
    return stllava_c.preference_loss(loss_types=["sigmoid"], policy_chosen=value, policy_rejected=value, reference_chosen=value,
                                     reference_rejected=[-3.0, -1.0], chosen_tokens=[2, 2], rejected_tokens=[2, 2])[3]


class Shared:
    """One model that every thread uses. `refused`: codes of the errors that the docstrings allow here."""

    def __init__(self) -> None:
        self.model = tiny()
        self.model.set_trainable([NORM])
        self.run, self.batch, self.pixels, self.png = stllava_c.Run(self.model), pair_batch(self.model), pixels(), png()
        self.refused: set[str] = set()

    def forward(self):
        return self.run.forward(self.batch, pixels=self.pixels)

    def forward_own_run(self):
        run = stllava_c.Run(self.model)
        return run.forward(self.batch, pixels=self.pixels, train=True)

    def backward_on_the_shared_run(self):
        """Another thread's forward may come between the two: then backward is refused."""
        try:
            self.run.forward(self.batch, pixels=self.pixels, train=True)
            self.run.backward([0.0, 0.0, 0.0])
        except stllava_c.Error as error:
            self.refused.add(error.code)

    def generate(self):
        return generate(self.model)

    def look(self):
        with memoryview(self.model.theta) as view:
            return np.array(view)

    def effective_weight(self):
        return self.model.effective_weight(Q_PROJ)

    def add_lora(self):
        """Refused: runs of the model are alive, or somebody looks at its memory."""
        with pytest.raises((stllava_c.Error, BufferError)):
            self.model.add_lora(Q_PROJ, 2, 1.0)

    def free(self):
        tensor = stllava_c.Tensor.zeros(100)
        array = tensor.numpy()
        with pytest.raises(BufferError):
            tensor.free()
        del array
        tensor.free()

    def set_num_threads(self):
        try:
            stllava_c.set_num_threads(1 + threading.get_ident() % 3)
        except stllava_c.Error as error:
            self.refused.add(error.code)

    def decode(self):
        return stllava_c.image_decode(self.png)

    def preference_loss(self):
        return preference()

    def gradient_of_own(self):
        try:
            return gradient_of_own()
        except stllava_c.Error as error:  # the number of threads changed between forward and backward
            self.refused.add(error.code)
            return None

    def everything(self) -> list[Callable[[], object]]:
        return [self.forward, self.forward_own_run, self.backward_on_the_shared_run, self.generate, self.look, self.effective_weight, self.add_lora,
                self.free, self.set_num_threads, self.decode, self.preference_loss, self.gradient_of_own]


def run_together(work: Callable[[int], None]) -> None:
    """work(i) on each thread i, all starting at once; the first failure is raised here."""
    start, failures = threading.Barrier(N_THREADS), []

    def guarded(i: int) -> None:
        try:
            start.wait(60)
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_every_call_at_once(amount, threads_as_before):
    shared = Shared()
    calls = shared.everything()
    want = [call() for call in calls]
    shared.refused.clear()

    def work(i: int) -> None:
        order = np.random.default_rng(i)
        for _ in range(amount(5, 400)):
            for k in order.permutation(len(calls)):
                got = calls[k]()
                assert got is None or np.array_equal(got, want[k]), calls[k].__name__

    run_together(work)
    assert shared.refused <= {"state"}
    assert all(np.array_equal(got, value) for got, value in zip([call() for call in calls], want, strict=True) if value is not None)


def test_own_models_train_as_alone(amount):
    """Eight training loops of their own, side by side on one pool."""
    def train() -> bytes:
        model = tiny()
        model.set_trainable([NORM, "lm_head.weight"])
        run, batch, image = stllava_c.Run(model), pair_batch(model), pixels()
        m, v = (np.zeros(model.n_trainable, np.float32) for _ in range(2))
        for step in range(1, amount(5, 100) + 1):
            model.zero_grad()
            run.forward(batch, pixels=image, train=True)
            run.backward([-1.0, -1.0, -1.0])
            stllava_c.adamw_step(model, m, v, [(0, model.n_trainable, 1e-2, 0.01)], step=step)
        return model.theta.numpy().tobytes() + generate(model, seeds=[3]).tobytes()

    want = train()

    def work(i: int) -> None:
        assert train() == want

    run_together(work)


def test_a_model_closed_under_its_users(amount):
    """The last user's reference may go in any thread; who comes late gets the error of a closed model."""
    for _ in range(amount(3, 200)):
        model = tiny()
        runs = [stllava_c.Run(model) for _ in range(N_THREADS)]

        def work(i: int, model: stllava_c.Model = model, runs: list = runs) -> None:
            run = runs[i]
            runs[i] = None
            try:
                run.forward(text_batch(model))
                del run
                model.close()
            except stllava_c.Error as error:
                assert error.code == "state"

        run_together(work)
        model.close()
        with pytest.raises(stllava_c.Error, match="closed"):
            model.tensors()
