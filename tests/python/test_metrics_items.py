"""Per-item metrics: golden tables of spec 4.4, nltk as the oracle for BLEU, and the strict set."""

import warnings
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st
from nltk.translate.bleu_score import sentence_bleu as nltk_bleu

from stllava.evaluate.bleu import sentence_bleu
from stllava.evaluate.metrics import closed_hits, exact_match, f1_precision_recall, open_hit_candidates, strict_values
from stllava.evaluate.normalize import normalize_word

ITEMS = [  # candidate, reference, EM, F1, P, R
    ("the left lung is affected", "left lung", 0.5, 0.666667, 0.5, 1),
    ("left left left", "left lung", 0.333333, 0.857143, 1, 0.75),
    ("lung", "left lung", 1, 0.666667, 1, 0.5),
    ("right lung", "left lung", 0.5, 0.5, 0.5, 0.5),
    ("no evidence of pneumothorax", "no", 0.25, 0.4, 0.25, 1),
    ("", "left", 0, 0, 0, 0),
    ("it is the ct scan of the chest", "ct", 0.166667, 0.285714, 0.166667, 1),
    ("two", "2", 1, 1, 1, 1),
    ("pleural effusion pleural effusion", "pleural effusion", 0.5, 1, 1, 1),
    ("in the canals of hering", "canals of hering", 0.75, 0.857143, 0.75, 1),
]


@pytest.mark.parametrize(("candidate", "reference", "em", "f1", "precision", "recall"), ITEMS)
def test_word_metrics(candidate, reference, em, f1, precision, recall):
    assert exact_match(candidate, reference) == pytest.approx(em, abs=1e-6)
    assert f1_precision_recall(candidate, reference) == pytest.approx((f1, precision, recall), abs=1e-6)


RAW_BLEU = [  # candidate, reference, BLEU-1, -2, -3 on raw white-space tokens
    ("the left lung is affected", "left lung", 0.4, 0.25, 0),
    ("lung", "left lung", 0.36787944, None, None),
    ("", "left", 0, 0, 0),
    ("it is the ct scan of the chest", "ct", 0.125, None, None),
    ("pleural effusion pleural effusion", "pleural effusion", 0.5, 0.333333, None),
    ("in the canals of hering", "canals of hering", 0.6, 0.5, 0.3333),
]


@pytest.mark.parametrize(("candidate", "reference", "bleu_1", "bleu_2", "bleu_3"), RAW_BLEU)
def test_bleu_table(candidate, reference, bleu_1, bleu_2, bleu_3):
    for order, expected in enumerate((bleu_1, bleu_2, bleu_3)):
        if expected is not None:
            weights = [float(i == order) for i in range(4)]
            got = sentence_bleu(candidate.split(), reference.split(), weights)
            assert got == pytest.approx(expected, abs=1e-4 if expected == 0.3333 else 1e-6)


TOKENS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(hypothesis=TOKENS, reference=TOKENS.filter(len), order=st.sampled_from([None, 0, 1, 2]))
def test_bleu_equals_nltk_bit_for_bit(hypothesis, reference, order):
    weights = (0.25,) * 4 if order is None else tuple(float(i == order) for i in range(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns about every precision of zero
        assert sentence_bleu(hypothesis, reference, weights) == nltk_bleu([reference], hypothesis, weights)


CLOSED = [  # reference, prediction, run_eval, batch, pvqa
    ("No", "The chest x-ray appears normal", 1, 1, 1),
    ("Yes", "There is an abnormality", 0, 0, None),
    ("Left", "The left side", 0, 1, 0),
    ("Left", "Yes, left side, no right", 1, 1, 1),
    ("Yes", "Eyes are shown", 1, 1, 1),
    ("No", "yes, diagnosis unclear", 1, 1, 1),
    ("MRI", "this is an MRI", 0, 1, 0),
    ("One", "1 lesion, not more", 1, 1, 1),
    ("", "anything", 0, 1, 0),
    ("No", "", 0, 0, 0),
]


@pytest.mark.parametrize(("reference", "prediction", "run_eval", "batch", "pvqa"), CLOSED)
def test_closed_hits(reference, prediction, run_eval, batch, pvqa):
    hits = closed_hits(normalize_word(prediction.lower()), normalize_word(reference.lower()))
    assert hits == {"run_eval": run_eval, "batch": batch, "pvqa": pvqa}


def test_open_hit_takes_the_first_of_the_best_candidates():
    assert open_hit_candidates("left lung", "left", ["left", "lung"]) == 1
    assert open_hit_candidates("left lung", "lung", ["left", "lung"]) == 0
    assert open_hit_candidates("left lung", "left lung", ["", "left lung"]) == 1
    assert open_hit_candidates("heart", "3", ["3", "4"]) == 1  # nothing matches, so the first one is taken


STRICT_CLOSED = [  # reference, prediction, hit
    ("No", "The chest x-ray appears normal", 0),
    ("Yes", "Eyes are shown", 0),
    ("No", "yes, diagnosis unclear", 0),
    ("No", "No. Yes would be wrong.", 1),
    ("Yes", "Yes, left side, no right", 1),
    ("Left", "The left side", 1),
    ("Left", "leftover", 0),
    ("left lung", "the lung, left", 0),
    ("left lung", "in the left lung.", 1),
    ("MRI", "this is an MRI", 1),
    ("One", "1 lesion, not more", 1),
    ("", "anything", 0),
    ("", "the", 1),
    ("No", "", 0),
]


@pytest.mark.parametrize(("reference", "prediction", "hit"), STRICT_CLOSED)
def test_strict_closed(reference, prediction, hit):
    values = strict_values(False, normalize_word(prediction.lower(), 0), normalize_word(reference.lower(), 0))
    assert values["hit"] == hit


def test_strict_overlap_does_not_reward_repetition():
    values = strict_values(True, "left left left", "left lung")
    assert values["precision"] == pytest.approx(1 / 3) and values["recall"] == 0.5
    assert values["f1"] == pytest.approx(0.4) and values["exact_match"] == values["hit"] == 0.0


WORDS = st.lists(st.sampled_from(["left", "lung", "yes", "no", "heart"]), max_size=6).map(" ".join)


@given(prediction=WORDS, reference=WORDS, is_open=st.booleans())
def test_strict_values_by_counting(prediction, reference, is_open):
    values = strict_values(is_open, prediction, reference)
    p, r = prediction.split(), reference.split()
    common = sum(min(p.count(word), r.count(word)) for word in set(p))
    if p and r:
        assert Fraction(common, len(p)) == Fraction(values["precision"]).limit_denominator(50)
        assert Fraction(common, len(r)) == Fraction(values["recall"]).limit_denominator(50)
        assert values["f1"] == pytest.approx(2 * common / (len(p) + len(r)))
    assert all(0.0 <= value <= 1.0 for value in values.values())
    if prediction == reference:
        assert values["exact_match"] == values["f1"] == values["hit"] == 1.0
