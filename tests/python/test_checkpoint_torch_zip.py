"""torch_zip: golden files read, own files round trip, and nothing in a pickle is ever called."""

from __future__ import annotations

import collections
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from stllava.checkpoint import torch_zip
from stllava.errors import FormatError

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "checkpoint_files"
SAMPLE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "bf": np.array([0x3F80], np.uint16), "h": np.ones((2, 1), np.float16),
          "d": np.array(2.5), "i": np.array([-1], np.int64), "e": np.zeros((0, 3), np.float32), "flag": np.array([True])}


def archive(path: Path, pickle_bytes: bytes, entries: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("m/data.pkl", pickle_bytes)
        for name, data in (entries or {}).items():
            file.writestr(f"m/{name}", data)
    return path


def tensor_pickle(storage: bytes = b"FloatStorage", key: bytes = b"0", count: int = 4, offset: int = 0,
                  size: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1)) -> bytes:
    def text(value: bytes) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    return (b"\x80\x02}(" + text(b"w") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text(b"storage") + b"ctorch\n" + storage + b"\n"
            + text(key) + text(b"cuda:0") + number(count) + b"tQ" + number(offset) + b"(" + b"".join(map(number, size)) + b"t("
            + b"".join(map(number, stride)) + b"t\x89ccollections\nOrderedDict\n)RtRu.")


FOUR = {"data/0": np.arange(4, dtype=np.float32).tobytes(), "version": b"3\n", "byteorder": b"little"}


def test_golden_files_match_the_listing() -> None:
    listing = json.loads((GOLDEN / "listing.json").read_text())
    names = [name for name in listing if name.endswith(".bin")]
    assert len(names) == 3
    for name in names:
        file = torch_zip.load(GOLDEN / name)
        assert set(file) == set(listing[name])
        for key, (dtype, shape, total) in listing[name].items():
            assert str(file[key].dtype) == dtype and list(file[key].shape) == shape
            assert float(file[key].sum(dtype=np.float64)) == pytest.approx(total, rel=1e-12)


def test_round_trip_and_reproducible_bytes(tmp_path: Path) -> None:
    torch_zip.save(tmp_path / "x.bin", SAMPLE)
    file = torch_zip.load(tmp_path / "x.bin")
    assert list(file) == list(SAMPLE)
    for name, array in SAMPLE.items():
        assert file[name].dtype == array.dtype and file[name].shape == array.shape
        np.testing.assert_array_equal(file[name], array)
        assert not file[name].flags.writeable
    first = (tmp_path / "x.bin").read_bytes()
    torch_zip.save(tmp_path / "x.bin", file)
    assert (tmp_path / "x.bin").read_bytes() == first


def test_written_layout_is_what_torch_asks_for(tmp_path: Path) -> None:
    torch_zip.save(tmp_path / "x.bin", SAMPLE)
    with zipfile.ZipFile(tmp_path / "x.bin") as file:
        assert file.testzip() is None
        assert file.read("x/version") == b"3\n" and file.read("x/byteorder") == b"little"
        offsets = [info.header_offset + 30 + len(info.filename) + len(info.extra) for info in file.infolist()]
        assert all(offset % 64 == 0 for offset in offsets)


def test_storages_beyond_the_zip_limit_stay_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2 GiB on an entry needs zip64 fields, which lengthen its header; here the limit is 1000 bytes."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    tensors = {"large": np.arange(3000, dtype=np.float32), "small": np.arange(5.0)}
    torch_zip.save(tmp_path / "x.bin", tensors)
    file = torch_zip.load(tmp_path / "x.bin")
    for name, array in tensors.items():
        np.testing.assert_array_equal(file[name], array)
    data = (tmp_path / "x.bin").read_bytes()
    assert data.index(tensors["large"].tobytes()) % 64 == 0 and data.index(tensors["small"].tobytes()) % 64 == 0


def test_strided_views_and_shared_storage(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", tensor_pickle(size=(2, 2), stride=(1, 2)), FOUR)
    np.testing.assert_array_equal(torch_zip.load(path)["w"], [[0, 2], [1, 3]])
    path = archive(tmp_path / "x.bin", tensor_pickle(offset=2, size=(2,), stride=(1,)), FOUR)
    np.testing.assert_array_equal(torch_zip.load(path)["w"], [2, 3])


def test_state_dict_with_version_table(tmp_path: Path) -> None:
    """torch saves a module's state_dict as an OrderedDict that carries `_metadata` through a BUILD opcode."""
    code = tensor_pickle().replace(b"\x80\x02}(", b"\x80\x02ccollections\nOrderedDict\n)R(")
    code = code[:-1] + b"}X\x09\x00\x00\x00_metadata}sb."
    assert list(torch_zip.load(archive(tmp_path / "x.bin", code, FOUR))) == ["w"]


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_in_a_pickle_never_runs(tmp_path: Path, protocol: int) -> None:
    code = pickle.dumps({"w": Touch(tmp_path / "ran")}, protocol)
    with pytest.raises(FormatError, match="never run"):
        torch_zip.load(archive(tmp_path / "x.bin", code, FOUR))
    assert not (tmp_path / "ran").exists()


BAD_PICKLES = {
    "other global": (b"\x80\x02cos\nsystem\n.", "'os system' is not allowed"),
    "other function of torch": (tensor_pickle().replace(b"_rebuild_tensor_v2", b"_rebuild_parameter"), "_rebuild_parameter"),
    "storage called": (b"\x80\x02ctorch\nFloatStorage\n)R.", "call of"),
    "OrderedDict with arguments": (b"\x80\x02ccollections\nOrderedDict\nN\x85R.", "call of"),
    "string called": (b"\x80\x02X\x01\x00\x00\x00a)R.", "not a name"),
    "unknown storage class": (tensor_pickle(storage=b"QUInt8Storage"), "QUInt8Storage"),
    "missing storage": (tensor_pickle(key=b"7"), "no storage m/data/7"),
    "key with a path": (tensor_pickle(key=b"../version"), "no storage"),
    "storage of another length": (tensor_pickle(count=5), "has 16 bytes"),
    "negative count": (tensor_pickle(count=-1), "not a storage"),
    "tensor past its storage": (tensor_pickle(size=(2, 3), stride=(2, 1)), "does not fit"),
    "offset past its storage": (tensor_pickle(offset=1), "does not fit"),
    "negative offset": (tensor_pickle(offset=-1), "non-negative"),
    "negative stride": (tensor_pickle(stride=(-2, 1)), "non-negative"),
    "stride 0 bomb": (tensor_pickle(size=(2**31 - 1, 2**31 - 1), stride=(0, 0)), "does not fit"),
    "size and stride differ in length": (tensor_pickle(stride=(1,)), "non-negative"),
    "rank 9": (tensor_pickle(size=(1,) * 9, stride=(1,) * 9), "rank at most 8"),
    "protocol 4": (b"\x80\x04}.", "protocol 4"),
    "ends early": (b"\x80\x02}", "ends too early"),
    "empty stack": (b"\x80\x02R.", "malformed"),
    "unknown memo": (b"\x80\x02h\x05.", "malformed"),
    "two objects left": (b"\x80\x02}}.", "2 objects left"),
    "key not a string": (b"\x80\x02}K\x01K\x02s.", "key of type int"),
    "duplicate key": (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "duplicate key"),
    "a number, not a tensor": (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "is a int, want a tensor"),
    "not a dictionary": (b"\x80\x02N.", "holds a NoneType"),
    "string longer than the file": (b"\x80\x02X\xff\xff\xff\xff.", "ends too early"),
    "name without an end": (b"\x80\x02c" + b"a" * 1000, "without an end"),
    "mark as a value": (b"\x80\x02(\x85.", "mark"),
    "tensor in the place of a word": (tensor_pickle().replace(b"X\x07\x00\x00\x00storage", tensor_pickle()[10:-2], 1), "not a storage"),
    # 2^60 references to one object: must not be printed, compared or copied
    "nested tuples that double": (b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60)) + b"Q.", "not a storage"),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickle_is_refused(tmp_path: Path, case: str) -> None:
    code, message = BAD_PICKLES[case]
    with pytest.raises(FormatError, match=message) as error:
        torch_zip.load(archive(tmp_path / "bad.bin", code, FOUR))
    assert "bad.bin" in str(error.value)


def test_every_cut_of_a_pickle_is_refused(tmp_path: Path) -> None:
    code = tensor_pickle()
    for n in range(len(code)):
        with pytest.raises(FormatError):
            torch_zip.load(archive(tmp_path / "x.bin", code[:n], FOUR))


def renamed(path: Path, old: bytes, new: bytes) -> None:
    archive(path, tensor_pickle(), {**FOUR, "data.pk": b""})
    path.write_bytes(path.read_bytes().replace(old, new))


def test_bad_archives(tmp_path: Path) -> None:
    good = archive(tmp_path / "good.bin", tensor_pickle(), FOUR)
    whole = good.read_bytes()
    for n in range(0, len(whole), 11):
        (tmp_path / "cut.bin").write_bytes(whole[:n])
        with pytest.raises(FormatError):
            torch_zip.load(tmp_path / "cut.bin")
    cases = {
        "re-save": lambda p: p.write_bytes(pickle.dumps(collections.OrderedDict())),
        "compressed": lambda p: archive(p, tensor_pickle(), FOUR, zipfile.ZIP_DEFLATED),
        "byte order": lambda p: archive(p, tensor_pickle(), {**FOUR, "byteorder": b"big"}),
        "no m/data.pkl": lambda p: renamed(p, b"m/data.pkl", b"m/data.foo"),
        "one top folder": lambda p: renamed(p, b"m/version", b"n/version"),
        "two entries named": lambda p: renamed(p, b"m/version", b"m/data.pkl"[:9]),
    }
    for message, make in cases.items():
        make(tmp_path / "bad.bin")
        with pytest.raises(FormatError, match=message):
            torch_zip.load(tmp_path / "bad.bin")


def test_archive_entries_that_overlap(tmp_path: Path) -> None:
    """Two central entries that point at the same local header: a polyglot, not a checkpoint."""
    path = archive(tmp_path / "x.bin", tensor_pickle(), FOUR)
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", central + 4)
    data[second + 42:second + 46] = data[central + 42:central + 46]
    path.write_bytes(data)
    with pytest.raises(FormatError, match="no entry 'm/data/0' at byte 0"):
        torch_zip.load(path)


def test_pickle_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tensor_pickle()
    path = archive(tmp_path / "x.bin", code, FOUR)
    monkeypatch.setattr(torch_zip, "MAX_PICKLE_BYTES", len(code))
    torch_zip.load(path)
    monkeypatch.setattr(torch_zip, "MAX_PICKLE_BYTES", len(code) - 1)
    with pytest.raises(FormatError, match="limit"):
        torch_zip.load(path)
