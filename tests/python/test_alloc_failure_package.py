"""Without memory in the core: loading, adapters, a step of SFT and of DPO, generation, saving. Each allocation fails, once and from then on; the
call raises MemoryError with the core's words, and again it gives the bits of one that never failed."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from no_memory import failing
from tiny import dpo_records, sft_records, tiny_model, write_pictures

import stllava_c
from stllava.checkpoint.peft import LoraConfig
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.generation import Generation
from stllava.model import LlavaModel
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOTrainer
from stllava.train.loop import Trainer
from stllava.train.sft import SFTTrainer
from stllava_c import _core

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=frozenset({"q_proj", "v_proj"}))
IDS = [1, 30, -200, 42, 11]
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)


def check(call: Callable[[], object], again: Callable[[], None] = lambda: None, stride: int = 1) -> int:
    """`call` returns what is compared; `again` makes the objects as new. The number of the first allocation beyond the last, about."""
    def live_after_success() -> int:
        again()
        assert call() == want
        gc.collect()
        return _core._live_allocations()

    again()
    want = call()
    live = live_after_success()
    for forever in (False, True):
        for n in itertools.count(1, stride):
            again()
            error = failing(call, n, forever)
            if error is None:
                break
            assert "no memory for " in str(error)
            assert call() == want
    assert live_after_success() == live
    return n


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """(base, adapters for it)"""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model(vocab_size=64)
    model.save_pretrained(folder / "base")
    model.add_lora(LORA)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def test_load(checkpoints, amount):
    base, adapter = checkpoints

    def load() -> bytes:
        return LlavaModel.from_pretrained(adapter, base).logits(IDS, [PICTURE]).tobytes()

    assert check(load, stride=amount(23, 1)) > 100


def test_merge_and_unload(checkpoints, amount):
    base, adapter = checkpoints
    model = LlavaModel.from_pretrained(adapter, base)

    def merge() -> bytes:
        return model.merge_and_unload().logits(IDS, [PICTURE]).tobytes()

    assert check(merge, stride=amount(23, 1)) > 100


def test_adapters(checkpoints, monkeypatch):
    """Without memory for their values the model is as before; in the core, as the docstring says, it has to be loaded anew."""
    want = LlavaModel.from_pretrained(*reversed(checkpoints)).logits(IDS, [PICTURE]).tobytes()

    def zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        if len(made) == 3:
            raise MemoryError
        made.append(shape)
        return np.empty(shape, dtype)

    made: list[tuple[int, ...]] = []
    model = LlavaModel.from_pretrained(checkpoints[0])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(np, "zeros", zeros)
        model.add_lora(LORA)
    model.add_lora(LORA)
    assert model.logits(IDS, [PICTURE]).tobytes() == want
    for forever in (False, True):
        for n in itertools.count(1):
            model = LlavaModel.from_pretrained(checkpoints[0])
            error = failing(partial(model.add_lora, LORA), n, forever)
            if error is None:
                break
            assert "no memory for " in str(error)
        assert model.logits(IDS, [PICTURE]).tobytes() == want


def test_save_allocates_nothing_in_the_core(checkpoints, tmp_path):
    base, adapter = checkpoints
    model = LlavaModel.from_pretrained(adapter, base)
    assert failing(lambda: model.save_pretrained(tmp_path / "again"), 1, True) is None
    for file in adapter.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_generate(checkpoints, amount):
    model = LlavaModel.from_pretrained(*reversed(checkpoints))

    def generate() -> list:
        return model.generate([IDS, [1, 2, 3]], [PICTURE, None], max_new_tokens=4, temperature=1.0, num_return_sequences=2)

    assert check(generate, stride=amount(3, 1)) > 20


@pytest.mark.parametrize("forever", [False, True])
def test_a_turn_of_a_chat(forever):
    """A turn without memory never was; the same words again get the answer they would have got."""
    model = tiny_model()

    def turns(*, failing_at: int) -> tuple[Generation, BaseException | None]:
        session = model.chat_session(max_new_tokens=3, temperature=1.0, repetition_penalty=1.2)
        session.send("What is it?", [PICTURE]).finish()
        before = session.messages
        error = failing(lambda: session.send("Is it large?", [PICTURE]), failing_at, forever) if failing_at else None
        assert error is None or session.messages == before
        return session.send("Is it large?", [PICTURE]).finish(), error

    want, _ = turns(failing_at=0)
    n_failed = 0
    for n in itertools.count(1):
        found, error = turns(failing_at=n)
        assert found == want
        if error is None:
            break
        assert "no memory for " in str(error)
        n_failed += 1
    assert n_failed > 8


def sft_trainer(model: LlavaModel, folder: Path, names: list[str]) -> Trainer:
    data = SFTDataset(sft_records(names), model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=model.core.tokens_per_image)
    return SFTTrainer(model, SFTConfig(str(folder / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True), data)


def dpo_trainer(model: LlavaModel, folder: Path, names: list[str]) -> Trainer:
    data = DPODataset(dpo_records(names), model.tokenizer, model.image_processor, image_folder=folder, tokens_per_image=model.core.tokens_per_image)
    return DPOTrainer(model, DPOConfig(str(folder / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True), data)


def test_an_update_without_memory_is_not_counted(tmp_path, monkeypatch):
    def without_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    trainer = sft_trainer(tiny_model(), tmp_path, write_pictures(tmp_path))
    updater = trainer.updater
    updater.gradients(1, [trainer.objective.collate(trainer.train_dataset, items) for items in trainer.plan.update(1)])
    updater.n_skipped_in_a_row = 1
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(stllava_c, "adamw_step", without_memory)
        updater.apply(1)
    assert (updater.n_updates, updater.n_skipped_in_a_row) == (0, 1)
    updater.apply(1)
    assert (updater.n_updates, updater.n_skipped_in_a_row) == (1, 0)


@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
def test_training_step(tmp_path, make, amount):
    model = tiny_model()
    model.add_lora(LORA)
    trainer = make(model, tmp_path, write_pictures(tmp_path))
    updater, theta = trainer.updater, np.array(model.core.theta.numpy())

    def again() -> None:
        model.core.theta.numpy()[:] = theta
        updater.exp_avg[:] = updater.exp_avg_sq[:] = 0
        updater.n_updates = 0
        model.run = stllava_c.Run(model.core)
        if make is dpo_trainer:
            trainer.objective.reference_run = stllava_c.Run(model.core)

    def step() -> tuple:
        micros = [trainer.objective.collate(trainer.train_dataset, items) for items in trainer.plan.update(1)]
        numbers = updater.gradients(1, micros)
        return numbers, updater.apply(1), model.core.theta.numpy().tobytes(), updater.exp_avg_sq.tobytes(), updater.n_updates

    assert check(step, again, amount(3, 1)) > 10
