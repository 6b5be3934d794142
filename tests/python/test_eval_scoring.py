"""Scores of systems: values, intervals, comparisons, baselines, groups, published rows, refusals."""

import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from stllava.errors import FormatError
from stllava.evaluate import evaluate_vqa, is_attainable, mcnemar_exact
from stllava.evaluate.baselines import majority_answers, other_images
from stllava.evaluate.breakdown import groups_of
from stllava.evaluate.definitions import METRICS, metrics_of
from stllava.evaluate.published import PUBLISHED, SPLITS, rows_for
from stllava.evaluate.refusals import is_refusal
from stllava.evaluate.scoring import Scoring, compare, score_answers, scores_of

FAST = Scoring(n_resamples=200)
WORDS = ("left", "lung", "yes", "no", "heart", "abnormal", "x-ray", "The", "3.5")


def test_set(n, seed=0):
    draw = random.Random(seed)
    return [{"id": i, "image": f"{i % 7}.png", "answer_type": draw.choice(("OPEN", "CLOSED")), "modality": draw.choice(("CT", "MRI")),
             "conversations": [{"from": "human", "value": f"<image>\nquestion {i}?"},
                               {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.randint(1, 3)))}]} for i in range(n)]


def answers_to(items, seed=1, right=0.5):
    draw = random.Random(seed)
    return [{"question_id": item["id"], "text": item["conversations"][1]["value"] if draw.random() < right else
             " ".join(draw.choices(WORDS, k=draw.randint(0, 4)))} for item in items]


def test_values_are_those_of_evaluate_vqa_to_the_last_bit():
    items = test_set(200)
    answers = answers_to(items)
    scores = {score.metric.name: score for score in score_answers("a", items, answers, FAST).scores}
    rows = {"batch": {"recall": "open_recall", "f1 score": "open_f1", "precision": "open_precision", "exact match score": "open_exact_match",
                      "bleu_score": "open_bleu", "bleu_score_2": "open_bleu_2", "open accuracy": "open_accuracy_batch",
                      "yes/no accuracy": "closed_accuracy_batch", "recall_closed": "closed_recall"},
            "run_eval": {"yes/no accuracy": "closed_accuracy_run_eval"}, "pvqa": {"yes/no accuracy": "closed_accuracy_pvqa"}}
    for closed, named in rows.items():
        values = evaluate_vqa(items, answers, "compat", closed).values
        assert {row: values[row] for row in named} == {row: scores[name].value for row, name in named.items()}
    strict = evaluate_vqa(items, answers, "strict").values
    assert [strict[row] for row in ("recall", "f1", "exact match", "closed accuracy")] == [
        scores[f"strict_{name}"].value for name in ("open_recall", "open_f1", "open_exact_match", "closed_accuracy")]
    assert "open_accuracy_run_eval" not in scores  # it needs candidates
    assert scores["closed_accuracy_pvqa"].n < scores["closed_accuracy_batch"].n  # what it leaves out
    with_candidates = score_answers("a", items, answers, Scoring(n_resamples=50, candidates=["left lung", "heart"]))
    assert "open_accuracy_run_eval@1" in {score.metric.id for score in with_candidates.scores}


def test_every_metric_has_its_own_name_and_a_definition():
    assert len({metric.id for metric in METRICS}) == len(METRICS) and all(metric.id.endswith("@1") and metric.text.endswith(".") for metric in METRICS)
    assert {metric.metric_set for metric in metrics_of(["strict"])} == {"strict"}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.randoms())
def test_properties_of_scores(n, seed, order):
    """The order of items and of answers changes no value; shares are attainable; an interval holds no value outside [0, 1]."""
    items = test_set(n, seed)
    answers = answers_to(items, seed)
    found = score_answers("a", items, answers, FAST)
    for score in found.scores:
        assert (score.value is None and score.n == 0) or (0 <= score.low <= score.high <= 1)
        if score.metric.share and score.n:
            assert score.attainable and (score.value * score.n) == pytest.approx(round(score.value * score.n), abs=1e-9)
            assert is_attainable(round(100 * score.value, 2), score.n)
        else:
            assert score.attainable is None
    order.shuffle(items)
    order.shuffle(answers)
    shuffled = score_answers("a", items, answers, FAST)
    assert [score.n for score in shuffled.scores] == [score.n for score in found.scores]
    assert [score.value for score in shuffled.scores] == pytest.approx([score.value for score in found.scores], nan_ok=True, abs=1e-12)


def test_empty_and_onesided_sets():
    items = [item for item in test_set(30) if item["answer_type"] == "OPEN"]
    scores = score_answers("a", items, answers_to(items), FAST).scores
    closed = [score for score in scores if not score.metric.is_open]
    assert closed and all((score.n, score.value, score.low, score.attainable) == (0, None, None, None) for score in closed)
    assert all(score.value is None for score in score_answers("a", [], [], FAST).scores)


def test_comparison():
    items = test_set(300)
    better, worse = answers_to(items, 1, right=0.7), answers_to(items, 2, right=0.3)
    a, b = (score_answers(name, items, answers, Scoring()) for name, answers in (("a", better), ("b", worse)))
    found = compare(a, b, Scoring())
    by_name = {one.metric.name: one for one in found.differences}
    assert list(by_name) == ["open_recall", "open_f1", "closed_accuracy_batch", "strict_open_recall", "strict_open_f1", "strict_closed_accuracy"]
    closed = by_name["strict_closed_accuracy"]
    assert closed.n == a.report.n_closed and closed.test == "McNemar, exact"
    assert closed.p == mcnemar_exact(closed.only_first, closed.only_second) < 0.01
    assert closed.difference == pytest.approx((closed.only_first - closed.only_second) / closed.n)
    opened = by_name["open_recall"]
    assert opened.low < opened.difference < opened.high and opened.p == 1 / 2001 and opened.test == "paired bootstrap" and opened.only_first is None
    back = compare(b, a, Scoring())
    assert [(-one.difference, one.p) for one in back.differences] == [(one.difference, one.p) for one in found.differences]
    itself = compare(a, a, Scoring())
    assert itself.same == 1.0 and all(one.difference == 0.0 and one.p == 1.0 for one in itself.differences)
    texts = [{row["question_id"]: row["text"] for row in answers} for answers in (better, worse)]
    assert found.same == pytest.approx(sum(x.prediction_normalised == y.prediction_normalised for x, y in zip(a.items, b.items, strict=True)) / 300)
    assert all(item.prediction == texts[0][item.id] for item in a.items)
    with pytest.raises(ValueError, match="not scored on the same items"):
        compare(a, score_answers("c", items[:-1], better[:-1], FAST), FAST)


def test_pvqa_is_compared_where_both_count():
    items = test_set(100)
    a, b = (score_answers(name, items, answers_to(items, seed), Scoring(closed="pvqa", n_resamples=100)) for name, seed in (("a", 1), ("b", 2)))
    [closed] = [one for one in compare(a, b, Scoring(closed="pvqa", n_resamples=100)).differences if one.metric.name == "closed_accuracy_pvqa"]
    n = [next(score.n for score in system.scores if score.metric.name == "closed_accuracy_pvqa") for system in (a, b)]
    assert closed.n <= min(n)


def test_intervals_by_image_are_wider_where_an_images_questions_go_together():
    items = test_set(140)
    for item in items:
        item["answer_type"] = "CLOSED"
    answers = [{"question_id": item["id"], "text": item["conversations"][1]["value"] if int(item["image"][0]) % 2 else "nothing"} for item in items]
    widths = []
    for by_image in (False, True):
        [score] = [score for score in score_answers("a", items, answers, Scoring(by_image=by_image)).scores if score.metric.name == "strict_closed_accuracy"]
        widths.append(score.high - score.low)
    assert widths[1] > 2 * widths[0]


def test_all_right_is_not_certain():
    items = [item for item in test_set(140) if item["answer_type"] == "CLOSED"]
    answers = [{"question_id": item["id"], "text": item["conversations"][1]["value"]} for item in items]
    for by_image, n in ((False, len(items)), (True, 7)):
        [score] = [score for score in score_answers("a", items, answers, Scoring(by_image=by_image)).scores if score.metric.name == "strict_closed_accuracy"]
        assert (score.value, score.high) == (1.0, 1.0) and score.low == pytest.approx(0.025 ** (1 / n))


def test_majority():
    def item(i, kind, answer, question_type="PRES"):
        return {"id": i, "answer_type": kind, "answer": answer, "question_type": question_type}

    test = [item(0, "CLOSED", "Yes"), item(1, "CLOSED", "no"), item(2, "CLOSED", "No."), item(3, "OPEN", "lung"), item(4, "OPEN", "CT", "MODALITY"), item(5, "?", "x")]
    assert [row["text"] for row in majority_answers(test)] == ["no", "no", "no", "ct", "ct", ""]
    train = [item(9, "CLOSED", "yes"), item(8, "OPEN", "heart"), item(7, "OPEN", "MRI", "MODALITY"), item(6, "OPEN", "heart")]
    assert [row["text"] for row in majority_answers(test, train)] == ["yes", "yes", "yes", "heart", "heart", ""]
    assert [row["text"] for row in majority_answers(test, train, by_type=True)] == ["yes", "yes", "yes", "heart", "mri", ""]
    assert [row["id"] for row in majority_answers(test)] == [0, 1, 2, 3, 4, 5]
    score = score_answers("majority", test, majority_answers(test), FAST)
    assert next(one for one in score.scores if one.metric.name == "strict_closed_accuracy").value == pytest.approx(2 / 3)


def test_shuffled_images_are_all_others():
    names = [f"{i}.png" for i in range(20)] * 3
    other = other_images(names, 0)
    assert sorted(other) == sorted(other.values()) == sorted(set(names)) and all(a != b for a, b in other.items())
    assert other != other_images(names, 1) and other == other_images(names[::-1], 0)
    with pytest.raises(ValueError, match="at least two"):
        other_images(["a"], 0)


def test_groups():
    items = [{"modality": "CT ", "image_organ": "HEAD", "question_type": "PRES, POS"}, {"modality": "ct", "image_organ": "CHEST", "question_type": "PRES"},
             {"modality": "CT", "location": "Chest", "question_type": ""}]
    assert groups_of(items) == {"organ": {"chest": [1, 2], "head": [0]}, "question type": {"pres": [0, 1], "pos": [0]}}
    domains = [{"domain": {"mri": True, "ct_scan": False}}, {"domain": {"mri": False, "ct_scan": True}}]
    assert groups_of(domains) == {"modality": {"ct_scan": [1], "mri": [0]}}
    assert groups_of([]) == {}


def test_scores_of_groups_add_up():
    items = test_set(120)
    system = score_answers("a", items, answers_to(items), FAST)
    [groups] = groups_of(items).values()
    parts = [scores_of(system, FAST, rows) for rows in groups.values()]
    for whole, *some in zip(system.scores, *parts, strict=True):
        assert whole.n == sum(part.n for part in some)
        assert whole.value * whole.n == pytest.approx(sum((part.value or 0) * part.n for part in some))


def test_published_rows():
    assert SPLITS == {"vqa-rad": (179, 272), "slake": (645, 416), "pathvqa": (3370, 3391)}
    for name, counts in SPLITS.items():
        rows, text = rows_for(name, *counts)
        assert rows and rows[0].model == "STLLaVA-Med 7B" and "orientation" in text
        assert rows == rows_for(None, *counts)[0] and name in rows_for("my.json", *counts)[1]
        assert rows_for(name, counts[0], counts[1] - 1) == ([], rows_for(name, counts[0], counts[1] - 1)[1])
        assert str(counts[1] - 1) in rows_for(name, counts[0], counts[1] - 1)[1]
    assert rows_for("other", 3, 4) == ([], "No published row is known for this test set.")
    impossible = {(row.model, row.benchmark): row.unattainable for row in PUBLISHED if row.unattainable}
    assert impossible[("STLLaVA-Med 7B", "vqa-rad")] == {"closed_accuracy_batch": 60.35}
    assert not [key for key in impossible if key[0].startswith(("LLaVA-Med,", "LLaVA-7B", "LLaVA-Med 60k", "LLaVA-Med Vicuna"))]
    assert all(set(row.percent) <= {metric.name for metric in METRICS} for row in PUBLISHED)


REFUSALS = ["I'm sorry, but I cannot provide a diagnosis.", "As an AI language model, I do not see pictures.", "It is not possible to determine the organ.",
            "I am unable to tell.", "The modality cannot be determined from this image.", "Please consult a radiologist.", "I don't know.",
            "I don’t have enough information"]
ANSWERS = ["No", "There is no image of the heart.", "A tumour cannot be excluded.", "I cannot see a fracture.", "The answer is unknown pathology", "",
           "Yes, the patient could not be supine.", "an ai", "The left lung."]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_settings_are_checked():
    for wrong in ({"metric_sets": ()}, {"metric_sets": ("loose",)}, {"closed": "best"}, {"n_resamples": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Scoring(**wrong)
    with pytest.raises(FormatError, match="1 missing"):
        score_answers("a", test_set(3), answers_to(test_set(3))[1:], FAST)
    lost = score_answers("a", test_set(3), answers_to(test_set(3))[1:], Scoring(unmatched="wrong", n_resamples=50))
    assert lost.report.n_unanswered == 1 and np.isfinite(lost.values).any()


test_set.__test__ = False
