"""Whole evaluations: the recorded case, joining by id, counts, reports, intervals."""

import io
import json

import pytest
from cases_metrics import replay_metrics
from rich.console import Console
from text_data import GOLDENS, load

from stllava.errors import FormatError
from stllava.evaluate import evaluate_vqa, is_attainable, paired_bootstrap, print_report

CASE = GOLDENS / "metrics"


def reference(item_id, answer_type, answer, key="conversations"):
    return {"id": item_id, "answer_type": answer_type, key: [{"value": "?"}, {"from": "gpt", "value": answer}]}


def prediction(item_id, text):
    return {"question_id": item_id, "text": text}


REFERENCES = [reference(1, "OPEN", "left lung"), reference("2", "CLOSED ", "Yes"), reference(3, "closed", "axial", "conversatons")]
PREDICTIONS = [prediction(3, "An axial plane"), prediction("1", "lung"), prediction(2, "There is no fracture")]


def test_recorded_case_bit_for_bit():
    replayed, recorded = replay_metrics(CASE), load(CASE / "expected.json")
    assert replayed["items"] == recorded["items"]
    assert replayed["corpus_percent"] == recorded["corpus_percent"]
    assert (replayed["n_open"], replayed["n_closed"]) == (recorded["n_open"], recorded["n_closed"])
    assert replayed["normalise"] == load(CASE / "normalise.json")["rows"]


def test_items_are_joined_by_id_and_types_are_folded():
    report = evaluate_vqa(REFERENCES, PREDICTIONS)
    assert (report.n_open, report.n_closed, report.n_skipped) == (1, 2, 0)
    assert report.variant == "compat/batch"
    assert [item.prediction for item in report.items] == ["lung", "There is no fracture", "An axial plane"]
    assert report.values["recall"] == 0.5 and report.values["yes/no accuracy"] == 0.5
    assert report.percent["recall"] == 50.0


def test_the_order_of_predictions_does_not_matter():
    assert evaluate_vqa(REFERENCES, PREDICTIONS) == evaluate_vqa(REFERENCES, PREDICTIONS[::-1])


def test_variants_of_closed_accuracy():
    accuracy = {
        closed: evaluate_vqa(REFERENCES, PREDICTIONS, closed=closed).values["yes/no accuracy"]
        for closed in ("batch", "run_eval", "pvqa")
    }
    # The answer "no" without the reference "yes" leaves pvqa's denominator, where it should have been a zero.
    assert accuracy == {"batch": 0.5, "run_eval": 0.0, "pvqa": 0.0}
    only = [REFERENCES[1]], [PREDICTIONS[2]]
    assert evaluate_vqa(*only, closed="pvqa").values["yes/no accuracy"] is None
    assert evaluate_vqa(*only, metric_set="strict").values["closed accuracy"] == 0.0


def test_strict_set():
    report = evaluate_vqa(REFERENCES, PREDICTIONS, metric_set="strict")
    assert report.variant == "strict" and report.closed is None
    assert report.values["closed accuracy"] == 0.5 and report.values["f1"] == pytest.approx(2 / 3)


def test_path_vqa_types_numbers_and_plain_answers():
    items = [
        {"question_id": 1, "answer_type": "yes/no", "answer": "no"},
        {"question_id": 2, "answer_type": "number", "answer": 3},
        {"question_id": 3, "answer_type": "other", "answer": "kidney"},
        {"question_id": 4, "answer_type": "", "answer": "kidney"},
    ]
    report = evaluate_vqa(items, [prediction(i, "3 no") for i in (1, 2, 3, 4)])
    assert (report.n_open, report.n_closed, report.n_skipped) == (2, 1, 1)
    assert report.items[1].reference == "3" and report.items[1].values["recall"] == 1.0


def test_open_accuracy_of_run_eval_needs_candidates():
    assert "open accuracy" not in evaluate_vqa(REFERENCES, PREDICTIONS, closed="run_eval").values
    with_list = evaluate_vqa(REFERENCES, PREDICTIONS, closed="run_eval", candidates=["left lung", 3])
    with_object = evaluate_vqa(REFERENCES, PREDICTIONS, closed="run_eval", candidates={"0": ["left lung", 3]})
    assert with_list.values["open accuracy"] == with_object.values["open accuracy"] == 1.0


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (PREDICTIONS[1:], "1 missing .first '3'"),
        ([*PREDICTIONS, prediction(3, "again")], "1 duplicate .first '3'"),
        ([*PREDICTIONS, prediction(9, "x")], "1 surplus .first '9'"),
        ([{"text": "x"}], "prediction 0: no 'id'"),
        ([{"id": 1}], "prediction 0 .id 1.: no 'text'"),
    ],
)
def test_predictions_that_do_not_match(predictions, message):
    with pytest.raises(FormatError, match=message):
        evaluate_vqa(REFERENCES, predictions)


def test_unmatched_items_can_be_counted_as_wrong():
    predictions = [prediction("1", "left lung"), prediction(1, "left lung"), prediction(2, "yes"), prediction(9, "x")]
    report = evaluate_vqa(REFERENCES, predictions, unmatched="wrong")
    assert (report.n_unanswered, report.n_surplus) == (2, 1)
    assert report.values["recall"] == 0.0 and report.values["yes/no accuracy"] == 0.5


def test_damaged_references():
    with pytest.raises(FormatError, match="1 ids occur more than once, first '1'"):
        evaluate_vqa([REFERENCES[0], reference("1", "OPEN", "x")], [])
    with pytest.raises(FormatError, match="reference 7: no answer"):
        evaluate_vqa([{"id": 7, "answer_type": "OPEN", "conversations": [{"value": "?"}]}], [prediction(7, "x")])
    with pytest.raises(FormatError, match="candidates"):
        evaluate_vqa(REFERENCES, PREDICTIONS, candidates=[])
    for options in ({"metric_set": "loose"}, {"closed": "best"}, {"unmatched": "skip"}):
        with pytest.raises(ValueError, match=next(iter(options.values()))):
            evaluate_vqa(REFERENCES, PREDICTIONS, **options)


def test_report_prints_its_variant_and_counts_and_is_json():
    report = evaluate_vqa([*REFERENCES, reference(4, "?", "x")], [*PREDICTIONS, prediction(4, "x")])
    out = io.StringIO()
    print_report(report, "VQA-RAD", Console(file=out, width=100))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.getvalue().splitlines()]
    assert out.getvalue().startswith("VQA-RAD: compat/batch")
    for expected in (["n open", "1"], ["n closed", "2"], ["n skipped", "1"], ["yes/no accuracy", "50.00"]):
        assert expected in rows
    assert json.loads(json.dumps(report.as_dict()))["variant"] == "compat/batch"


def test_bootstrap():
    better, worse = [1.0] * 60 + [0.0] * 40, [1.0] * 30 + [0.0] * 70
    mean, low, high = paired_bootstrap(better, worse)
    assert mean == pytest.approx(0.3)
    # 100 items, 30 of which differ by one: standard error sqrt(0.3 * 0.7 / 100) = 0.046, normal 95 % interval +- 0.090.
    assert low == pytest.approx(0.21, abs=0.02) and high == pytest.approx(0.39, abs=0.02)
    assert paired_bootstrap(better, worse) == (mean, low, high)
    uneven = [i / 7 for i in range(20)]
    assert paired_bootstrap(uneven, [0.0] * 20) != paired_bootstrap(uneven, [0.0] * 20, seed=1)
    assert paired_bootstrap(better, better) == (0.0, 0.0, 0.0)
    for a, b in (([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [0.0])):
        with pytest.raises(ValueError, match="want two|finite"):
            paired_bootstrap(a, b)


@pytest.mark.parametrize(("percent", "n"), [(59.56, 272), (46.88, 416), (57.69, 416), (55.23, 3391), (52.90, 3391)])
def test_published_closed_accuracies_are_fractions_of_their_test_sets(percent, n):
    assert is_attainable(percent, n)


@pytest.mark.parametrize(("percent", "n"), [(60.35, 272), (60.35, 251), (60.35, 451), (52.90, 3362)])
def test_accuracies_that_cannot_come_from_that_many_items(percent, n):
    assert not is_attainable(percent, n)
