"""Answer normalisation of the public VQA evaluation code, as LLaVA-Med 1.0 uses it: quirks and all.

The quirks matter because published numbers were made with them. Tests look at the text as given while edits act on the
edited text, so one " -" deletes every hyphen where a lone hyphen would have become a space; a digit-comma-digit
anywhere makes all punctuation vanish instead; and only the first 32 full stops are removed per call, because a flag of
value 32 sits where the count belongs. Source: `normalize_word`, `llava/eval/eval_metrics/glossary.py` of
microsoft/LLaVA-Med at tag v1.0.0; contraction table of GT-Vision-Lab/VQA.
"""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_DOT = re.compile(r"\.(?!\d)")
DOT_LIMIT = 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0",
    **{word: str(i) for i, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])},
}


def _contractions() -> dict[str, str]:
    without_apostrophe = """
        ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
        it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
        somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
        they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
        where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    """
    without_either_apostrophe = """
        couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
        there'd've they'd've we'd've who'd've wouldn't've you'd've
    """
    table = {
        "somebody'd": "somebodyd",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "yall'll": "y'all'll",
        "y'allll": "y'all'll",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }
    for value in without_apostrophe.split():
        table[value.replace("'", "")] = value
    for value in without_either_apostrophe.split():
        first, second, third = value.split("'")
        table[f"{first}{second}'{third}"] = value
        table[f"{first}'{second}{third}"] = value
    return table


CONTRACTIONS = _contractions()
"""Word without an apostrophe -> the word it stands for; the 114 entries of the table that can ever match."""


def normalize_word(text: str, dot_limit: int = DOT_LIMIT) -> str:
    """Lower-cased words of `text` without articles and punctuation, numbers up to ten as digits, joined by one space.

    dot_limit: how many full stops may be removed; 0 means all of them, which makes the function idempotent in practice.
    Colons, apostrophes, %, *, &, # and non-ASCII punctuation stay. Digits, white space and case are Unicode's.
    """
    edited = text
    delete_all = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        delete = delete_all or f"{mark} " in text or f" {mark}" in text
        edited = edited.replace(mark, "" if delete else " ")
    edited = _DOT.sub("", edited, count=dot_limit)
    words = (_NUMBERS.get(word, word) for word in edited.lower().split())
    kept = (CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
    return " ".join(kept).replace(",", "")
