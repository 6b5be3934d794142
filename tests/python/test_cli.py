"""The command line: settings are the fields of the configuration classes, errors are one line, a small run goes through every verb."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import dpo_records, sft_records, tiny_model, write_pictures

from stllava.cli import VERBS, main
from stllava_c import _core


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_model().save_pretrained(folder)
    return str(folder)


def test_sft_then_dpo(tmp_path, model_dir, capsys):
    names = write_pictures(tmp_path)
    (tmp_path / "sft.json").write_text(json.dumps(sft_records(names)))
    (tmp_path / "dpo.json").write_text(json.dumps(dpo_records(names)))
    common = ["--model_name_or_path", model_dir, "--image_folder", str(tmp_path), "--lora_enable", "--lora_r", "4", "--max_steps", "6", "--disable_tqdm"]
    assert main(["sft", *common, "--data_path", str(tmp_path / "sft.json"), "--output_dir", str(tmp_path / "sft"), "--vit_lora_enable", "true", "--use_dora",
                 "--learning_rate", "1e-3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["global_step"] == 6
    assert all(json.loads((tmp_path / "sft" / part / "adapter_config.json").read_text())["use_dora"] for part in (".", "Vit-lora"))
    assert main(["dpo", *common, "--data_path", str(tmp_path / "dpo.json"), "--output_dir", str(tmp_path / "dpo"), "--loss_type", "sigmoid", "sft",
                 "--loss_weights", "1.0", "0.1", "--learning_rate", "1e-3"]) == 0


def test_asking_to_pairs(tmp_path, model_dir, capsys):
    (tmp_path / "images").mkdir()
    write_pictures(tmp_path / "images", 2)
    images = ["--model_name_or_path", model_dir, "--image_folder", str(tmp_path / "images")]
    asked, answered, judged = (str(tmp_path / name) for name in ("asked.jsonl", "answered.jsonl", "judged.jsonl"))
    assert main(["ask", *images, "--out", asked, "--n_questions", "2", "--max_new_tokens", "5", "--description_max_new_tokens", "3"]) == 0
    assert main(["answer", *images, "--questions", asked, "--out", answered, "--max_new_tokens", "4"]) == 0
    rows = [json.loads(line) for line in Path(answered).read_text(encoding="utf-8").splitlines()]
    replies = [{"image": r["image"], "question": r["question"], "answers": list(pair), "raw": f"{len(pair[0])} {len(pair[1])}"}
               for r in rows for pair in (r["answers"], r["answers"][::-1])]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in replies))
    assert main(["judge", "--answers", answered, "--replies", str(tmp_path / "replies.jsonl"), "--out", judged]) == 0
    assert main(["pairs", "--judged", judged, "--out", str(tmp_path / "pairs.json")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["pairs", "--judged", judged, "--out", str(tmp_path / "original.json"), "--original_compat"]) == 0
    original = capsys.readouterr()
    assert json.loads(original.out)["dropped"]["tie"] == 0 and original.err == "stllava pairs: original_compat: ties last, balance False\n"
    assert report["pairs"] + sum(report["dropped"].values()) == len(rows) and report["pairs"] == len(json.loads((tmp_path / "pairs.json").read_text()))


def test_eval_prints_counts(tmp_path, model_dir, capsys):
    [name] = write_pictures(tmp_path, 1)
    items = [{"id": i, "image": name, "answer_type": kind, "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "yes"}]}
             for i, kind in enumerate(("OPEN", "CLOSED "))]
    (tmp_path / "test.json").write_text(json.dumps(items))
    assert main(["eval", "--model_name_or_path", model_dir, "--image_folder", str(tmp_path), "--question_file", str(tmp_path / "test.json"),
                 "--max_new_tokens", "3"]) == 0
    assert "1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["sft", "--model_name_or_path", "nowhere", "--data_path", "x.json", "--output_dir", "out"], "nowhere"),
    (["pairs", "--judged", "nowhere.jsonl", "--out", "out.json"], "nowhere.jsonl"),
])
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"stllava {arguments[0]}: ") and "Traceback" not in error


def test_no_memory_is_one_line(capsys, model_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, 1)
    words = ["ask", "--model_name_or_path", model_dir, "--image_folder", ".", "--out", "asked.jsonl"]
    _core._fail_allocation(1, True)
    try:
        assert main(words) == 1
    finally:
        _core._fail_allocation(0)
    error = capsys.readouterr().err
    assert re.fullmatch(r"stllava ask: .*no memory for [^\n]+\n", error)

    def without_memory(args):
        raise MemoryError  # as Python itself does, without a word

    monkeypatch.setitem(VERBS, "doctor", (VERBS["doctor"][0], without_memory))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "stllava doctor: out of memory\n"


def test_bad_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "--unknown_flag", "1"])
    assert "required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sft", "--learning-rat", "1"])
    assert "unknown flag --learning_rat; did you mean --learning_rate?" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["build"]["version"] and facts["packages"]["numpy"]
