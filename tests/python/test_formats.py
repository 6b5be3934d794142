"""Reading: containers told by content, odd and broken files, and what the training data sets make of every layout."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import published
import pytest
from tiny import dpo_records, sft_records, tiny_model, write_pictures

from stllava.constants import IMAGE_TOKEN_INDEX
from stllava.data.dpo import DPODataset
from stllava.data.formats import LAYOUTS, describe, load
from stllava.data.formats.plain_pickle import read_plain_pickle
from stllava.data.problems import DataError
from stllava.data.records import read_records
from stllava.data.sft import SFTDataset
from stllava.errors import ConfigError, FormatError
from stllava.train.arguments import SFTConfig
from stllava.train.sft import SFTTrainer

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A lung."}]
ROWS = [{"id": "1", "image": "0.png", "conversations": TURNS}, {"id": "2", "conversations": [{"from": "human", "value": "Hello\u2028?"}, TURNS[1]]}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data", "data.txt", "data.parquet", "data.pkl"])
@pytest.mark.parametrize(("text", "container"), [
    (json.dumps(ROWS), "JSON list"), (json.dumps(ROWS, indent=2), "JSON list"), ("\n\n " + json.dumps(ROWS) + "\n", "JSON list"), ("\ufeff" + json.dumps(ROWS), "JSON list"),
    ("\n".join(LINES), "JSON lines"), ("\r\n".join([*LINES, ""]), "JSON lines"), ("\n" + "\n\n".join(LINES), "JSON lines"), ("\ufeff" + "\n".join(LINES), "JSON lines"),
    (",\n".join(LINES) + ",\n", "JSON objects joined by commas"), (",\n".join(LINES), "JSON objects joined by commas"),
    (",\n".join(json.dumps(row, indent=1) for row in ROWS) + ",\n", "JSON objects joined by commas"),
], ids=range(11))
def test_the_container_is_told_by_its_content(tmp_path: Path, name: str, text: str, container: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = load(tmp_path / name)
    assert (found.records, found.container, found.problems) == (ROWS, container, [])
    assert found.layout is not None and found.layout.name == "llava"


@pytest.mark.parametrize(("data", "message"), [
    (b"", "line 1 is not JSON"), (b"  \n", "is not JSON"), (b"null", "want a list of records, found a NoneType"), (b'"a"', "found a str"), (b"[1]", "row 0 is a int"),
    (b"[[]]", "row 0 is a list"), (b'{"a": 1}\n[2]\n', "not JSON|row 1"), (b'[{"a": 1}, {"a": 1', "line 1 is not JSON"), (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    ("[]".encode("utf-16"), "UTF-16 text, want UTF-8"), (b'[{"id": "caf\xe9"}]', "not JSON: 'utf-8' codec"), (b'{"id": "caf\xe9"}\n', "codec|not JSON"),
    (b'[{"id": 1, "id": 2}]', "duplicate key 'id'"), (b'[{"id": NaN}]', "NaN is not JSON"), (b'{"id": 1},\n{"id": 1, "id": 2},\n', "JSON"),
    (b"PAR1", "not a readable Parquet file"), (b"PAR1" + bytes(100) + b"PAR1", "not a readable Parquet file"), (b"\x80\x04", "ends too early"),
    (b"\x80\x04N.", "want a list of records, found a NoneType"), (pickle.dumps([3]), "row 0 is a int"), (pickle.dumps([{3: 4}]), "field '3' is a int"),
    (pickle.dumps([{"a": [1]}]), "field 'a' is a list of more than text and numbers"), (pickle.dumps([{"a": {"b": {}}}]), "field 'a' is a dict"),
], ids=range(23))
def test_files_that_hold_no_records(tmp_path: Path, data: bytes, message: str) -> None:
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=f"{tmp_path}/{name}: "):
            if read_records(tmp_path / name) == []:
                raise FormatError(f"{tmp_path}/{name}: no rows")
    with pytest.raises(FormatError, match=message):
        read_records(tmp_path / "data.json")


def test_every_layout_is_found_and_described(tmp_path: Path) -> None:
    examples = {
        "dpo": dpo_records(["a"])[0], "judged": {"q": "Q", "img": "a", "p": "yes", "r": "no"}, "trl-preference": {"prompt": "Q", "chosen": "a", "rejected": "b"},
        "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "prompt-completion": {"prompt": "Q", "completion": "A"},
        "slake": published.slake_rows()[0], "vqa-rad": published.vqa_rad_rows()[0], "pathvqa": published.pathvqa_rows("test", "vqa")[0],
        "llava-med-vqa": published.llava_med_rows()[0], "llava": sft_records(["a"])[0], "questions": {"question_id": 1, "image": "a", "text": "Q"},
        "answers": {"question_id": 1, "prompt": "Q", "text": "A", "answer_id": "x", "model_id": "m", "metadata": {}}, "vqa": {"image": "a", "question": "Q", "answer": "A"},
        "asked": {"question_id": 1, "image": "a", "prompt": ["Q"]}, "answered": {"img": "a", "prompt": "Q", "answers": ["a", "b"]}}
    assert set(examples) == {layout.name for layout in LAYOUTS}
    for name, row in examples.items():
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        found = describe(tmp_path / "x.jsonl")
        assert (found.layout, found.rows, found.problems) == (name, 1, 0) and f"x.jsonl: {name} (" in str(found) and set(found.fields) == set(row)


def test_rows_of_other_layouts_are_listed(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "Q", "chosen": "a", "rejected": "b", "id": "p"}, {"x": 1}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    found = load(tmp_path / "x.json")
    assert [(p.row, p.id) for p in found.problems] == [(2, "p"), (3, "3")]
    with pytest.raises(DataError, match=r"2 of 4 rows are not of the layout llava:\n  row 2 \(id p\): fields chosen_conversations|fields chosen, id"):
        found.checked()
    assert "2 rows are not of this layout" in str(describe(tmp_path / "x.json"))


def test_directories(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert load(tmp_path).records == ROWS  # the only data file
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    with pytest.raises(FormatError, match=r"not exactly one .json or .jsonl file; found a.json, b.json"):
        load(tmp_path)
    for name, rows in (("train", ROWS), ("test", published.slake_rows())):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    with pytest.raises(FormatError, match="files of different layouts: .*test.json .slake., .*train.json .llava."):
        load(tmp_path)
    assert load(tmp_path, "train").records == ROWS


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = published.write_parquet(tmp_path / "x.parquet", [{"id": "1"}])
    real = importlib.import_module

    def without(name: str, *rest: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"need the package pyarrow: pip install 'stllava\[parquet\]'"):
        read_records(path)


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """What `keep` lets go is not in memory when the next rows come."""
    rows = [{"image": {"bytes": bytes(1000), "path": f"{i}.png"}, "question": "Q", "answer": "yes"} for i in range(500)]
    published.write_parquet(tmp_path / "x.parquet", rows)
    alive = most = 0

    class Counted(bytes):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def keep(record: dict) -> dict:
        nonlocal alive, most
        alive, most = alive + 1, max(most, alive + 1)
        counted = Counted(record["image"]["bytes"])
        assert len(counted) == 1000
        return {**record, "image": record["image"]["path"]}

    assert [record["image"] for record in load(tmp_path / "x.parquet", keep=keep).records] == [f"{i}.png" for i in range(500)]
    assert most == 1


def test_columns_of_other_types(tmp_path: Path) -> None:
    """Categories are read as what they stand for; types that let one value stand in many rows are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), pa.array(["yes", "no"]))
    pq.write_table(pa.table({"answer": words, "image": ["a.png"] * 3, "question": ["Q"] * 3}), tmp_path / "x.parquet")
    assert [record["conversations"][1]["value"] for record in read_records(tmp_path / "x.parquet")] == ["yes", "no", "yes"]
    pq.write_table(pa.table({"answers": pa.array([["a"]], pa.list_(pa.dictionary(pa.int8(), pa.string())))}), tmp_path / "x.parquet")
    with pytest.raises(FormatError, match="field 'answers' is of the type list<.*dictionary.*want text"):
        read_records(tmp_path / "x.parquet")


def test_plain_values_of_every_protocol(tmp_path: Path) -> None:
    value = [{"a": 1, "b": -2.5, "c": "caf\u00e9\n'\"", "d": {"x": 2**40, "y": -1, "z": 10**20}}, [], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), None, True, False, "x" * 300,
             255, 65535, 65536, -1, [["a"] * 3] * 2]
    for protocol in range(6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
        assert read_plain_pickle(tmp_path / "x.pkl") == value
    (tmp_path / "x.pkl").write_bytes(b"(lp0\n(dp1\nS'image'\np2\nS'test_0001'\np3\nsS'n'\nI3\nsa.")  # Python 2
    assert read_plain_pickle(tmp_path / "x.pkl") == [{"image": "test_0001", "n": 3}]


# ---- the data sets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def options(model, folder: Path) -> dict:
    return {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "image_folder": folder, "template": "v1",
            "tokens_per_image": model.core.tokens_per_image}


def test_sft_takes_every_layout_that_has_questions_and_answers(tmp_path: Path, model) -> None:
    names = write_pictures(tmp_path, 2)
    want = [{"image": name, "conversations": [{"from": "human", "value": "<image>\nIs it large?"}, {"from": "gpt", "value": "yes"}]} for name in names]
    message = [{"role": "user", "content": "Is it large?"}, {"role": "assistant", "content": "yes"}]
    forms = {
        "misspelt": [{"image": r["image"], "conversatons": r["conversations"]} for r in want], "messages": [{"messages": message, "images": [name]} for name in names],
        "completion": [{"prompt": "Is it large?", "completion": "yes", "image": name} for name in names],
        "hub": [{"image": name, "question": "Is it large?", "answer": "yes"} for name in names],
        "slake": [{"img_name": name, "question": "Is it large?", "answer": "yes", "qid": i, "q_lang": "en"} for i, name in enumerate(names)]}

    def samples(data: object) -> list:
        found = SFTDataset(data, **options(model, tmp_path))
        return [(list(sequence.ids), list(sequence.labels), sequence.images) for i in range(len(found)) for sequence in found.sequences(i, 0)]

    expected = samples(want)
    assert len(expected) == 2
    for name, rows in forms.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        published.write_parquet(tmp_path / f"{name}.parquet", rows)
        for data in (rows, tmp_path / f"{name}.jsonl", tmp_path / f"{name}.parquet"):
            assert samples(data) == expected, name


def test_dpo_takes_trl_rows(tmp_path: Path, model) -> None:
    names = write_pictures(tmp_path, 2)
    want = dpo_records(names)
    rows = [{"id": r["id"], "images": [r["image"]], "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
             "chosen": [{"role": "assistant", "content": [{"type": "text", "text": r["chosen_conversations"][1]["value"]}]}],
             "rejected": [{"role": "assistant", "content": [{"type": "text", "text": r["reject_conversations"][1]["value"]}]}]} for r in want]

    def pairs(data: object) -> list:
        found = DPODataset(data, **options(model, tmp_path))
        return [(list(s.ids), list(s.labels), s.images, s.sample) for i in range(len(found)) for s in found.pair(i, 0)]

    (tmp_path / "x.json").write_text(json.dumps(rows))
    published.write_parquet(tmp_path / "x.parquet", rows)
    for data in (rows, tmp_path / "x.json", tmp_path / "x.parquet"):
        assert pairs(data) == pairs(want)


def test_records_of_another_kind_are_named(tmp_path: Path, model) -> None:
    names = write_pictures(tmp_path, 1)
    with pytest.raises(DataError, match="the record is of the layout dpo .* which is no instruction record"):
        SFTDataset(dpo_records(names), **options(model, tmp_path))
    with pytest.raises(DataError, match="the record is of the layout llava .* which is no pair record"):
        DPODataset(sft_records(names), **options(model, tmp_path))
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}, {"id": "bad", "prompt": "Q", "chosen": "a", "rejected": 3}]
    data = DPODataset(rows, **options(model, tmp_path), on_bad_sample="skip")
    assert len(data) == 1 and [(p.row, p.id, p.kind) for p in data.problems] == [(1, "bad", "turns")] and "'rejected' is a int" in data.problems[0].text


def test_only_the_train_split_is_trained_on(tmp_path: Path, model) -> None:
    folder = published.vqa_rad(tmp_path / "rad")
    for data, images in ((folder, folder), (folder / published.VQA_RAD, folder / "VQA_RAD Image Folder")):
        found = SFTDataset(data, **options(model, images))
        assert len(found) == 3 and {record["split"] for record in found.records} == {"train"}
    path = published.pathvqa(tmp_path / "path")
    assert len(SFTDataset(path, **options(model, path))) == len(SFTDataset(path, **options(model, path) | {"image_folder": None})) == 3


def test_samples_of_several_images(tmp_path: Path, model) -> None:
    names = write_pictures(tmp_path, 4)
    question = {"from": "human", "value": "<image>\nNow <image>\nwhich is larger?"}
    later = [{"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "Larger still."}]
    rows = [{"id": "two", "image": names[:2], "conversations": [question, TURNS[1]]}, {"id": "three", "images": names[:3], "conversations": [question, TURNS[1], *later]},
            {"id": "one", "image": names[3], "conversations": TURNS}]
    data = SFTDataset(rows, **options(model, tmp_path) | {"template": "v1_sq"}, sq_r=1.0)
    [two], [three], [one] = (data.sequences(i, 0) for i in range(3))
    assert (two.images, three.images, one.images) == (tuple(names[:2]), tuple(names[:3]), (names[3],))
    assert [list(s.ids).count(IMAGE_TOKEN_INDEX) for s in (two, three, one)] == [2, 3, 1]
    assert IMAGE_TOKEN_INDEX not in three.labels  # a question with a picture is never the model's own
    pixels = [data.pixels(name) for name in names]
    trees, batch = model.batch([two, three, one], share=True)
    logp = model.run.forward(batch, pixels=model.pixels(data.pixels(key) for key in trees.image_keys))
    alone = []
    for sequence, pictures in ((two, pixels[:2]), (three, pixels[:3]), (one, pixels[3:])):
        own, part = model.batch([sequence], share=False)
        assert own.image_keys == list(sequence.images)
        alone.append(model.run.forward(part, pixels=model.pixels(pictures)).sum())
    np.testing.assert_allclose(logp.sum(), sum(alone), rtol=1e-5)
    swapped = two.__class__(two.ids, two.labels, two.images[::-1])
    trees, batch = model.batch([swapped], share=False)
    other = model.run.forward(batch, pixels=model.pixels(data.pixels(key) for key in trees.image_keys)).sum()
    assert other != alone[0]  # the order of the pictures counts
    result = SFTTrainer(model, SFTConfig(output_dir=str(tmp_path / "out"), max_steps=2, learning_rate=1e-3, disable_tqdm=True), data).train()
    assert result.global_step == 2 and np.isfinite(result.metrics["train_loss"])


@pytest.mark.parametrize(("image", "value", "message"), [
    (["0.png", "1.png"], "<image>\nWhat?", "1 <image> markers for 2 images"), (["0.png"], "<image>\n<image>\nWhat?", None), ("0.png", "What?", "0 <image> markers for 1 images"),
    (["0.png", "1.png"], "<image><image><image>What?", "3 <image> markers for 2 images"), ([], "<image>\nWhat?", "1 <image> markers for 0 images"),
    (["0.png", "9.png"], "<image>\n<image>\nWhat?", "9.png"), (["0.png", None], "<image>\nWhat?", None), (["0.png", 3], "<image>\n<image>\nWhat?", "a int"),
])
def test_as_many_markers_as_images(tmp_path: Path, model, image: object, value: str, message: str | None) -> None:
    write_pictures(tmp_path, 2)
    row = {"image": image, "conversations": [{"from": "human", "value": value}, TURNS[1]]}
    pair = {"image": image, "chosen_conversations": row["conversations"], "reject_conversations": [row["conversations"][0], {"from": "gpt", "value": "A car."}]}
    for kind, record in ((SFTDataset, row), (DPODataset, pair)):
        if message is None:
            assert len(kind([record], **options(model, tmp_path))) == 1
        else:
            with pytest.raises(DataError, match=message):
                kind([record], **options(model, tmp_path))


def test_an_answer_shows_no_picture(tmp_path: Path, model) -> None:
    write_pictures(tmp_path, 2)
    row = {"image": ["0.png", "1.png"], "conversations": [TURNS[0], {"from": "gpt", "value": "It is <image>"}]}
    with pytest.raises(DataError, match="an answer has an <image> marker"):
        SFTDataset([row], **options(model, tmp_path))


def test_images_inside_rows_are_trained_on(tmp_path: Path, model) -> None:
    """The same samples and pictures as with files; the same bytes are one picture."""
    names = write_pictures(tmp_path, 2)
    rows = [{"image": {"bytes": (tmp_path / name).read_bytes(), "path": name}, "question": "Is it large?", "answer": "yes"} for name in [*names, names[0]]]
    named = SFTDataset([{**row, "image": row["image"]["path"]} for row in rows], **options(model, tmp_path))
    for data in (rows, published.write_parquet(tmp_path / "x.parquet", rows)):
        inside = SFTDataset(data, **options(model, tmp_path / "nowhere"), group_by_image=True)
        assert [len(inside.sequences(i, 0)) for i in range(len(inside))] == [2, 1]
        for item, name in enumerate(names):
            [key] = inside.sequences(item, 0)[0].images
            np.testing.assert_array_equal(inside.pixels(key), named.pixels(name))
    broken = [{**rows[0], "image": {"bytes": b"no picture", "path": "x.png"}}]
    with pytest.raises(DataError, match="row 0"):
        SFTDataset(broken, **options(model, tmp_path))
