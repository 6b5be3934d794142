"""The pytest plugin, run by pytest: thresholds as tests, kept answers, wrong markers, and what it costs those who do not use it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from published import slake
from talking import picture, talking_model

from stllava.checkpoint.lock import LockedError, run_lock
from stllava.evaluate import thresholds
from stllava.evaluate.thresholds import Evaluations, Vqa
from stllava.model import LlavaModel

pytest_plugins = "pytester"
PLUGIN = ("-p", "stllava.pytest_plugin", "--strict-markers", "--tb=short")
TOKENS = 3


def item(number, answer, kind="CLOSED"):
    return {"id": f"q{number}", "image": f"{number % 2}.png", "answer_type": kind, "conversations": [
        {"from": "human", "value": f"<image>\nIs number {number} there?"}, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, two pictures and eight closed questions; the model has five right, since it was asked before."""
    folder = tmp_path_factory.mktemp("made")
    talking_model().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for i in range(2):
        picture(i).save(folder / "images" / f"{i}.png")
    items = [item(number, "?") for number in range(8)]
    (folder / "test.json").write_text(json.dumps(items))
    said = Evaluations(folder / "first").answers(Vqa(str(folder / "model"), str(folder / "test.json"), image_folder=str(folder / "images"),
                                                     max_new_tokens=TOKENS))
    items = [item(number, row["text"] if number < 5 else "unheard") for number, row in enumerate(said)]
    (folder / "test.json").write_text(json.dumps([*items, item(8, "heart", "OPEN")]))
    return folder


@pytest.fixture
def run(pytester, made, monkeypatch):
    """Runs pytest on a test file in a folder with `made`, and counts what is loaded."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # where the package is installed its entry point would load the plugin a second time
    for name in ("model", "images", "test.json"):
        (pytester.path / name).symlink_to(made / name)
    loaded = []
    real = LlavaModel.from_pretrained.__func__
    monkeypatch.setattr(LlavaModel, "from_pretrained", classmethod(lambda cls, *args, **options: loaded.append(args) or real(cls, *args, **options)))

    def run(text, *arguments):
        pytester.makepyfile(text)
        loaded.clear()
        result = pytester.runpytest_inprocess(*PLUGIN, *arguments)
        result.loaded = len(loaded)
        return result

    return run


MARKER = 'pytest.mark.vqa(model="model", data="test.json", image_folder="images", max_new_tokens=3'
MODULE = f"""
import pytest
pytestmark = {MARKER})
"""


def test_a_threshold_that_is_reached_and_one_that_is_not(run, pytester):
    result = run(f"""
        import pytest

        @{MARKER}, metric="closed accuracy", at_least=0.625)
        def test_reached(): ...

        @{MARKER}, metric="closed_accuracy_batch@1", at_least=0.7)
        def test_missed():
            raise RuntimeError("the thresholds come first")
    """)
    result.assert_outcomes(passed=1, failed=1)
    assert result.loaded == 1, "both metrics need the answers once"
    result.stdout.fnmatch_lines([
        "closed_accuracy_batch@1 of model on test.json: 0.6250 is below 0.7",
        "- closed_accuracy_batch@1 >= 0.7000",
        "+ closed_accuracy_batch@1 == 0.6250   95 % interval 0.2500 to *",
        "5 of 8 closed items are right, 6 have to be; compat/batch; at most 3 new tokens",
        "the worst 3 of 3 answers that are not right:",
        "  value   id   question             expected   answer",
        "  0.00    q5   Is number 5 there?   unheard    *",
        "  0.00    q6   Is number 6 there?   unheard    *",
        "  0.00    q7   Is number 7 there?   unheard    *"])
    result.stdout.no_fnmatch_line("*RuntimeError*")
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_module_names_model_and_data_once_and_tests_may_assert_more(run):
    result = run(MODULE + """
@pytest.mark.vqa(metric="closed accuracy", at_least=0.6)
@pytest.mark.vqa(metric="closed accuracy", metric_set="strict", at_least=0.6)
def test_two(vqa_report, stllava_model):
    assert vqa_report.metric_set == "strict" and (vqa_report.n_closed, vqa_report.n_open) == (8, 1)
    assert stllava_model("model") is stllava_model("model")
    assert [item.prediction for item in vqa_report.items if item.id == "q0"] == [vqa_report.items[0].reference]

def test_report_alone(vqa_report):
    assert vqa_report.values["yes/no accuracy"] == 0.625

def test_open(vqa_report):
    assert vqa_report.values["recall"] == 2
""")
    result.assert_outcomes(passed=2, failed=1)
    assert result.loaded == 1
    result.stdout.fnmatch_lines(["E   assert * == 2"])


def test_answers_are_kept_until_something_they_depend_on_changes(run, pytester, made):
    text = MODULE + """
@pytest.mark.vqa(metric="closed accuracy", at_least=0.6)
def test_it(): ...
"""
    assert run(text).loaded == 1
    assert run(text).loaded == 0
    assert run(text, "-p", "no:cacheprovider").loaded == 1
    items = json.loads((made / "test.json").read_text())
    (pytester.path / "test.json").unlink()
    items[0]["conversations"][1]["value"] = "unheard"
    (pytester.path / "test.json").write_text(json.dumps(items))
    result = run(text)
    assert result.loaded == 0, "other references, the same questions"
    result.stdout.fnmatch_lines(["4 of 8 closed items are right, 5 have to be; *"])
    items[0]["conversations"][0]["value"] = "What else?"
    (pytester.path / "test.json").write_text(json.dumps(items))
    assert run(text).loaded == 1
    (pytester.path / "images").unlink()
    (pytester.path / "images").mkdir()
    for i in range(2):
        picture(i + 5).save(pytester.path / "images" / f"{i}.png")
    assert run(text).loaded == 1
    (pytester.path / "model").unlink()
    talking_model(seed=4).save_pretrained(pytester.path / "model")
    assert run(text).loaded == 1
    assert run(text, "--vqa-answers", "kept").loaded == 1
    [file] = (pytester.path / "kept").glob("*.jsonl")
    assert file.name.startswith("model.test.") and len(file.read_text().splitlines()) == 9
    assert run(text, "--vqa-answers", "kept").loaded == 0


WRONG = {
    'metrik="closed accuracy", at_least=0.5': "@pytest.mark.vqa has no argument 'metrik'; did you mean metric?*",
    'metric="closed acuracy", at_least=0.5': "*metric 'closed acuracy' is not in the set compat, which has *; did you mean closed_accuracy?",
    'metric="closed accuracy"': "*metric and at_least go together, but at_least is missing",
    "at_least=0.5": "*metric and at_least go together, but metric is missing",
    'metric="closed accuracy", at_least=60': "*at_least is 60, want a fraction in [[]0, 1[]]; for 60 per cent say 0.6",
    'metric="closed accuracy", at_least="0.6"': "*at_least is '0.6', want a number",
    'metric="closed accuracy@7", at_least=0.5': "*metric 'closed accuracy@7': this version of stllava computes definition closed_accuracy_batch@1",
    'metric_set="strikt"': "*metric_set is 'strikt', want one of compat, strict; did you mean strict?",
    "model=3": "*model is 3, want a text",
    'model="modell"': "*model is 'modell', but there is no */modell",
    'data="tests.json"': "*data is 'tests.json', but there is no */tests.json",
    "max_new_tokens=0": "*max_new_tokens is 0, want at least 1",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_marker_is_an_error_that_names_test_and_argument(run, wrong):
    result = run(MODULE + f"""
@pytest.mark.vqa({wrong})
def test_it():
    raise RuntimeError("not reached")

@pytest.mark.vqa(max_new_tokens=2)
def test_another(): ...
""")
    result.assert_outcomes(errors=1, passed=1)
    assert result.loaded == 0
    result.stdout.fnmatch_lines([f"*::test_it: {WRONG[wrong]}"])
    result.stdout.no_fnmatch_line("*During handling*")
    result.stdout.no_fnmatch_line("*RuntimeError*")


def test_markers_that_say_too_little(run):
    result = run("""
import pytest

@pytest.mark.vqa("model", "test.json")
def test_positional(): ...

@pytest.mark.vqa(model="model")
def test_no_data(): ...

def test_no_marker(vqa_report): ...
""")
    result.assert_outcomes(errors=3)
    result.stdout.fnmatch_lines(["*::test_positional: @pytest.mark.vqa('model', ...): arguments need their names, as model='model'",
                                 "*::test_no_data: @pytest.mark.vqa: data is missing",
                                 "*::test_no_marker: vqa_report needs to know whose: @pytest.mark.vqa(*"])


def test_a_metric_that_cannot_be_computed_is_a_failure(run, pytester):
    (pytester.path / "test.json").unlink()
    (pytester.path / "test.json").write_text(json.dumps([item(0, "lung", "OPEN")]))
    result = run(MODULE + """
@pytest.mark.vqa(metric="closed accuracy", at_least=0)
def test_it(): ...

@pytest.mark.vqa(metric="open accuracy", closed="run_eval", at_least=0)
def test_candidates(): ...
""")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["closed_accuracy_batch@1 of model on test.json: no closed item to compute it from (1 open, 0 closed)",
                                 "open_accuracy_run_eval@1 of model on test.json: not computed, it needs a list of candidate answers"])


def test_what_cannot_be_evaluated_is_one_line_too(run, pytester):
    slake(pytester.path / "slake")
    (pytester.path / "images").unlink()
    result = run(MODULE.replace('image_folder="images", ', "") + """
@pytest.mark.vqa(metric="closed accuracy", at_least=0)
def test_pictures(): ...

@pytest.mark.vqa(data="slake", benchmark="slacke")
def test_benchmark(vqa_report): ...
""", "--tb=long")
    result.assert_outcomes(failed=1, errors=1)
    result.stdout.fnmatch_lines(["*::test_benchmark: benchmark 'slacke' is unknown, want one of vqa-rad, slake, pathvqa",
                                 "*::test_pictures: *2 of 2 pictures are missing: *0.png, *1.png; *"])
    for noise in ("*Error*", "*During handling*"):
        result.stdout.no_fnmatch_line(noise)


def test_data_may_be_a_published_benchmark(run, pytester):
    slake(pytester.path / "slake")
    result = run(f"""
import pytest

@pytest.mark.filterwarnings("ignore:.*published")
@{MARKER.replace('"test.json", image_folder="images"', '"slake", benchmark="SLAKE", language="zh"')})
def test_it(vqa_report):
    assert vqa_report.n_open + vqa_report.n_closed == len(vqa_report.items) > 0
""")
    result.assert_outcomes(passed=1)
    assert result.loaded == 1


def test_another_worker_computes_the_same_answers(made, tmp_path, monkeypatch):
    """As with pytest-xdist: the second waits, and takes what the first wrote."""
    vqa = Vqa(str(made / "model"), str(made / "test.json"), image_folder=str(made / "images"), max_new_tokens=TOKENS)
    want = Evaluations(tmp_path / "one").answers(vqa)
    [file] = (tmp_path / "one").glob("*.jsonl")
    (tmp_path / "two").mkdir()
    lock = run_lock(tmp_path / "two" / file.name)
    lock.__enter__()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        lock.__exit__(None, None, None)

    monkeypatch.setattr(thresholds.time, "sleep", sleep)
    assert Evaluations(tmp_path / "two").answers(vqa) == want and len(waits) == 1
    (tmp_path / "three").mkdir()
    monkeypatch.setattr(thresholds.time, "sleep", waits.append)
    monkeypatch.setattr(thresholds, "PATIENCE", 3)
    with run_lock(tmp_path / "three" / file.name), pytest.raises(LockedError):
        Evaluations(tmp_path / "three").answers(vqa)
    assert len(waits) == 4


def test_those_who_do_not_use_it_pay_nothing(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile("""
        import sys

        def test_nothing_is_imported():
            assert "stllava.pytest_plugin" in sys.modules
            assert not {"numpy", "PIL", "rich", "stllava_c", "stllava.model", "stllava.evaluate"} & set(sys.modules)
    """)
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)
    pytester.runpytest_subprocess(*PLUGIN, "--help").stdout.fnmatch_lines(["*--vqa-answers=DIR*"])
    pytester.runpytest_subprocess(*PLUGIN, "--markers").stdout.fnmatch_lines(["@pytest.mark.vqa(model, data, metric, at_least, *"])


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"stllava": "stllava.pytest_plugin"}
