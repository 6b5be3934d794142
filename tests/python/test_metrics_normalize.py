"""normalize_word: the golden table, the recorded strings, and a line-by-line port of the rules as a second opinion."""

import re
import unicodedata

import pytest
from hypothesis import example, given, strategies as st
from text_data import GOLDENS, load

from stllava.evaluate.normalize import CONTRACTIONS, normalize_word

GOLDEN = {
    "the left lung.": "left lung",
    "a right-sided pleural effusion, and an x-ray.": "right sided pleural effusion and x ray",
    "x-ray - chest": "xray chest",
    "bi-lateral , left": "bi lateral left",
    "t1/t2 weighted": "t1 t2 weighted",
    "1,000 cells": "1000 cells",
    "1,2 a-b": "12 ab",
    "one, two; three": "1 2 3",
    "none.": "0",
    "ten-year": "10 year",
    "it's a chest x-ray (pa view)": "it's chest x ray pa view",
    "3.5 cm": "3.5 cm",
    "3. 5": "3 5",
    "3.5.": "3.5",
    "v1.2.3": "v1.2.3",
    "no.5": "no.5",
    "e.g. the heart": "eg heart",
    "hyphen-ated, e.g., this": "hyphen ated eg this",
    "yes/no": "yes no",
    "left,right": "left right",
    "left ,right": "left right",
    "dont": "don't",
    "dont,": "don't",
    "isnt it?": "isn't it",
    "somebody'd": "somebodyd",
    "a:b": "a:b",
    "a_b": "b",
    "50% - 60%": "50% 60%",
    "the": "",
    "....": "",
    "...a": "",
    "x" + "." * 40: "x" + "." * 8,
    "co2+ / h2o": "co2 h2o",
    "[1]": "1",
    "<unk>": "unk",
    "a\u00a0b": "b",
    "its shes whatd ill well were": "its shes whatd ill well were",
    "yall'd've": "y'all'd've",
    "couldnt've couldn'tve": "couldn't've couldn't've",
    "twas oclock": "'twas o'clock",
}


@pytest.mark.parametrize(("text", "expected"), GOLDEN.items(), ids=[repr(text)[:30] for text in GOLDEN])
def test_golden_table(text, expected):
    assert normalize_word(text) == expected


def test_recorded_strings():
    rows = load(GOLDENS / "metrics" / "normalise.json")["rows"]
    assert len(rows) >= 150
    for text, once, twice in rows:
        assert normalize_word(text) == once
        assert normalize_word(once) == twice


def test_dots_beyond_the_limit_need_a_second_call():
    once = normalize_word("x" + "." * 40)
    assert normalize_word(once) == "x"
    assert normalize_word("x" + "." * 40, dot_limit=0) == "x"


def test_contraction_table():
    assert len(CONTRACTIONS) == 114
    assert all(key == key.lower() and key != value for key, value in CONTRACTIONS.items())
    restored = [value for key, value in CONTRACTIONS.items() if key.replace("'", "") == value.replace("'", "")]
    assert len(restored) == 114  # nothing but apostrophes ever differs


def port(t):
    """The rules of spec 4.4, one line each, on characters and without sharing anything with the package."""
    marks = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
    digit = [unicodedata.category(c) == "Nd" for c in t]
    dc = any(t[i] == "," and digit[i - 1] and digit[i + 1] for i in range(1, len(t) - 1))
    u = t
    for p in marks:
        if t.find(p + " ") >= 0 or t.find(" " + p) >= 0 or dc:
            u = "".join(c for c in u if c != p)
        else:
            u = "".join(" " if c == p else c for c in u)
    kept, removed = [], 0
    for i, c in enumerate(u):
        followed_by_digit = i + 1 < len(u) and unicodedata.category(u[i + 1]) == "Nd"
        if c == "." and not followed_by_digit and removed < 32:
            removed += 1
        else:
            kept.append(c)
    words = re.split(r"[\s\x1c-\x1f]+", "".join(kept).lower())
    names = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    values = ["0", "0", *map(str, range(1, 11))]
    out = []
    for w in words:
        if w in names:
            w = values[names.index(w)]
        if w and w not in ("a", "an", "the"):
            out.append(CONTRACTIONS.get(w, w))
    return " ".join(out).replace(",", "")


ATOMS = st.sampled_from(
    [*"ab1٣3.,;/[]\"{}()=+\\_-><@`?! \t\n\u00a0\u2003'İ…", "the", " an ", "one", "none ", "dont", "isnt ", "1,0", ". ", "." * 20]
)


@given(st.one_of(st.text(), st.lists(ATOMS, max_size=25).map("".join)))
@example("." * 33)
@example("٣,٣ a-b")
@example("1,000 x-ray...")
@example("İstanbul")
def test_equal_to_the_line_by_line_port(text):
    assert normalize_word(text) == port(text)
