"""The same bits: at any number of threads, in any company, with and without the key/value cache and shared prefixes, time after time."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import dpo_records, sft_records, tiny_model, write_pictures
from tiny_core import Q_PROJ, bind_all, pixels, tiny

import stllava_c
from stllava.checkpoint.peft import LoraConfig
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOTrainer
from stllava.train.sft import SFTTrainer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return folder, write_pictures(folder)


@pytest.fixture
def at_any_number_of_threads(amount):
    """Calls a function at 1, 2 and 4 threads, several times each, and compares the bytes it returns."""
    before = stllava_c.get_num_threads()

    def compare(work) -> None:
        stllava_c.set_num_threads(1)
        want = work()
        for n in (1, 2, 4):
            stllava_c.set_num_threads(n)
            for _ in range(amount(2, 20)):
                assert work() == want, f"{n} threads"

    yield compare
    stllava_c.set_num_threads(before)


def trained(trainer) -> bytes:
    """Two updates as bytes: numbers, gradient, weights and both moments."""
    updater, plan = trainer.updater, trainer.plan
    numbers = []
    for step in range(2):
        micros = [trainer.objective.collate(trainer.train_dataset, items) for items in plan.update(step)]
        numbers.append(updater.gradients(step, micros) | updater.apply(step, micros))
    core = trainer.model.core
    return repr(numbers).encode() + b"".join(a.tobytes() for a in (core.grad.numpy(), core.theta.numpy(), updater.exp_avg, updater.exp_avg_sq))


def adapted(pictures):
    folder, names = pictures
    model = tiny_model()
    for part in ("llm", "vit"):
        model.add_lora(LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1), part)
    return model, names, {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "image_folder": folder,
                          "tokens_per_image": model.core.tokens_per_image}


def test_sft_step(pictures, at_any_number_of_threads, tmp_path):
    def work() -> bytes:
        model, names, options = adapted(pictures)
        return trained(SFTTrainer(model, SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2),
                                  SFTDataset(sft_records(names), **options)))
    at_any_number_of_threads(work)


def test_dpo_step(pictures, at_any_number_of_threads, tmp_path):
    def work() -> bytes:
        model, names, options = adapted(pictures)
        return trained(DPOTrainer(model, DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, disable_dropout=False),
                                  DPODataset(dpo_records(names), **options)))
    at_any_number_of_threads(work)


# ---- generation and forward, on the core alone: a prefix with an image and three ways on ---------------------------------------------

PREFIX, ANSWERS = [1, -200, 4, 17, 9], ([11, 12, 30], [13], [14, 15, 16, 2])


def adapted_core(dtype: str = "f32") -> stllava_c.Model:
    model = tiny(dtype)
    model.add_lora(Q_PROJ, 2, 1.0)
    return bind_all(model)


def batch_of(model: stllava_c.Model, sequences, *, share: bool, prefix=PREFIX) -> stllava_c.Batch:
    """The answers below one prefix, or each with a prefix of its own; all show the one image."""
    if share:
        parent, pieces = [-1] + [0] * len(sequences), [prefix, *sequences]
    else:
        parent, pieces = [-1] * len(sequences), [[*prefix, *sequence] for sequence in sequences]
    ids = [i for piece in pieces for i in piece]
    answers = [(not share) * [-100] * len(prefix) + list(sequence) for sequence in sequences]
    labels = [label for piece in ([[-100] * len(prefix)] if share else []) + answers for label in piece]
    n_marks = ids.count(-200)
    return stllava_c.Batch(model, parent=parent, begin=np.cumsum([0, *map(len, pieces)]), ids=ids, labels=labels, image=[0] * n_marks,
                           n_images=int(n_marks > 0))


def rows(batch: stllava_c.Batch, logp: np.ndarray) -> list[bytes]:
    return [logp[begin:end].tobytes() for begin, end in zip(batch.sequence_begin[:-1], batch.sequence_begin[1:], strict=True)]


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_forward_alone_shared_and_in_company(dtype):
    """Batch of one against batch of all, and the prefix computed once against once per sequence."""
    model = adapted_core(dtype)
    run, image = stllava_c.Run(model), pixels()

    def logp(sequences, share: bool) -> list[bytes]:
        batch = batch_of(model, sequences, share=share)
        return rows(batch, run.forward(batch, pixels=image))

    want = logp(ANSWERS, share=True)
    assert logp(ANSWERS, share=False) == want
    for share in (True, False):
        assert [logp([answer], share)[0] for answer in ANSWERS] == want
    assert logp(ANSWERS[::-1], share=True) == want[::-1]


def generated(model: stllava_c.Model, sequences, share: bool, *, temperature: float, seeds, n_tokens: int = 12) -> list[bytes]:
    generator = stllava_c.Generator(model, batch_of(model, sequences, share=share), pixels=pixels(), temperature=temperature, top_k=40, top_p=0.95,
                                    seeds=seeds, max_new_tokens=n_tokens)
    steps = [generator.step() for _ in range(n_tokens)]
    return [np.array([tokens[i] for tokens, _ in steps]).tobytes() + np.array([logp[i] for _, logp in steps]).tobytes() for i in range(len(sequences))]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_generation(temperature, at_any_number_of_threads):
    model = adapted_core()
    seeds = [5, 6, 7]
    want = generated(model, ANSWERS, True, temperature=temperature, seeds=seeds)
    assert generated(model, ANSWERS, False, temperature=temperature, seeds=seeds) == want
    assert [generated(model, [answer], True, temperature=temperature, seeds=[seed])[0] for answer, seed in zip(ANSWERS, seeds, strict=True)] == want
    at_any_number_of_threads(lambda: b"".join(generated(model, ANSWERS, True, temperature=temperature, seeds=seeds)))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_generation_with_and_without_the_cache(dtype):
    """Every step's logits against a forward over all tokens so far."""
    model = adapted_core(dtype)
    prompt = [*PREFIX, 11, 12]
    generator = stllava_c.Generator(model, batch_of(model, [[12]], share=True, prefix=[*PREFIX, 11]), pixels=pixels(), max_new_tokens=10)
    run, tokens = stllava_c.Run(model), []
    for _ in range(10):
        batch = batch_of(model, [[*prompt, *tokens][len(PREFIX):]], share=False)
        run.forward(batch, pixels=pixels())
        assert run.logits([batch.n_rows - 1]).tobytes() == generator.logits().tobytes()
        tokens.append(int(generator.step()[0][0]))
