"""Every published layout of VQA-RAD, SLAKE and PathVQA as test items: values, traps, counts, and what is no such set."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import published
import pytest

from stllava.data.benchmarks import PUBLISHED, Counts, load_benchmark, read_benchmark
from stllava.data.problems import DataError
from stllava.data.records import read_records
from stllava.errors import FormatError
from stllava.evaluate.vqa import evaluate_vqa


def said(item: dict) -> tuple[object, ...]:
    """(id, image, type, question, answer)"""
    return item["id"], item["image"], item["answer_type"], *(turn["value"] for turn in item["conversations"])


@pytest.mark.parametrize("make", [published.vqa_rad, published.data_rad])
def test_vqa_rad(tmp_path: Path, make) -> None:
    folder = make(tmp_path)
    prefix = "VQA_RAD Image Folder" if make is published.vqa_rad else "images"
    found = load_benchmark(folder)
    assert (found.name, found.split, found.layout) == ("vqa-rad", "test", "vqa-rad")
    assert [said(item) for item in found.items] == [
        (3, f"{prefix}/synpic2.jpg", "CLOSED", "Which side is it on?\n<image>", "left"),
        ("4", f"{prefix}/synpic3.jpg", "OPEN", "What is the organ system?\n<image>", "Gastrointestinal"),
        (5, f"{prefix}/synpic3.jpg", "CLOSED", "Is there free air?\n<image>", "No")]
    assert all((folder / item["image"]).is_file() for item in found.items)
    first = found.items[0]
    assert (first["organ"], first["question_type"], first["split"], first["phrase_type"]) == ("CHEST", "PRES", "test", "test_freeform")
    assert first["image_case_url"] == "https://example.org/case/synpic2.jpg" and "question" not in first and "answer" not in first
    train = load_benchmark(folder, "vqarad", "train").items
    assert [said(item)[-1] for item in train] == ["Yes", "12", "no"] and [item["answer_type"] for item in train] == ["CLOSED", "OPEN", "CLOSED"]
    assert len(load_benchmark(folder, split="all").items) == 6


def test_vqa_rads_file_alone(tmp_path: Path) -> None:
    path = published.vqa_rad(tmp_path) / published.VQA_RAD
    assert [item["image"] for item in load_benchmark(path).items] == ["synpic2.jpg", "synpic3.jpg", "synpic3.jpg"]  # relative to the image folder
    assert [record["split"] for record in read_records(path)] == ["train"] * 3 + ["test"] * 3


@pytest.mark.parametrize("validation", ["validate", "validation", "val"])
def test_slake(tmp_path: Path, validation: str) -> None:
    folder = published.slake(tmp_path, validation)
    found = load_benchmark(folder)
    assert (found.name, found.split, found.language) == ("slake", "test", "en")
    assert [said(item) for item in found.items] == [
        (11, "imgs/xmlab1/source.jpg", "OPEN", "What modality is used to take this image?\n<image>", "MRI"),
        (13, "imgs/xmlab2/source.jpg", "CLOSED", "Does the picture contain liver?\n<image>", "Yes"),
        (14, "imgs/xmlab2/source.jpg", "CLOSED", "Which is larger, lung or liver?\n<image>", "Lung")]
    first = found.items[0]
    assert {key: first[key] for key in ("modality", "organ", "location", "question_type", "content_type", "base_type", "q_lang", "img_id", "triple")} == {
        "modality": "MRI", "organ": "Abdomen", "location": "Abdomen", "question_type": "Modality", "content_type": "Modality", "base_type": "vqa",
        "q_lang": "en", "img_id": 1, "triple": ["vhead", "_", "_"]}
    assert [item["id"] for item in load_benchmark(folder, language="zh").items] == [12]
    assert len(load_benchmark(folder, language="all").items) == 4
    for name in ("validation", "validate", "val"):
        assert load_benchmark(folder, split=name).split == "validation"
    assert load_benchmark(folder / "test.json").items[0]["image"] == "xmlab1/source.jpg"


def test_slakes_images_in_a_zip_file(tmp_path: Path) -> None:
    published.slake(tmp_path)
    with zipfile.ZipFile(tmp_path / "imgs.zip", "w") as archive:
        for path in sorted((tmp_path / "imgs").rglob("*.jpg")):
            archive.write(path, path.relative_to(tmp_path))
            path.unlink()
    assert load_benchmark(tmp_path).items[0]["image"] == "imgs.zip/imgs/xmlab1/source.jpg"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("layout", ["vqa", "qa"])
@pytest.mark.parametrize("below", ["", "pvqa"])
def test_pathvqa(tmp_path: Path, layout: str, protocol: int, below: str) -> None:
    published.pathvqa(tmp_path / below, layout, protocol)
    found = load_benchmark(tmp_path)
    assert (found.name, found.split) == ("pathvqa", "test")
    assert [item["answer_type"] for item in found.items] == ["OPEN", "CLOSED", "OPEN"]
    assert [item["conversations"][1]["value"] for item in found.items] == ["in the canals of hering", "yes", "2"]
    assert [item["id"] for item in found.items] == ([100, 101, 102] if layout == "vqa" else ["test-0", "test-1", "test-2"])
    assert all((tmp_path / item["image"]).is_file() for item in found.items) and found.items[0]["image"].endswith("images/test/test_0000.jpg")
    assert ("question_type" in found.items[0]) == (layout == "vqa")
    assert load_benchmark(tmp_path, split="val").split == "validation"
    file = tmp_path / below / "qas" / ("test_vqa.pkl" if layout == "vqa" else "test/test_qa.pkl")
    assert load_benchmark(file).items[0]["image"] == "test/test_0000.jpg"


def test_the_heaviest_answer_of_a_label(tmp_path: Path) -> None:
    row = published.pathvqa_rows("test", "vqa")[0] | {"label": {"a cell": 0.3, "a nucleus": 1.0, "none": 0.3}}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([row]))
    assert load_benchmark(tmp_path / "x.pkl").items[0]["conversations"][1]["value"] == "a nucleus"


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
def test_llava_meds_conversion(tmp_path: Path, key: str) -> None:
    (tmp_path / "test.json").write_text(json.dumps(published.llava_med_rows(key)))
    found = load_benchmark(tmp_path / "test.json")
    assert found.name is None and [item["answer_type"] for item in found.items] == ["OPEN", "CLOSED", "CLOSED"]
    assert said(found.items[2]) == (2, "0.jpg", "CLOSED", "Which side?\n<image>", "left")
    report = evaluate_vqa(found.items, [{"question_id": item["id"], "text": item["conversations"][1]["value"]} for item in found.items])
    assert (report.n_open, report.n_closed) == (1, 2)


def test_questions_that_have_their_answers(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in published.question_rows()))
    items = load_benchmark(tmp_path / "q.jsonl").items
    assert [said(item) for item in items] == [(0, "0.jpg", "OPEN", "What is it?\n<image>", "a lung"), (1, "1.jpg", "CLOSED", "Is it large?\n<image>", "yes")]


@pytest.mark.parametrize("embedded", [True, False])
def test_parquet_as_on_the_hub(tmp_path: Path, embedded: bool) -> None:
    rows = published.hub_rows(tmp_path / "pictures", embedded=embedded)
    for split in ("train", "test"):
        for shard in (0, 1):
            published.write_parquet(tmp_path / "set" / "data" / f"{split}-0000{shard}-of-00002.parquet", rows)
    found = load_benchmark(tmp_path / "set", "vqa-rad")
    assert [item["answer_type"] for item in found.items] == ["OPEN", "CLOSED", "CLOSED"] * 2 and found.split == "test"
    assert len({item["id"] for item in found.items}) == 6 and found.items[0]["id"] == "test-0"
    assert found.items[0]["image"] == (rows[0]["image"] if embedded else "0.png")
    assert any("vqa-rad test: 6 questions" in note and "451" in note for note in found.notes)


def test_numbers_are_held_against_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published.vqa_rad(tmp_path)
    found = load_benchmark(folder)
    assert [note for note in found.notes if "published" in note] == [
        "vqa-rad test: 3 questions (1 open, 2 closed) on 2 images; published: 451 questions (179 open, 272 closed) on 203 images (OSF, data_RAD)"]
    with pytest.warns(UserWarning, match="3 questions .* published: 451"):
        assert read_benchmark(folder) == found.items
    monkeypatch.setitem(PUBLISHED, ("vqa-rad", "test"), (Counts(3, 1, 2, 2, "here"),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not [note for note in load_benchmark(folder).notes if "published" in note]
    monkeypatch.setitem(PUBLISHED, ("vqa-rad", "test"), (Counts(3, 2, 1, 2, "here"), Counts(3, None, None, None, "there")))
    assert any("published: 3 questions (2 open, 1 closed)" in note for note in load_benchmark(folder).notes)  # not taken for the version without types


def test_published_numbers_add_up() -> None:
    for (name, split), versions in PUBLISHED.items():
        for version in versions:
            assert version.open is None or version.closed is None or version.open + version.closed == version.total, (name, split)


def test_an_id_that_stands_twice_is_renamed_and_said(tmp_path: Path) -> None:
    rows = published.slake_rows()
    rows[2]["qid"] = 11
    rows[3]["qid"] = "11"
    (tmp_path / "test.json").write_text(json.dumps(rows))
    found = load_benchmark(tmp_path / "test.json")
    assert [item["id"] for item in found.items] == [11, "11-2", "11-3"] and any("2 ids occur more than once, the first '11'" in note for note in found.notes)
    (tmp_path / "med.json").write_text(json.dumps([*published.llava_med_rows(), published.llava_med_rows()[0]]))
    with pytest.raises(FormatError, match="1 ids occur more than once, the first 0 in rows 0 and 3"):
        load_benchmark(tmp_path / "med.json")


@pytest.mark.parametrize(("change", "message"), [
    ({"answer": None}, "row 1 .id 12.: field 'answer' is missing"), ({"answer": ["a"]}, "row 1 .id 12.: field 'answer' is a list"),
    ({"answer": True}, "'answer' is a bool"), ({"answer": " "}, "'answer' is empty"), ({"question": 3}, "'question' is a int"),
    ({"question": ""}, "'question' is empty"), ({"img_name": None}, "'img_name' is missing"), ({"qid": 1.5}, "the id is a float"),
    ({"answer_type": "maybe"}, "'answer_type' is a str .'maybe'"),
])
def test_rows_that_are_no_items(tmp_path: Path, change: dict, message: str) -> None:
    rows = [{**row, "id": row["qid"]} for row in published.slake_rows()]
    rows[1] |= change
    (tmp_path / "test.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message) as error:
        load_benchmark(tmp_path / "test.json")
    assert "1 of 4 rows" in str(error.value) and [problem.row for problem in error.value.problems] == [1]


def test_what_is_no_benchmark(tmp_path: Path) -> None:
    published.slake(tmp_path)
    with pytest.raises(FormatError, match="those of slake, not of vqa-rad"):
        load_benchmark(tmp_path, "vqa-rad")
    with pytest.raises(ValueError, match="want one of vqa-rad, slake, pathvqa"):
        load_benchmark(tmp_path, "vqa2")
    with pytest.raises(ValueError, match="want en, zh or all"):
        load_benchmark(tmp_path, language="de")
    (tmp_path / "validate.json").unlink()
    with pytest.raises(FormatError, match=r"no file of the split 'val', found test, train"):
        load_benchmark(tmp_path, split="val")
    (tmp_path / "dpo.json").write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    with pytest.raises(FormatError, match="trl-preference .* no questions with a reference answer"):
        load_benchmark(tmp_path / "dpo.json")
    (tmp_path / "odd.json").write_text(json.dumps([{"a": 1}]))
    with pytest.raises(FormatError, match="no known layout, with the fields a; known are: dpo "):
        load_benchmark(tmp_path / "odd.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="found nothing"):
        load_benchmark(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        load_benchmark(tmp_path / "nowhere.json")
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
    (tmp_path / "long.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    with pytest.raises(DataError, match="want one question of human and one answer"):
        load_benchmark(tmp_path / "long.json")
