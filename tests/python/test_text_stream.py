"""Text while its tokens come: the pieces are the text, whole characters, and nothing of a stop string or behind it."""

from __future__ import annotations

import text_data
from hypothesis import example, given, settings, strategies as st

from stllava.text.stream import TextStream

TOKENIZER = text_data.tokenizer()
BYTES = range(3, 259)  # <0x00> ... <0xFF>
tokens = st.one_of(st.integers(0, 31_999), st.sampled_from([0, 1, 2, *BYTES, 29871, 29871]))  # 29871: a space alone


def pieces_of(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[TextStream, list[str]]:
    stream = TextStream(TOKENIZER, stop)
    return stream, [*(stream.add(i) for i in ids), stream.close()]


@settings(max_examples=200, deadline=None)
@given(st.lists(tokens, max_size=30))
def test_pieces_are_the_text(ids):
    stream, pieces = pieces_of(ids)
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids).strip()
    assert not stream.stopped


@settings(max_examples=200, deadline=None)
@example([], ["b", "aba"], "aba")
@given(st.lists(tokens, max_size=20), st.lists(st.text("ab #\n", min_size=1, max_size=4), max_size=3), st.text("ab #\né長🩻", max_size=30))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(ids, stop, words):
    ids = [*ids, *TOKENIZER.encode(words, add_bos=False, parse_special=False)]
    for n in range(len(ids) + 1):
        whole = TOKENIZER.decode(ids[:n])
        if n < len(ids) and whole.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # perhaps half a character
        cut = min((at for at in map(whole.find, stop) if at >= 0), default=-1)
        if cut >= 0:
            break
    stream, pieces = pieces_of(ids, tuple(stop))
    assert stream.stopped == (cut >= 0)
    assert "".join(pieces) == stream.text == (whole if cut < 0 else whole[:cut]).strip()


def test_half_a_character_is_held_back():
    ids = [*TOKENIZER.encode("a", add_bos=False), *(3 + byte for byte in "🩻".encode())]
    assert pieces_of(ids)[1] == ["a", "", "", "", "🩻", ""]
    assert pieces_of(ids[:-1])[1] == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}" * 3]  # the answer ended there


def test_a_stop_string_across_tokens_is_never_shown():
    ids = TOKENIZER.encode("It is a lung.\n###Human: why?", add_bos=False)
    stream, pieces = pieces_of(ids, ("###Human",))
    assert stream.text == "It is a lung." and stream.stopped and all("#" not in piece for piece in pieces)
    n_needed = next(n for n in range(len(ids)) if "###Human" in TOKENIZER.decode(ids[:n]))
    stream, pieces = pieces_of(ids[:n_needed - 1], ("###Human",))
    assert stream.text.startswith("It is a lung.\n###") and not stream.stopped  # it did not come after all


def test_every_token_is_decoded_a_few_times(monkeypatch):
    lengths = []
    decode = TOKENIZER.decode
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    ids = TOKENIZER.encode("The chest film shows a small effusion on the left side. " * 20, add_bos=False)
    pieces_of(ids, ("###",))
    assert len(ids) > 200 and max(lengths) <= 4


def test_special_and_unknown_ids_have_no_text():
    ids = TOKENIZER.encode("one two", add_bos=False)
    assert pieces_of([1, ids[0], 2, 32_063, *ids[1:], 2])[0].text == "one two"
    assert pieces_of([])[0].text == "" and pieces_of([2, 1])[0].text == ""
