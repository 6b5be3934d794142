"""The data check: what was planted is found, nothing else is; every kind of the table has its case; what it says about tokens is what training does."""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import scans
import text_data
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image
from planted import PAIR_PLANTS, PLANTS, clean_item, clean_pair, clean_row, draw, plant
from tiny import tiny_model

from stllava.cli import main
from stllava.data.dpo import DPODataset
from stllava.data.sft import SFTDataset
from stllava.datacheck import KINDS, CheckSettings, check_data
from stllava.datacheck.estimate import Plan, estimate
from stllava.datacheck.hashes import MIN_LIKENESS, close_pairs, fingerprint, likeness, near_pairs
from stllava.datacheck.masks import choose_rows, masked
from stllava.datacheck.page import write_page
from stllava.datacheck.pictures import PictureRules, key_of
from stllava.datacheck.screen import print_report
from stllava.datacheck.summary import lengths_of
from stllava.images import ImageProcessor

DEEP = CheckSettings(pictures=PictureRules(deep=True, prints=True))


def found(report) -> set[tuple[int | None, str]]:
    return {(finding.row, finding.kind) for finding in report.findings}


def check(folder, name, settings=DEEP, **options):
    return check_data(folder / f"{name}.json", folder / "images", tokenizer=text_data.tokenizer(), tokens_per_image=576, settings=settings, **options)


def check_rows(*records, settings=None, **options):
    return check_data(list(records), tokenizer=text_data.tokenizer(), tokens_per_image=16, settings=settings, **options)


def said(question: str, answer: str, **fields) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return folder, plant(folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    plant(folder, spoil=False)
    tiny_model().save_pretrained(folder / "model")
    return folder


# ---- the bar ---------------------------------------------------------------------------------------------------------------------


def test_what_was_planted_is_found_exactly(planted):
    folder, (wanted, wanted_pairs) = planted
    report = check(folder, "sft", against=[folder / "test.json"])
    assert found(report) - wanted == {(None, "text_only")} and wanted - found(report) == set()
    assert found(check(folder, "dpo")) == wanted_pairs
    kinds = {kind for kind, *_ in (*PLANTS, *PAIR_PLANTS)}
    assert len(PLANTS) + len(PAIR_PLANTS) >= 60 and len(kinds) >= 20 and len(report.findings) == len(wanted) + 1


def test_the_clean_twin_has_no_finding(clean):
    for name in ("sft", "dpo", "test"):
        report = check(clean, name, against=[clean / "test.json"] if name == "sft" else ())
        assert report.findings == [] and len(report.records) > 3


def test_headers_alone_find_all_but_what_only_pixels_show(planted):
    folder, (wanted, _) = planted
    report = check(folder, "sft", CheckSettings(), against=[folder / "test.json"])
    needs_pixels = {(row, kind) for row, kind in wanted if kind in ("image_blank", "image_near_duplicate", "leak_near_duplicate")}
    assert len(needs_pixels) == 3 and found(report) == wanted - needs_pixels | {(None, "text_only")}
    small = check(folder, "sft", CheckSettings(pictures=PictureRules(prints=True)), against=[folder / "test.json"])
    assert {kind for _, kind in found(small)} >= {"image_near_duplicate", "leak_near_duplicate"}


def test_processes_find_the_same(planted, monkeypatch):
    monkeypatch.setattr("stllava.datacheck.check._FEW", 1)
    monkeypatch.setattr("stllava.datacheck.check._CHUNK", 20)
    folder, (wanted, _) = planted
    report = check(folder, "sft", CheckSettings(workers=2, pictures=DEEP.pictures), against=[folder / "test.json"])
    assert found(report) == wanted | {(None, "text_only")}
    assert report.lengths == check(folder, "sft", against=[folder / "test.json"]).lengths


# ---- every kind of the table -------------------------------------------------------------------------------------------------------

OTHERS = {
    "file": lambda folder: check_data(_written(folder / "broken.json", "[{")),
    "row_too_long": lambda _: check_rows(said("Long?", "x" * (4 << 20))),
    "field_unknown": lambda _: check_rows(said("Is it?", "It is.", converations=1)),
    "text_only": lambda folder: check_data([said("Is it?", "It is."), _with_image(folder)], folder),
    "yes_no_case": lambda _: check_rows(said("Is it a?", "Yes"), said("Is it b?", "yes.")),
    "image_cut": lambda folder: check_data([_with_image(folder)], folder, tokenizer=text_data.tokenizer(), tokens_per_image=16,
                                           settings=CheckSettings(max_length=60)),
    "image_text": lambda folder: check_data([_with_scan(folder, BurnedInAnnotation="YES")], folder),
    "conversation": lambda folder: check_rows({**said("Is it?", "It is."), "conversations": said("Is it?", "It is.")["conversations"] * 2},
                                              settings=CheckSettings(template="plain")),
}


def _written(path, text):
    path.write_text(text)
    return path


def _with_image(folder):
    draw(1).save(folder / "a.png")
    return said("<image>\nWhat?", "A thing.", image="a.png")


def _with_scan(folder, **tags):
    (folder / "a.dcm").write_bytes(scans.dicom(rows=60, columns=80, **tags))
    return said("<image>\nWhat?", "A thing.", image="a.dcm")


def test_every_kind_is_planted_somewhere():
    in_plants = {kind for plants in (PLANTS, PAIR_PLANTS) for kind, _, *more in plants for kind in (more[0] if more else {kind})}
    assert in_plants | set(OTHERS) == set(KINDS)
    assert all(kind.severity in ("error", "warning", "note") and kind.means and kind.todo for kind in KINDS.values())


@pytest.mark.parametrize("kind", OTHERS)
def test_kinds_that_are_not_of_one_row(kind, tmp_path):
    assert kind in {finding.kind for finding in OTHERS[kind](tmp_path).findings}


def test_errors_are_what_training_refuses(planted):
    """Row by row: an error, and the data set refuses it; none, and it takes it."""
    folder, _ = planted
    for name, cls in (("sft", SFTDataset), ("dpo", DPODataset)):
        report = check(folder, name)
        data = cls(folder / f"{name}.json", text_data.tokenizer(), ImageProcessor(size=28), image_folder=folder / "images", tokens_per_image=576,
                   on_bad_sample="skip")
        refused = {problem.row for problem in data.problems}
        assert refused == {finding.row for finding in report.findings if finding.severity == "error"} and len(refused) >= (20 if name == "sft" else 4)


WORDS = ("<image>", "</s>", "USER:", "ASSISTANT:", "yes", "\n", " ", "x\ud800", "\x00", "é", "")
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "gpt", "human", "user"]), "value": st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)})


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.lists(TURN, max_size=5), st.sampled_from([0, 1, 2]), st.sampled_from(["v1", "v1_sq", "mistral_instruct", "v0"]))
def test_any_dialogue_is_refused_by_both_or_none(turns, n_images, template):
    record = {"id": 1, "conversations": turns, **({"image": ["a.png", "b.png"][:n_images]} if n_images else {})}
    report = check_data([record], tokenizer=text_data.tokenizer(), tokens_per_image=16, settings=CheckSettings(template=template))
    errors = {finding.kind for finding in report.findings if finding.severity == "error"} - {"image_missing"}
    data = _Unchecked(record, template)
    assert bool(errors) == data.refused, (errors, data.refused)
    assert "conversation" not in errors  # which has no name of its own


class _Unchecked:
    """What the data set says about the row, its pictures aside."""

    def __init__(self, record, template):
        processor = ImageProcessor(size=28)
        data = SFTDataset([said("Is it?", "It is.")], text_data.tokenizer(), processor, template=template, tokens_per_image=16)
        data._images.pixels = lambda key: np.zeros(1)
        data.records = [record]
        self.refused = data._check(0, record) is not None


# ---- images that look alike --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.lists(st.tuples(st.integers(0, 39), st.sets(st.integers(0, 63), max_size=9)), max_size=20),
       st.integers(0, 9))
def test_every_close_pair_is_found_once(values, changes, distance):
    values = values + [values[i] ^ sum(1 << bit for bit in bits) for i, bits in changes if i < len(values)]
    pairs = list(close_pairs(np.array(values, np.uint64), distance))
    wanted = {(i, j) for j in range(len(values)) for i in range(j) if (values[i] ^ values[j]).bit_count() <= distance}
    assert set(pairs) == wanted and len(pairs) == len(wanted)


@pytest.mark.parametrize("number", range(8))
def test_a_picture_looks_like_itself_and_not_like_others(number, tmp_path):
    image = draw(number, (320, 240))
    image.save(tmp_path / "a.jpg", quality=60)
    variants = [image.resize((97, 73)), Image.open(tmp_path / "a.jpg"), Image.eval(image, lambda value: 20 + value * 4 // 5), image.convert("L")]
    mine = fingerprint(image)
    assert all(likeness(mine, fingerprint(variant)) >= MIN_LIKENESS for variant in variants)
    assert sorted(near_pairs([mine, *map(fingerprint, variants)])) == [(i, j) for i in range(5) for j in range(i + 1, 5)]
    assert list(near_pairs([mine, *(fingerprint(draw(k, (320, 240))) for k in range(100, 130)), None])) == []


def test_a_picture_of_one_grey_looks_like_nothing():
    assert fingerprint(Image.new("RGB", (50, 40), (9, 9, 9))) is None


# ---- overlap -----------------------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_leaks_are_the_intersection(tmp_path_factory, ours, theirs):
    """Rows are (patient, image, question) k; what both files have is reported, each image and patient once, each row every time."""
    folder = tmp_path_factory.mktemp("overlap")
    for k in set(ours) | set(theirs):
        draw(k).save(folder / f"{k}.png")
    rows = [dict(clean_item(k), id=f"row {i}") for i, k in enumerate(ours)]
    (folder / "other.json").write_text(json.dumps([dict(clean_item(k), id=f"test {i}") for i, k in enumerate(theirs)]))
    report = check_data(rows, folder, against=[folder / "other.json"])
    common = set(ours) & set(theirs)
    leaks = [finding for finding in report.findings if finding.kind.startswith("leak")]
    assert sorted(f.row for f in leaks if f.kind == "leak_row") == [i for i, k in enumerate(ours) if k in common]
    for kind in ("leak_image", "leak_patient"):
        assert sorted(f.row for f in leaks if f.kind == kind) == sorted(ours.index(k) for k in common)
    assert not any("patient 1" in finding.text for finding in report.findings)


def test_names_in_two_folders_are_two_images_and_bytes_are_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    draw(1).save(tmp_path / "a" / "1.png")
    draw(2).save(tmp_path / "b" / "1.png")
    draw(1).save(tmp_path / "b" / "other.png")
    (tmp_path / "test.json").write_text(json.dumps([said("What is it?\n<image>", "It.", id=1, image="1.png")]))
    rows, options = [said("<image>\nWhat is IT?", "It.", id=2, image="1.png")], {"against": [tmp_path / "test.json"], "against_image_folder": tmp_path / "b"}
    assert check_data(rows, tmp_path / "a", **options).findings == []
    (tmp_path / "test.json").write_text(json.dumps([said("What is it?\n<image>", "It.", id=1, image="other.png")]))
    assert found(check_data(rows, tmp_path / "a", **options)) == {(0, "leak_image"), (0, "leak_row")}


def test_an_image_inside_its_record_is_an_image(tmp_path):
    draw(1).save(tmp_path / "a.png")
    inside = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [said("<image>\nWhat is it?", "It.", image="a.png"), said("<image>\nWhere is it?", "There.", image=inside),
            said("<image>\nWhen was it?", "Then.", image={"bytes": b"GIF89a", "path": None})]
    report = check_data(rows, tmp_path, tokenizer=text_data.tokenizer(), tokens_per_image=16)
    assert found(report) == {(1, "image_duplicate"), (2, "image_damaged")} and len(report.lengths) == 3


def test_images_in_archives(tmp_path):
    for i in range(3):
        draw(i).save(tmp_path / f"{i}.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "0.png", "a/0.png")
        archive.write(tmp_path / "1.png", "a/1.png")
        archive.writestr("a/2.png", b"no picture")
    names = ["2.png", "images.zip/a/0.png", "images.zip/a/1.png", "1.png", "images.zip/a/2.png", "images.zip/a/3.png", "images.zip/../x.png"]
    report = check_data([said(f"<image>\nWhat is {i}?", "It.", image=name) for i, name in enumerate(names)], tmp_path)
    assert found(report) == {(3, "image_duplicate"), (4, "image_damaged"), (5, "image_missing"), (6, "image_name")}
    inside = check_data([said(f"<image>\nWhat is {i}?", "It.", image=f"a/{i}.png") for i in range(2)], tmp_path / "images.zip", against=[])
    assert inside.findings == [] and [picture.size for picture in inside.pictures] == [(96, 72), (96, 72)]


def test_frames_of_one_file_are_several_images(tmp_path):
    (tmp_path / "a.dcm").write_bytes(scans.dicom(frames=2, rows=60, columns=80, BurnedInAnnotation="NO"))
    names = ["a.dcm#frame=0", "a.dcm#frame=1", "a.dcm#frame=2"]
    report = check_data([said(f"<image>\nWhat is {i}?", "It.", image=name) for i, name in enumerate(names)], tmp_path,
                        settings=CheckSettings(pictures=PictureRules(deep=True)))
    assert found(report) == {(2, "image_damaged")}


def test_limits_are_read_off_the_header(tmp_path):
    """More pixels than the file can hold; more than Pillow opens."""
    for name, size in (("a.png", (9000, 9000)), ("b.png", (40000, 40000))):
        draw(1).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        header = b"IHDR" + struct.pack(">II", *size) + data[24:29]
        (tmp_path / name).write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    report = check_data([said(f"<image>\nWhat is {name}?", "It.", image=name) for name in ("a.png", "b.png")], tmp_path)
    assert found(report) == {(0, "image_limit"), (1, "image_limit")}


def test_nothing_of_a_medical_header_or_name_is_told(tmp_path, capsys):
    """Sentinels in the texts of the header and in the name; good, damaged and missing files; screen, page and lines."""
    secret = "SENTINEL7"
    tags = dict.fromkeys(("PatientName", "PatientID", "InstitutionName", "StudyDescription", "SeriesDescription", "ImageComments", "AccessionNumber"), secret)
    good = scans.dicom(rows=60, columns=80, BurnedInAnnotation="YES", **tags)
    assert good.count(secret.encode()) >= len(tags)
    files = {f"{secret}-good.dcm": good, f"{secret}-same.dcm": good, f"{secret}-cut.dcm": good[:-1000], f"{secret}-empty.dcm": b"", f"{secret}-text.dcm": good[:200]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names = [*files, f"{secret}-none.dcm", f"../{secret}.dcm", f"{secret}-good.dcm#frame=9"]
    (tmp_path / "data.json").write_text(json.dumps([said(f"<image>\nWhat is {i}?", "It.", id=i, image=name) for i, name in enumerate(names)]))
    (tmp_path / "test.json").write_text(json.dumps([said("<image>\nWhat?", "It.", id="t", image=f"{secret}-good.dcm", patient_id=secret)]))
    for deep in ([], ["--deep"]):
        assert main(["check-data", str(tmp_path / "data.json"), "--image_folder", str(tmp_path), "--html", str(tmp_path / "page.html"), "--jsonl",
                     str(tmp_path / "lines.jsonl"), "--against", str(tmp_path / "test.json"), *deep]) == 2
        out, err = capsys.readouterr()
        lines, page = ((tmp_path / name).read_text() for name in ("lines.jsonl", "page.html"))
        assert all(secret not in text for text in (out, err, lines, page))
        kinds = [(row["row"], row["kind"]) for row in map(json.loads, lines.splitlines())]
        assert {(0, "image_text"), (0, "leak_image"), (1, "image_duplicate"), (3, "image_empty"), (4, "image_damaged"), (5, "image_missing"),
                (6, "image_name")} <= set(kinds) and ((2, "image_damaged") in kinds) == bool(deep)


# ---- tokens ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("limit", [700, 2048, None])
def test_lengths_and_targets_are_those_of_training(clean, name, limit):
    report = check(clean, name, CheckSettings(max_length=limit))
    options = {"image_folder": clean / "images", "tokens_per_image": 576, "max_length": limit, "on_bad_sample": "skip"}
    if name == "sft":
        data = SFTDataset(clean / "sft.json", text_data.tokenizer(), ImageProcessor(size=28), **options)
        sequences = [sequence for item in range(len(data)) for sequence in data.sequences(item, 0)]
    else:
        data = DPODataset(clean / "dpo.json", text_data.tokenizer(), ImageProcessor(size=28), **options)
        sequences = [sequence for item in range(len(data)) for sequence in data.pair(item, 0)]
    kept = [length for row, length in report.lengths if (row, "no_target") not in found(report)]
    assert [(length.n_rows - length.n_cut, length.n_targets) for length in kept] == [
        (len(s.ids) + 575, sum(label >= 0 for label in s.labels)) for s in sequences]
    total = lengths_of(report)
    assert total.n == len(report.lengths) == sum(bar.n for bar in total.bars) and total.n_cut == sum(length.n_cut for _, length in report.lengths)


@pytest.mark.parametrize("template", ["v1", "v1_sq", "llama_2", "mistral_instruct"])
def test_masked_tokens_are_the_labels(template):
    rows = [clean_row(3), {key: value for key, value in clean_row(4).items() if key != "image"}]
    rows[1]["conversations"] = [{**turn, "value": turn["value"].replace("<image>\n", "") + " \U0001f980é"} for turn in rows[1]["conversations"]]
    report = check_rows(*rows, settings=CheckSettings(template=template, max_length=220))
    n_asked = 0
    for row, record in enumerate(report.records):
        [shown] = masked(record, row, report.tokens)
        sample = report.tokens.sample(record["conversations"], 1 - row, report.tokens.switches(record, row))
        budget = report.tokens.budget(sample)
        assert sum(part.n_tokens for part in shown.parts) == len(sample.input_ids)
        assert sum(part.n_tokens for part in shown.parts if part.role in ("target", "asked")) == sum(label >= 0 for label in sample.labels[:budget])
        text = "".join(part.text for part in shown.parts)
        assert text.removeprefix("<s>").replace("[image: 16 rows]", "<image>").split() == sample.prompt.split()
        n_asked += sum(part.n_tokens for part in shown.parts if part.role == "asked")
    assert (n_asked > 0) == (template == "v1_sq")


def test_what_most_rows_have_is_said_once():
    rows = [said(f"Is it {i}?", f"It is {i}. ASSISTANT: And {i}.") for i in range(30)]
    report = check_rows(*rows)
    assert [finding.row for finding in report.findings if finding.kind.startswith("original")] == [None]
    assert sum(finding.kind == "role_tag_text" for finding in report.findings) == 30


def test_rows_shown_are_drawn_by_the_seed():
    rows = list(range(0, 300, 3))
    assert choose_rows(rows, 5, 1) == choose_rows(rows, 5, 1) != choose_rows(rows, 5, 2)
    assert set(choose_rows(rows, 500, 1)) == set(rows)


# ---- memory and time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_estimate_is_the_arena_of_the_longest_batch(clean, name):
    """Training with the same adapters takes what was foretold."""
    model = tiny_model()
    report = check_data(clean / f"{name}.json", clean / "images", tokenizer=model.tokenizer, tokens_per_image=16)
    cost = estimate(model, report, Plan(batch_size=1, lora_r=4), rate=1e9)
    names = [what for what, _ in cost.memory]
    longest = max(report.lengths, key=lambda item: item[1].n_rows)[0] if name == "sft" else max(
        range(len(report.records)), key=lambda row: sum(length.n_rows for at, length in report.lengths if at == row))
    options = {"image_folder": clean / "images", "tokens_per_image": 16}
    if name == "sft":
        data = SFTDataset(clean / "sft.json", model.tokenizer, ImageProcessor(size=28), **options)
        sequences = data.sequences(longest, 0)
    else:
        data = DPODataset(clean / "dpo.json", model.tokenizer, ImageProcessor(size=28), **options)
        sequences = data.pair(longest, 0)
    trees, batch = model.batch(sequences)
    model.run = None
    import stllava_c
    real = stllava_c.Run(model.core).estimate(batch, pixels=np.zeros((1, 3, 28, 28), np.float32), train=True, vision_grad=False, dropout=True)
    assert len(trees.order) == len(sequences) and cost.memory[-1][1] == pytest.approx(real, rel=0.03) and "activations" in names[-1]
    assert cost.n_trainable == model.core.n_trainable and cost.seconds == pytest.approx(cost.flop / 0.75e9)


def test_more_work_takes_longer(clean):
    report = check(clean, "sft", CheckSettings())

    def flop(**plan):
        return estimate(tiny_model(), report, Plan(**{"lora_r": 4, **plan}), rate=1e9).flop
    assert flop(epochs=2.0) == 2 * flop() and flop() < flop(recompute=True) < flop(lora_r=0, recompute=True) and flop() < flop(vit_lora_r=4)


# ---- what people see ---------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags that are open, addresses, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_has_everything_inside_it(planted, tmp_path):
    folder, _ = planted
    attack = "<script>alert(1)</script><img src=http://example.com/x>"
    rows = [*json.loads((folder / "sft.json").read_text()), said(f"<image>\n{attack}", f"{attack} </s>", image="0.png", id=attack)]
    model = tiny_model()
    report = check_data(rows, folder / "images", tokenizer=model.tokenizer, tokens_per_image=16, settings=DEEP)
    samples = [one for row in (0, len(rows) - 1) for one in masked(report.records[row], row, report.tokens)]
    write_page(tmp_path / "page.html", report, samples, estimate(model, report, Plan(lora_r=4), 1e9))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == [] and page.addresses and all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "<script" not in text and "alert(1)" in page.text and "http://example.com" in page.text and not re.search(r"@import|url\(", text)
    for kind, n in report.counts():
        assert f"{kind} {n}: " in page.text
    assert "class=\"asked\"" in text and "<svg" in text and str(folder) not in text


def test_the_screen_says_what_the_report_has(planted, tmp_path):
    folder, _ = planted
    report = check(folder, "sft")
    with open(tmp_path / "screen", "w", encoding="utf-8") as file:
        print_report(report, masked(report.records[0], 0, report.tokens), None, file)
    text = (tmp_path / "screen").read_text(encoding="utf-8")
    assert all(kind in text for kind, _ in report.counts()[:40]) and f"{report.n_of('error')} errors" in text and "self-questioning at sq_r 0.5" in text
    assert "[INST]" in text and max(map(len, text.splitlines()[2:40])) <= 150  # markup in the data stays text, findings are a line each


# ---- the command -------------------------------------------------------------------------------------------------------------------


def test_exit_codes_and_files(clean, planted, tmp_path, capsys):
    bad, _ = planted
    common = ["--model_name_or_path", str(clean / "model"), "--lora_enable", "--flops", "1e9"]
    page, lines = tmp_path / "page.html", tmp_path / "findings.jsonl"
    assert main(["check-data", str(clean / "sft.json"), "--image-folder", str(clean / "images"), *common, "--deep", "--html", str(page), "--jsonl", str(lines),
                 "--against", str(clean / "test.json"), "--show", "0,1", "--strict"]) == 0
    out = capsys.readouterr().out
    assert "nothing found" in out and "row 1 " in out and "memory about" in out and lines.read_text() == "" and page.read_text().count("class=\"sample\"") == 2
    assert main(["check-data", str(bad / "sft.json"), "--image_folder", str(bad / "images"), "--jsonl", str(lines)]) == 2
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert all(set(row) == {"row", "id", "kind", "severity", "text"} and row["severity"] == KINDS[row["kind"]].severity for row in written)
    assert [row["severity"] for row in written] == sorted((row["severity"] for row in written), key=["error", "warning", "note"].index)
    capsys.readouterr()
    warned = tmp_path / "warned.json"
    warned.write_text(json.dumps([dict(clean_pair(90), id=1), dict(clean_pair(91), id=1)]))
    for i in (90, 91):
        draw(i).save(tmp_path / f"{i}.png")
    assert main(["check-data", str(warned), "--image_folder", str(tmp_path)]) == 0
    assert main(["check-data", str(warned), "--image_folder", str(tmp_path), "--strict"]) == 2
    assert main(["check-data", str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("words, said_of_it", [
    (["--show", "a"], "--show"), (["--show", "0"], "--model_name_or_path"), (["--sq_r", "2"], "--sq_r"), (["--num_workers", "0"], "--num_workers"),
    (["--version", "nosuch"], "nosuch"), (["--against", "nosuch.json"], "nosuch.json"), (["--flops", "-1"], "--flops"), (["--max_aspect", "nan"], "--max_aspect"),
    (["--model_max_length", "0"], "--model_max_length"), (["--modell", "x"], "did you mean")])
def test_mistakes_are_one_line(clean, words, said_of_it, capsys):
    try:
        code = main(["check-data", str(clean / "sft.json"), "--image_folder", str(clean / "images"), *words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said_of_it in error


def test_two_slices_of_one_volume_inside_records_are_two_images() -> None:
    keys = [key_of({"bytes": b"volume", "path": f"v.nii#slice={i}"}) for i in (1, 2, 2)]
    assert keys[0] != keys[1] == keys[2]
    assert key_of(3) is None and key_of({"path": "a.png"}) is None and key_of("a.png") == "a.png"
