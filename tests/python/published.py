"""Miniature copies of the published layouts, made here: the fields, spellings, file names and traps of the sets, none of their content (spec 5)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

VQA_RAD = "VQA_RAD Dataset Public.json"


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade % 256, 10, 20)).save(path)


def vqa_rad_rows() -> list[dict[str, Any]]:
    """Three phrase types of train, two of test; ids of both types, a trailing space, an integer answer, closed answers beyond yes and no."""
    def row(qid: Any, image: str, phrase: str, question: str, answer: Any, kind: str) -> dict[str, Any]:
        return {"qid": qid, "phrase_type": phrase, "qid_linked_id": f"03f451ca-{qid}", "image_case_url": f"https://example.org/case/{image}", "image_name": image,
                "image_organ": "CHEST", "evaluation": "not evaluated", "question": question, "question_rephrase": "NULL", "question_relation": "NULL",
                "question_frame": "NULL", "question_type": "PRES", "answer": answer, "answer_type": kind}
    return [row("0", "synpic1.jpg", "freeform", "Are regions of the lung infarcted?", "Yes", "CLOSED"),
            row("1", "synpic1.jpg", "para", "How many ribs are there ?", 12, "OPEN"),
            row(2, "synpic2.jpg", "freeform", "Is it normal?", "no", "CLOSED "),
            row(3, "synpic2.jpg", "test_freeform", "Which side is it on?", "left", "CLOSED"),
            row("4", "synpic3.jpg", "test_para", "What is the organ system?", "Gastrointestinal", "OPEN"),
            row(5, "synpic3.jpg", "test_freeform ", "Is there free air?", "No", "CLOSED ")]


def vqa_rad(folder: Path) -> Path:
    """As on OSF."""
    for number in (1, 2, 3):
        picture(folder / "VQA_RAD Image Folder" / f"synpic{number}.jpg", number)
    (folder / VQA_RAD).write_text(json.dumps(vqa_rad_rows()))
    return folder


def data_rad(folder: Path) -> Path:
    """MEVF's copy: two files, images/."""
    rows = vqa_rad_rows()
    for number in (1, 2, 3):
        picture(folder / "images" / f"synpic{number}.jpg", number)
    (folder / "trainset.json").write_text(json.dumps(rows[:3]))
    (folder / "testset.json").write_text(json.dumps(rows[3:]))
    return folder


def slake_rows() -> list[dict[str, Any]]:
    def row(qid: int, image: int, language: str, question: str, answer: str, kind: str, content: str) -> dict[str, Any]:
        return {"img_id": image, "img_name": f"xmlab{image}/source.jpg", "question": question, "answer": answer, "q_lang": language, "location": "Abdomen",
                "modality": "MRI", "answer_type": kind, "base_type": "vqa", "content_type": content, "triple": ["vhead", "_", "_"], "qid": qid}
    return [row(11, 1, "en", "What modality is used to take this image?", "MRI", "OPEN", "Modality"),
            row(12, 1, "zh", "\u8fd9\u662f\u4ec0\u4e48\u6a21\u6001?", "\u6838\u78c1", "OPEN", "Modality"),
            row(13, 2, "en", "Does the picture contain liver?", "Yes", "CLOSED", "Organ"),
            row(14, 2, "en", "Which is larger, lung or liver?", "Lung", "CLOSED", "Size")]


def slake(folder: Path, validation: str = "validate") -> Path:
    for image in (1, 2):
        picture(folder / "imgs" / f"xmlab{image}" / "source.jpg", image)
    for split in ("train", validation, "test"):
        (folder / f"{split}.json").write_text(json.dumps(slake_rows(), ensure_ascii=False), encoding="utf-8")
    return folder


def pathvqa_rows(split: str, layout: str) -> list[dict[str, Any]]:
    data = [("Where are liver stem cells located here?", "in the canals of hering", "other"), ("Is the wall thick?", "yes", "yes/no"),
            ("How many cells are there?", "2", "number")]
    if layout == "qa":
        return [{"image": f"{split}_000{i}", "question": question, "answer": answer} for i, (question, answer, _) in enumerate(data)]
    return [{"answer_type": kind, "img_id": f"{split}_000{i}", "label": {answer: 1}, "question_id": 100 + i, "question_type": question.split()[0].lower(),
             "sent": question} for i, (question, answer, kind) in enumerate(data)]


def pathvqa(folder: Path, layout: str = "vqa", protocol: int = 2) -> Path:
    """layout: vqa (qas/{split}_vqa.pkl) or qa (qas/{split}/{split}_qa.pkl)."""
    for split in ("train", "val", "test"):
        for i in range(3):
            picture(folder / "images" / split / f"{split}_000{i}.jpg", i)
        path = folder / "qas" / (f"{split}_vqa.pkl" if layout == "vqa" else f"{split}/{split}_qa.pkl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(pathvqa_rows(split, layout), protocol))
    if layout == "vqa":
        (folder / "qas" / "trainval_label2ans.pkl").write_bytes(pickle.dumps(["yes", "no"], protocol))
    return folder


def llava_med_rows(key: str = "conversations") -> list[dict[str, Any]]:
    """LLaVA-Med's conversion, with types as one public copy spells them."""
    return [{"id": i, "image": f"{i % 2}.jpg", "answer_type": kind, "question_type": "PRES",
             key: [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}]}
            for i, (kind, question, answer) in enumerate([("OPEN", "What is it?", "a lung"), ("Closed", "Is it large?", "Yes"), ("CLOSED ", "Which side?", "left")])]


def question_rows() -> list[dict[str, Any]]:
    """{question_id, image, text, gpt4_answer, answer_type}; a text of them ends in the marker already."""
    return [{"question_id": 0, "image": "0.jpg", "text": "What is it?\n<image>", "gpt4_answer": "a lung", "answer_type": "OPEN"},
            {"question_id": 1, "image": "1.jpg", "text": "Is it large?", "gpt4_answer": "yes", "answer_type": "CLOSED"}]


def hub_rows(folder: Path, *, embedded: bool = True) -> list[dict[str, Any]]:
    """{image, question, answer}; the image as `datasets` stores it."""
    rows = []
    for i, (question, answer) in enumerate([("What is it?", "a lung"), ("Is it large?", "Yes"), ("is it small ?", "no")]):
        picture(folder / f"{i}.png", i)
        image = {"bytes": (folder / f"{i}.png").read_bytes() if embedded else None, "path": f"{i}.png"}
        rows.append({"image": image, "question": question, "answer": answer})
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path
