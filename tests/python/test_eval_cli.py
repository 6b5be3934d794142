"""`stllava eval`: a small model on a small test set through every output; answers of other systems; what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import published
import pytest
import scans
from PIL import Image
from rich.console import Console
from tiny import tiny_model, write_pictures

from stllava.cli import main
from stllava.errors import FormatError
from stllava.evaluate import evaluate_vqa, runs
from stllava.evaluate.evaluation import SCHEMA, Answers, evaluate
from stllava.evaluate.identity import model_digest
from stllava.evaluate.pictures import ItemPictures
from stllava.evaluate.predictions import read_predictions, system_name
from stllava.evaluate.published import SPLITS
from stllava.evaluate.render.page import html_page
from stllava.evaluate.render.tables import latex_table, markdown_table
from stllava.evaluate.render.terminal import print_evaluation
from stllava.evaluate.runs import write_evaluation
from stllava.evaluate.scoring import Scoring
from stllava.images import load_image

FAST = Scoring(n_resamples=50)
OUTPUTS = ["manifest.json", "report.html", "report.json", "table.md", "table.tex"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """4 pictures, 8 questions, one of them without a picture and one of an unknown type."""
    folder = tmp_path_factory.mktemp("data")
    names = write_pictures(folder, 4)
    items = [item(f"q{i}", "OPEN" if i % 2 else "CLOSED ", "no" if i % 4 else "a lung", image=names[i % 4], modality=("CT", "MRI")[i % 2]) for i in range(7)]
    del items[3]["image"]
    items[3]["conversations"][0]["value"] = "What?"
    items.append(item("q7", "?", "x", image=names[0]))
    (folder / "items.json").write_text(json.dumps(items))
    return folder


def item(name, kind, answer, question="What is it?\n<image>", **more):
    return {"id": name, "answer_type": kind, **more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def common(data, out=None, *more):
    return ["--question_file", str(data / "items.json"), "--image_folder", str(data), "--max_new_tokens", "3", "--bootstrap", "50",
            *(["--out", str(out)] if out else []), *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_data(self, data):
        self.text.append(data)


def test_a_model_through_every_output_twice_and_in_parts(tmp_path, data, model_dir, capsys):
    words = ["eval", model_dir, *common(data, tmp_path / "one", "--baselines", "majority,no-image,grey_image,shuffled_image")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "n open 3, n closed 4, n skipped 1 (neither open nor closed)" in " ".join(shown.split())
    for metric in ("closed_accuracy_batch@1", "closed_accuracy_run_eval@1", "closed_accuracy_pvqa@1", "strict_closed_accuracy@1", "open_recall@1"):
        assert metric in shown
    first = contents(tmp_path / "one")
    assert sorted(first) == sorted([*OUTPUTS, "answers.jsonl", *(f"answers.{name}.jsonl" for name in ("no_image", "grey_image", "shuffled_image"))])

    report = json.loads(first["report.json"])
    assert report["schema"] == SCHEMA and report["counts"] == {"open": 3, "closed": 4, "skipped": 1, "unanswered": 0, "surplus": 0, "empty": 0, "refused": 0}
    assert [one["name"] for one in report["baselines"]] == ["majority", "no_image", "grey_image", "shuffled_image"]
    assert "the test set itself" in report["baselines"][0]["note"]
    assert set(report["groups"]) == {"modality"} and report["groups"]["modality"]["ct"]["closed"] == 4
    assert all(score["low"] is None for score in report["groups"]["modality"]["ct"]["scores"])  # fewer than 20
    again = evaluate_vqa(json.loads((data / "items.json").read_text()), rows_of(tmp_path / "one" / "answers.jsonl"))
    by_name = {score["metric"]: score["value"] for score in report["scores"]}
    assert by_name["open_recall@1"] == again.values["recall"] and by_name["closed_accuracy_batch@1"] == again.values["yes/no accuracy"]
    same = {one["name"]: one["comparison"]["same_answer"] for one in report["baselines"]}
    assert same["no_image"] >= 1 / 7 and same["shuffled_image"] >= 1 / 7  # the question that has no picture
    manifest = json.loads(first["manifest.json"])
    assert set(manifest["files"]) == set(first) - {"manifest.json"} and manifest["facts"]["template"] == "v1" and str(tmp_path) not in first["manifest.json"].decode()

    assert main(words) == 0  # again: nothing to answer, the same bytes
    assert contents(tmp_path / "one") == first
    for chunk in range(3):
        part = ["eval", model_dir, *common(data, tmp_path / "two"), "--num_chunks", "3", "--chunk_idx", str(chunk), "--baselines", "no_image,grey_image,shuffled_image"]
        assert main(part) == 0
    assert "part 2 of 3: 3 answers in" in capsys.readouterr().out and not (tmp_path / "two" / "report.json").exists()
    assert main([word.replace("/one", "/two") for word in words]) == 0
    assert {name: text for name, text in contents(tmp_path / "two").items() if "chunk" not in name} == first

    assert main([*words, "--max_new_tokens", "2"]) == 2  # another run's answers
    assert "another model, other pictures or settings" in capsys.readouterr().err
    assert contents(tmp_path / "one") == first

    # what one system is to another: itself
    assert main(["eval", "--predictions", str(tmp_path / "one"), "--compare", str(tmp_path / "two" / "answers.jsonl"), *common(data, tmp_path / "three")]) == 0
    third = json.loads((tmp_path / "three" / "report.json").read_text())
    assert third["scores"] == report["scores"] and third["compared_with"]["comparison"]["same_answer"] == 1.0
    assert all(one["p"] == 1.0 and one["difference"] == 0.0 for one in third["compared_with"]["comparison"]["differences"])
    again = json.loads((tmp_path / "three" / "manifest.json").read_text())
    assert again["files"]["answers.jsonl"] == manifest["files"]["answers.jsonl"] and again["facts"] == manifest["facts"]

    # a part of another run is refused before anything is written
    before = contents(tmp_path / "two")
    (tmp_path / "two" / "answers.jsonl").unlink()
    part = tmp_path / "two" / "answers.chunk-1-of-3.jsonl"
    part.write_text(part.read_text().replace('"run": "', '"run": "0'))
    assert main([word.replace("/one", "/two") for word in words]) == 2
    assert "answers.chunk-1-of-3.jsonl: holds answers of a run with another model" in capsys.readouterr().err
    assert not (tmp_path / "two" / "answers.jsonl").exists() and (tmp_path / "two" / "report.json").read_bytes() == before["report.json"]


def test_old_flags(tmp_path, data, model_dir, capsys):
    words = ["eval", "--model-path", model_dir, "--question-file", str(data / "items.json"), "--image-folder", str(data), "--answers-file",
             str(tmp_path / "a.jsonl"), "--conv-mode", "vicuna_v1", "--max_new_tokens", "2", "--metrics", "compat"]
    assert main(words) == 0
    assert len(rows_of(tmp_path / "a.jsonl")) == 8 and "strict" not in capsys.readouterr().out
    assert list(rows_of(tmp_path / "a.jsonl")[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


def test_answers_depend_on_weights_and_pictures(data, tmp_path):
    assert model_digest(tiny_model()) == model_digest(tiny_model()) != model_digest(tiny_model(seed=1))
    assert model_digest(tiny_model()) != model_digest(tiny_model("f64"))
    changed = tiny_model()
    name, array = next((name, array) for name, array in changed.named_parameters() if "mm_projector" in name and array.ndim == 2)
    array[0, 0] += 1
    assert model_digest(changed) != model_digest(tiny_model()), name
    items = json.loads((data / "items.json").read_text())
    pictures = ItemPictures(items, data)
    for path in data.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert ItemPictures(items, tmp_path).digest() == pictures.digest()
    Image.new("RGB", (9, 9)).save(tmp_path / "2.png")
    assert ItemPictures(items, tmp_path).digest() != pictures.digest()


def test_pictures_inside_records(data):
    held = [{"id": i, "image": {"bytes": (data / f"{i % 2}.png").read_bytes(), "path": None}} for i in range(4)]
    pictures = ItemPictures(held, None)
    assert [one["image"] for one in pictures.items] == [pictures.names[i % 2] for i in range(4)] and len(pictures.names) == 2
    assert load_image(pictures(pictures.names[1])).rgb.tolist() == load_image(data / "1.png").rgb.tolist()
    pictures.require()
    assert pictures.digest() == ItemPictures(held, data).digest() != ItemPictures(held[::-1], None).digest()
    with pytest.raises(FormatError, match="2 pictures are files, the first '0.png'; give --image_folder"):
        ItemPictures([{"image": "0.png"}, {"image": "1.png"}, {"id": "text"}], None).require()
    with pytest.raises(FormatError, match="1 of 2 pictures are missing: nowhere.png"):
        ItemPictures([{"image": "0.png"}, {"image": "nowhere.png"}], data).require()
    with pytest.raises(FormatError, match="lies outside"):
        ItemPictures([{"image": "../0.png"}], data).require()


def test_pictures_in_an_archive(data, tmp_path, model_dir):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in data.glob("*.png"):
            archive.write(path, path.name)
    for folder, prefix in ((tmp_path / "images.zip", ""), (tmp_path, "images.zip/")):
        items = [{**one, **({"image": prefix + one["image"]} if "image" in one else {})} for one in json.loads((data / "items.json").read_text())]
        (tmp_path / "items.json").write_text(json.dumps(items))
        assert main(["eval", model_dir, "--question_file", str(tmp_path / "items.json"), "--image_folder", str(folder), "--max_new_tokens", "3", "--bootstrap", "50",
                     "--out", str(tmp_path / f"out{len(prefix)}")]) == 0
        assert "<img" in (tmp_path / f"out{len(prefix)}" / "report.html").read_text()
    assert main(["eval", model_dir, *common(data, tmp_path / "files")]) == 0
    answers = [[row["text"] for row in rows_of(tmp_path / name / "answers.jsonl")] for name in ("out0", "out11", "files")]
    assert answers[0] == answers[1] == answers[2]


def test_of_a_medical_file_its_pixels_alone(data, tmp_path, model_dir, capfd):
    """Neither what its header says nor its name, which may be a patient's, is in what is printed or in the page."""
    pixels = (np.arange(2 * 40 * 30) % 255).astype(np.int16).reshape(2, 40, 30)
    (tmp_path / "DOE_JOHN.dcm").write_bytes(scans.dicom(pixels, frames=2, PatientName="SENTINEL^NAME", StudyDescription="SENTINEL study"))
    items = [item(i, "CLOSED", "yes", image=f"DOE_JOHN.dcm#frame={i}") for i in range(2)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    words = ["eval", model_dir, "--question_file", str(tmp_path / "items.json"), "--max_new_tokens", "2", "--bootstrap", "50", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    written = contents(tmp_path / "out")
    assert not [name for name, text in written.items() if b"SENTINEL" in text] and b"DOE_JOHN" not in written["report.html"] + written["answers.jsonl"]
    assert written["report.html"].count(b"<img") == 2
    assert "DOE_JOHN" not in "".join(capfd.readouterr()) and main(words) == 0 and contents(tmp_path / "out") == written


# ---- a benchmark -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqa_rad(tmp_path_factory):
    """As many items as VQA-RAD's test split; 164 closed answers of 272 are right."""
    folder = tmp_path_factory.mktemp("rad")
    n_open, n_closed = SPLITS["vqa-rad"]
    items = [item(i, "OPEN" if i < n_open else "CLOSED", "left lung" if i < n_open else "yes", image=f"{i % 7}.png", organ="chest") for i in range(n_open + n_closed)]
    answers = [{"question_id": str(i), "text": "the lung" if i < n_open else "yes" if i < n_open + 164 else "no", "model_id": "theirs"} for i in range(len(items))]
    (folder / "test.json").write_text(json.dumps(items))
    (folder / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folder


def test_published_rows_stand_beside_a_benchmark_of_their_size(vqa_rad, tmp_path, capsys):
    assert main(["eval", "--predictions", str(vqa_rad / "theirs.jsonl"), "--benchmark", str(vqa_rad / "test.json"), "--out", str(tmp_path), "--bootstrap", "100"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "vqa-rad test" in shown and "60.29" in shown and "60.35*" in shown and "STLLaVA-Med 7B" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "vqa-rad" and report["model"] == "theirs"
    closed = next(score for score in report["scores"] if score["metric"] == "closed_accuracy_batch@1")
    assert closed["value"] == 164 / 272 and closed["attainable"] is True and closed["low"] < 164 / 272 < closed["high"]
    assert report["published"]["rows"][0]["unattainable"] == {"closed_accuracy_batch": 60.35}
    page = Tags((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "not k of\n272" in "".join(page.text)
    assert re.search(r"STLLaVA-Med 7B \(published\) & 37\.12 & 10\.83 & 60\.35", (tmp_path / "table.tex").read_text())
    assert "60.35 is not k of 272" in (tmp_path / "table.md").read_text().replace("\\", "")


LAYOUTS = {  # name -> (makes the files and gives their path, benchmark, open and closed items, a heading of its groups)
    "vqa-rad": (published.vqa_rad, "vqa-rad", 1, 2, "phrase type"),
    "data_RAD": (published.data_rad, "vqa-rad", 1, 2, "phrase type"),
    "slake": (published.slake, "slake", 1, 2, "question type"),
    "pathvqa": (published.pathvqa, "pathvqa", 2, 1, "question type"),
    "pathvqa, qa": (lambda folder: published.pathvqa(folder, "qa"), "pathvqa", 2, 1, None),
    "parquet": (lambda folder: published.write_parquet(folder / "test.parquet", published.hub_rows(folder)), None, 1, 2, None),
    "parquet, paths": (lambda folder: published.write_parquet(folder / "test.parquet", published.hub_rows(folder, embedded=False)), None, 1, 2, None)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_benchmarks_in_their_published_layouts(layout, tmp_path, model_dir, capsys):
    make, name, n_open, n_closed, heading = LAYOUTS[layout]
    path = make(tmp_path / "data")
    chosen = ["--benchmark", name, "--data", str(path)] if name else ["--benchmark", str(path)]
    assert main(["eval", model_dir, *chosen, "--max_new_tokens", "2", "--bootstrap", "50", "--out", str(tmp_path / "out"), "--baselines", "shuffled_image"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["benchmark"], report["counts"]["open"], report["counts"]["closed"]) == (name, n_open, n_closed)
    assert set(report["groups"]) == ({heading} if heading else set()) and report["published"]["rows"] == []
    assert f"here are {n_open} and {n_closed}" in report["published"]["note"] or name is None
    assert "<img" in (tmp_path / "out" / "report.html").read_text()
    assert all(row["prompt"] and "<image>" not in row["prompt"] for row in rows_of(tmp_path / "out" / "answers.jsonl"))
    images = {row["image"] for row in report["items"]}
    assert len(images) >= 2 and all(image.startswith("embedded:") for image in images) == (layout == "parquet")


def test_the_majority_of_a_benchmarks_training_split(tmp_path, capsys):
    folder = published.vqa_rad(tmp_path / "data")
    (tmp_path / "answers.json").write_text(json.dumps({"3": "left", "4": "no", "5": "no"}))
    assert main(["eval", "--predictions", str(tmp_path / "answers.json"), "--benchmark", "vqa-rad", "--data", str(folder), "--bootstrap", "50", "--baselines",
                 "majority,majority_by_type", "--train_file", str(folder), "--out", str(tmp_path / "out")]) == 0
    baselines = json.loads((tmp_path / "out" / "report.json").read_text())["baselines"]
    assert [one["note"].split(", ")[-1] for one in baselines] == ["counted in data"] * 2
    assert [score["value"] for one in baselines for score in one["scores"] if score["metric"] == "strict_closed_accuracy@1"] == [0.5, 0.5]  # "no", of "no", "yes"


def test_majority_of_a_train_file(vqa_rad, data, capsys):
    train = [item(i, "CLOSED", "no") for i in range(3)] + [item(9, "OPEN", "Left lung.")]
    (vqa_rad / "train.json").write_text(json.dumps(train))
    words = ["eval", "--predictions", str(vqa_rad / "theirs.jsonl"), "--benchmark", "vqa-rad", "--data", str(vqa_rad / "test.json"), "--bootstrap", "50"]
    assert main([*words, "--baselines", "majority", "--train_file", str(vqa_rad / "train.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "counted in train.json" in shown and re.search(r"closed_accuracy_batch 0\.00 \+60\.29", shown) and re.search(r"open_recall 100\.00 -50\.00", shown)


# ---- answers of other systems ------------------------------------------------------------------------------------------------

ROWS = [("1", "yes"), ("2", "left, lung\nand \"more\"")]


@pytest.mark.parametrize("field", ["text", "answer", "prediction", "response"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_files_of_answers(tmp_path, field, suffix):
    path = tmp_path / f"model.{suffix}"
    records = [{"id": name, field: text} for name, text in ROWS]
    if suffix in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["id", field], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text(json.dumps(records) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in records))
    rows = read_predictions(path)
    assert [(row["question_id"], row["text"]) for row in rows] == ROWS and system_name(path, rows) == "model"


def test_more_files_of_answers(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    assert read_predictions(write("map.json", {"1": "yes", "2": 3})) == [{"question_id": "1", "text": "yes"}, {"question_id": "2", "text": "3"}]
    both = [{"qid": 1, "question": "?", "answer": "reference", "prediction": "yes"}]
    assert read_predictions(write("both.json", both)) == [{"question_id": 1, "text": "yes"}]
    unclear = write("unclear.json", [{"id": 1, "text": "a", "answer": "b"}])
    assert read_predictions(unclear, "answer") == [{"question_id": 1, "text": "b"}]
    for path, message in ((unclear, r"unclear.json: row 0 has text and answer: one may be .*--text_field"),
                          (write("none.json", [{"id": 1, "q": "x"}]), "row 0 has no answer; want one of .* found id, q"),
                          (write("id.json", [{"text": "x"}]), "row 0 has no id"),
                          (write("null.json", [{"id": 5, "text": None}]), r"row 0 \(id 5\): text is a NoneType"),
                          (write("deep.json", {"1": {"a": 2}}), "want id -> answer"),
                          (write("wide.csv", "id,text\n1,yes,more\n"), "row 0 has not the 2 cells of the heading"),
                          (write("open.csv", 'id,text\n1,"yes\n'), "cannot be read as a table"),
                          (tmp_path, "no answers.jsonl in it")):
        with pytest.raises(FormatError, match=message):
            read_predictions(path)


def test_unmatched_answers(vqa_rad, tmp_path, capsys):
    lines = (vqa_rad / "theirs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[1:]) + '{"question_id": "new", "text": "x"}\n' + lines[-1])
    words = ["eval", "--predictions", str(tmp_path / "some.jsonl"), "--benchmark", str(vqa_rad / "test.json"), "--bootstrap", "50"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "1 missing (first '0'), 1 duplicate (first '450'), 1 surplus (first 'new')" in error and "--unmatched wrong" in error
    assert main([*words, "--unmatched", "wrong"]) == 0
    assert "n unanswered 2 (wrong), n surplus 1 (ignored)" in " ".join(capsys.readouterr().out.split())


# ---- pages -------------------------------------------------------------------------------------------------------------------

HOSTILE = "</td><script>alert(1)</script>&\\input{x}%$_{}|`<img src=http://x>\n\x1b[31m[bold]\ud800"


@pytest.fixture(scope="module")
def hostile(data):
    items = [item(f"{HOSTILE}{i}", ("OPEN", "CLOSED")[i % 2], f"{HOSTILE} {i}", f"{HOSTILE}\n<image>", image=f"{i % 4}.png", modality=f"{HOSTILE}{i % 2}") for i in range(6)]
    answers = [{"id": one["id"], "text": ("", "I cannot determine it. " + HOSTILE)[i % 2]} for i, one in enumerate(items)]
    found = evaluate(items, Answers(HOSTILE, answers), FAST, title=HOSTILE, baselines=[Answers(f"base {HOSTILE}", answers, HOSTILE)],
                     other=Answers(HOSTILE, answers), facts={HOSTILE: HOSTILE})
    return found, ItemPictures(items, data)


def test_a_page_holds_everything_and_runs_nothing(hostile):
    found, pictures = hostile
    page = Tags(html_page(found, pictures))
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    assert len(page.sources) == 6 and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert page.tags.count("svg") == 6 and page.tags.count("img") == 6
    text = "".join(page.text)
    assert "The worst closed answers" in text and "Refusals: 3" in text and "Empty answers: 3" in text and "alert(1)" in text
    assert "img" not in Tags(html_page(found)).tags  # without pictures


def test_a_picture_that_cannot_be_read_is_said_to_be(data, tmp_path):
    items = [item(0, "CLOSED", "yes", image="gone.png")]
    found = evaluate(items, Answers("a", [{"id": 0, "text": "no"}]), FAST)
    page = html_page(found, ItemPictures(items, tmp_path))
    assert "gone.png" in page and "<img" not in page


def test_hostile_texts_are_written(hostile, tmp_path):
    found, pictures = hostile
    written = [path.name for path in write_evaluation(found, tmp_path / "out", {"title": HOSTILE}, [], pictures)]
    assert sorted(written) == OUTPUTS and written[-1] == "manifest.json"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["title"] == HOSTILE
    assert "alert(1)" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_tables_escape(hostile):
    found, _ = hostile
    for row in [line for line in latex_table(found).splitlines() if not re.match(r"%|\\hline|\\begin|\\end", line)]:
        assert row.endswith(r"\\") and r"\input" not in row and not re.search(r"(?<!\\)[%$#]", row) and len(re.findall(r"(?<!\\)&", row)) == 6
    table = [line for line in markdown_table(found).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {8} and not re.search(r"(?<!\\)<", "".join(table))


def test_terminal_and_notebook(hostile):
    found, _ = hostile
    out = io.StringIO()
    print_evaluation(found, Console(file=out, width=80))
    assert "\x1b" not in out.getvalue() and "empty answers 3, refusals 3" in out.getvalue() and "[bold]" in out.getvalue()
    for shown in (found._repr_html_(), found.system.report._repr_html_()):
        page = Tags(shown)
        assert {"table", "caption"} <= set(page.tags) and not {"script", "img"} & set(page.tags)
    assert "open_recall@1" in found._repr_html_() and "n skipped" in found.system.report._repr_html_()


# ---- what is refused ---------------------------------------------------------------------------------------------------------

WRONG = [
    ([], "nothing to evaluate"),
    (["{model}"], "give one test set"),
    (["{model}", "--predictions", "{answers}", "--question_file", "{items}"], "give one"),
    (["{model}", "--model_path", "other", "--question_file", "{items}"], "two models"),
    (["{model}", "--question_file", "{items}", "--benchmark", "slake"], "give one test set"),
    (["--predictions", "{answers}", "--benchmark", "slake"], "--benchmark slake: give --data PATH"),
    (["--predictions", "{answers}", "--benchmark", "slak"], "did you mean slake?"),
    (["--predictions", "{answers}", "--benchmark", "nowhere.json"], "no such file, and not one of vqa-rad, slake, pathvqa"),
    (["--predictions", "{answers}", "--benchmark", "slake", "--data", "nowhere"], "nowhere"),
    (["--predictions", "nowhere.jsonl", "--question_file", "{items}"], "nowhere.jsonl"),
    (["--predictions", "{answers}", "--question_file", "{items}", "--baselines", "no_image"], "the model has to answer"),
    (["--predictions", "{answers}", "--question_file", "{items}", "--baselines", "majorty"], "did you mean majority?"),
    (["--predictions", "{answers}", "--question_file", "{items}", "--bootstrap", "0"], "n_resamples=0"),
    (["--predictions", "{answers}", "--question_file", "{items}", "--metrics", "loose"], "not one of compat, strict, both"),
    (["--predictions", "{answers}", "--question_file", "{items}", "--closed", "bach"], "did you mean batch?"),
    (["--predictions", "{answers}", "--question_file", "{items}"], "missing"),
    (["{model}", "--question_file", "{items}", "--num_chunks", "2"], "give --out DIR"),
    (["{model}", "--question_file", "{items}", "--num_chunks", "2", "--chunk_idx", "2", "--out", "{out}"], "chunk 2 of 2"),
    (["{model}", "--question_file", "{items}", "--batch_size", "0"], "--batch_size is 0"),
    (["{model}", "--question_file", "{items}", "--image_folder", "nowhere"], "3 of 3 pictures are missing"),
    (["{model}", "--question_file", "{items}", "--conv_mode", "v9"], "template 'v9' is unknown"),
    (["{model}", "--question_file", "{items}", "--compare", "{answers}"], "answers.jsonl: predictions do not match the 8 references: 7 missing"),
    (["{model}", "--question_file", "{items}", "--baselines", "majority", "--train_file", "nowhere"], "nowhere"),
    (["--predictions", "{answers}", "--question_file", "{items}", "--candidates", "{model}/tokenizer.model"], "not JSON"),
    (["nowhere", "--question_file", "{items}"], "nowhere"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_mistakes_are_one_line(words, message, data, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"question_id": "q0", "text": "no"}\n')
    places = {"model": model_dir, "answers": str(tmp_path / "answers.jsonl"), "items": str(data / "items.json"), "out": str(tmp_path / "out")}
    try:
        code = main(["eval", *(word.format(**places) for word in words)])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("stllava eval: ")]) == 1


def test_without_jinja2_everything_but_the_page(vqa_rad, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "has_jinja", lambda: False)
    assert main(["eval", "--predictions", str(vqa_rad / "theirs.jsonl"), "--benchmark", str(vqa_rad / "test.json"), "--out", str(tmp_path), "--bootstrap", "50"]) == 0
    assert "no report.html: it needs jinja2 (pip install 'stllava[report]')" in capsys.readouterr().err
    assert sorted(contents(tmp_path)) == [name for name in OUTPUTS if name != "report.html"]
