"""Questions, captions and the rule-based judge of the demo."""

import itertools
import json

import numpy as np
import pytest

from stllava.demo import questions as q
from stllava.demo.judge_rules import RuleJudge, classify
from stllava.demo.questions import Facts

HEAD = Facts("T1 MRI", "brain", "axial", cerebellum=True, ventricles=False, marker=True, colour="green", quadrant="upper left")
NODE = Facts("ultrasound", "lymph node")
DESCRIBE = "Can you describe the image in detail?"


@pytest.fixture
def judge():
    return RuleJudge({"unlabelled/00001": HEAD, "unlabelled/00002": NODE})


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (HEAD, "an axial T1 MRI of the brain, showing the cerebellum, with a green marker in the upper left"),
        (NODE, "an ultrasound of the lymph node"),
        (
            Facts("EPI MRI", "brain", "coronal", cerebellum=True, ventricles=True),
            "a coronal EPI MRI of the brain, showing the cerebellum and the lateral ventricles",
        ),
        (
            Facts("histology", "colon", marker=True, colour="red", quadrant="lower right"),
            "a histology picture of the colon, with a red marker in the lower right",
        ),
    ],
)
def test_caption(facts, text):
    assert q.caption(facts) == text


def test_every_question_text_is_classified_as_its_type_and_nothing_else_is():
    texts = q.question_texts()
    assert len(texts) == len(set(texts)) == 11 + 3 + 8 + 4
    for form in q.FORMS:
        for choice in form.choices or ("",):
            text = form.text.format(choice)
            assert classify(text) == classify(text.upper()) == classify("  " + text.replace("?", " ?")) == form.type
    for garbled in ("", "what is the?", "what is the modality", "is the plane green?", "is the organ the axial?"):
        assert classify(garbled) is None, garbled
    assert classify("is there a marker? yes") is classify("what is what is the modality?") is None


def test_question_types_are_nine_or_more_and_split_into_open_and_closed():
    assert {form.type for form in q.FORMS} == {"describe", *q.OPEN, *q.CLOSED}
    assert len(q.OPEN) + len(q.CLOSED) >= 9
    assert set(q.STRUCTURES) < set(q.CLOSED)


def test_asked_answers_equal_the_answers_recomputed_from_the_text(judge):
    rng = np.random.default_rng(3)
    for name, facts in (("unlabelled/00001", HEAD), ("unlabelled/00002", NODE)):
        for question in q.ask_all((*q.OPEN, *q.CLOSED), facts, rng):
            assert judge.truth(name, question.question) == question.answer
            assert classify(question.question) == question.type


def test_unknown_facts_are_not_asked():
    rng = np.random.default_rng(0)
    asked = {question.type for _ in range(20) for question in q.ask_all((*q.OPEN, *q.CLOSED), NODE, rng)}
    assert asked == {"caption", "modality", "organ", "is_mri", "is_organ", "marker"}
    assert q.ask("is_mri", Facts("white matter map", "brain", "axial"), rng) is None


def test_verification_questions_are_yes_half_of_the_time():
    rng = np.random.default_rng(1)
    answers = [q.ask(type_, HEAD, rng).answer for type_ in ("is_plane", "is_organ", "is_colour") for _ in range(400)]
    # 1,200 fair draws: four standard deviations are 0.058
    assert abs(answers.count("yes") / len(answers) - 0.5) < 0.058


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        (DESCRIBE, q.caption(HEAD)),
        ("what is the modality?", "T1 MRI"),
        ("where is the marker?", "upper left"),
        ("is this an MRI?", "yes"),
        ("is the plane coronal?", "no"),
        ("is the marker green?", "yes"),
        ("is the brain shown with the lateral ventricles?", "no"),
        ("which organ?", None),
    ],
)
def test_truth(judge, question, truth):
    assert judge.truth("unlabelled/00001.png", question) == truth
    assert judge.judgeable("unlabelled/00001", question) == (truth is not None)


def test_every_true_answer_gets_ten_and_every_other_short_answer_less(judge):
    rng = np.random.default_rng(5)
    pool = {"yes", "no", *q.MODALITIES, *q.ORGANS, *q.PLANES, *q.COLOURS, *q.QUADRANTS}
    for name, facts in (("unlabelled/00001", HEAD), ("unlabelled/00002", NODE)):
        for question in q.ask_all((*q.OPEN, *q.CLOSED), facts, rng):
            for other in pool - {question.answer}:
                true_score, other_score, _ = judge.score(name, question.question, question.answer, other)
                assert true_score == 10 and other_score < 10, (question, other)


def test_captions_are_graded_by_recall_minus_wrong_statements(judge):
    answers = [
        q.caption(HEAD),
        "an axial T1 MRI of the brain, with a green marker in the upper left",  # a fact missing
        # one missing, one wrong
        "an axial T1 MRI of the brain, showing the lateral ventricles, with a green marker in the upper left",
        "an axial T1 MRI of the brain",
        "an axial T1 MRI of the brain green green brain xyz",  # right words, then garbage
        "a fundus photograph of the eye",
    ]
    scores = [judge.score("unlabelled/00001", DESCRIBE, answer, answers[0])[0] for answer in answers]
    assert scores[0] == 10 and scores[-1] == 1
    assert scores[0] > scores[1] > scores[2] > scores[3] > scores[-1]
    assert scores[3] >= scores[4] > scores[-1]


def test_a_contradictory_or_empty_answer_gets_one(judge):
    assert judge.score("unlabelled/00001", "is this an MRI?", "yes no", "")[:2] == (1, 1)


def test_uncertain_structure_is_neither_right_nor_wrong():
    facts = Facts("T1 MRI", "brain", "axial", cerebellum=None, ventricles=False)
    judge = RuleJudge({"a": facts})
    with_structure = q.caption(facts) + ", showing the cerebellum"
    assert judge.score("a", DESCRIBE, q.caption(facts), with_structure)[:2] == (10, 10)
    assert judge.score("a", "is the brain shown with the cerebellum?", "yes", "no")[:2] == (-1, -1)


def test_exchanged_answers_get_exchanged_scores_and_the_reply_parses(judge):
    answers = (q.caption(HEAD), "an axial MRI", "a green marker", "yes", "", "upper left T1")
    for a, b in itertools.permutations(answers, 2):
        for question in (DESCRIBE, "what is the modality?", "is there a marker?", "no question"):
            first, second, reply = judge.score("unlabelled/00001", question, a, b)
            assert judge.score("unlabelled/00001", question, b, a)[:2] == (second, first)
            line = reply.splitlines()[0].split(" ")
            assert [float(v) for v in line] == [first, second]


def test_unknown_image_is_named(judge):
    with pytest.raises(KeyError, match="unlabelled/00009.png"):
        judge.score("unlabelled/00009.png", DESCRIBE, "a", "b")


def test_facts_survive_json(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"test/00000": HEAD.to_json()}))
    assert RuleJudge.from_file(path).facts("test/00000") == HEAD


def test_corpus_holds_the_whole_language_and_is_reproducible():
    lines = list(q.corpus_lines(200, seed=1))
    assert lines == list(q.corpus_lines(200, seed=1)) != list(q.corpus_lines(200, seed=2))
    assert set(q.question_texts()) <= set(lines)
    words = {word for line in lines for word in line.replace(",", " ").replace("?", " ").split()}
    for value in (*q.MODALITIES, *q.ORGANS, *q.PLANES, *q.COLOURS, *q.QUADRANTS):
        assert set(value.split()) <= words
    assert all("\n" not in line for line in lines)
