"""A data directory with known mistakes, and its twin without: drawn pictures, made-up text.

`PLANTS` is the truth: every entry spoils one row of its own and names what must be found there. Nothing else may be found, and nothing at all in the twin.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Record = dict[str, Any]
WORDS = ("opacity", "lobe", "margin", "shadow", "vessel", "nodule", "rib", "lesion", "contour", "septum", "fissure", "apex", "hilum", "cortex", "node", "gyrus")


def phrase(*numbers: int) -> str:
    """Other numbers, other words."""
    rng = np.random.default_rng(numbers)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 6)) + " " + "-".join(map(str, numbers))


def draw(number: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Ellipses on noise, every number another picture."""
    rng = np.random.default_rng(1000 + number)
    image = Image.fromarray(rng.integers(20, 90, (size[1], size[0], 3), dtype=np.uint8))
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        w, h = rng.integers(8, 40, 2)
        canvas.ellipse((int(x - w), int(y - h), int(x + w), int(y + h)), fill=tuple(map(int, rng.integers(0, 255, 3))))
    return image


class Planter:
    """What a plant may touch: the image folder, the row's own image file, the records before it and the other file."""

    def __init__(self, folder: Path, records: list[Record], test: list[Record]) -> None:
        self.folder, self.records, self.test = folder, records, test

    def file(self, record: Record) -> Path:
        return self.folder / record["image"]

    def store(self, record: Record, image: Image.Image, suffix: str | None = None, **options: Any) -> None:
        """The row's image, under its own name or one with another suffix."""
        path = self.file(record)
        path.unlink()
        if suffix is not None:
            path = path.with_suffix(suffix)
            record["image"] = str(path.relative_to(self.folder))
        image.save(path, **options)

    def picture(self, record: Record) -> Image.Image:
        with Image.open(self.file(record)) as image:
            image.load()
            return image


Plant = Callable[[Record, Planter], None]


def _set(key: str, value: Any) -> Plant:
    return lambda record, _: record.__setitem__(key, value)


def _drop(key: str) -> Plant:
    return lambda record, _: record.pop(key)


def _turn(i: int, **changes: Any) -> Plant:
    return lambda record, _: record["conversations"][i].update(changes)


def _append(i: int, text: str) -> Plant:
    return lambda record, _: record["conversations"][i].update(value=record["conversations"][i]["value"] + text)


def _marker(text: str) -> Plant:
    """The first question with `text` in the place of its marker."""
    return lambda record, _: record["conversations"][0].update(value=record["conversations"][0]["value"].replace("<image>\n", text))


def _delete_turn(i: int) -> Plant:
    return lambda record, _: record["conversations"].pop(i)


def _bytes(make: Callable[[bytes], bytes]) -> Plant:
    return lambda record, here: here.file(record).write_bytes(make(here.file(record).read_bytes()))


def _without_file(record: Record, here: Planter) -> None:
    here.file(record).unlink()


def _outside_link(record: Record, here: Planter) -> None:
    target = here.folder.parent / f"outside-{record['id']}.png"
    here.file(record).rename(target)
    os.symlink(target, here.file(record))


def _fifo(record: Record, here: Planter) -> None:
    _without_file(record, here)
    os.mkfifo(here.file(record))


def _huge_header(data: bytes) -> bytes:
    """The PNG says that it has 70,000 x 4 pixels."""
    header = b"IHDR" + struct.pack(">II", 70000, 4) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _as_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _jpeg_named_png(record: Record, here: Planter) -> None:
    here.file(record).write_bytes(_as_jpeg(here.picture(record)))


def _png_named_jpg(record: Record, here: Planter) -> None:
    path = here.file(record).rename(here.file(record).with_suffix(".jpg"))
    record["image"] = path.name


def _rotated(record: Record, here: Planter) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    here.store(record, here.picture(record), ".jpg", quality=95, exif=exif)


def _sixteen_bit(record: Record, here: Planter) -> None:
    grey = np.asarray(here.picture(record).convert("L")).astype(np.uint16) * 200
    here.store(record, Image.fromarray(grey))


def _frames(record: Record, here: Planter) -> None:
    here.store(record, draw(901), ".gif", save_all=True, append_images=[draw(902)])


def _copy_of_first(record: Record, here: Planter) -> None:
    here.file(record).write_bytes(here.file(here.records[0]).read_bytes())


def _near_first(record: Record, here: Planter) -> None:
    """The first picture scaled and compressed."""
    first = here.picture(here.records[0])
    here.store(record, first.resize((first.width * 2, first.height * 2), Image.Resampling.BICUBIC), ".jpg", quality=85)


def _other_answer(record: Record, here: Planter) -> None:
    first = here.records[0]
    _without_file(record, here)
    record["image"] = first["image"]
    record["conversations"] = [dict(turn) for turn in first["conversations"]]
    record["conversations"][1]["value"] = "Something else."


def _same_row(record: Record, here: Planter) -> None:
    _without_file(record, here)
    record.update(image=here.records[1]["image"], conversations=here.records[1]["conversations"])


def _same_id(record: Record, here: Planter) -> None:
    record["id"] = here.records[2]["id"]


def _leaking_name(record: Record, here: Planter) -> None:
    _without_file(record, here)
    record["image"] = here.test[0]["image"]


def _leaking_bytes(record: Record, here: Planter) -> None:
    here.file(record).write_bytes(here.file(here.test[1]).read_bytes())


def _leaking_near(record: Record, here: Planter) -> None:
    here.store(record, here.picture(here.test[2]).resize((150, 112)), ".jpg", quality=85)


def _leaking_patient(record: Record, here: Planter) -> None:
    record["patient_id"] = here.test[3]["patient_id"]


def _leaking_row(record: Record, here: Planter) -> None:
    _without_file(record, here)
    record["image"] = here.test[3]["image"]
    record["conversations"] = [dict(record["conversations"][0], value="<image>\n" + here.test[3]["conversations"][0]["value"].removesuffix("\n<image>")),
                               record["conversations"][1]]


def _long(i: int, n: int) -> Plant:
    return _append(i, " node" * n)


PLANTS: list[tuple[str, Plant] | tuple[str, Plant, set[str]]] = [
    ("no_turns", _drop("conversations")),
    ("no_turns", _set("conversations", [])),
    ("no_turns", _set("conversations", [{"from": "gpt", "value": "Alone."}]), {"no_turns", "starts_with_gpt"}),
    ("turn_shape", _turn(1, value=3)),
    ("turn_shape", lambda record, _: record["conversations"][1].pop("from")),
    ("turn_shape", lambda record, _: record["conversations"].__setitem__(1, "no turn")),
    ("role_unknown", _turn(2, **{"from": "user"})),
    ("role_order", _delete_turn(1)),
    ("ends_with_question", _delete_turn(3)),
    ("starts_with_gpt", lambda record, _: record["conversations"].insert(0, {"from": "gpt", "value": "Ask me."})),
    ("turn_empty", _turn(3, value=" \n\t")),
    ("turn_empty", _turn(2, value="")),
    ("answer_type", _set("answer_type", "CLOSED ")),
    ("marker_missing", _marker("")),
    ("marker_without_image", lambda record, here: (_without_file(record, here), record.pop("image")), {"marker_without_image"}),
    ("marker_place", _append(2, "\n<image>")),
    ("marker_place", _append(3, " see <image>")),
    ("marker_repeated", _marker("<image>\n<image>\n")),
    ("special_token_text", _append(0, " [INST] really"), {"special_token_text"}),
    ("special_token_text", _append(1, "</s>"), {"special_token_text", "original_mismatch"}),
    ("role_tag_text", _append(1, " USER: and more"), {"role_tag_text"}),
    ("role_tag_text", _append(1, " ASSISTANT: again"), {"role_tag_text", "original_labels"}),
    ("characters", _append(1, " lung\ufffd")),
    ("characters", _append(2, " a\x00b")),
    ("half_character", _append(1, " \ud83d")),
    ("mojibake", _append(1, " 3 Âµm")),
    ("id_duplicate", _same_id),
    ("row_duplicate", _same_row),
    ("answers_conflict", _other_answer),
    ("answer_cut", _long(3, 1400)),
    ("answer_lost", _long(2, 1500)),
    ("no_target", _long(0, 1500)),
    ("image_name", _set("image", "../outside.png")),
    ("image_name", _set("image", "/etc/hostname")),
    ("image_name", _set("image", "a\\b.png")),
    ("image_name", _set("image", 7)),
    ("marker_count", _set("image", ["0.png", "1.png"])),
    ("image_name", _outside_link),
    ("image_missing", _without_file),
    ("image_missing", _set("image", "no/such.png")),
    ("image_empty", _bytes(lambda data: b"")),
    ("image_damaged", _bytes(lambda data: b"not a picture")),
    ("image_damaged", _bytes(lambda data: data[:-200])),
    ("image_damaged", _fifo),
    ("image_limit", _bytes(_huge_header)),
    ("image_extension", _jpeg_named_png),
    ("image_extension", _png_named_jpg),
    ("image_size", lambda record, here: here.store(record, draw(801, (400, 20)))),
    ("image_size", lambda record, here: here.store(record, draw(802).resize((12, 9)))),
    ("image_blank", lambda record, here: here.store(record, Image.new("RGB", (96, 72), (7, 7, 7)))),
    ("image_rotated", _rotated),
    ("image_alpha", lambda record, here: here.store(record, draw(803).convert("RGBA"))),
    ("image_16bit", _sixteen_bit),
    ("image_frames", _frames),
    ("image_colours", lambda record, here: here.store(record, draw(804).convert("CMYK"), ".jpg", quality=95)),
    ("image_duplicate", _copy_of_first),
    ("image_near_duplicate", _near_first),
    ("leak_image", _leaking_name),
    ("leak_image", _leaking_bytes),
    ("leak_near_duplicate", _leaking_near),
    ("leak_patient", _leaking_patient),
    ("leak_row", _leaking_row, {"leak_row", "leak_image"}),
]

PairPlant = Callable[[Record], None]
PAIR_PLANTS: list[tuple[str, PairPlant]] = [
    ("pair_side", lambda record: record.pop("reject_conversations")),
    ("pair_prompt", lambda record: record["reject_conversations"][0].update(value="<image>\nAnother question?")),
    ("pair_same", lambda record: record["reject_conversations"][1].update(value=record["chosen_conversations"][1]["value"] + " ")),
    ("pair_same_normalised", lambda record: record["reject_conversations"][1].update(value=record["chosen_conversations"][1]["value"].upper() + "!")),
    ("pair_length", lambda record: record["chosen_conversations"][1].update(value=phrase(3) * 40)),
    ("turn_empty", lambda record: record["chosen_conversations"][1].update(value="  ")),
]


def clean_row(number: int) -> Record:
    return {"id": f"r{number}", "image": f"{number}.png", "conversations": [
        {"from": "human", "value": f"<image>\nWhere is the {phrase(number, 0)}?"}, {"from": "gpt", "value": f"Beside the {phrase(number, 1)}."},
        {"from": "human", "value": f"Is there {phrase(number, 2)}?"}, {"from": "gpt", "value": f"I see {phrase(number, 3)}."}]}


def clean_pair(number: int) -> Record:
    def turns(answer: str) -> list[Record]:
        return [{"from": "human", "value": f"<image>\nWhere is the {phrase(number, 0)}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"p{number}", "image": f"{number}.png", "chosen_conversations": turns(f"Beside the {phrase(number, 1)}."),
            "reject_conversations": turns(f"Above {phrase(number, 2)}.")}


def clean_item(number: int) -> Record:
    return {"id": number, "image": f"{number}.png", "answer_type": "OPEN", "patient_id": f"patient {number}", "conversations": [
        {"from": "human", "value": f"What is {phrase(number, 4)}?\n<image>"}, {"from": "gpt", "value": phrase(number, 5)}]}


N_BEFORE = 3  # clean rows that plants copy from
N_TEST = 4


def plant(folder: Path, *, spoil: bool = True) -> tuple[set[tuple[int, str]], set[tuple[int, str]]]:
    """Writes sft.json, dpo.json, test.json and images/ into `folder`.

    Returns:
        the (row, kind) that must be found in sft.json against test.json, and those in dpo.json.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    rows = [clean_row(number) for number in range(N_BEFORE + len(PLANTS))]
    pairs = [clean_pair(len(rows) + number) for number in range(len(PAIR_PLANTS))]
    test = [clean_item(len(rows) + len(pairs) + number) for number in range(N_TEST)]
    for number, record in enumerate((*rows, *pairs, *test)):
        draw(number).save(images / record["image"])
    wanted, wanted_pairs = set(), set()
    if spoil:
        here = Planter(images, rows, test)
        for row, (kind, spoiler, *more) in enumerate(PLANTS, N_BEFORE):
            spoiler(rows[row], here)
            wanted |= {(row, kind) for kind in (more[0] if more else {kind})}
        for row, (kind, spoil_pair) in enumerate(PAIR_PLANTS):
            spoil_pair(pairs[row])
            wanted_pairs.add((row, kind))
    for name, records in (("sft", rows), ("dpo", pairs), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return wanted, wanted_pairs
