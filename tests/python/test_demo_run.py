"""The demo from end to end on a tenth of the data."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

import stllava_c
from stllava.demo import run as demo_run
from stllava.demo.baselines import other_images, score
from stllava.demo.questions import CLOSED, OPEN
from stllava.demo.summary import bars, structures, table_sha256

if stllava_c.build_info()["sanitizers"]:
    pytest.skip("its two trainings take many minutes under AddressSanitizer; test_train_loop and test_selftrain make the same calls", allow_module_level=True)

WHEELS = Path(__file__).parents[2] / "build" / "wheels"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose wheels are those of `make demo`, so that both download them once."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    path = tmp_path_factory.mktemp("demo")
    (path / "wheels").symlink_to(WHEELS, target_is_directory=True)
    return path


@pytest.fixture(scope="module")
def one_thread(folder):
    return demo_run.run(folder / "one", seed=5, num_threads=1, quick=True)


@pytest.fixture(scope="module")
def two_threads(folder, one_thread):
    """The same seed again, with two threads."""
    return demo_run.run(folder / "two", seed=5, num_threads=2, quick=True)


def test_results_file_has_every_field_with_values_in_range(folder, one_thread):
    results = json.loads((folder / "one" / "results.json").read_text())
    assert results == json.loads(json.dumps(one_thread))
    assert set(results) == {"seed", "threads", "seconds", "evaluation", "baselines", "self_training", "dpo", "table_sha256", "details"}
    assert (results["seed"], results["threads"]) == (5, 1)
    assert all(seconds >= 0 for seconds in results["seconds"].values())
    assert set(results["evaluation"]) == {"base", "sft", "dpo"}
    assert set(results["baselines"]) == {"majority", "no_image", "shuffled_image"}
    for row in (*results["evaluation"].values(), *results["baselines"].values()):
        assert set(row) == {"closed_accuracy", "open_recall", "token_f1", "n_closed", "n_open", "by_type"}
        assert all(0 <= row[key] <= 1 for key in ("closed_accuracy", "open_recall", "token_f1"))
        assert set(row["by_type"]) <= {*OPEN, *CLOSED} and len(row["by_type"]) >= 9
        for kinds, key, metric in ((CLOSED, "closed_accuracy", "accuracy"), (OPEN, "open_recall", "recall")):
            types = [row["by_type"][kind] for kind in kinds if kind in row["by_type"]]
            assert {kind["metric"] for kind in types} == {metric}
            assert sum(kind["n"] for kind in types) == row["n_" + key.split("_")[0]]
            assert np.isclose(sum(kind["n"] * kind["value"] for kind in types) / sum(kind["n"] for kind in types), row[key], rtol=0, atol=1e-12)
    assert set(results["self_training"]) == {"questions", "well_formed_share", "judgeable_share", "pairs", "dropped"}
    assert set(results["dpo"]) == {"reward_accuracy", "margin", "heldout_reward_accuracy", "delta_open", "delta_closed"}
    for delta, key in (("delta_open", "open_recall"), ("delta_closed", "closed_accuracy")):
        change = results["dpo"][delta]
        assert change["low"] <= change["mean"] <= change["high"]
        assert np.isclose(change["mean"], results["evaluation"]["dpo"][key] - results["evaluation"]["sft"][key], rtol=0, atol=1e-12)


def test_every_question_ends_as_a_pair_or_is_counted_as_dropped(one_thread):
    found = one_thread["self_training"]
    assert found["questions"] == demo_run.QUICK.n_unlabelled * demo_run.QUICK.n_questions
    assert found["pairs"] + sum(found["dropped"].values()) == found["questions"]
    assert found["pairs"] == one_thread["details"]["pairs_training"] + one_thread["details"]["pairs_heldout"]
    assert 0 <= found["judgeable_share"] <= found["well_formed_share"] <= 1


def test_heldout_pairs_are_about_other_images_and_yes_and_no_are_balanced(folder, one_thread):
    pairs = json.loads((folder / "one" / "self_training" / "pairs.json").read_text())
    heldout = {pair["image"] for pair in pairs if demo_run._is_heldout(pair["image"], 5, demo_run.QUICK.heldout_share)}
    assert 0 < len(heldout) < len({pair["image"] for pair in pairs})
    assert sum(pair["image"] in heldout for pair in pairs) == one_thread["details"]["pairs_heldout"]
    chosen = [(pair["question_type"], pair["chosen_conversations"][-1]["value"]) for pair in pairs]
    for kind in CLOSED:
        assert chosen.count((kind, "yes")) == chosen.count((kind, "no"))


def test_same_seed_gives_the_same_digest_and_answers_at_one_and_two_threads(folder, one_thread, two_threads):
    assert two_threads["threads"] == 2
    assert two_threads["table_sha256"] == one_thread["table_sha256"]
    for file in ("questions.jsonl", "answers.jsonl", "judged.jsonl", "pairs.json"):
        one, two = ((folder / name / "self_training" / file).read_bytes() for name in ("one", "two"))
        assert one == two, file


def test_digest_is_of_the_results_and_of_nothing_else(one_thread):
    changed = json.loads(json.dumps(one_thread))
    changed["seconds"]["sft"] += 1
    changed["threads"] = 64
    assert table_sha256(changed) == one_thread["table_sha256"]
    changed["evaluation"]["dpo"]["by_type"]["caption"]["value"] += 1e-15
    assert table_sha256(changed) != one_thread["table_sha256"]


def test_report_needs_nothing_from_outside(folder, one_thread):
    page = (folder / "one" / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) >= 2 + 6 + 8
    for source in sources:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.split(",")[1], validate=True).startswith(b"\x89PNG")
    assert "Not a medical device" in page and "by position, not by subject" in page
    assert f"{100 * one_thread['evaluation']['dpo']['closed_accuracy']:.1f}" in page
    assert one_thread["table_sha256"] in page


def test_bars_follow_the_numbers(one_thread):
    changed = json.loads(json.dumps(one_thread))
    changed["evaluation"]["sft"]["open_recall"] = 0.90
    assert not met(changed, "after SFT: open recall")
    changed["evaluation"]["sft"]["open_recall"] = 0.92
    assert met(changed, "after SFT: open recall")
    changed["baselines"]["no_image"]["closed_accuracy"] = changed["evaluation"]["sft"]["closed_accuracy"] - 0.24
    assert not met(changed, "after SFT: closed above image-free baselines")
    changed["baselines"]["no_image"]["closed_accuracy"] = changed["baselines"]["majority"]["closed_accuracy"] = 0.5
    changed["evaluation"]["sft"]["closed_accuracy"] = 0.76
    assert met(changed, "after SFT: closed above image-free baselines")
    changed["dpo"]["delta_open"]["mean"] = -0.016
    assert not met(changed, "DPO - SFT: open recall")
    assert not met(changed, "DPO: growth of the reward margin", growth=-0.1)
    assert met(changed, "DPO: growth of the reward margin", growth=0.1)


def met(results, name, growth=0.0):
    [bar] = [bar for bar in bars(results, growth) if bar.name == name]
    return bar.met


def test_structures_are_pooled_over_items():
    by_type = {"cerebellum": {"value": 0.5, "n": 10}, "ventricles": {"value": 1.0, "n": 30}, "marker": {"value": 0.0, "n": 50}}
    assert structures({"by_type": by_type}) == 0.875


def test_score_of_an_open_and_a_closed_item():
    items = [{"id": "a", "image": "a.png", "answer_type": "OPEN", "question_type": "modality", "conversations": turns("T1 MRI")},
             {"id": "b", "image": "a.png", "answer_type": "CLOSED", "question_type": "marker", "conversations": turns("yes")},
             {"id": "c", "image": "b.png", "answer_type": "CLOSED", "question_type": "marker", "conversations": turns("no")}]
    found = score(items, {"a": "T2 MRI", "b": "yes", "c": "yes"})
    assert found.row == {"closed_accuracy": 0.5, "open_recall": 0.5, "token_f1": 0.5, "n_closed": 2, "n_open": 1, "by_type": {
        "modality": {"metric": "recall", "value": 0.5, "n": 1}, "marker": {"metric": "accuracy", "value": 0.5, "n": 2}}}
    assert (found.closed, found.open) == ([1.0, 0.0], [0.5])


def turns(answer):
    return [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": answer}]


def test_every_image_gets_another_one_and_none_twice():
    names = [f"{i}.png" for i in range(17)]
    found = other_images(names + names[:5], seed=3)
    assert set(found) == set(found.values()) == set(names)
    assert all(name != other for name, other in found.items())
    assert found == other_images(names, seed=3) != other_images(names, seed=4)
    with pytest.raises(ValueError, match="at least two"):
        other_images(["a.png", "a.png"], seed=0)
