"""Seeded damage: `mutate(kind, data, rng)` makes one hostile variant of a file.

Half of the variants know nothing of the format (bits, extreme bytes, cuts, chunks moved, integers set to extremes). The other half change one thing
inside the structure and keep the rest valid (lengths, checksums), because random bytes seldom come past the first check.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(kind: str, data: bytes, rng: random.Random) -> bytes:
    """One to three changes to `data`; kind: json, safetensors, zip, proto, png, jpeg, bmp, dicom, nifti, tar or gguf."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        inside = _STRUCTURED.get(kind)
        if inside is not None and rng.random() < 0.5:
            try:
                data = inside(data, rng)
                continue
            except (ValueError, LookupError, RuntimeError, EOFError, OSError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError):
                pass  # an earlier change broke the structure
        data = rng.choice(_BLIND)(data, rng)
    return data


# ---- without knowledge of the format ---------------------------------------------------------------------------------------


def _place(data: bytes, rng: random.Random) -> int:
    """Headers matter more than pixels and weights: every second change falls on the first 64 bytes or the last."""
    n = len(data)
    where = rng.random()
    return rng.randrange(n) if where < 0.5 or n < 128 else rng.randrange(64) if where < 0.75 else n - 1 - rng.randrange(64)


def _bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[_place(out, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data or b"\0")
    at, n = _place(out, rng), rng.choice((1, 1, 2, 4, 16))
    out[at:at + n] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))]) * len(out[at:at + n])
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[:rng.randrange(len(data) + 1)]


def _move(data: bytes, rng: random.Random) -> bytes:
    """Delete, repeat, exchange or append a stretch."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 4, 30, 1000)))
    piece, rest = data[a:b], data[:a] + data[b:]
    at = rng.randrange(len(rest) + 1)
    return rng.choice((rest, data[:b] + piece * rng.choice((1, 3)) + data[b:], rest[:at] + piece + rest[at:], data + piece))


def _integer(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(EXTREMES) % 2**(8 * size)
    at = _place(data or b"\0", rng)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size:]


def _splice(data: bytes, rng: random.Random) -> bytes:
    """The file's head on a tail that starts elsewhere in it."""
    return data[:rng.randrange(len(data) + 1)] + data[rng.randrange(len(data) + 1):]


_BLIND: tuple[Callable[[bytes, random.Random], bytes], ...] = (_bits, _bits, _bytes, _bytes, _cut, _move, _integer, _integer, _splice)


# ---- JSON ------------------------------------------------------------------------------------------------------------------


class Raw(str):
    """JSON text put into the file as it is."""


def _nested(depth: int) -> Raw:
    return Raw("[" * depth + "]" * depth)


NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-320, 2**31, 2**32, 2**63, 2**64, -2**63, 10**400, Raw("9" * 5000), Raw("1e400"), Raw("-1e400"), Raw("NaN"),
    Raw("Infinity"), Raw("0.1e-99999"), "", "a", "0", "\0", "\ud800", "\udfff\ud800", "../../etc/passwd", "/dev/zero", "\N{RIGHT-TO-LEFT OVERRIDE}", "x" * 100_000,
    "<image>", "<image>" * 3, "</s>", [], {}, [[]], [None], [1, 2], ["a"], {"": 0}, {"a": {"a": []}}, _nested(63), _nested(65), _nested(1000), _nested(100_000),
    Raw('{"a":' * 500 + "1" + "}" * 500), Raw('{"a":1,"a":2}'), Raw("tru"), Raw("'a'"), Raw("[1,]"), Raw("01"), Raw('"\\ud800\\u0000"'))


def _dump(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{_dump(item)}" for key, item in value.pairs) + "}"
    return json.dumps(value)


class Pairs:
    """A JSON object that may hold a key twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _nodes(value: Any) -> list[tuple[list[Any], int]]:
    """(container, position) of every value, however deep."""
    found: list[tuple[list[Any], int]] = []
    rest = [value]
    while rest:
        items = rest.pop()
        inner = items.pairs if isinstance(items, Pairs) else items if isinstance(items, list) else []
        for i, item in enumerate(inner):
            found.append((inner, i))
            rest.append(item[1] if isinstance(items, Pairs) else item)
    return found


def change_json(data: bytes, rng: random.Random) -> bytes:
    root = [json.loads(data, object_pairs_hook=Pairs)]
    nodes = _nodes(root)
    inner, i = rng.choice(nodes)
    other, j = rng.choice(nodes)
    is_pair = isinstance(inner[i], tuple)
    value = inner[i][1] if is_pair else inner[i]
    match rng.randrange(8):
        case 0:
            del inner[i]
        case 1:  # twice
            inner.insert(i, inner[i])
        case 2 if is_pair:
            inner[i] = (rng.choice(("", "\0", "\ud800", "k" * 1000, inner[i][0] + "x", inner[i][0].upper())), value)
        case 3:  # a value from elsewhere in the file
            taken = other[j][1] if isinstance(other[j], tuple) else other[j]
            taken = Raw(_dump(taken))
            inner[i] = (inner[i][0], taken) if is_pair else taken
        case 4 if type(value) is int:
            value = rng.choice((value + 1, value - 1, -value, value * 2**32, value + 2**64, float(min(value, 2**1000))))
            inner[i] = (inner[i][0], value) if is_pair else value
        case _:
            value = rng.choice(NASTY)
            inner[i] = (inner[i][0], value) if is_pair else value
    if not root:
        return b""
    text = _dump(root[0])
    return text.encode("utf-8", "surrogatepass") if rng.random() < 0.9 else text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")), "surrogatepass")


# ---- binary structures -----------------------------------------------------------------------------------------------------


def _change_safetensors(data: bytes, rng: random.Random) -> bytes:
    n = int.from_bytes(data[:8], "little")
    header = change_json(data[8:8 + n], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + n:]


def _change_zip(data: bytes, rng: random.Random) -> bytes:
    """Another entry list: pickle changed, entries renamed, compressed, doubled or dropped; the archive itself is in order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = 0 if rng.random() < 0.6 else rng.randrange(len(entries))
    name, content = entries[at]
    compression = zipfile.ZIP_STORED
    match rng.randrange(8):
        case 0:
            del entries[at]
        case 1:
            entries.append((name, content))
        case 2:
            entries[at] = (rng.choice(("../" + name, "/" + name, name + "\0x", name.upper(), "", "other/data.pkl", "é" * 300)), content)
        case 3:
            compression = zipfile.ZIP_DEFLATED
        case _:
            entries[at] = (name, rng.choice(_BLIND)(content, rng))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that stand twice are wanted here
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name or "x"), content, compression)
    return out.getvalue()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


Field = tuple[int, int, Any]  # number, wire type, value: an int or bytes


def split_fields(data: bytes) -> list[Field]:
    """The fields of a protobuf message."""
    at, found = 0, []

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value: Any = varint()
        else:
            n = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            value, at = data[at:at + n], at + n
        found.append((key >> 3, kind, value))
    return found


def join_fields(fields: list[Field]) -> bytes:
    out = bytearray()
    for number, kind, value in fields:
        out += _varint(number << 3 | kind)
        out += _varint(value) if kind == 0 else _varint(len(value)) + value if kind == 2 else value
    return bytes(out)


def change_proto(data: bytes, rng: random.Random) -> bytes:
    """One field of the message or of a message in it: another value, dropped, doubled, exchanged or renumbered."""
    fields = split_fields(data)
    i, j = rng.randrange(len(fields)), rng.randrange(len(fields))
    if rng.random() < 0.4:  # the few fields behind the pieces: trainer and normaliser
        i = rng.randrange(max(len(fields) - 4, 0), len(fields))
    number, kind, value = fields[i]
    if kind == 2 and value and rng.random() < 0.75:
        try:
            fields[i] = (number, kind, change_proto(value, rng))
            return join_fields(fields)
        except (KeyError, IndexError):
            pass
    match rng.randrange(6):
        case 0:
            del fields[i]
        case 1:
            fields.insert(j, fields[i])
        case 2:
            fields[i], fields[j] = fields[j], fields[i]
        case 3:
            fields[i] = (rng.choice((1, 2, 3, 4, 5, 24, 41, 1000)), kind, value)
        case _ if kind == 0:
            fields[i] = (number, kind, rng.choice((*EXTREMES, 2, 3, 4, 5, 6, 7)))
        case _ if kind == 2:
            fields[i] = (number, kind, rng.choice((b"", b"\0", b"\xff", value * 2, b"a" * 2000, "▁".encode(), b"<0x41>", rng.randbytes(8), rng.randbytes(4000))))
        case _:
            fields[i] = (number, kind, struct.pack("<f", rng.choice((float("nan"), float("inf"), -1e38))) if kind == 5 else b"\xff" * 8)
    return join_fields(fields)


def _change_png(data: bytes, rng: random.Random) -> bytes:
    """One chunk changed, its checksum right; sometimes the pixel stream is unpacked, changed and packed again."""
    at, chunks = 8, []
    while at + 12 <= len(data):
        n = int.from_bytes(data[at:at + 4])
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + n]))
        at += n + 12
    i = rng.randrange(len(chunks))
    name, content = chunks[i]
    match rng.randrange(7):
        case 0:
            del chunks[i]
        case 1:
            chunks.insert(rng.randrange(len(chunks)), chunks[i])
        case 2:
            chunks[i] = (rng.choice((b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fcTL", b"eXIf", b"\0\0\0\0")), content)
        case 3:
            chunks.insert(1, (rng.choice((b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"iTXt", b"eXIf", b"gAMA", b"acTL")), rng.randbytes(rng.choice((0, 1, 6, 30)))))
        case 4 if name == b"IDAT":
            chunks[i] = (name, zlib.compress(rng.choice(_BLIND)(zlib.decompress(content), rng)))
        case _:
            chunks[i] = (name, rng.choice(_BLIND)(content, rng))
    body = b"".join(len(c).to_bytes(4) + n + c + zlib.crc32(n + c).to_bytes(4) for n, c in chunks)
    return data[:8] + body


def _change_jpeg(data: bytes, rng: random.Random) -> bytes:
    """One marker segment changed, its length right."""
    at, segments = 2, []
    while data[at + 1] != 0xDA:
        n = int.from_bytes(data[at + 2:at + 4])
        segments.append((data[at + 1], data[at + 4:at + 2 + n]))
        at += n + 2
    i = rng.randrange(len(segments))
    marker, content = segments[i]
    match rng.randrange(5):
        case 0:
            del segments[i]
        case 1:
            segments.insert(rng.randrange(len(segments)), segments[i])
        case 2:
            segments[i] = (rng.choice((0xC0, 0xC2, 0xC4, 0xC9, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE)), content)
        case _:
            segments[i] = (marker, rng.choice(_BLIND)(content, rng)[:65_000])
    return data[:2] + b"".join(bytes([0xFF, m]) + (len(c) + 2).to_bytes(2) + c for m, c in segments) + data[at:]


def _change_bmp(data: bytes, rng: random.Random) -> bytes:
    """One field of the two headers."""
    at, size = rng.choice(((2, 4), (10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (34, 4), (46, 4)))
    value = rng.choice((*EXTREMES, 2, 3, 4, 8, 16, 24, 32, 40, 108, 124, rng.randrange(2**16))) % 2**(8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size:]


def _gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """(place, bytes) of every number in the table of a GGUF file: counts, types, lengths, values, sizes, offsets."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at, found = 4, []

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size:at], "little")

    def text() -> None:
        nonlocal at
        n = number(8)
        at += n

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner, n = number(4), number(8)
            for _ in range(min(n, len(data))):
                value(inner)
        else:
            number(sizes[kind])

    number(4)
    n_tensors, n_keys = number(8), number(8)
    for _ in range(min(n_keys, 1000)):
        text()
        value(number(4))
    for _ in range(min(n_tensors, 1000)):
        text()
        for _ in range(min(number(4), 8)):
            number(8)
        number(4)
        number(8)
    return found


def _change_gguf(data: bytes, rng: random.Random) -> bytes:
    """One number of the table; the vocabulary has most of them, so those outside it come as often."""
    numbers = _gguf_numbers(data)
    at, size = rng.choice(rng.choice((numbers, numbers[:60], numbers[-80:])))
    old = int.from_bytes(data[at:at + size], "little")
    value = rng.choice((*EXTREMES, 2, 3, 8, 9, 10, 13, 30, old + 1, old - 1, old * 2, rng.randrange(2**16))) % 2**(8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size:]


def _dicom_elements(data: bytes) -> list[tuple[int, int, int]]:
    """(place, place of the value, length) of the elements of an explicit little-endian file, those inside sequences not."""
    at, found = 132, []
    while at + 8 <= len(data):
        long = data[at + 4:at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OF")
        begin = at + (12 if long else 8)
        n = int.from_bytes(data[begin - (4 if long else 2):begin], "little")
        if begin + n > len(data):  # also an undefined length
            found.append((at, begin, len(data) - begin))
            break
        found.append((at, begin, n))
        at = begin + n
    return found


def _change_dicom(data: bytes, rng: random.Random) -> bytes:
    """One element: its value, kind, length or tag; dropped, doubled, or its value replaced by one of the same length."""
    elements = _dicom_elements(data)
    at, begin, n = rng.choice(elements[-30:])  # behind the meta information stands what is read
    end = begin + n
    match rng.randrange(7):
        case 0:
            return data[:at] + data[end:]
        case 1:
            return data[:end] + data[at:end] + data[end:]
        case 2:
            return data[:at + 4] + rng.choice((b"LO", b"US", b"DS", b"SQ", b"OB", b"UN", b"UT", b"ZZ", b"\0\0")) + data[at + 6:]
        case 3:
            return data[:begin - 2] + rng.choice(EXTREMES).to_bytes(8, "little")[:2] + data[begin:]
        case 4 if n <= 16:
            value = rng.choice((b"0", b"-1", b"1e400", b"nan", b"99999999", b"4096", b"1\\2", b"x", b"MONOCHROME1", b"PALETTE COLOR", b"RGB", b"YBR_FULL_422"))
            return data[:begin] + value.ljust(n, b" ")[:n] + data[end:]
        case 5 if n <= 8:
            return data[:begin] + rng.choice((*EXTREMES, 2, 3, 8, 12, 32, 64)).to_bytes(8, "little")[:n] + data[end:]
        case _:
            return data[:begin] + rng.choice(_BLIND)(data[begin:end] or b"\0", rng)[:n].ljust(n, b"\0") + data[end:]


def _change_nifti(data: bytes, rng: random.Random) -> bytes:
    """One field of the header; inside the gzip stream of a packed file."""
    if data[:2] == b"\x1f\x8b":
        return gzip.compress(_change_nifti(gzip.decompress(data), rng), mtime=0)
    at, size = rng.choice(((0, 4), *((40 + 2 * i, 2) for i in range(8)), (70, 2), (72, 2), *((76 + 4 * i, 4) for i in range(8)), (108, 4), (112, 4), (116, 4), (252, 2), (254, 2),
                           *((256 + 4 * i, 4) for i in range(6)), *((280 + 4 * i, 4) for i in range(12)), (344, 4), (348, 4)))
    value = rng.choice((*(n.to_bytes(8, "little") for n in (*EXTREMES, 2, 3, 4, 8, 16, 64, 128, 256, 512, 1024, 2304, 100, rng.randrange(2**16))),
                        *(struct.pack("<f", x) for x in (float("nan"), float("inf"), -1e38, 1e-38, 0.5, -1.0, 352.0, 1e9))))
    return data[:at] + value[:size].ljust(size, b"\0") + data[at + size:]


def _change_tar(data: bytes, rng: random.Random) -> bytes:
    """One field of one header, its checksum right; inside the stream of a packed file."""
    for head, unpack, pack in ((b"\x1f\x8b", gzip.decompress, gzip.compress), (b"\xfd7zXZ", lzma.decompress, lzma.compress), (b"BZh", bz2.decompress, bz2.compress)):
        if data.startswith(head):
            return pack(_change_tar(unpack(data), rng))
    at, headers = 0, []
    while at + 512 <= len(data) and data[at:at + 1] != b"\0":
        headers.append(at)
        at += 512 + -(-int(data[at + 124:at + 135].strip(b"\0 ") or b"0", 8) // 512) * 512
    at = rng.choice(headers)
    header = bytearray(data[at:at + 512])
    begin, n = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (257, 6), (263, 2), (345, 155)))
    value = rng.choice((b"77777777777", b"\xff" * 12, b"\x80" + bytes(7) + b"\1\0\0\0", b"0", b"00000000001", b"", b"../up", b"/abs", b"1", b"2", b"3", b"5", b"6", b"K", b"L", b"S",
                        b"g", b"x", rng.randbytes(6)))
    header[begin:begin + n] = value[:n].ljust(n, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512:]


_STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": change_json, "safetensors": _change_safetensors, "zip": _change_zip, "proto": change_proto, "png": _change_png, "jpeg": _change_jpeg, "bmp": _change_bmp, "dicom": _change_dicom,
    "nifti": _change_nifti, "tar": _change_tar, "gguf": _change_gguf}
