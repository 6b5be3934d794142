"""`stllava data`: convert there and back, splits, samples, merging; one line for what it did and one for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import published
import pytest
from tiny import dpo_records, sft_records

from stllava.cli import main
from stllava.data.benchmarks import load_benchmark
from stllava.data.formats import describe, images_of, load


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["data", *map(str, words)]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def wrong(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    try:
        code = main(["data", *map(str, words)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.startswith("stllava data") and "Traceback" not in captured.err, captured.err
    return captured.err


def dump(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


EXTRA = {"domain": {"mri": True, "ct_scan": False}, "note": "Grüße \u2028 \"quoted\"", "score": 0.5}
SFT = [{**record, **EXTRA} for record in sft_records(["a.png", "b/c.png"])]
PAIRS = [{**record, **EXTRA} for record in dpo_records(["a.png", "b/c.png"])]
SEVERAL = [{"id": "s", "image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image>\nand\n<image>\nWhich is it?"}, {"from": "gpt", "value": "The first."}]}]


AWAY = [
    (SFT, "llava", "trl"), (SFT, "llava", "parquet"), (PAIRS, "dpo", "trl"), (PAIRS, "dpo", "parquet"), (SEVERAL, "llava", "trl"), (SEVERAL, "llava", "parquet"),
    (published.llava_med_rows(), "llava-med", "question"), (published.llava_med_rows(), "llava-med", "parquet"), (published.llava_med_rows(), "llava-med", "trl"),
]


@pytest.mark.parametrize(("records", "home", "away", "suffix"), [(*case, suffix) for case in AWAY for suffix in (".json", ".jsonl", ".parquet")
                                                                 if case[2] != "parquet" or suffix == ".parquet"],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_there_and_back(tmp_path, capsys, records, home, away, suffix) -> None:
    """Everything comes back: ids, images, texts, turns, other fields. What a layout cannot hold is its own: the place of the marker in a question."""
    start = dump(tmp_path / "in.json", records)
    run(capsys, "convert", start, tmp_path / f"there{suffix}", "--to", away)
    report = run(capsys, "convert", tmp_path / f"there{suffix}", tmp_path / "back.json", "--to", home)
    assert report["read"] == report["written"] == len(records)
    back = json.loads((tmp_path / "back.json").read_text(encoding="utf-8"))
    if home == "llava-med":
        records = [{**record, "answer_type": kind} for record, kind in zip(records, ("OPEN", "CLOSED", "CLOSED"), strict=True)]
    assert back == records


@pytest.mark.parametrize(("make", "options"), [(published.vqa_rad, ()), (published.slake, ("--split", "test")), (published.pathvqa, ("--split", "test"))])
def test_a_published_set_in_llava_meds_layout(tmp_path, capsys, make, options) -> None:
    folder = make(tmp_path / "set")
    report = run(capsys, "convert", folder, tmp_path / "items.json", "--to", "llava-med", *options)
    items = json.loads((tmp_path / "items.json").read_text(encoding="utf-8"))
    assert report["written"] == len(items) and {item["answer_type"] for item in items} <= {"OPEN", "CLOSED"}
    want = load_benchmark(folder, language="all").items
    assert [item for item in items if item["split"] == "test"] == want
    assert load_benchmark(tmp_path / "items.json", language="all").items == want  # the file holds both splits of VQA-RAD
    run(capsys, "convert", folder, tmp_path / "items.parquet", "--to", "parquet", *options)
    found = load_benchmark(tmp_path / "items.parquet", language="all").items
    assert [(str(item["id"]), item["conversations"]) for item in want] == [(str(item["id"]), item["conversations"]) for item in found]


def test_images_inside_come_out_and_go_in(tmp_path, capsys) -> None:
    rows = published.hub_rows(tmp_path / "pictures")
    source = published.write_parquet(tmp_path / "test.parquet", [*rows, rows[0]])
    report = run(capsys, "convert", source, tmp_path / "out" / "items.json", "--to", "llava-med")
    assert report == {"layout": "vqa", "read": 4, "written": 4, "images_written": 3, "image_folder": str(tmp_path / "out" / "images")}
    items = json.loads((tmp_path / "out" / "items.json").read_text())
    for item, row in zip(items, [*rows, rows[0]], strict=True):
        assert (tmp_path / "out" / "images" / item["image"]).read_bytes() == row["image"]["bytes"] and item["image"].endswith(".png")
    run(capsys, "convert", tmp_path / "out" / "items.json", tmp_path / "again.parquet", "--to", "parquet", "--embed_images", "--image_folder", tmp_path / "out" / "images")
    again = load(tmp_path / "again.parquet").records
    assert [item["image"]["bytes"] for item in again] == [row["image"]["bytes"] for row in [*rows, rows[0]]]
    assert [item["conversations"] for item in again] == [item["conversations"] for item in items]
    run(capsys, "sample", source, tmp_path / "one.parquet", "-n", 1)  # stays inside
    assert isinstance(load(tmp_path / "one.parquet").records[0]["image"], dict)
    err = wrong(capsys, "convert", tmp_path / "out" / "items.json", tmp_path / "bad.parquet", "--to", "parquet", "--embed_images", "--image_folder", tmp_path)
    assert "cannot be read: No such file" in err and not (tmp_path / "bad.parquet").exists()
    items[0]["image"] = "../pictures/0.png"
    dump(tmp_path / "evil.json", items)
    err = wrong(capsys, "convert", tmp_path / "evil.json", tmp_path / "bad.parquet", "--to", "parquet", "--embed_images", "--image_folder", tmp_path / "out" / "images")
    assert "lies outside" in err


def test_a_slice_of_a_volume_stays_that_slice(tmp_path, capsys) -> None:
    """Bytes that are inside a row twice are one file, and what is chosen of them stays with the name."""
    rows = [{"image": {"bytes": b"volume", "path": f"patient name.nii.gz#axis=2&slice={i}"}, "question": "Q", "answer": "yes"} for i in range(3)]
    report = run(capsys, "convert", published.write_parquet(tmp_path / "x.parquet", rows), tmp_path / "x.json", "--to", "llava-med")
    items = json.loads((tmp_path / "x.json").read_text())
    [file] = (tmp_path / "images").iterdir()
    assert report["images_written"] == 1 and [item["image"] for item in items] == [f"{file.name}#axis=2&slice={i}" for i in range(3)]
    assert file.name.endswith(".nii.gz") and "patient" not in file.name
    report = run(capsys, "split", tmp_path / "x.json", "--out_dir", tmp_path / "parts", "--fractions", "a=0.5", "b=0.5")
    assert sorted(report["written"].values()) == [0, 3]  # slices of a volume are one image


def test_the_asking_steps_file(tmp_path, capsys) -> None:
    """Objects joined by commas, as the original leaves it."""
    rows = [{"question_id": f"i{n}.jpg", "image": f"i{n}.jpg", "prompt": ["What is it?", "Is it large?"]} for n in range(3)]
    (tmp_path / "asked.json").write_text("".join(json.dumps(row) + ",\n" for row in rows))
    assert describe(tmp_path / "asked.json").container == "JSON objects joined by commas"
    report = run(capsys, "convert", tmp_path / "asked.json", tmp_path / "q.jsonl", "--to", "question")
    assert report["read"] == 3 and report["written"] == 6
    first = json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0])
    assert first == {"question_id": "i0.jpg/0", "image": "i0.jpg", "text": "What is it?"}


def test_describe(tmp_path, capsys) -> None:
    folder = published.slake(tmp_path / "s")
    assert main(["data", "describe", str(folder), str(dump(tmp_path / "pairs.jsonl", PAIRS))]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: slake (vqa), JSON list, 12 rows" in out and "splits: test 4, train 4, validation 4" in out and "test.json, train.json, validate.json" in out
    assert "pairs.jsonl: dpo (pair), JSON lines, 2 rows" in out
    assert run(capsys, "describe", "--json", tmp_path / "pairs.jsonl")["fields"]["score"] == 2
    assert "fields a; known are: dpo (" in wrong(capsys, "describe", dump(tmp_path / "odd.json", [{"a": 1}]))


def test_split(tmp_path, capsys) -> None:
    records = [{"id": i, "image": f"p{i % 10}/{i % 30}.png", "patient": f"x{i % 10}", "conversations": SFT[0]["conversations"]} for i in range(90)]
    start = dump(tmp_path / "in.jsonl", records)
    for by, key in (("image", lambda r: r["image"]), ("patient", lambda r: r["patient"])):
        ways = [["--patient_field", "patient"], ["--patient_regex", r"^(p\d+)/"]] if by == "patient" else [[]]
        for way in ways:
            report = run(capsys, "split", start, "--out_dir", tmp_path / by, "--fractions", "train=0.6", "validation=0.2", "test=0.2", "--by", by, *way)
            parts = {name: [json.loads(line) for line in (tmp_path / by / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "validation", "test")}
            assert report["written"] == {name: len(rows) for name, rows in parts.items()} and sum(map(len, parts.values())) == 90
            seen = [{key(row) for row in rows} for rows in parts.values()]
            assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
            assert all(rows == [row for row in records if row in rows] for rows in parts.values())  # unchanged, in order
    report = run(capsys, "split", start, "--out_dir", tmp_path / "n", "--n", "test=10", "--by", "sample", "--format", "json")
    assert report["written"] == {"train": 80, "test": 10} and len(json.loads((tmp_path / "n" / "test.json").read_text())) == 10


def test_sample_and_merge(tmp_path, capsys) -> None:
    records = [{**record, "id": f"{i}"} for i, record in enumerate(SFT * 10)]
    start = dump(tmp_path / "in.json", records)
    assert run(capsys, "sample", start, tmp_path / "some.json", "-n", 7)["written"] == 7
    assert run(capsys, "sample", start, tmp_path / "half.json", "--fraction", 0.5, "--seed", 3)["written"] == 15
    some = json.loads((tmp_path / "some.json").read_text())
    assert some == [record for record in records if record in some]
    assert "7 ids stand twice: " in wrong(capsys, "merge", start, tmp_path / "some.json", "--out", tmp_path / "all.json")
    for how, n in (("rename", 37), ("skip", 30)):
        report = run(capsys, "merge", start, tmp_path / "some.json", "--out", tmp_path / "all.json", "--on_duplicate", how, "--image_prefix", "one", "")
        merged = json.loads((tmp_path / "all.json").read_text())
        assert report["written"] == len(merged) == n and report["duplicates"] == 7 and len({row["id"] for row in merged}) == n
        assert images_of(merged[0]) == ["one/a.png"] and (how == "skip" or images_of(merged[-1]) in ([], ["a.png"], ["b/c.png"]))
    vqa = dump(tmp_path / "vqa.json", published.llava_med_rows())
    assert run(capsys, "merge", start, vqa, "--out", tmp_path / "both.parquet", "--to", "parquet", "--on_duplicate", "rename")["written"] == 33


@pytest.mark.parametrize(("words", "message"), [
    (["split", "IN", "--out_dir", "OUT", "--fractions", "train=0.6", "test=0.2"], "add up to 0.8"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "train=1.5", "test=-0.5"], "from 0 to 1"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "0.5", "0.5"], "want PART=NUMBER"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "../x=1"], "no name of a part"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "a=0.5", "a=0.5"], "a is given twice"),
    (["split", "IN", "--out_dir", "OUT"], "either fractions or numbers"),
    (["split", "IN", "--out_dir", "OUT", "--n", "test=99"], "more than the 3 records"),
    (["split", "IN", "--out_dir", "OUT", "--n", "test=1", "--rest", "a/b"], "no name of a part"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "a=1", "--by", "patient"], "needs --patient_field or --patient_regex"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "a=1", "--patient_field", "x"], "go with --by patient"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "a=1", "--by", "patient", "--patient_field", "x"], "3 of 3 records have no patient, rows 0 (id r0)"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "a=1", "--by", "patient", "--patient_regex", "("], "no regular expression"),
    (["split", "IN", "--out_dir", "OUT", "--fractions", "a=1", "--by", "patien"], "did you mean patient?"),
    (["sample", "IN", "OUT.json"], "either a number of records or a fraction"),
    (["sample", "IN", "OUT.json", "-n", "9"], "9 of 3 records"),
    (["sample", "IN", "OUT.json", "--fraction", "2"], "fraction 2"),
    (["sample", "IN", "OUT.json", "-n", "1", "--stratify", "x"], "no record has the field 'x'"),
    (["convert", "IN", "OUT.json"], "required: --to"),
    (["convert", "IN", "OUT.json", "--to", "llava2"], "did you mean llava?"),
    (["convert", "IN", "OUT.json", "--to", "dpo"], "instruction records cannot be written as dpo; want one of llava, llava-med, question, trl, parquet"),
    (["convert", "IN", "OUT.json", "--to", "llava-med"], "row 0 (id r0): field 'conversations' is a list"),
    (["convert", "IN", "OUT.txt", "--to", "llava"], "the name ends in '.txt'"),
    (["convert", "IN", "OUT.json", "--to", "parquet"], "want .parquet"),
    (["convert", "IN", "OUT.json", "--to", "llava", "--embed_images"], "--embed_images needs a .parquet file"),
    (["convert", "IN", "IN", "--to", "llava"], "would take the place of what is read"),
    (["convert", "NOWHERE", "OUT.json", "--to", "llava"], "no such file"),
    (["convert", "EMPTY", "OUT.json", "--to", "llava"], "no records"),
    (["convert", "IN", "OUT.json", "--to", "llava", "--splt", "x"], "unknown flag --splt; did you mean --split?"),
    (["convert", "IN", "OUT.json", "--to", "llava", "more"], "unexpected 'more'"),
    (["merge", "IN", "PAIRS", "--out", "OUT.json"], "records of different kinds: "),
    (["merge", "IN", "IN", "--out", "OUT.json", "--on_duplicate", "skip", "--image_prefix", "a"], "1 prefixes for 2 sets"),
    (["merge", "IN", "--out", "OUT.csv"], "ends in '.csv'"),
    (["convrt", "IN"], "did you mean convert?"),
    ([], "required: VERB"),
])
def test_mistakes_are_one_line(tmp_path, capsys, words, message) -> None:
    files = {"IN": dump(tmp_path / "in.json", SFT[:3]), "PAIRS": dump(tmp_path / "pairs.json", PAIRS), "EMPTY": dump(tmp_path / "empty.json", [])}
    before = sorted(tmp_path.iterdir())
    error = wrong(capsys, *(str(files.get(word, word.replace("OUT", str(tmp_path / "out")).replace("NOWHERE", str(tmp_path / "none.json")))) for word in words))
    assert message in error and (error.count("\n") == 1 or "row 0" in error)
    assert sorted(path for path in tmp_path.iterdir() if path.name != "out") == before and not list(tmp_path.glob("out/*"))


def test_a_parquet_column_has_one_type(tmp_path, capsys) -> None:
    rows = [{**SFT[0], "score": 1}, {**SFT[1], "score": "high"}]
    assert "field 'score' has values of different types" in wrong(capsys, "convert", dump(tmp_path / "in.json", rows), tmp_path / "x.parquet", "--to", "parquet")
    mixed = [{**SFT[0], "id": 1}, {**SFT[1], "id": "b"}]
    run(capsys, "convert", dump(tmp_path / "in.json", mixed), tmp_path / "x.parquet", "--to", "parquet")
    assert [record["id"] for record in load(tmp_path / "x.parquet").records] == ["1", "b"]


def test_half_a_surrogate_pair_stays(tmp_path, capsys) -> None:
    rows = [{"id": "a\ud800", "conversations": SFT[0]["conversations"]}]
    run(capsys, "convert", dump(tmp_path / "in.json", rows), tmp_path / "x.jsonl", "--to", "llava")
    assert json.loads((tmp_path / "x.jsonl").read_text()) == rows[0]
