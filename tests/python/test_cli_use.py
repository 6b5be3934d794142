"""`stllava chat` and `stllava generate` as they are typed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from talking import picture, talking_model

import stllava_c
from stllava.cli import main
from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.data.steps import item_seed
from stllava.evaluate import answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ and three pictures."""
    folder = tmp_path_factory.mktemp("use")
    talking_model(max_position_embeddings=256).save_pretrained(folder / "model")
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model():
    return talking_model()


# ---- chat ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Runs a chat on these lines; returns (exit code, answers, stderr)."""
    def run(lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", str(folder / "model"), "--max-new-tokens", "5", *flags])
        found = capsys.readouterr()
        return code, found.out.splitlines(), found.err
    return run


def test_several_turns_through_a_pipe(talk, folder, model):
    code, answers, errors = talk(["What is it?", "", "Is it large?", f"/image {folder / '1.png'}", "And this?", "/reset", "What is it?", "/exit", "not read"],
                                 "--image", str(folder / "0.png"), "--temperature", "0.8", "--seed", "3")
    assert (code, errors) == (0, "")
    session = model.chat_session(seed=3, max_new_tokens=5, temperature=0.8)
    want = [session.send("What is it?", [folder / "0.png"]).finish().text, session.send("Is it large?").finish().text,
            session.send("And this?", [folder / "1.png"]).finish().text]
    session.reset()
    want.append(session.send("What is it?", [folder / "1.png"]).finish().text)
    assert answers == want and len(set(want)) == 4


def test_mistakes_in_a_chat_do_not_end_it(talk, folder):
    (folder / "bad.png").write_bytes(b"no picture")
    code, answers, errors = talk(["/image nowhere.png", f"/image {folder / 'bad.png'}", "/imagine", "/image", "word " * 300, "What?"])
    assert code == 1 and len(answers) == 1 and len(answers[0].split()) == 5  # a script sees that something failed
    for text in ("nowhere.png", "bad.png", "'/imagine' is no command", "'/image' is no command", "the model's context is 256", "/reset"):
        assert text in errors
    assert "Traceback" not in errors


def test_a_template_that_does_not_fit_is_said_and_used(talk, model):
    code, answers, errors = talk(["What is it?"], "--conv-mode", "mistral_instruct")
    assert code == 0 and "--conv_mode is mistral_instruct, but model looks like a checkpoint of v1; using mistral_instruct" in errors
    assert answers == [model.chat([{"role": "user", "content": "What is it?"}], template="mistral_instruct", max_new_tokens=5)]
    assert talk([], "--conv_mode", "nonsense")[::2] == (2, ("stllava chat: --conv_mode: template 'nonsense' is unknown, want one of default, dolly, "
                                                           "llama_2, llava_llama_2, llava_v0, llava_v1, mistral_instruct, mpt, plain, plain_qav, v0, "
                                                           "v0_mmtag, v0_plain, v1, v1_mmtag, v1_sq, vicuna_v1\n"))


def test_help_and_stop(talk):
    code, answers, errors = talk(["/help", "What is it?"])
    assert code == 0 and "/image FILE" in errors
    word = answers[0].split()[2]
    code, cut, _ = talk(["What is it?"], "--stop", word)
    assert cut == [" ".join(answers[0].split()[:2])]


# ---- generate --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(folder, tmp_path, capsys):
    """Answers these questions; returns (exit code, answer records, stderr)."""
    def run(questions, *flags):
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        code = main(["generate", "--model-path", str(folder / "model"), "--question-file", str(tmp_path / "q.jsonl"), "--image-folder", str(folder),
                     "--answers-file", str(tmp_path / "a.jsonl"), "--max_new_tokens", "4", *flags])
        path = tmp_path / "a.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return code, rows, capsys.readouterr().err
    return run


QUESTIONS = [{"question_id": i, "image": f"{i % 3}.png", "text": f"{DEFAULT_IMAGE_TOKEN}\nIs it number {i}?", "category": "x"} for i in range(8)]
QUESTIONS.append({"question_id": "text", "text": "What is air?"})


def test_answers_in_llavas_layout(ask, model, folder):
    code, rows, errors = ask(QUESTIONS, "--temperature", "0.7", "--seed", "5", "--batch_size", "3")
    assert code == 0 and "fields not used: category" in errors
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in QUESTIONS]
    for row, question in zip(rows, QUESTIONS, strict=True):
        assert set(row) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert (row["model_id"], row["metadata"], row["prompt"]) == ("model", {}, question["text"].replace(f"{DEFAULT_IMAGE_TOKEN}\n", ""))
        assert row["text"] == model.chat([{"role": "user", "content": question["text"]}], [folder / question["image"]] if "image" in question else [],
                                         max_new_tokens=4, temperature=0.7, seeds=[item_seed(5, "question", question["question_id"])])
    assert len({row["answer_id"] for row in rows}) == len(rows)


def test_an_image_is_encoded_once(ask, monkeypatch):
    made, real = [], stllava_c.Generator
    monkeypatch.setattr(stllava_c, "Generator", lambda *a, pixels=None, **o: made.append(0 if pixels is None else len(pixels)) or real(*a, pixels=pixels, **o))
    ask(QUESTIONS, "--batch_size", "3")  # of picture 0 and 1 there are three questions, of picture 2 two
    assert made == [1, 1, 1]


def test_features_are_kept(ask, tmp_path):
    whole = ask(QUESTIONS, "--feature-cache", str(tmp_path / "features"))[1]
    assert len(list((tmp_path / "features").rglob("*.features"))) == 3
    (tmp_path / "a.jsonl").unlink()
    assert ask(QUESTIONS, "--feature-cache", str(tmp_path / "features"))[1] == whole
    (tmp_path / "a.jsonl").unlink()
    assert ask(QUESTIONS)[1] == whole


def test_a_picture_that_cannot_be_read_ends_the_run_and_loses_nothing(ask, folder):
    (folder / "bad.png").write_bytes(b"no picture")
    code, rows, errors = ask([*QUESTIONS, {"question_id": "bad", "text": "a", "image": "bad.png"}], "--batch_size", "3")
    assert code == 2 and len(rows) == 9 and "bad.png" in errors


def test_what_was_answered_is_not_asked_again(ask, tmp_path, monkeypatch):
    _, whole, _ = ask(QUESTIONS)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    stranger = json.dumps({"question_id": 99, "text": "kept"}) + "\n"
    for torn in (lines[1][:30], lines[1][:-1]):
        (tmp_path / "a.jsonl").write_text(lines[4] + stranger + torn)
        asked, real = [], stllava_c.Batch
        monkeypatch.setattr(stllava_c, "Batch", lambda *a, **o: asked.append(o["n_images"]) or real(*a, **o))
        _, rows, _ = ask(QUESTIONS)
        monkeypatch.undo()
        assert rows == [json.loads(stranger), *whole] and len(asked) == 1
    assert ask(QUESTIONS)[1] == rows


def test_chunks_are_the_whole(ask, tmp_path):
    _, whole, _ = ask(QUESTIONS)
    parts = []
    for k in range(3):
        (tmp_path / "a.jsonl").unlink()
        parts += ask(QUESTIONS, "--num-chunks", "3", "--chunk-idx", str(k))[1]
    assert parts == whole


@pytest.mark.parametrize("questions, flags, words", [
    (QUESTIONS, ["--num_beams", "4"], ["--num_beams is 4: there is no beam search"]),
    (QUESTIONS, ["--batch_size", "0"], ["--batch_size is 0"]),
    (QUESTIONS, ["--num_chunks", "2", "--chunk_idx", "2"], ["chunk 2 of 2"]),
    (QUESTIONS, ["--temperature", "-1"], ["temperature"]),
    ([*QUESTIONS, QUESTIONS[2]], [], ["q.jsonl: 1 of 10 questions", "row 9: question_id 2 is that of row 2 too"]),
    ([{"question_id": 1, "question": "a", "image": "0.png"}, {"text": "b"}, {"question_id": 2, "text": "c", "image": 3}], [],
     ["3 of 3 questions", "row 0: no text", "found fields ['image', 'question', 'question_id']", "row 1: no question_id", "row 2: image is a int"]),
    ([{"question_id": 1, "text": "a", "image": "none.png"}], [], ["1 of 1 image files are missing", "none.png"]),
    ([{"question_id": 1, "text": "a", "image": "../0.png"}], [], ["outside the directory"]),
    ([{"question_id": 1, "text": "a " * 300}], [], ["prompt 0 is", "context is 256"]),
    ([3], [], ["row 0 is a int, want an object"]),
])
def test_what_cannot_be_answered_is_named(ask, questions, flags, words):
    code, rows, errors = ask(questions, *flags)
    assert (code, rows) == (2, []) and all(word in errors for word in words), errors
    assert "Traceback" not in errors


def test_an_interrupted_run_keeps_its_answers(ask, monkeypatch):
    _, whole, _ = ask(QUESTIONS[:3])
    real, calls = answers.generate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(answers, "generate", interrupted)
    code, rows, errors = ask(QUESTIONS, "--batch_size", "2")
    assert code == 130 and len(rows) == 5 and "interrupted" in errors
    monkeypatch.undo()
    assert ask(QUESTIONS)[1][:3] == whole


def test_answers_of_another_model_or_question_are_not_continued(ask, tmp_path):
    _, whole, _ = ask(QUESTIONS)
    for field, now in (("model_id", "'model'"), ("prompt", "'Is it number 3?'")):
        (tmp_path / "a.jsonl").write_text(json.dumps({**whole[3], field: "another"}) + "\n")
        code, _, errors = ask(QUESTIONS)
        assert code == 2 and f"question 3 has the {field} 'another', but now it is {now}; to answer anew, name another file" in errors


def test_another_file_is_not_continued(ask, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 3}\n')
    code, rows, errors = ask(QUESTIONS)
    assert code == 2 and rows == [{"id": 3}] and "a.jsonl: a line without 'question_id'" in errors


def test_questions_with_images_need_a_folder(folder, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS[0]))
    words = ["generate", "--model_path", str(folder / "model"), "--question_file", str(tmp_path / "q.jsonl"), "--answers_file", str(tmp_path / "a.jsonl")]
    assert main(words) == 2
    assert "1 questions have an image, the first '0.png'; give --image_folder" in capsys.readouterr().err
    assert not Path(tmp_path / "a.jsonl").exists()
