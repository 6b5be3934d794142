"""Small files that ask for much memory or time. Each is refused within 100 ms of CPU and 64 MB.

`python tests/hostile/bombs.py` prints what each one costs.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats
import numpy as np
from PIL import Image

from stllava.checkpoint import atomic, gguf_container, index, safetensors_file, torch_zip
from stllava.checkpoint.gguf_file import read_gguf
from stllava.config import LlavaConfig
from stllava.data.records import read_records
from stllava.images import load_image
from stllava.limits import MAX_TENSORS
from stllava.text import load_tokenizer
from stllava.text.tokenizer import Tokenizer

Bomb = Callable[[Path], Callable[[], Any]]
BOMBS: dict[str, Callable[[], Bomb]] = {}
MAX_CPU_MS, MAX_MB = 100, 64
READ = {"png_whose_pixels_inflate_to_80_mb"}  # Pillow stops where the picture is full, so this is a valid picture with a long tail


def bomb(make: Bomb) -> Bomb:
    BOMBS[make.__name__] = lambda: make
    return make


def written(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def variants(**cases: Callable[[], Bomb]) -> None:
    BOMBS.update(cases)


# ---- GGUF ------------------------------------------------------------------------------------------------------------------


def u64(n: int) -> bytes:
    return n.to_bytes(8, "little")


for package in ("gguf", "tokenizers"):  # readers import them when they are needed, which is not the files' doing
    importlib.import_module(package)


def gguf_table(*, n_tensors: int = 0, n_keys: int = 0, version: int = 3, rest: bytes = b"") -> Bomb:
    def make(folder: Path) -> Callable[[], Any]:
        path = written(folder / "x.gguf", b"GGUF", struct.pack("<IQQ", version, n_tensors, n_keys), rest, bytes(64))
        return lambda: gguf_container.read(path)
    return make


def gguf_key(kind: int, value: bytes) -> Bomb:
    return gguf_table(n_keys=1, rest=u64(1) + b"k" + struct.pack("<I", kind) + value)


def gguf_tensor(*sizes: int, kind: int = 0, offset: int = 0, name: bytes = b"t") -> Bomb:
    return gguf_table(n_tensors=1, rest=u64(len(name)) + name + struct.pack("<I", len(sizes)) + b"".join(map(u64, sizes)) + struct.pack("<IQ", kind, offset))


variants(
    gguf_of_2_63_tensors=lambda: gguf_table(n_tensors=2**63),
    gguf_of_2_63_keys=lambda: gguf_table(n_keys=2**63),
    gguf_of_more_keys_than_bytes=lambda: gguf_table(n_keys=9000),
    gguf_of_version_2_31=lambda: gguf_table(version=2**31),
    gguf_big_endian=lambda: gguf_table(version=3 << 24),
    gguf_key_of_an_unknown_type=lambda: gguf_key(77, u64(0)),
    gguf_key_of_2_63_bytes=lambda: gguf_table(n_keys=1, rest=u64(2**63)),
    gguf_string_of_2_62_bytes=lambda: gguf_key(8, u64(2**62)),
    gguf_string_of_minus_one_bytes=lambda: gguf_key(8, u64(2**64 - 1)),
    gguf_array_of_2_60_strings=lambda: gguf_key(9, struct.pack("<IQ", 8, 2**60)),
    gguf_array_of_2_60_numbers=lambda: gguf_key(9, struct.pack("<IQ", 12, 2**60)),
    gguf_arrays_in_arrays=lambda: gguf_key(9, struct.pack("<IQ", 9, 3) * 100),
    gguf_array_of_strings_that_end_early=lambda: gguf_key(9, struct.pack("<IQ", 8, 5) + u64(2**64 - 8)),
    gguf_tensor_of_2_64_values=lambda: gguf_tensor(2**16, 2**16, 2**16, 2**16),
    gguf_tensor_of_no_values=lambda: gguf_tensor(2**62, 0),
    gguf_tensor_of_2_31_dimensions=lambda: gguf_table(n_tensors=1, rest=u64(1) + b"t" + struct.pack("<I", 2**31)),
    gguf_tensor_outside_the_file=lambda: gguf_tensor(2**30),
    gguf_tensor_at_2_63=lambda: gguf_tensor(1, offset=2**63),
    gguf_tensor_of_an_unknown_type=lambda: gguf_tensor(1, kind=4000),
    gguf_tensor_of_a_removed_type=lambda: gguf_tensor(32, kind=4),
    gguf_tensor_of_half_a_block=lambda: gguf_tensor(33, kind=8),
    gguf_tensor_without_a_name=lambda: gguf_tensor(1, name=b""),
    gguf_cut_in_its_magic=lambda: lambda folder: functools.partial(gguf_container.read, written(folder / "x.gguf", b"GG")),
    gguf_that_is_none=lambda: lambda folder: functools.partial(gguf_container.read, written(folder / "x.gguf", b"PK\3\4" + bytes(100))),
)


@bomb
def gguf_of_blocks_that_unpack_to_17_gb(folder: Path) -> Callable[[], Any]:
    """A sparse file, and settings that ask for another shape: nothing is unpacked before the shapes are compared."""
    keys = {b"block_count": 1, b"context_length": 8, b"embedding_length": 8, b"feed_forward_length": 8, b"attention.head_count": 1}
    table = b"".join(u64(len(key) + 6) + b"llama." + key + struct.pack("<II", 4, value) for key, value in keys.items())
    path, epsilon = folder / "x.gguf", b"llama.attention.layer_norm_rms_epsilon"
    table += u64(len(epsilon)) + epsilon + struct.pack("<If", 6, 1e-5)
    arch = u64(20) + b"general.architecture" + struct.pack("<I", 8) + u64(5) + b"llama"
    name = b"token_embd.weight"
    info = u64(len(name)) + name + struct.pack("<IQQIQ", 2, 4096, 2**20, 19, 0)  # IQ1_S: 50 bytes for 256 values
    written(path, b"GGUF", struct.pack("<IQQ", 3, 1, len(keys) + 2), arch, table, info)
    with open(path, "r+b") as file:
        file.truncate(4096 + 2**24 * 50)
    return lambda: read_gguf(path)


def tokenizer_json(text: bytes) -> Bomb:
    def make(folder: Path) -> Callable[[], Any]:
        written(folder / "tokenizer.json", text)
        written(folder / "tokenizer_config.json", b'{"eos_token": "a"}')
        return lambda: load_tokenizer(folder)
    return make


variants(
    tokenizer_json_of_65_mb=lambda: tokenizer_json(b" " * (65 << 20)),
    tokenizer_json_of_100_000_levels=lambda: tokenizer_json(b'{"model":' * 100_000),
    tokenizer_json_of_5_million_items=lambda: tokenizer_json(b'{"model":{"type":"BPE","vocab":{},"merges":[' + b"[]," * (5 << 20)),
    tokenizer_json_with_a_token_of_1_mb=lambda: tokenizer_json(b'{"model":{"type":"BPE","merges":[],"vocab":{"' + b"a" * (1 << 20) + b'":0}}}'),
    tokenizer_json_with_an_id_of_2_40=lambda: tokenizer_json(b'{"model":{"type":"BPE","merges":[],"vocab":{"a":1099511627776}}}'),
)


# ---- zip archives and pickles ----------------------------------------------------------------------------------------------


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def torch_file(path: Path, data: bytes) -> Callable[[], Any]:
    written(path / "x.bin", data)
    return lambda: torch_zip.load(path / "x.bin")


def end_record(n_entries: int, size: int, begin: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, n_entries, n_entries, size, begin, 0)


def end_records_64(n_entries: int, size: int, begin: int) -> bytes:
    return (struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, n_entries, n_entries, size, begin)
            + struct.pack("<4sLQL", b"PK\6\7", 0, begin + size, 1) + end_record(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF))


LOCAL = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"


def entry(name: bytes, start: int, size: int = 0, extra: bytes = b"") -> bytes:
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, size, size, len(name), len(extra), 0, 0, 0, 0, start) + name + extra


@bomb
def zip_of_high_ratio(folder: Path) -> Callable[[], Any]:
    return torch_file(folder, archive({"m/data.pkl": bytes(20 << 20)}, zipfile.ZIP_DEFLATED))


@bomb
def zip_of_zips(folder: Path) -> Callable[[], Any]:
    data = archive({"x": bytes(10 << 20)}, zipfile.ZIP_DEFLATED)
    for _ in range(5):
        data = archive({f"m/{i}": data for i in range(10)}, zipfile.ZIP_DEFLATED)
    return torch_file(folder, archive({"m/data.pkl": data}))


@bomb
def zip_of_overlapping_entries(folder: Path) -> Callable[[], Any]:
    """Local headers one behind the other; each entry claims everything from there to the end."""
    names = [b"m/%d" % i for i in range(2000)]
    local = [struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name for name in names]
    starts = np.cumsum([0, *map(len, local)]).tolist()
    body, kernel = b"".join(local), bytes(1000)
    directory = b"".join(entry(name, start, starts[-1] + 1000 - start - 30 - len(name)) for name, start in zip(names, starts, strict=False))
    return torch_file(folder, body + kernel + directory + end_record(2000, len(directory), len(body) + 1000))


@bomb
def zip_of_entries_with_one_body(folder: Path) -> Callable[[], Any]:
    directory = b"".join(entry(b"m/%d" % i, 0) for i in range(60_000))
    return torch_file(folder, LOCAL + directory + end_record(60_000, len(directory), len(LOCAL)))


@bomb
def zip_of_a_size_of_2_60(folder: Path) -> Callable[[], Any]:
    directory = entry(b"a", 0, 0xFFFFFFFF, struct.pack("<HHQQ", 1, 16, 2**60, 2**60))
    return torch_file(folder, LOCAL + directory + end_record(1, len(directory), len(LOCAL)))


@bomb
def zip_of_an_offset_of_2_64(folder: Path) -> Callable[[], Any]:
    directory = entry(b"a", 0xFFFFFFFF, 0, struct.pack("<HHQ", 1, 8, 2**64 - 1))
    return torch_file(folder, LOCAL + directory + end_record(1, len(directory), len(LOCAL)))


@bomb
def zip_of_too_many_entries(folder: Path) -> Callable[[], Any]:
    n = MAX_TENSORS + 1
    read = torch_file(folder, LOCAL)
    with open(folder / "x.bin", "ab") as file:
        file.truncate(len(LOCAL) + 47 * n)
        file.seek(0, io.SEEK_END)
        file.write(end_records_64(n, 47 * n, len(LOCAL)))
    return read


@bomb
def zip_that_declares_10_9_entries(folder: Path) -> Callable[[], Any]:
    directory = entry(b"a", 0)
    return torch_file(folder, LOCAL + directory + end_records_64(10**9, len(directory), len(LOCAL)))


@bomb
def zip_with_more_entries_than_it_says(folder: Path) -> Callable[[], Any]:
    directory = b"".join(entry(b"%d" % i, 0) for i in range(100_000))
    return torch_file(folder, LOCAL + directory + end_record(1, len(directory), len(LOCAL)))


def pickled(code: bytes) -> Bomb:
    return lambda folder: torch_file(folder, archive({"m/data.pkl": code, "m/data/0": bytes(16)}))


def tensor(size: bytes, stride: bytes) -> bytes:
    return (b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQK\0("
            + size + b"t(" + stride + b"t\x89ccollections\nOrderedDict\n)RtRs.")


LARGE = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
variants(
    pickle_whose_tuples_double=lambda: pickled(b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 5000 + b"Q."),
    pickle_of_20_mb_of_dictionaries=lambda: pickled(b"\x80\x02" + b"}" * (20 << 20) + b"."),
    pickle_of_60_kb_of_dictionaries=lambda: pickled(b"\x80\x02" + b"}" * 60_000 + b"."),
    pickle_of_deep_tuples=lambda: pickled(b"\x80\x02N" + b"\x85" * 60_000 + b"."),
    pickle_of_deep_dictionaries=lambda: pickled(b"\x80\x02" + b"}X\1\0\0\0a" * 8000 + b"N" + b"s" * 8000 + b"."),
    pickle_with_a_string_of_4_gb=lambda: pickled(b"\x80\x02X\xff\xff\xff\xff."),
    pickle_with_a_tensor_of_2_504=lambda: pickled(tensor(LARGE * 8, LARGE * 8)),
    pickle_with_a_tensor_of_stride_0=lambda: pickled(tensor(LARGE, b"K\0")),
    pickle_with_an_empty_tensor_of_2_126=lambda: pickled(tensor(LARGE * 2 + b"K\0", b"K\0" * 3)),
)


# ---- safetensors, index, configuration -------------------------------------------------------------------------------------


def weights(*parts: bytes) -> Bomb:
    def make(folder: Path) -> Callable[[], Any]:
        path = written(folder / "x.safetensors", *parts)
        return lambda: safetensors_file.read(path)
    return make


def header(text: bytes, data: bytes = b"") -> Bomb:
    return weights(len(text).to_bytes(8, "little"), text, data)


def shaped(*shape: int) -> Bomb:
    return header(json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode(), bytes(4))


@bomb
def header_of_100_mb_of_nothing(folder: Path) -> Callable[[], Any]:
    """The file takes no room on disk."""
    path = folder / "x.safetensors"
    with open(path, "wb") as file:
        file.write((99_000_000).to_bytes(8, "little") + b"{")
        file.seek(99_000_007)
        file.write(b"}")
    return lambda: safetensors_file.read(path)


variants(
    header_of_2_60_bytes=lambda: weights((2**60).to_bytes(8, "little"), b"{}"),
    header_of_2_64_bytes=lambda: weights(b"\xff" * 8, b"{}"),
    header_of_99_mb_in_a_small_file=lambda: weights((99_000_000).to_bytes(8, "little"), b"{}"),
    header_of_100_001_levels=lambda: header(b'{"a":' * 100_001 + b"1" + b"}" * 100_001),
    header_of_too_many_tensors=lambda: header(b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(MAX_TENSORS + 1)) + b"}"),
    header_of_empty_lists=lambda: header(b'{"a":[' + b"[]," * 10_000_000 + b"0]}"),
    header_with_long_numbers=lambda: header(b'{"w":{"dtype":"F32","shape":[' + b"9" * 4_000_000 + b'],"data_offsets":[0,4]}}'),
    shape_of_2_64=lambda: shaped(2**32, 2**32),
    shape_that_wraps_to_4_bytes=lambda: shaped(2**62 + 1, 4),
    shape_of_8_large_sizes=lambda: shaped(*[2**62] * 8),
    shape_of_100_000_axes=lambda: shaped(*[1] * 100_000),
    shape_empty_but_2_124=lambda: shaped(0, 2**62, 2**62),
)


def directory_with(name: str, text: bytes, read: Callable[[Path], Any]) -> Bomb:
    def make(folder: Path) -> Callable[[], Any]:
        written(folder / name, text)
        return lambda: read(folder)
    return make


def mapping(n: int, head: str, item: str) -> bytes:
    return (head + ",".join(item % (i, i) for i in range(n)) + "}}").encode()


INDEX = "model.safetensors.index.json"
DEEP = b'{"hidden_size":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
variants(
    index_of_a_million_shards=lambda: directory_with(INDEX, mapping(1_000_000, '{"weight_map":{', '"%d":"%d.bin"'), index.read_weights),
    index_of_30_000_shards=lambda: directory_with(INDEX, mapping(30_000, '{"weight_map":{', '"%d":"%d.bin"'), index.read_weights),
    index_of_empty_lists=lambda: directory_with(INDEX, b'{"weight_map":[' + b"[]," * 5_000_000 + b"0]}", index.read_weights),
    manifest_of_400_000_files=lambda: directory_with("manifest.json", mapping(400_000, '{"version":1,"files":{', '"%d":{"size":%d,"sha256":""}'), atomic.verify),
    config_of_100_000_levels=lambda: directory_with("config.json", DEEP, LlavaConfig.from_pretrained),
    config_with_a_number_of_4_million_digits=lambda: directory_with("config.json", b'{"hidden_size":' + b"9" * 4_000_000 + b"}", LlavaConfig.from_pretrained),
    config_with_a_float_of_4_million_digits=lambda: directory_with("config.json", b'{"rms_norm_eps":0.' + b"9" * 4_000_000 + b"e999}", LlavaConfig.from_pretrained),
    config_of_20_mb=lambda: directory_with("config.json", b'{"a":"' + b"a" * (20 << 20) + b'"}', LlavaConfig.from_pretrained),
    data_of_100_000_levels=lambda: directory_with("data.json", b"[" * 100_000, lambda folder: read_records(folder / "data.json")),
    data_lines_of_100_000_levels=lambda: directory_with("data.jsonl", b"[" * 100_000, lambda folder: read_records(folder / "data.jsonl")),
)


@bomb
def config_of_a_model_of_10_15_weights(folder: Path) -> Callable[[], Any]:
    """The largest sizes a configuration may have, beside the weights of a tiny model."""
    from stllava.model import LlavaModel
    formats.small_model().save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"hidden_size": 2**20, "intermediate_size": 2**20, "num_hidden_layers": 1024, "vocab_size": 2**20, "head_dim": 2**20}
    (folder / "config.json").write_text(json.dumps(values))
    return lambda: LlavaModel.from_pretrained(folder)


def tokens(text: bytes | None, added: bytes = b"{}") -> Bomb:
    def make(folder: Path) -> Callable[[], Any]:
        written(folder / "tokenizer.model", formats.small_tokenizer() if text is None else text)
        written(folder / "added_tokens.json", added)
        return lambda: Tokenizer.from_pretrained(folder)
    return make


variants(
    tokenizer_of_80_mb=lambda: tokens(b"\n\3\n\1a" * (16 << 20)),
    tokenizer_with_100_000_added_tokens=lambda: tokens(None, json.dumps({f"<{i}>": i for i in range(100_000)}).encode()),
)


# ---- pictures --------------------------------------------------------------------------------------------------------------


def picture(data: bytes, name: str = "x.png") -> Bomb:
    def make(folder: Path) -> Callable[[], Any]:
        path = written(folder / name, data)
        return lambda: load_image(path)
    return make


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, pixels: bytes = bytes(100), before: bytes = b"") -> bytes:
    ihdr = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + before + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg_of_scans(n: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: every scan walks over all its blocks."""
    data = saved(Image.new("L", (2048, 2048), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * n + data[-2:]


def jpeg_of_size(width: int, height: int, progressive: bool) -> bytes:
    data = bytearray(saved(Image.new("RGB", (16, 16), (1, 2, 3)), "JPEG", progressive=progressive))
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[frame + 5:frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp(width: int, height: int, bits: int, compression: int) -> bytes:
    palette = bytes(1024)
    return (b"BM" + struct.pack("<LLL", 2000, 0, 54 + len(palette)) + struct.pack("<LllHHLLllLL", 40, width, height, 1, bits, compression, 0, 0, 0, 256, 0)
            + palette + bytes(100))


def webp(width: int, height: int) -> bytes:
    """A lossless one; its two sizes have 14 bits each, behind the signature byte."""
    data = bytearray(saved(Image.new("L", (16, 16)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    rest = int.from_bytes(data[at:at + 4], "little") >> 28 << 28
    data[at:at + 4] = (rest | (height - 1) << 14 | width - 1).to_bytes(4, "little")
    return bytes(data)


def tiff(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("L", (16, 16)), "TIFF", compression="tiff_adobe_deflate"))
    at = int.from_bytes(data[4:8], "little")
    for i in range(int.from_bytes(data[at:at + 2], "little")):
        tag = at + 2 + 12 * i
        if int.from_bytes(data[tag:tag + 2], "little") in (256, 257, 278):
            value = width if data[tag] == 0 else height
            data[tag + 2:tag + 12] = struct.pack("<HLL", 4, 1, value)
    return bytes(data)


@functools.cache
def zeros() -> bytes:
    return zlib.compress(bytes(80 << 20), 1)



variants(
    png_of_4_10_18_pixels=lambda: picture(png(2**31 - 1, 2**31 - 1)),
    png_of_178_million_pixels=lambda: picture(png(65_535, 2730)),
    png_of_178_million_pixels_with_alpha=lambda: picture(png(65_535, 2730, colour=6)),
    png_of_16_bit_and_178_million_pixels=lambda: picture(png(13_377, 13_377, depth=16, colour=0)),
    png_of_1_bit_and_178_million_pixels=lambda: picture(png(13_377, 13_377, depth=1, colour=0, pixels=bytes(1673 * 13_377))),
    png_whose_pixels_inflate_to_80_mb=lambda: picture(png(40, 40, pixels=bytes(80 << 20))),
    png_whose_alpha_pixels_inflate_to_80_mb=lambda: picture(png(40, 40, colour=6, pixels=bytes(40 * 161 - 1))[:-12] + chunk(b"IDAT", zeros())),
    png_with_a_ztxt_bomb=lambda: picture(png(40, 40, colour=6, pixels=bytes(40 * 161), before=chunk(b"zTXt", b"a\0\0" + zeros()))),
    png_with_an_itxt_bomb=lambda: picture(png(40, 40, colour=6, pixels=bytes(40 * 161), before=chunk(b"iTXt", b"a\0\1\0\0\0" + zeros()))),
    png_with_10_000_text_chunks=lambda: picture(png(40, 40, colour=6, pixels=bytes(40 * 161), before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000), 9)) * 10_000)),
    gif_of_4_10_9_pixels=lambda: picture(b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\2\0;"),
    gif_of_178_million_pixels=lambda: picture(b"GIF89a" + struct.pack("<HHBBB", 13_377, 13_377, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 13_377, 13_377, 0) + b"\2\1\x44\0;"),
    tiff_of_178_million_pixels=lambda: picture(tiff(13_377, 13_377)),
    tiff_of_4_10_18_pixels=lambda: picture(tiff(2**31 - 1, 2**31 - 1)),
    webp_of_178_million_pixels=lambda: picture(webp(16_383, 10_900)),
    jpeg_of_178_million_pixels=lambda: picture(jpeg_of_size(65_500, 2730, False), "x.jpg"),
    jpeg_of_178_million_progressive_pixels=lambda: picture(jpeg_of_size(65_500, 2730, True), "x.jpg"),
    jpeg_of_2000_scans=lambda: picture(jpeg_of_scans(2000), "x.jpg"),
    bmp_of_178_million_pixels=lambda: picture(bmp(13_377, 13_377, 24, 0), "x.bmp"),
    bmp_of_178_million_packed_pixels=lambda: picture(bmp(13_377, 13_377, 8, 1), "x.bmp"),
    bmp_of_negative_sizes=lambda: picture(bmp(-(2**31), -(2**31), 24, 0), "x.bmp"),
    postscript_that_never_ends=lambda: picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"),
    icon_as_png=lambda: picture(saved(Image.new("RGB", (16, 16)), "ICO")),
    svg_as_png=lambda: picture(b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb">]><svg>&b;</svg>'),
)


@bomb
def picture_of_100_mb(folder: Path) -> Callable[[], Any]:
    path = folder / "x.png"
    with open(path, "wb") as file:
        file.truncate(100 << 20)
    return lambda: load_image(path)


@bomb
def picture_that_is_a_fifo(folder: Path) -> Callable[[], Any]:
    os.mkfifo(folder / "x.png")
    return lambda: load_image(folder / "x.png")


@bomb
def data_that_is_a_fifo(folder: Path) -> Callable[[], Any]:
    os.mkfifo(folder / "x.json")
    return lambda: read_records(folder / "x.json")


@bomb
def parquet_of_a_long_text_again_and_again(folder: Path) -> Callable[[], Any]:
    """A dictionary holds 1 MB once, 100,000 rows name it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"question": column}), folder / "x.parquet")
    return lambda: read_records(folder / "x.parquet")


@bomb
def parquet_of_zeros(folder: Path) -> Callable[[], Any]:
    """An image of 300 MB, packed."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    images = pa.array([{"bytes": bytes(300 << 20), "path": None}], pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": images}), folder / "x.parquet", compression="zstd", use_dictionary=False)
    return lambda: read_records(folder / "x.parquet")


@bomb
def picture_that_is_dev_zero(folder: Path) -> Callable[[], Any]:
    return lambda: load_image("/dev/zero")


if __name__ == "__main__":
    import worker
    worker.prepare()
    for name in sys.argv[1:] or BOMBS:
        with tempfile.TemporaryDirectory() as work:
            result = worker.watched(BOMBS[name]()(Path(work)))
        print(f"{name:48} {result['cpu_ms']:7.1f} ms {result['mb']:7.1f} MB  {result['bad'] or result['outcome']}: {str(result['value'])[:140]!r}", flush=True)
