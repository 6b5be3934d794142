"""Conversations: every turn is what a fresh model would say to the whole, and costs only what is new."""

from __future__ import annotations

import base64
import gc
import io
from dataclasses import replace

import numpy as np
import pytest
from talking import picture, talking_model
from tiny import tiny_model

import stllava_c
from stllava.checkpoint.peft import LoraConfig
from stllava.conversation import conv_templates
from stllava.data.steps import item_seed
from stllava.errors import ConfigError, StllavaError
from stllava.generation import generate
from stllava.text.encode import encode_conversation

QUESTIONS = ["What is it?", "Is it large?", "Why do you think so?"]


def fresh(model, questions, answers, images, k, template="v1", **settings):
    """The answer number k to the whole conversation, from nothing."""
    dialogue = conv_templates[template].copy()
    for question, answer in zip(questions[:k + 1], [*answers[:k], None], strict=True):
        dialogue.append_message(dialogue.roles[0], question)
        dialogue.append_message(dialogue.roles[1], answer)
    [[found]] = generate(model, [encode_conversation(dialogue, model.tokenizer)], [tuple(images)], seeds=[item_seed(7, k)], **settings)
    return found


@pytest.mark.parametrize("make, template, settings", [
    (talking_model, "v1", {}), (talking_model, "v1", {"temperature": 1.0, "repetition_penalty": 1.5}), (talking_model, "mistral_instruct", {"temperature": 0.9}),
    (tiny_model, "v1", {"temperature": 1.0, "top_k": 50, "top_p": 0.9}), (lambda: talking_model("f64"), "v1_sq", {"temperature": 1.0})])
def test_a_turn_is_that_of_a_fresh_model(make, template, settings):
    """Texts, ids and log-probabilities, with an image in the first turn and another in the third; words of `tiny_model` are never tokenised as drawn."""
    model = make()
    session = model.chat_session(template, seed=7, max_new_tokens=6, **settings)
    answers, questions, images = [], [], []
    for k, question in enumerate(QUESTIONS):
        new = [picture(k)] if k != 1 else []
        images += new
        questions.append("<image>\n" * len(new) + question)
        reply = session.send(question, new)
        pieces = list(reply)
        want = fresh(model, questions, answers, images, k, template, max_new_tokens=6, **settings)
        assert reply.generation == want and "".join(pieces) == want.text
        answers.append(want.text)
    assert session.messages == [{"role": role, "content": text} for pair in zip(questions, answers, strict=True)
                                for role, text in zip(("user", "assistant"), pair, strict=True)]


def test_a_turn_costs_what_is_new():
    model = talking_model()
    session = model.chat_session(max_new_tokens=5)
    session.send("What is it?", [picture()]).finish()
    first = session.rows_computed
    for question in QUESTIONS[1:]:
        computed = session._decoder.n_rows
        reply = session.send(question)
        total = len(session._prompt) + 15  # the image's place has 16 rows
        assert session.rows_computed == total - computed < first  # one for the last word, whose row was not needed before, and the question
        reply.finish()


def test_a_turn_left_early_is_kept_as_far_as_it_came():
    model = talking_model()
    session = model.chat_session(seed=7, max_new_tokens=8)
    reply = session.send("What is it?")
    said = next(reply) + next(reply)
    assert session.messages[-1] == {"role": "assistant", "content": said}
    after = session.send("Go on.").finish()
    assert list(reply) == []  # it cannot go on behind the conversation's back
    assert after == fresh(model, ["What is it?", "Go on."], [said], (), 1, max_new_tokens=8)


def test_an_answer_interrupted_before_its_first_word_never_was():
    model = talking_model()
    session = model.chat_session(seed=7, max_new_tokens=4)
    session.send("Lost.")
    assert session.messages == []
    assert session.send("What is it?").finish() == fresh(model, ["What is it?"], [], (), 0, max_new_tokens=4)


@pytest.mark.parametrize("interrupt", [1, 2, 3])
def test_an_interrupt_anywhere_leaves_a_session_that_goes_on(monkeypatch, interrupt):
    """KeyboardInterrupt before, inside or right after the call that computes the second turn's prompt."""
    model = talking_model()
    session = model.chat_session(seed=7, max_new_tokens=4)

    class Interrupted:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def extend(self, batch, **options):
            if interrupt == 2:
                stllava_c._core._fail_allocation(1, True)
            if interrupt > 1:
                try:
                    self.real.extend(batch, **options)
                except MemoryError:
                    pass
                finally:
                    stllava_c._core._fail_allocation(0)
            raise KeyboardInterrupt

    def interrupted(text):
        real, before = session._decoder, session.messages
        session._decoder = Interrupted(real)
        with pytest.raises(KeyboardInterrupt):
            session.send(text)
        assert session.messages == before
        session._decoder = real

    session.send(QUESTIONS[0], [picture()])  # left before its first word
    interrupted("Lost.")
    first = session.send(QUESTIONS[0], [picture()]).finish()
    assert first == fresh(model, [f"<image>\n{QUESTIONS[0]}"], [], [picture()], 0, max_new_tokens=4)
    interrupted("Lost.")
    second = session.send(QUESTIONS[1]).finish()
    assert second == fresh(model, [f"<image>\n{QUESTIONS[0]}", QUESTIONS[1]], [first.text], [picture()], 1, max_new_tokens=4)


def test_memory_goes_with_the_session():
    model = talking_model()
    gc.collect()
    live = stllava_c._core._live_allocations()
    gc.disable()
    try:
        session = model.chat_session(max_new_tokens=3)
        session.send("What is it?").finish()
        assert stllava_c._core._live_allocations() > live
        session.reset()
        assert stllava_c._core._live_allocations() == live
        reply = session.send("What is it?")
        del session
        assert len(list(reply)) == 3  # an answer outlives it
        del reply
        assert stllava_c._core._live_allocations() == live
    finally:
        gc.enable()


def test_reset_and_adapters_and_settings():
    model = talking_model()
    session = model.chat_session(seed=7, max_new_tokens=4)
    first = session.send(QUESTIONS[0]).finish()
    session.reset()
    assert session.messages == [] and session.send(QUESTIONS[0]).finish() == first
    session.settings = replace(session.settings, max_new_tokens=2)
    assert len(session.send(QUESTIONS[1]).finish().ids) == 2
    adapted = talking_model()
    names = adapted.add_lora(LoraConfig(r=2))
    for name in names:
        adapted.core.tensor(name).numpy()[...] = np.random.default_rng(len(name)).normal(0, 0.3, adapted.core.tensor(name).numpy().shape)
    session = adapted.chat_session(seed=7, max_new_tokens=4)
    one = session.send(QUESTIONS[0]).finish()
    with adapted.disable_adapters():
        two = session.send(QUESTIONS[1]).finish()
        assert two == fresh(adapted, QUESTIONS, [one.text], (), 1, max_new_tokens=4)
    assert session.send(QUESTIONS[2]).finish() == fresh(adapted, QUESTIONS, [one.text, two.text], (), 2, max_new_tokens=4)


def test_stop_strings_of_the_template_end_an_answer():
    model = talking_model()
    word = model.chat_session("v0", max_new_tokens=9).send("What?").finish().text.split()[3]
    house = replace(conv_templates["v0"], sep=word)
    reply = model.chat_session(house, max_new_tokens=9).send("What?")
    assert word not in "".join(reply) and reply.generation.finished
    assert word not in model.chat([{"role": "user", "content": "What?"}], template=house, max_new_tokens=9)


def test_what_cannot_be_sent_changes_nothing(tmp_path):
    model = talking_model(max_position_embeddings=96)
    session = model.chat_session(seed=7, max_new_tokens=4)
    first = session.send(QUESTIONS[0]).finish()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no")
    for text, images, error, words in (("long " * 50, [], ConfigError, "the conversation is .* context is 96"), ("a <image>", [], ValueError, "1 image mark"),
                                       ("", [], ValueError, "nothing to send"), ("a", [tmp_path / "bad.png"], StllavaError, "bad.png")):
        with pytest.raises(error, match=words):
            session.send(text, images)
    assert session.send(QUESTIONS[1]).finish() == fresh(model, QUESTIONS, [first.text], (), 1, max_new_tokens=4)


def test_a_model_that_says_image_shows_none():
    model = talking_model()
    session = model.chat_session(max_new_tokens=2)
    session.send("What?").finish()
    session._turns[0].answer.text = "an <image> of"
    assert session.send("Which?").finish().text


def test_messages_of_the_openai_kind():
    model = talking_model()
    data = io.BytesIO()
    picture().save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    want = model.chat([{"role": "user", "content": "What is it?"}], [picture()], max_new_tokens=5)
    for part in ({"type": "image_url", "image_url": {"url": url, "detail": "high"}}, {"type": "image", "image": picture()}):
        assert model.chat([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}], max_new_tokens=5) == want
    system = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is it?"}]
    text = model.chat(system, [picture()], max_new_tokens=5)
    assert text == model.chat_session(system="Be short.", max_new_tokens=5).send("What is it?", [picture()]).finish().text
    for messages, words in (([{"role": "user", "content": [{"type": "audio"}]}], "message 0 has a part"), ([{"role": "user", "content": 3}], "a int as content"),
                            ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}], "nothing is fetched"),
                            ([{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,@@"}]}], "not base64"),
                            ([{"role": "assistant", "content": "a"}], "message 0 has role 'assistant'"), ([], "the last message must be the user's")):
        with pytest.raises(ValueError, match=words):
            model.chat(messages)
