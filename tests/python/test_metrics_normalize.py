"""normalize_word: the golden table, the recorded strings, and a line-by-line port of the rules as a second opinion."""

import random
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


# The contraction table once more, from spec 4.4 alone: (a) values whose key lacks the apostrophe, (b) values whose two keys lack one of the two, (c) others.
ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't might've
mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll
that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
TWO = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've
wouldn't've you'd've"""
A, B = ONE.split(), TWO.split()
C = {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "yall'll": "y'all'll", "y'allll": "y'all'll",
     "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}


def spelled_out():
    table = dict(C)
    for value in A:
        table[value.replace("'", "")] = value
    for value in B:
        first, second = value.index("'"), value.rindex("'")
        table[value[:first] + value[first + 1:]] = value
        table[value[:second] + value[second + 1:]] = value
    return table


TABLE = spelled_out()
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NAMES = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def port(t):
    """The rules of spec 4.4, one line each, on characters and without sharing anything with the package."""
    digit = [unicodedata.category(c) == "Nd" for c in t]
    dc = any(t[i] == "," and digit[i - 1] and digit[i + 1] for i in range(1, len(t) - 1))
    u = t
    for p in MARKS:
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
    out = []
    for w in words:
        w = NAMES.get(w, w)
        if w and w not in ("a", "an", "the"):
            out.append(TABLE.get(w, w))
    return " ".join(out).replace(",", "")


def test_the_two_tables_are_the_same():
    assert len(A) == 73 and len(B) == 16 and len(TABLE) == 73 + 32 + 9 == 114
    assert TABLE == CONTRACTIONS


ATOMS_OF = (
    [*"ab1٣3.,;/[]\"{}()=+\\_-><@`?! \t\n\u00a0\u2003'İ…", "the", " an ", "one", "none ", "dont", "isnt ", "1,0", ". ", "." * 20]
)
ATOMS = st.sampled_from(ATOMS_OF)


@given(st.one_of(st.text(), st.lists(ATOMS, max_size=25).map("".join)))
@example("." * 33)
@example("٣,٣ a-b")
@example("1,000 x-ray...")
@example("İstanbul")
def test_equal_to_the_line_by_line_port(text):
    assert normalize_word(text) == port(text)


PIECES = [*ATOMS_OF, *"abcdefghijklmnopqrstuvwxyz0123456789.,;/-'?! ", *MARKS, *NAMES, *A, *B, *TABLE, "left lung", "x-ray", "t1/t2", "3.5 cm", "1,000", " - ", ", ",
          ". ", "...", "." * 33, "\u0663,\u0663", "\u00a0", "\u2028", "\x1c", "\x85", "\u0130", "\u00df", "\u03a3", "\U0001d7d8", "e\u0301", "\ud800", "% *&#:"]


def random_text(draw):
    """Mostly pieces that rules are about, sometimes any characters at all; as given or in lower case, as the scripts call it."""
    kind = draw.random()
    if kind < 0.1:
        text = "".join(chr(draw.choice((draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x110000)))) for _ in range(draw.randrange(12)))
    else:
        text = ("" if kind < 0.6 else " ").join(draw.choices(PIECES, k=draw.randrange(12)))
    return text.lower() if draw.random() < 0.5 else text


def test_random_strings_without_a_difference(amount):
    """One million with --long."""
    draw = random.Random(20)
    different = [text for text in (random_text(draw) for _ in range(amount(100_000, 1_000_000))) if normalize_word(text) != port(text)]
    assert different == []
