"""Neutral records -> a layout, and rows -> a file. Texts are not touched and other fields stay."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stllava.checkpoint.atomic import make_directory, write_bytes
from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.data.problems import DataError, Problem, listed
from stllava.errors import FormatError
from stllava.image_source import split_choice, suffix_of

from .layouts import Kind
from .messages import images_of, messages_of, with_images
from .vqa import item_of_conversation, item_of_question

__all__ = ["TARGETS", "convert_records", "embed_images", "encode_rows", "extract_images", "write_rows"]

SUFFIXES = (".json", ".jsonl", ".parquet")
_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"II*\0": ".tif", b"MM\0*": ".tif", b"RIFF": ".webp"}
_SUFFIX = r"(\.nii)?\.[a-z0-9]{1,8}"

Row = dict[str, Any]


# ---- layouts -----------------------------------------------------------------------------------------------------------------


def _llava(record: Row, kind: Kind, row: int, parts: bool) -> Row:
    return item_of_question(record, row) if kind == "question" else record


def _llava_med(record: Row, kind: Kind, row: int, parts: bool) -> Row:
    return item_of_question(record, row) if kind == "question" else item_of_conversation(record, row)


def _question(record: Row, kind: Kind, row: int, parts: bool) -> Row:
    if kind == "question":
        return record
    item = item_of_conversation(record, row)
    own = {"question_id": item["id"], **({"image": item["image"]} if "image" in item else {}), "text": _plain_question(item),
           "gpt4_answer": item["conversations"][1]["value"], "answer_type": item["answer_type"]}
    return own | {key: value for key, value in item.items() if key not in own and key not in ("id", "conversations")}


def _asked(record: Row) -> Iterator[Row]:
    """The questions that a model asked about an image, one by one: of {question_id, image, prompt: [...]} or {id, questions}."""
    name, questions = record.get("question_id", record.get("id")), record.get("prompt", record.get("questions"))
    if not isinstance(questions, list) or not all(isinstance(question, str) for question in questions):
        raise FormatError(f"the record {name!r} is no list of questions: an intermediate file of another step is not to be converted", field="prompt")
    for number, question in enumerate(questions):
        yield {"question_id": f"{name}/{number}", "image": record.get("image", name), "text": question}


def _dpo(record: Row, kind: Kind, row: int, parts: bool) -> Row:
    return record


def _trl(record: Row, kind: Kind, row: int, parts: bool) -> Row:
    """Conversational; `images` is a list."""
    if kind == "question":
        record = item_of_question(record, row)
    images = images_of(record)
    turns = ("conversations", "chosen_conversations", "reject_conversations")
    rest = {key: value for key, value in with_images(record, []).items() if key not in turns}
    if kind != "pair":
        own: Row = {"messages": messages_of(_turns(record, "conversations"), parts=parts)}
    else:
        chosen, rejected = (messages_of(_turns(record, side), parts=parts) for side in ("chosen_conversations", "reject_conversations"))
        n = len(chosen) - 1
        if chosen[:n] != rejected[:n] or not n:
            raise FormatError("the prompts of chosen and rejected differ; a pair may differ in the last answer only", field="reject_conversations")
        own = {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
    return {**rest, **own, **({"images": images} if images else {})}


def _hub(record: Row, kind: Kind, row: int, parts: bool) -> Row:
    """As such sets are on the Hub: TRL's rows, and {image, question, answer} of a VQA set. Answers to questions stay as they are."""
    if kind != "vqa":
        return record if kind in ("question", "answer") else _trl(record, kind, row, parts)
    item = item_of_conversation(record, row)
    own = {"question": _plain_question(item), "answer": item["conversations"][1]["value"]}
    return {key: value for key, value in item.items() if key != "conversations"} | own


def _plain_question(item: Mapping[str, Any]) -> str:
    value: str = item["conversations"][0]["value"]
    return value.removesuffix(f"\n{DEFAULT_IMAGE_TOKEN}").removeprefix(f"{DEFAULT_IMAGE_TOKEN}\n")


def _turns(record: Row, field: str) -> list[Any]:
    turns = record.get(field)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise FormatError(f"field {field!r} is missing, empty, or no list of turns", field=field)
    return turns


TARGETS: dict[str, tuple[frozenset[Kind], Callable[[Row, Kind, int, bool], Row]]] = {
    "llava": (frozenset({"instruction", "vqa", "question"}), _llava),
    "llava-med": (frozenset({"instruction", "vqa", "question"}), _llava_med),
    "question": (frozenset({"instruction", "vqa", "question"}), _question),
    "dpo": (frozenset({"pair"}), _dpo),
    "trl": (frozenset({"instruction", "vqa", "question", "pair"}), _trl),
    "parquet": (frozenset({"instruction", "vqa", "question", "answer", "pair"}), _hub),
}
"""Layout to write -> kinds of records that have one, and how: (record, kind, row, contents of messages as parts) -> row."""


def convert_records(records: Iterable[Row], kind: Kind, target: str, source: object) -> list[Row]:
    """Rows of the layout `target`. Raises FormatError for a kind that has none, DataError listing every record that is not as it must be."""
    kinds, convert = TARGETS[target]
    if kind not in kinds and not (kind == "steps" and target == "question"):
        possible = [name for name, (some, _) in TARGETS.items() if kind in some]
        raise FormatError(f"{source}: {kind} records cannot be written as {target}; want one of {', '.join(possible) or '(nothing)'}")
    records, rows, problems = list(records), [], []
    if kind == "steps" and target == "question":
        records, kind = [question for record in records for question in _asked(record)], "question"
    parts = any(images_of(record) for record in records)  # contents are text, or parts, in all rows: a column of Parquet has one type
    for row, record in enumerate(records):
        try:
            rows.append(convert(record, kind, row, parts))
        except FormatError as error:
            problems.append(Problem(row, str(record.get("id", record.get("question_id", row))), "layout", str(error)))
    if problems:
        raise DataError(f"{source}: {len(problems)} records cannot be written as {target}:\n" + listed(problems), problems)
    return rows


# ---- images ------------------------------------------------------------------------------------------------------------------


def map_images(record: Row, change: Callable[[Any], Any]) -> Row:
    """`record` with `change` applied to each of its images."""
    return {key: ([change(one) for one in value] if isinstance(value, list) else change(value)) if key in ("image", "images") and value is not None
            else value for key, value in record.items()}


def extract_images(folder: Path, wrote: Callable[[], None] = lambda: None) -> Callable[[Row], Row]:
    """Writes images that are inside a record to `folder`, named by a digest of their bytes, and puts the name in their place.

    wrote: called once for each file.
    """
    written: set[str] = set()

    def name_of(image: Any) -> Any:
        if not isinstance(image, Mapping) or not isinstance(image.get("bytes"), bytes):
            return image
        data = image["bytes"]
        own, choice = split_choice(str(image.get("path") or ""))
        suffix = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), suffix_of(own))
        name = f"{hashlib.sha256(data).hexdigest()[:32]}{suffix if re.fullmatch(_SUFFIX, suffix) else '.bin'}"
        if name not in written:
            make_directory(folder)
            write_bytes(folder / name, data, durable=False)
            written.add(name)
            wrote()
        return f"{name}#{choice}" if choice else name

    return lambda record: map_images(record, name_of)


def embed_images(record: Row, read: Callable[[str], bytes]) -> Row:
    """`record` with the bytes of its images inside, as `datasets` stores them."""
    return map_images(record, lambda image: {"bytes": read(image), "path": image} if isinstance(image, str) else image)


# ---- files -------------------------------------------------------------------------------------------------------------------


def encode_rows(rows: Sequence[Row], suffix: str) -> bytes:
    """The content of a file of rows. Raises FormatError naming a field whose values no column of Parquet holds, or an image inside for JSON."""
    if suffix == ".parquet":
        from .parquet import encode_parquet
        return encode_parquet(rows)
    try:
        lines = [_line(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise FormatError(f"rows that JSON cannot hold: {error}") from error
    if suffix == ".jsonl":
        return b"".join(line + b"\n" for line in lines)
    return b"[\n" + b",\n".join(lines) + b"\n]\n" if lines else b"[]\n"


def _line(row: Row) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair has no bytes, but JSON can spell it
        return json.dumps(row, allow_nan=False).encode("ascii")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a file of rows, atomically; the suffix says how they are stored. Raises FormatError; OSError, and then what was there still stands."""
    if path.suffix not in SUFFIXES:
        raise FormatError(f"{path}: the name ends in {path.suffix or 'nothing'!r}, want {', '.join(SUFFIXES)}", path=path)
    data = encode_rows(rows, path.suffix)
    make_directory(path.parent)
    write_bytes(path, data)
