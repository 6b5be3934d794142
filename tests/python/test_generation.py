"""generate and stream: what a call draws is what its definition says, each prefix is computed once, and what cannot be answered is said before."""

from __future__ import annotations

import numpy as np
import pytest
from talking import picture, talking_model
from tiny import tiny_model

import stllava_c
from stllava.data.steps import item_seed
from stllava.errors import ConfigError
from stllava.generation import generate

IDS = [1, 306, 29871, -200, 4, 5]


@pytest.fixture(scope="module")
def model():
    return talking_model()


@pytest.fixture
def computed(monkeypatch):
    """(rows of the batch, images) of every generator made."""
    made, real = [], stllava_c.Generator

    def generator(core, batch, *, pixels=None, **options):
        made.append((batch.n_rows, 0 if pixels is None else len(pixels)))
        return real(core, batch, pixels=pixels, **options)

    monkeypatch.setattr(stllava_c, "Generator", generator)
    return made


def test_samples_of_a_prompt_and_questions_of_an_image_share_their_rows(model, computed, tmp_path):
    picture().save(tmp_path / "a.png")
    prompts = [[1, 306, -200, 4, 5 + i] for i in range(12)]
    shared = picture()
    generate(model, prompts, [shared] * 12, max_new_tokens=2, num_return_sequences=3)
    generate(model, prompts, [tmp_path / "a.png", str(tmp_path / "a.png")] * 6, max_new_tokens=2)  # one file, whatever names it
    assert computed == [(2 + 16 + 1 + 12, 1)] * 2


def test_a_penalty_and_a_least_length_are_transformers(model):
    """Each token against its definition on the logits of the whole sequence; the log-probability is that of the model."""
    settings = dict(max_new_tokens=8, min_new_tokens=5, repetition_penalty=4.0, temperature=0.0)
    [[free]] = generate(model, [IDS], [picture()], max_new_tokens=8, eos_token_id=())
    eos = free.ids[1]
    [[found]] = generate(model, [IDS], [picture()], eos_token_id=eos, **settings)
    ids, pixels = list(IDS), [model.image_processor(picture())]
    for step, (token, logp) in enumerate(zip(found.ids, found.logps, strict=True)):
        plain = model.logits(ids, pixels)[-1].astype(np.float64)
        logits = plain.copy()
        for seen in {i for i in ids if i >= 0}:
            logits[seen] = plain[seen] * 4 if plain[seen] < 0 else plain[seen] / 4
        if step < 5:
            logits[eos] = -np.inf
        assert token == int(logits.argmax())
        assert logp == pytest.approx(plain[token] - np.log(np.exp(plain - plain.max()).sum()) - plain.max(), abs=1e-5)
        ids.append(token)
    assert len(found.ids) >= 5 and len(set(found.ids)) == len(found.ids) != len(set(free.ids))


def test_one_seed_for_a_call(model):
    options = dict(max_new_tokens=5, temperature=1.0, num_return_sequences=2)
    prompts = [[1, 306], [1, 307, 308]]
    found = generate(model, prompts, seed=11, **options)
    assert found == generate(model, prompts, seeds=[item_seed(11, i, j) for i in range(2) for j in range(2)], **options)
    assert found != generate(model, prompts, seed=12, **options)
    assert found[:1] == generate(model, prompts[:1], seed=11, **options)
    with pytest.raises(ValueError, match="seed and seeds are given"):
        generate(model, prompts, seed=1, seeds=[1, 2, 3, 4], **options)


def test_tokens_are_told_as_they_come(model):
    told: dict[tuple[int, int], list] = {}
    prompts = [[1, 306], [1, 306, 307], [1, 400]]
    found = generate(model, prompts, seed=1, temperature=1.0, max_new_tokens=6, num_return_sequences=2, batch_size=2,
                     on_token=lambda i, j, token, text: told.setdefault((i, j), []).append((token, text)))
    for (i, j), steps in told.items():
        assert [token for token, _ in steps] == found[i][j].ids and "".join(text for _, text in steps) == found[i][j].text
    assert len(told) == 6


def test_a_stream_is_the_text_of_generate(model):
    [[whole]] = generate(model, ["<image>\nWhat is it?"], [picture()], seeds=[5], temperature=1.0, max_new_tokens=9)
    pieces = list(model.stream("<image>\nWhat is it?", [picture()], seed=5, temperature=1.0, max_new_tokens=9))
    assert "".join(pieces) == whole.text and len(pieces) > 3
    word = whole.text.split()[4]
    cut = list(model.stream("<image>\nWhat is it?", [picture()], seed=5, temperature=1.0, max_new_tokens=9, stop=word))
    assert "".join(cut) == whole.text[:whole.text.index(word)].strip()
    with pytest.raises(ValueError, match="the prompt has 1 image markers but 0 images"):
        model.stream("<image>\nWhat is it?")
    with pytest.raises(TypeError, match="temprature"):
        model.stream("What is it?", temprature=1.0)


def test_an_answer_ends_with_the_context():
    model = talking_model(max_position_embeddings=32)
    prompts = [[1, -200, *range(300, 310)], [1, 5]]
    [[long], [short]] = generate(model, prompts, [picture(), None], max_new_tokens=25, eos_token_id=())
    assert (len(long.ids), len(short.ids)) == (32 - 27, 25) and not long.finished
    assert len(long.text.split()) == 5


def test_what_does_not_fit_is_named_before_anything_is_computed(computed):
    model = talking_model(max_position_embeddings=32)
    with pytest.raises(ConfigError, match=r"prompt 1 is 32 tokens long \(16 of text, 1 images of 16\), but the model's context is 32 \(max_position_emb"):
        generate(model, [[1, 5], [1, -200, *range(300, 315)]], [None, picture()])
    with pytest.raises(ConfigError, match="prompt 2 has 2 image markers but 1 images"):
        generate(model, [[1, 5], [1, -200], [-200, -200]], [None, picture(), picture()], batch_size=1)
    for settings, text in (({"repetition_penalty": -1.0}, "repetition_penalty"), ({"min_new_tokens": -1}, "min_new_tokens"), ({"max_new_tokens": 0}, "max_new")):
        with pytest.raises(ValueError, match=text):
            generate(model, [[1, 5]], **settings)
    assert computed == [(2, 0)] * 3  # the core refuses these, as it begins


def test_a_padded_vocabulary_does_not_end_an_answer():
    """Ids above the tokenizer's can be drawn from a checkpoint whose embedding was padded; they have no text."""
    model = tiny_model()
    model.tokenizer.vocab_size = 200
    [[found]] = generate(model, [[1, 5]], max_new_tokens=4, eos_token_id=())
    assert len(found.ids) == 4 and max(found.ids) >= 200
