"""Every limit of `stllava.limits`: L - 1 and L are read, L + 1 is refused. Limits that would take long files are lowered for the test."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import bombs
import formats
import mutate
import numpy as np
import published
import pytest
import scans
from PIL import Image

from stllava import limits
from stllava.checkpoint import gguf_container, index, safetensors_file, strict_json, torch_zip
from stllava.checkpoint.peft import LoraConfig
from stllava.config import LlavaConfig
from stllava.data.archives import Archive
from stllava.data.records import read_records
from stllava.errors import StllavaError
from stllava.images import load_image
from stllava.text import load_tokenizer
from stllava.text.tokenizer import Tokenizer

Try = Callable[[Path, int], object]


def json_file(folder: Path, n_bytes: int) -> object:
    text = b'{"a":1}'
    (folder / "x.json").write_bytes(text + b" " * (n_bytes - len(text)))
    return strict_json.read_object(folder / "x.json")


def json_items(folder: Path, n: int) -> object:
    (folder / "x.json").write_text('{"a":[' + ",".join("0" * (n - 1)) + "]}")  # n - 2 commas, two brackets
    return strict_json.read_object(folder / "x.json")


def weights(folder: Path, header: bytes, data: bytes = b"") -> object:
    (folder / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return safetensors_file.read(folder / "x.safetensors")


def tensors(n: int, name: str = "", shape: tuple[int, ...] = (0,)) -> bytes:
    return json.dumps({name or f"{i}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for i in range(n)}).encode()


def both_kinds_of_tensors(folder: Path, n: int) -> object:
    weights(folder, tensors(n))
    torch_zip.save(folder / "x.bin", {"w": np.zeros(1, np.float32)} if n < 4 else {f"{i}": np.zeros(1, np.float32) for i in range(n - 3)})
    return torch_zip.load(folder / "x.bin")  # n entries: pickle, byte order, version and n - 3 storages


def shards(folder: Path, n: int) -> object:
    names = [f"{i}.safetensors" for i in range(n)]
    for i, name in enumerate(names):
        safetensors_file.write(folder / name, {f"w{i}": np.zeros(1, np.float32)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}))
    return index.read_weights(folder)


def rows(folder: Path, n_chars: int) -> object:
    record = {"id": "x" * (n_chars - len('{"id":""}'))}
    (folder / "x.json").write_text(json.dumps([record, {"id": 1}]))
    (folder / "x.jsonl").write_text(json.dumps(record) + "\n")
    return read_records(folder / "x.json"), read_records(folder / "x.jsonl")


def lines(folder: Path, n_bytes: int) -> object:
    (folder / "x.json").write_bytes(b"[]".ljust(n_bytes))
    return read_records(folder / "x.json")


def image_bytes(folder: Path, n: int) -> object:
    data = bombs.saved(Image.new("RGB", (5, 5)), "BMP")
    return bombs.picture(data + bytes(n - len(data)), "x.bmp")(folder)()


def medical_bytes(folder: Path, n: int) -> object:
    data = scans.dicom(rows=8, columns=8)
    return load_image(data + b"\xfc\xff\xfc\xffOB\0\0" + (n - len(data) - 12).to_bytes(4, "little") + bytes(n - len(data) - 12))


def frames(folder: Path, n: int) -> object:
    return load_image(scans.dicom(frames=n))


def members(folder: Path, n: int) -> object:
    found = []
    for path, write in ((folder / f"{n}.zip", scans.write_zip), (folder / f"{n}.tar", scans.write_tar)):
        write(path, {f"{i}.png": b"x" for i in range(n)})
        found.append(len(Archive(path).names()))
    assert found == [n, n]
    return found


def unpacked(folder: Path, n: int) -> object:
    (folder / "x.tar").unlink(missing_ok=True)
    scans.write_tar(folder / "x.tar", {"a": b"x"})  # 10240 bytes
    data = (folder / "x.tar").read_bytes()
    (folder / "x.tar.gz").write_bytes(gzip.compress(data + bytes(n - len(data))))
    return Archive(folder / "x.tar.gz").read("a", lambda head: 10)


def side(folder: Path, n: int) -> object:
    return [load_image(bombs.saved(Image.new(mode, size), "PNG")) for mode in ("L", "LA") for size in ((n, 1), (1, n))]


def deep_grey(folder: Path, n_pixels: int) -> object:
    """The core does not read this one, so the limits of this package are the ones that count."""
    return load_image(bombs.saved(Image.new("I;16", (n_pixels, 1)), "PNG"))


def pixels_per_byte(folder: Path, n: int) -> object:
    data = bombs.saved(Image.new("I;16", (len(bombs.saved(Image.new("I;16", (60, 1)), "PNG")), 1)), "PNG")
    width = int.from_bytes(data[16:20])
    return load_image(data + bytes(max(width // n - len(data), 0) + (n == 0)))


def jpeg_scans(folder: Path, n: int) -> object:
    data = bombs.saved(Image.new("L", (16, 16), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return load_image(data[:last] + data[last:-2] * (n - data.count(b"\xff\xda") + 1) + data[-2:])


def png_texts(folder: Path, n: int) -> object:
    text = bombs.chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b"))
    return load_image(bombs.png(4, 4, colour=6, pixels=bytes(4 * 17), before=text * n))


def pieces(folder: Path, n: int = 400, length: int = 0, added: dict[str, int] | None = None, n_bytes: int = 0) -> object:
    fields = mutate.split_fields(formats.small_tokenizer(n - 100 - (length > 0)))
    if length:
        fields.insert(300, (1, 2, mutate.join_fields([(1, 2, b"q" * length)])))
    data = mutate.join_fields(fields)
    if n_bytes:  # an unknown field fills it up
        data += mutate.join_fields([(1000, 2, bytes(n_bytes - len(data) - 5))])
        data = data[:-1] if len(data) > n_bytes else data
        assert len(data) == n_bytes
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "added_tokens.json").write_text(json.dumps(added or {}))
    return Tokenizer.from_pretrained(folder).encode("Is it large?")


def zip_of_pickle(folder: Path, n_bytes: int) -> object:
    """An empty dictionary that is remembered again and again."""
    code = b"\x80\x02}" + b"r\0\0\0\0" * (n_bytes % 2)
    code += b"q\0" * ((n_bytes - len(code) - 1) // 2) + b"."
    (folder / "x.bin").write_bytes(bombs.archive({"m/data.pkl": code}))
    return torch_zip.load(folder / "x.bin")


def gguf(folder: Path, keys: dict[str, gguf_container.Value], names: tuple[str, ...] = ("t",)) -> object:
    gguf_container.write(folder / "x.gguf", keys, {name: np.zeros(1, np.float32) for name in names})
    return gguf_container.read(folder / "x.gguf")


def gguf_of_tensors(folder: Path, n: int) -> object:
    return gguf(folder, {}, tuple(f"{i}" for i in range(n)))


def gguf_of_header(folder: Path, n_bytes: int) -> object:
    """The header ends where the last tensor's offset does."""
    rest = 24 + (8 + 1 + 4 + 8) + (8 + 1 + 4 + 8 + 4 + 8)
    return gguf(folder, {"k": "a" * (n_bytes - rest)})


def tokenizer_json(folder: Path, *, n_items: int = 0, n_bytes: int = 0, n_tokens: int = 2, length: int = 1, n_added: int = 0) -> object:
    vocabulary = {"a" * length: 0} | {f"<{i}>": i for i in range(1, n_tokens)}
    added = [{"id": n_tokens + i, "content": f"[{i}]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i in range(n_added)]
    values = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": None, "post_processor": None,
              "decoder": None, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    text = json.dumps(values, separators=(",", ":")).encode()
    if n_items:  # one comma for each further token
        return tokenizer_json(folder, n_tokens=n_tokens + n_items - strict_json.n_items(text))
    (folder / "tokenizer.json").write_bytes(text.ljust(n_bytes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a" * length}))
    return load_tokenizer(folder)


def config(**values: object) -> object:
    return LlavaConfig.from_dict({"hidden_size": 64, "num_attention_heads": 4, **values})


# limit -> (what to try with n, the module whose copy is lowered and to what; None: the real one)
LIMITS: dict[str, tuple[Try, tuple[str, int] | None]] = {
    "MAX_JSON_BYTES": (json_file, None),
    "MAX_JSON_DEPTH": (lambda folder, n: strict_json.parse_object(b'{"a":' * n + b"1" + b"}" * n, folder), None),
    "MAX_JSON_ITEMS": (json_items, None),
    "MAX_HEADER_BYTES": (lambda folder, n: weights(folder, tensors(1).ljust(n)), ("checkpoint.safetensors_file", 1000)),
    "MAX_STRING_CHARS": (lambda folder, n: weights(folder, b'{"__metadata__":{"a":"' + b"a" * n + b'"}}'), None),
    "MAX_TENSORS": (both_kinds_of_tensors, ("checkpoint.safetensors_file", 10)),
    "MAX_SHARDS": (shards, ("checkpoint.index", 5)),
    "MAX_RANK": (lambda folder, n: weights(folder, tensors(1, shape=(0,) * n)), None),
    "MAX_NAME_BYTES": (lambda folder, n: weights(folder, tensors(1, name="é" * (n // 2) + "e" * (n % 2))), None),
    "MAX_GGUF_KEYS": (lambda folder, n: gguf(folder, {f"{i}": i for i in range(n)}), None),
    "MAX_GGUF_STRINGS": (lambda folder, n: gguf(folder, {"a": ["x"] * (n // 2), "b": [""] * (n - n // 2)}), ("checkpoint.gguf_container", 1000)),
    "MAX_TOKENIZER_JSON_BYTES": (lambda folder, n: tokenizer_json(folder, n_bytes=n), ("text.tokenizer_json", 1000)),
    "MAX_TOKENIZER_JSON_ITEMS": (lambda folder, n: tokenizer_json(folder, n_items=n), ("text.tokenizer_json", 200)),
    "MAX_PICKLE_BYTES": (zip_of_pickle, ("checkpoint.torch_zip", 300)),
    "MAX_DATA_BYTES": (lines, ("data.formats.rows", 1000)),
    "MAX_ROW_CHARS": (rows, None),
    "MAX_IMAGE_BYTES": (image_bytes, ("image_source", 1000)),
    "MAX_MEDICAL_BYTES": (medical_bytes, ("image_source", 20_000)),
    "MAX_FRAMES": (frames, ("medical_images.dicom", 5)),
    "MAX_MEMBERS": (members, ("data.archives", 5)),
    "MAX_UNPACKED_BYTES": (unpacked, ("data.archives", 20_480)),
    "MAX_SIDE_PX": (side, None),
    "MAX_PIXELS": (deep_grey, ("images", 400)),
    "MAX_JPEG_SCANS": (jpeg_scans, None),
    "MAX_PNG_TEXTS": (png_texts, None),
    "MAX_VOCABULARY": (pieces, ("text.tokenizer", 400)),
    "MAX_PIECE_BYTES": (lambda folder, n: (pieces(folder, length=n), pieces(folder, added={"x" * n: 800})), None),
    "MAX_ADDED_TOKENS": (lambda folder, n: pieces(folder, added={f"<{i}>": 800 + i for i in range(n)}), None),
    "MAX_TOKENIZER_BYTES": (lambda folder, n: pieces(folder, n_bytes=n), ("text.tokenizer", 50_000)),
    "MAX_WIDTH": (lambda folder, n: (config(vocab_size=n), config(max_position_embeddings=n), config(intermediate_size=n)), None),
    "MAX_LAYERS": (lambda folder, n: config(num_hidden_layers=n), None),
    "MAX_LORA_RANK": (lambda folder, n: (LoraConfig(r=n), LoraConfig(rank_pattern={"q_proj": n})), None),
}
# the same limits in the readers of GGUF and tokenizer.json
ALSO: dict[str, tuple[Try, tuple[str, int] | None]] = {
    "MAX_HEADER_BYTES": (gguf_of_header, ("checkpoint.gguf_container", 1000)),
    "MAX_STRING_CHARS": (lambda folder, n: gguf(folder, {"k": "a" * n}), None),
    "MAX_TENSORS": (gguf_of_tensors, ("checkpoint.gguf_container", 10)),
    "MAX_NAME_BYTES": (lambda folder, n: gguf(folder, {}, ("x" * n,)), None),
    "MAX_VOCABULARY": (lambda folder, n: tokenizer_json(folder, n_tokens=n), ("text.tokenizer_json", 300)),
    "MAX_PIECE_BYTES": (lambda folder, n: tokenizer_json(folder, length=n), None),
    "MAX_ADDED_TOKENS": (lambda folder, n: tokenizer_json(folder, n_added=n), None),
}
TESTED_BELOW = {"MAX_NUMBER", "MAX_PLAIN_PIXELS", "MAX_PIXELS_PER_BYTE", "MAX_PLAIN_UNPACKED_BYTES", "MAX_UNPACKED_PER_BYTE"}


def test_every_limit_is_here() -> None:
    assert {name for name in vars(limits) if name.startswith("MAX_")} == set(LIMITS) | TESTED_BELOW


@pytest.mark.parametrize(("name", "table"), [(name, table) for table in (LIMITS, ALSO) for name in table])
def test_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, table: dict[str, tuple[Try, tuple[str, int] | None]]) -> None:
    attempt, lowered = table[name]
    limit = getattr(limits, name)
    if lowered is not None:
        module, limit = lowered
        monkeypatch.setattr(importlib.import_module(f"stllava.{module}"), name, limit)
    for n in (limit - 1, limit):
        attempt(tmp_path, n)
    with pytest.raises(StllavaError):
        attempt(tmp_path, limit + 1)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "lora_alpha"])
def test_numbers(key: str) -> None:
    def attempt(value: float) -> object:
        return LoraConfig(lora_alpha=value) if key == "lora_alpha" else config(**{key: value})

    for value in (1, 1e-30, np.nextafter(limits.MAX_NUMBER, 0).item(), limits.MAX_NUMBER):
        attempt(value)
    for value in (np.nextafter(limits.MAX_NUMBER, np.inf).item(), 10**400, float("inf"), float("nan"), 0, -1, True, "1", None, [1]):
        with pytest.raises(StllavaError):
            attempt(value)


def test_bytes_for_their_packed_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What unpacks to MAX_PLAIN_UNPACKED_BYTES may, and beyond them to MAX_UNPACKED_PER_BYTE for each packed byte: everywhere where something is unpacked."""
    content = bytes(40_000)
    scans.write_zip(tmp_path / "x.zip", {"a": content})
    scans.write_tar(tmp_path / "x.tar", {"a": content})
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    volume, deflated = scans.nifti(np.zeros((20, 20, 50), np.int16), gzipped=True), scans.deflated(scans.dicom(np.zeros((1, 100, 200), np.int16)))
    table = published.write_parquet(tmp_path / "x.parquet", [{"text": "x" * 40_000}])
    attempts = (lambda: Archive(tmp_path / "x.zip").read("a", lambda head: 10**6), lambda: Archive(tmp_path / "x.tar.gz").read("a", lambda head: 10**6),
                lambda: load_image(volume), lambda: load_image(deflated), lambda: read_records(table))
    for attempt in attempts:
        for plain, per_byte, allowed in ((60_000, 0, True), (30_000, 0, False), (0, 5000, True), (0, 5, False)):
            for module in ("data.archives", "medical_images.dicom", "medical_images.nifti", "data.formats.parquet"):
                monkeypatch.setattr(importlib.import_module(f"stllava.{module}"), "MAX_PLAIN_UNPACKED_BYTES", plain)
                monkeypatch.setattr(importlib.import_module(f"stllava.{module}"), "MAX_UNPACKED_PER_BYTE", per_byte)
            if allowed:
                attempt()
            else:
                with pytest.raises(StllavaError, match="bomb|to more than"):
                    attempt()


def test_pixels_for_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture may have MAX_PLAIN_PIXELS whatever its file, and beyond them MAX_PIXELS_PER_BYTE for each byte."""
    for mode in ("L", "I;16"):  # read by the core, and by Pillow
        data = bombs.saved(Image.new(mode, (60, 40)), "PNG")
        for plain, per_byte, allowed in ((2401, 0, True), (2400, 0, True), (2399, 0, False), (0, 2400 // len(data) + 1, True), (0, 2400 // len(data) - 1, False)):
            monkeypatch.setattr("stllava.images.MAX_PLAIN_PIXELS", plain)
            monkeypatch.setattr("stllava.images.MAX_PIXELS_PER_BYTE", per_byte)
            if allowed:
                load_image(data)
            else:
                with pytest.raises(StllavaError, match="decompression bomb"):
                    load_image(data)
