"""What rows share with each other and with other files: ids, dialogues, questions, images, patients.

A value that several rows share is reported once for each row after the first, and names the first. Values of patient fields are never written down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.data.formats import images_of

from .hashes import Print, near_pairs
from .pictures import Picture, digests, key_of
from .rows import PAIR_SIDES, quoted

__all__ = ["PATIENT_FIELDS", "OtherFile", "leaking_patients", "leaking_pictures", "leaking_rows", "repeated_pictures", "repeated_rows"]

PATIENT_FIELDS = ("patient_id", "subject_id", "study_id", "patient", "subject", "study")


@dataclass(slots=True)
class OtherFile:
    """A file that training data must not overlap with: its records, where their images lie, and what was found there."""

    name: str
    records: Sequence[Mapping[str, Any]]
    folder: Path
    pictures: list[Picture] = field(default_factory=list)


def dialogue_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of the well-formed turns of an instruction row, of a pair's chosen side, or of a question file's row."""
    turns = record.get(PAIR_SIDES[0]) if PAIR_SIDES[0] in record else record.get("conversations")
    if turns is None:
        turns = [{"from": "human", "value": record[key]} for key in ("text", "question") if isinstance(record.get(key), str)][:1]
    if not isinstance(turns, list):
        return []
    return [(turn["from"], turn["value"]) for turn in turns
            if isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)]


def image_keys(record: Mapping[str, Any]) -> tuple[Hashable, ...]:
    return tuple(key_of(image) for image in images_of(record))


def plain(text: str) -> str:
    """A text as far as a comparison is concerned: no marker, case or repeated white space."""
    return " ".join(text.replace(DEFAULT_IMAGE_TOKEN, " ").casefold().split())


def _key(*parts: object) -> bytes:
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


# ---- within the data -------------------------------------------------------------------------------------------------------------


def repeated_rows(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, str]]:
    """(row, kind, text): ids, whole rows, and questions that were there before."""
    ids: dict[Any, int] = {}
    rows: dict[bytes, int] = {}
    answers: dict[bytes, tuple[int, str]] = {}
    for row, record in enumerate(records):
        name = record.get("id")
        if isinstance(name, (str, int)) and (first := ids.setdefault(str(name), row)) != row:
            yield row, "id_duplicate", f"as row {first}"
        dialogue = dialogue_of(record)
        if not dialogue:
            continue
        other = [turn for turn in record.get(PAIR_SIDES[1]) or () if isinstance(turn, dict)][-1:]
        first = rows.setdefault(_key(image_keys(record), dialogue, other), row)
        if first != row:
            yield row, "row_duplicate", f"as row {first}"
        elif PAIR_SIDES[0] not in record and image_keys(record):
            yield from _conflicts(row, record, dialogue, answers)


def _conflicts(row: int, record: Mapping[str, Any], dialogue: list[tuple[str, str]],
               answers: dict[bytes, tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """A question means what it means after the turns before it, so those belong to the key."""
    before: list[object] = [image_keys(record)]
    for (role, question), (next_role, answer) in pairwise(dialogue):
        if role == "human" and next_role == "gpt":
            first, known = answers.setdefault(_key(*before, plain(question)), (row, plain(answer)))
            if known != plain(answer):
                yield row, "answers_conflict", f"{quoted(plain(question))}: {quoted(known)} in row {first}, {quoted(plain(answer))} here"
                return
        before.append(plain(question))


def repeated_pictures(pictures: Sequence[Picture]) -> Iterator[tuple[Picture, str, str]]:
    """(picture, kind, text) of pictures that were there under another name."""
    content = digests(pictures)
    first_of: dict[bytes, Picture] = {}
    fresh = []
    for picture in pictures:
        key = content.get(picture.place)
        first = picture if key is None else first_of.setdefault(key, picture)
        if first.place == picture.place:
            fresh.append(picture)
        else:
            yield picture, "image_duplicate", f"the bytes of {quoted(first.name)}"
    earliest: dict[int, int] = {}
    for i, j in near_pairs([picture.print for picture in fresh]):
        earliest[j] = min(i, earliest.get(j, i))
    for j, i in sorted(earliest.items()):
        yield fresh[j], "image_near_duplicate", f"looks like {quoted(fresh[i].name)}"


# ---- against another file --------------------------------------------------------------------------------------------------------


def leaking_patients(records: Sequence[Mapping[str, Any]], other: OtherFile, patient_fields: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(row, kind, text): one patient or study is reported once, with its number of rows."""
    for name in patient_fields:
        there: dict[str, int] = {}
        for row, record in enumerate(other.records):
            if isinstance(record.get(name), (str, int)):
                there.setdefault(str(record[name]), row)
        here: dict[str, list[int]] = {}
        for row, record in enumerate(records):
            if isinstance(record.get(name), (str, int)) and str(record[name]) in there:
                here.setdefault(str(record[name]), []).append(row)
        for value, rows in here.items():
            yield rows[0], "leak_patient", f"{name} as row {there[value]} of {other.name}{_also(len(rows), 'row')}"


def leaking_rows(records: Sequence[Mapping[str, Any]], pictures: Sequence[Picture], other: OtherFile,
                 content: Mapping[str, bytes]) -> Iterator[tuple[int, str, str]]:
    """(row, kind, text): the first question is asked about the same images there, whatever their names. content: `digests` of both."""
    ours, theirs = ({picture.key: content.get(picture.place, picture.place) for picture in these} for these in (pictures, other.pictures))
    asked: dict[bytes, int] = {}
    for row, record in enumerate(other.records):
        if (key := _question_key(record, theirs)) is not None:
            asked.setdefault(key, row)
    for row, record in enumerate(records):
        if (key := _question_key(record, ours)) in asked:
            yield row, "leak_row", f"{quoted(plain(dialogue_of(record)[0][1]))} as row {asked[key]} of {other.name}"


def _question_key(record: Mapping[str, Any], images: Mapping[Hashable, object]) -> bytes | None:
    """None for a row without images, with one that is not there, or without a question."""
    shown, dialogue = [images.get(key) for key in image_keys(record)], dialogue_of(record)
    return _key(shown, plain(dialogue[0][1])) if shown and all(shown) and dialogue else None


def leaking_pictures(pictures: Sequence[Picture], other: OtherFile, content: Mapping[str, bytes]) -> Iterator[tuple[Picture, str, str]]:
    """(picture, kind, text): the same file, the same bytes, or a picture that looks alike. content: `digests` of both."""
    places = {picture.place: picture.name for picture in other.pictures if picture.place}
    bytes_there = {content[picture.place]: picture.name for picture in other.pictures if picture.place in content}
    fresh = []
    for picture in pictures:
        if (name := places.get(picture.place)) is not None:
            yield picture, "leak_image", f"the file {quoted(name)} of {other.name}"
        elif (name := bytes_there.get(content.get(picture.place, b""))) is not None:
            yield picture, "leak_image", f"the bytes of {quoted(name)} of {other.name}"
        else:
            fresh.append(picture)
    prints: list[Print | None] = [picture.print for picture in (*fresh, *other.pictures)]
    found: dict[int, int] = {}
    for i, j in near_pairs(prints):
        if i < len(fresh) <= j:
            found.setdefault(i, j - len(fresh))
    for i, j in sorted(found.items()):
        yield fresh[i], "leak_near_duplicate", f"looks like {quoted(other.pictures[j].name)} of {other.name}"


def _also(n: int, what: str) -> str:
    return "" if n == 1 else f"; {n} {what}s"
