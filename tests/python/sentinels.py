"""Medical files whose every text says SENTINEL and a number, whole and broken, and a process that shows them to the package.

`python sentinels.py FOLDER MODEL OUT` reads every file of the folder and runs every verb over them, all warnings on, all log records at debug level, every
exception printed with all that it carries. What it prints and writes is for `test_header_texts.py` to search.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import random
import struct
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pydicom
from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword
from pydicom.encaps import encapsulate

MARK = "QZ7PHI"
TEXT_KINDS = ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
BYTE_KINDS = ("OB", "OW", "UN", "OB or OW", "US or OW", "OD", "OF", "OL", "OV")
# What a whole file must say truly, or it would be a broken one.
TRUE = {"TransferSyntaxUID", "MediaStorageSOPClassUID", "PhotometricInterpretation", "NumberOfFrames", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept",
        "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"}
PIXELS = np.arange(3 * 40 * 30, dtype=np.int16).reshape(3, 40, 30)

_numbers = itertools.count()


def sentinel() -> str:
    return f"{MARK}{next(_numbers):05d}"


Elements = dict[int, tuple[str, bytes]]


def encoded(elements: Elements) -> bytes:
    """Explicit little endian, with whatever bytes for whatever kind: pydicom would not write most of this."""
    out = bytearray()
    for tag, (kind, value) in sorted(elements.items()):
        if kind != "SQ":
            value += b" " * (len(value) % 2)
        long = kind in ("OB", "OW", "UN", "SQ", "UT", "UC", "UR")
        out += struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind.encode()) + struct.pack("<HL" if long else "<H", *((0, len(value)) if long else (len(value),))) + value
    return bytes(out)


def items(*each: Elements) -> tuple[str, bytes]:
    return "SQ", b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<L", len(inner)) + inner for inner in map(encoded, each))


def file(elements: Elements, syntax: bytes = b"1.2.840.10008.1.2.1\0") -> bytes:
    meta = encoded({0x00020001: ("OB", b"\0\1"), 0x00020002: ("UI", b"1.2.840.10008.5.1.4.1.1.2\0"), 0x00020003: ("UI", sentinel().encode()), 0x00020010: ("UI", syntax),
                    0x00020012: ("UI", sentinel().encode()), 0x00020013: ("SH", sentinel().encode()), 0x00020016: ("AE", sentinel().encode()),
                    0x00020017: ("AE", sentinel().encode()), 0x00020100: ("UI", sentinel().encode()), 0x00020102: ("OB", sentinel().encode())})
    return sentinel().encode().ljust(128, b"q") + b"DICM" + encoded({0x00020000: ("UL", struct.pack("<L", len(meta)))}) + meta + encoded(elements)


def number(value: int) -> tuple[str, bytes]:
    return "US", struct.pack("<H", value)


def elements() -> Elements:
    """Every element of the dictionary that can hold text or bytes, private ones, sequences in sequences, overlays."""
    found: Elements = {}
    for tag, (kind, _, _, _, keyword) in DicomDictionary.items():
        if tag >> 16 > 2 and keyword and keyword not in TRUE and kind in (*TEXT_KINDS, *BYTE_KINDS):
            found[tag] = kind if kind in TEXT_KINDS else "OB", sentinel().encode()
    inner = {0x00100010: ("PN", sentinel().encode()), 0x00104000: ("LT", sentinel().encode() * 3)}
    for at, keyword in enumerate(("OtherPatientIDsSequence", "RequestAttributesSequence", "ReferencedImageSequence", "PerFrameFunctionalGroupsSequence",
                                  "SharedFunctionalGroupsSequence")):
        outer = {0x00100020: ("LO", sentinel().encode()), 0x00081110: items(inner), 0x00111010 + at: ("LO", sentinel().encode())}
        found[tag_for_keyword(keyword)] = items(outer, outer)
    for group in (0x0009, 0x0029, 0x7FE1):
        found[group << 16 | 0x10] = "LO", sentinel().encode()
        for offset, kind in enumerate(("LO", "UN", "OB", "PN", "UT")):
            found[group << 16 | 0x1000 | offset] = kind, sentinel().encode()
        found[group << 16 | 0x1010] = items({0x00101040: ("LO", sentinel().encode())})
    for group in range(0x6000, 0x6006, 2):
        for offset, kind in ((0x0022, "LO"), (0x1500, "LO"), (0x3000, "OB"), (0x0040, "CS")):
            found[group << 16 | offset] = kind, sentinel().encode()
    for keyword, value in {"Rows": 40, "Columns": 30, "SamplesPerPixel": 1, "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}.items():
        found[tag_for_keyword(keyword)] = number(value)
    for keyword, kind, text in (("PhotometricInterpretation", "CS", "MONOCHROME2"), ("NumberOfFrames", "IS", "3"), ("WindowCenter", "DS", "1000"), ("WindowWidth", "DS", "1500"),
                                ("RescaleSlope", "DS", "1"), ("RescaleIntercept", "DS", "0")):
        found[tag_for_keyword(keyword)] = kind, text.encode()
    return found | {0x7FE00010: ("OW", PIXELS.tobytes())}


def whole_and_broken(share: int = 1) -> Iterator[tuple[str, bytes, bool]]:
    """(name, content, whole). share: broken ones have one of so many texts, and there are as much fewer random ones."""
    good = elements()
    data = file(good)

    def changed(keyword: str, kind: str, value: bytes, **more: tuple[str, bytes]) -> bytes:
        return file(good | {tag_for_keyword(keyword): (kind, value)} | {tag_for_keyword(key): value for key, value in more.items()})

    yield "whole", data, True
    yield "whole-YES", changed("BurnedInAnnotation", "CS", b"YES"), True
    yield "whole-SC", changed("SOPClassUID", "UI", b"1.2.840.10008.5.1.4.1.1.7"), True
    good = {tag: value for at, (tag, value) in enumerate(good.items()) if at % share == 0 or not value[1].startswith(MARK.encode())}
    data = file(good)
    for keyword in ("PhotometricInterpretation", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "NumberOfFrames"):
        yield f"text-{keyword}", changed(keyword, dictionary_VR(keyword), sentinel().encode()), False
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation", "HighBit", "PixelPaddingValue", "PlanarConfiguration",
                    "VOILUTSequence", "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PixelData", "ExtendedOffsetTable"):
        for kind in ("LO", "UN", "PN", "DS", "SQ", "QZ"):
            yield f"{kind}-{keyword}", changed(keyword, kind, sentinel().encode()), False
    table = {0x00283002: ("US", struct.pack("<3H", 3, 0, 8)), 0x00283003: ("LO", sentinel().encode()), 0x00283006: ("LO", sentinel().encode())}
    for keyword in ("VOILUTSequence", "ModalityLUTSequence"):
        yield f"table-{keyword}", changed(keyword, *items(table)), False
        yield f"descriptor-{keyword}", changed(keyword, *items(table | {0x00283002: ("LO", sentinel().encode())})), False
    yield "palette", changed("PhotometricInterpretation", "CS", b"PALETTE COLOR"), False
    yield "supplementary", changed("PhotometricInterpretation", "CS", b"YBR_PARTIAL_420 "), False
    for keyword in ("Rows", "Columns", "PixelRepresentation", "BitsAllocated", "PhotometricInterpretation", "PixelData"):
        yield f"without-{keyword}", file({tag: value for tag, value in good.items() if tag != tag_for_keyword(keyword)}), False
    yield "short-pixels", changed("PixelData", "OW", PIXELS.tobytes()[:-1000]), False
    for syntax, head in ((b"1.2.840.10008.1.2.4.50", b"\xff\xd8\xff\xfe\0\x40"), (b"1.2.840.10008.1.2.4.90", b"\xff\x4f\xff\x51"), (b"1.2.840.10008.1.2.5\0", b"\1\0\0\0"),
                         (b"1.2.840.10008.1.2.4.80", b"\xff\xd8\xff\xf7"), (b"1.2.840.10008.1.2.4.70", b""), (f"1.2.840.{sentinel()}\0".encode(), b"")):
        frames = encapsulate([(head + sentinel().encode() * 20).ljust(400, b" ")] * 3)
        rest = encoded({tag: value for tag, value in good.items() if tag < 0x7FE00010})
        pixels = struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + frames + b"\xfe\xff\xdd\xe0\0\0\0\0"
        yield f"compressed-{len(head)}-{syntax[-3:-1].decode()}", file({}, syntax) + rest + pixels, False
        yield f"not-{len(head)}-{syntax[-3:-1].decode()}", file(good, syntax), False
    for n in (200, 500, 2000, len(data) // 2, len(data) - 5000, len(data) - 10):
        yield f"cut-{n}", data[:n], False
    for case in range(60 // share):
        rng = random.Random(case)
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 5, 50))):
            at, n = rng.randrange(132, len(data)), rng.choice((1, 2, 4))
            damaged[at:at + n] = rng.randbytes(n)
        yield f"random-{case}", bytes(damaged), False


def volumes() -> Iterator[tuple[str, bytes, bool]]:
    """NIfTI files with texts in every field that has room for one, and comments behind the header."""
    import nibabel
    image = nibabel.Nifti1Image(PIXELS, np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", (sentinel() * 20).encode()))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("afni", f"<name>{sentinel()}</name>".encode()))
    for field, n in (("descrip", 80), ("aux_file", 24), ("intent_name", 16), ("db_name", 18), ("data_type", 10)):
        image.header[field] = sentinel().encode()[:n]
    data = image.to_bytes()
    yield "whole", data, True
    for field, at, text in (("datatype", 70, 2), ("dim", 40, 8), ("pixdim", 76, 12), ("vox_offset", 108, 4), ("srow", 280, 12), ("magic", 344, 3), ("codes", 252, 4), ("scl", 112, 8)):
        yield f"text-{field}", data[:at] + (MARK * 3).encode()[:text] + data[at + text:], False
    for n in (340, 360, len(data) - 10):
        yield f"cut-{n}", data[:n], False
    for case in range(30):
        rng = random.Random(case)
        changed = bytearray(data)
        for _ in range(rng.choice((1, 5, 20))):
            changed[rng.randrange(348)] = rng.randrange(256)
        yield f"random-{case}", bytes(changed), False


def write(folder: Path, share: int) -> dict[str, list[str]]:
    """The files, with a sentinel in every name. Returns names of whole and of broken ones."""
    found: dict[str, list[str]] = {"whole": [], "broken": []}
    for suffix, made in ((".dcm", whole_and_broken(share)), (".nii", volumes())):
        for name, content, whole in made:
            name = f"{MARK}-{name}{suffix}"
            (folder / name).write_bytes(content)
            found["whole" if whole else "broken"].append(name)
    return found


# ---- the process -------------------------------------------------------------------------------------------------------------------


def show(error: BaseException | None) -> None:
    """All that it carries, to the last cause."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        print(f"{type(error).__name__}: {error} {error.args} {getattr(error, '__notes__', '')}")
        print("".join(traceback.format_exception(error)))
        for other in (error.__cause__, error.__context__):
            if other is not None:
                show(other)
        error = None


def read_all(folder: Path) -> None:
    from stllava.data.image_store import ImageStore
    store = ImageStore(folder)
    counts = {"read": 0, "refused": 0}
    for name in store.names():
        for call in (lambda name=name: load(store, name), lambda name=name: print(store.size(name))):
            try:
                call()
                counts["read"] += 1
            except Exception as error:
                counts["refused"] += 1
                show(error)
    print(json.dumps(counts))


def load(store, name: str) -> None:
    from stllava.images import load_image
    loaded = load_image(store.source(name))
    print(loaded.rgb.shape, loaded.notes)


def run(words: list[str], lines: str = "") -> None:
    from stllava.cli import main
    print("$", words[0], flush=True)
    with mock.patch("sys.stdin", io.StringIO(lines)):
        try:
            print("exit code", main(words), flush=True)
        except BaseException as error:
            show(error)


def main(folder: Path, model: Path, out: Path) -> None:
    logging.basicConfig(level=logging.DEBUG)
    warnings.simplefilter("always")
    pydicom.config.debug(True)
    read_all(folder)
    pydicom.config.debug(False)  # it takes minutes for every element of every file
    names = json.loads((out / "names.json").read_text())
    for quality in ("whole", "broken"):
        images = names[quality] if quality == "whole" else names[quality][::12]
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A scan."}]
        rows = [{"id": f"r{i}", "question_id": i, "image": name, "text": "What is it?", "answer_type": "OPEN", "conversations": turns, "chosen_conversations": turns,
                 "reject_conversations": [turns[0], {"from": "gpt", "value": "No."}]} for i, name in enumerate(images)]
        for kind, keys in (("sft", ("id", "image", "conversations")), ("dpo", ("id", "image", "chosen_conversations", "reject_conversations")),
                           ("questions", ("question_id", "image", "text")), ("eval", ("id", "image", "answer_type", "conversations"))):
            (out / f"{quality}-{kind}.json").write_text(json.dumps([{key: row[key] for key in keys} for row in rows]))
        (out / f"{quality}-asked.jsonl").write_text("".join(json.dumps({"id": row["image"], "description": "a", "questions": ["Is it?"]}) + "\n" for row in rows))
        common, results = ["--model_name_or_path", str(model), "--image_folder", str(folder)], out / f"written-{quality}"
        results.mkdir()
        for verb in ("sft", "dpo"):
            for skip in ("error", "skip"):
                run([verb, *common, "--data_path", str(out / f"{quality}-{verb}.json"), "--output_dir", str(results / f"{verb}-{skip}"), "--max_steps", "2", "--on_bad_sample", skip,
                     "--lora_enable"])
        run(["check-data", str(out / f"{quality}-sft.json"), "--image_folder", str(folder), "--deep", "--html", str(results / "check.html"),
             "--jsonl", str(results / "check.jsonl")])
        run(["generate", *common, "--question_file", str(out / f"{quality}-questions.json"), "--answers_file", str(results / "answers.jsonl"), "--max_new_tokens", "2"])
        run(["eval", *common, "--question_file", str(out / f"{quality}-eval.json"), "--out", str(results / "eval"), "--max_new_tokens", "2"])
        run(["answer", *common, "--questions", str(out / f"{quality}-asked.jsonl"), "--out", str(out / f"named-{quality}-answer.jsonl"), "--max_new_tokens", "2"])
        for name in images[:3]:
            run(["chat", str(model), "--image", str(folder / name), "--max_new_tokens", "2"], "What is it?\n")
            run(["chat", str(model), "--max_new_tokens", "2"], f"/image {folder / name}\nWhat is it?\n")
    run(["ask", *common, "--out", str(out / "named-ask.jsonl"), "--max_new_tokens", "2", "--description_max_new_tokens", "2", "--n_questions", "1"])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
