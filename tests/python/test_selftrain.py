"""Self-training step by step: asking and answering on a tiny model, judging in both orders, pairs with every drop counted."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_model, write_pictures

from stllava.data.records import read_jsonl
from stllava.data.steps import item_seed, run_step
from stllava.errors import ConfigError, FormatError
from stllava.selftrain.answer import AnswerSettings, answer
from stllava.selftrain.ask import AskSettings, ask
from stllava.selftrain.judge import RecordedJudge, judge
from stllava.selftrain.pairs import PairSettings, build_pairs


class LongerIsBetter:
    """Scores by length; knows its replies' layout."""

    def score(self, image_id, question, answer_1, answer_2):
        scores = [min(10, 1 + len(a)) for a in (answer_1, answer_2)]
        return *scores, f"{scores[0]} {scores[1]}\nlonger is better"


def answered(*answers, question="is it red?", name="a/0"):
    return {"id": name, "image": name.split("/")[0], "question": question, "answers": list(answers)}


def test_ask_and_answer_and_continue(tmp_path):
    model = tiny_model()
    names = write_pictures(tmp_path, 3)
    images = [(name, str(tmp_path / name)) for name in names]
    settings = AskSettings(n_questions=3, max_new_tokens=6, description_max_new_tokens=4, seed=5)
    whole = ask(model, images, settings, progress=False)
    assert [row["id"] for row in whole] == names
    assert all(len(row["questions"]) + sum(row["dropped"].values()) == 3 for row in whole)
    # an item's draws do not depend on the batch, the order, or where a run was continued
    path = tmp_path / "asked.jsonl"
    ask(model, images[:2], settings, out=path, progress=False)
    path.write_text(path.read_text()[:-20])  # a crash in the middle of the last line
    assert ask(model, images, AskSettings(**{**_fields(settings), "batch_size": 1}), out=path, progress=False) == whole
    found = answer(model, whole, lambda name: str(tmp_path / name), AnswerSettings(max_new_tokens=5, n_answers=2), progress=False)
    assert len(found) == sum(len(row["questions"]) for row in whole)
    assert all(len(row["answers"]) == 2 and row["id"].startswith(row["image"]) for row in found)


def _fields(settings):
    return {name: getattr(settings, name) for name in settings.__slots__}


def test_asking_needs_a_virtual_user():
    with pytest.raises(ConfigError, match="no virtual user"):
        ask(tiny_model(), [], AskSettings(template="v1"))


def test_both_orders_are_judged_and_everything_kept():
    [row] = judge([answered("no", "yes it is", "no", "")], LongerIsBetter(), progress=False)
    assert [c["answer"] for c in row["candidates"]] == ["no", "yes it is"]
    assert [c["score"] for c in row["candidates"]] == [3, 10]
    assert [r["answers"] for r in row["replies"]] == [["no", "yes it is"], ["yes it is", "no"]] and "longer" in row["replies"][0]["raw"]
    [one] = judge([answered("no", "yes it is")], LongerIsBetter(), both_orders=False, progress=False)
    assert len(one["replies"]) == 1


def test_recorded_replies():
    row = answered("a", "b")
    replies = {("a", row["question"], "a", "b"): "8 7\nwhy", ("a", row["question"], "b", "a"): "6, 9"}
    [judged] = judge([row], RecordedJudge(replies), progress=False)
    assert [c["score"] for c in judged["candidates"]] == [8.5, 6.5]
    with pytest.raises(ConfigError, match="no recorded reply"):
        judge([answered("a", "c")], RecordedJudge(replies), progress=False)
    bad = {("a", row["question"], "a", "b"): "I cannot say", ("a", row["question"], "b", "a"): "6 9"}
    [judged] = judge([row], RecordedJudge(bad), progress=False)
    assert [c["score"] for c in judged["candidates"]] == [9, 6]  # the unread reply counts for nothing


def judged(name, *scored, question="is it red?"):
    return {"id": name, "image": name.split("/")[0], "question": question, "answers": [a for a, _ in scored],
            "candidates": [{"answer": a, "score": s} for a, s in scored], "replies": []}


def test_pairs_and_reasons():
    rows = [judged("a/0", ("no", 1), ("yes", 9)), judged("b/0", ("same", 5)), judged("c/0", ("x", 4), ("y", 4)),
            judged("d/0", ("x", None), ("y", None)), judged("e/0", ("x", 1), ("y", 2), question="gibberish"), judged("f/0", ("no", 8), ("yes", 2))]
    pairs, dropped = build_pairs(rows, lambda name: f"{name}.png", type_of=lambda q: None if q == "gibberish" else "red")
    assert dropped == {"unknown_question": 1, "one_answer": 1, "unread": 1, "tie": 1, "unbalanced": 0}
    assert len(pairs) + sum(dropped.values()) == len(rows)
    assert pairs[0]["image"] == "a.png" and pairs[0]["chosen_conversations"][1]["value"] == "yes" and pairs[0]["scores"] == [9, 1]
    assert pairs[0]["chosen_conversations"][0] == pairs[0]["reject_conversations"][0] == {"from": "human", "value": "<image>\nis it red?"}


def test_balance_drops_surplus_of_the_more_frequent_answer_per_type():
    rows = [judged(f"y{i}/0", ("yes", 9), ("no", 1)) for i in range(2)] + [judged(f"n{i}/0", ("no", 9), ("yes", 1)) for i in range(7)]
    rows += [judged(f"o{i}/0", ("brain", 9), ("eye", 1), question="organ?") for i in range(4)]
    kind = {"is it red?": "red", "organ?": "organ"}.get
    pairs, dropped = build_pairs(rows, str, type_of=kind)
    chosen = [p["chosen_conversations"][1]["value"] for p in pairs]
    assert (chosen.count("yes"), chosen.count("no"), chosen.count("brain"), dropped["unbalanced"]) == (2, 2, 4, 5)
    again, _ = build_pairs(rows, str, type_of=kind)
    assert again == pairs
    assert len(build_pairs(rows, str, PairSettings(balance=False), type_of=kind)[0]) == len(rows)


def test_steps_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    calls = []

    def work(batch):
        calls.append(batch)
        for item in batch:
            yield {"id": item, "n": len(item)}

    want = [{"id": c * n, "n": n} for n, c in enumerate("abcde", 1)]
    items = [row["id"] for row in want]
    run_step(items[:3], str, work, out=path, batch_size=2, label="x", progress=False)
    assert run_step(items, str, work, out=path, batch_size=2, label="x", progress=False) == want
    assert [i for b in calls for i in b] == items and read_jsonl(path) == want
    path.write_text('{"id": "a"\n{"id": "b"}\n')
    with pytest.raises(FormatError, match="line 1 is not JSON"):
        read_jsonl(path)


def test_json_lines_are_cut_off_only_where_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a\u2028b"}\n{"id": "c', encoding="utf-8")
    with pytest.raises(FormatError, match="line 2 is not JSON"):
        read_jsonl(path)
    assert read_jsonl(path, cut_off=True) == [{"id": "a\u2028b"}]


def test_item_seeds_differ_and_stay():
    seeds = {item_seed(0, "ask", f"image{i}", j) for i in range(50) for j in range(4)}
    assert len(seeds) == 200 and item_seed(0, "ask", "image1", 2) == item_seed(0, "ask", "image1", 2) != item_seed(1, "ask", "image1", 2)
    assert json.dumps(item_seed(3, "x"))


def test_ties_as_in_the_original():
    """Of equal scores the second answer is chosen (spec D42), when asked for; otherwise the pair is dropped and counted."""
    rows = [judged("a/0", ("one", 7), ("two", 7)), judged("a/1", ("one", 8), ("two", 7))]
    pairs, dropped = build_pairs(rows, str)
    assert [pair["id"] for pair in pairs] == ["a/1"] and dropped["tie"] == 1
    pairs, dropped = build_pairs(rows, str, PairSettings(ties="last"))
    assert [(pair["chosen_conversations"][1]["value"], pair["reject_conversations"][1]["value"]) for pair in pairs] == [("two", "one"), ("one", "two")]
    assert dropped["tie"] == 0
