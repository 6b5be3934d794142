"""safetensors_file: equal to the reference package on good files, a clear refusal of every damaged one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from stllava.checkpoint import safetensors_file
from stllava.checkpoint.tensor_file import count_nonfinite, to_float32
from stllava.errors import FormatError
from stllava.limits import MAX_NAME_BYTES, MAX_RANK

SAMPLE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(2.5), "half": np.ones(3, np.float16),
          "bits": np.array([[0x3F80, 0xC000]], np.uint16), "ids": np.array([1, -2], np.int64), "empty": np.zeros((0, 4), np.float32),
          "flag": np.array([True, False, True]), "byte": np.array([255], np.uint8)}


def raw_file(path: Path, header: Any, data: bytes = b"", n_header: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if n_header is None else n_header).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def assert_same(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and found[name].shape == wanted[name].shape
        np.testing.assert_array_equal(found[name], wanted[name])


def test_round_trip_keeps_dtype_shape_and_bits(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_file.write(path, SAMPLE)
    file = safetensors_file.read(path)
    assert_same(file, SAMPLE)
    assert file.metadata == {"format": "pt"}
    assert file.dtype("bits") == "bf16" and file.dtype("b") == "f64"


def test_bytes_equal_the_reference_package(tmp_path: Path) -> None:
    tensors = {name: array for name, array in SAMPLE.items() if name != "bits"}
    safetensors_file.write(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})


def test_reference_package_reads_our_bf16(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "x", {"w": np.array([0x3F80], np.uint16)})
    with safetensors.safe_open(tmp_path / "x", framework="numpy") as file:
        assert file.get_slice("w").get_dtype() == "BF16"


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=20).filter(lambda s: s != "__metadata__"), hnp.arrays(
    st.sampled_from([np.float32, np.float16, np.int64, np.uint8]), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)), max_size=5))
def test_any_tensors_round_trip_through_the_reference_package(tmp_path_factory: pytest.TempPathFactory, tensors: dict) -> None:
    path = tmp_path_factory.mktemp("st") / "x"
    safetensors_file.write(path, tensors)
    assert_same({k: v.view(np.uint8) if v.ndim else v for k, v in safetensors.numpy.load_file(path).items()},
                {k: np.ascontiguousarray(v).view(np.uint8) if v.ndim else v for k, v in safetensors_file.read(path).items()})


def test_views_are_read_only_and_do_not_copy_the_file(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "x", SAMPLE)
    array = safetensors_file.read(tmp_path / "x")["a.weight"]
    assert not array.flags.writeable and not array.flags.owndata


def test_data_off_its_alignment_is_copied(tmp_path: Path) -> None:
    data = b"\1" + np.array([1.5, 2.5], np.float32).tobytes()
    path = raw_file(tmp_path / "x", {"pad": entry(0, 1, [1], "U8"), "w": entry(1, 9)}, data)
    array = safetensors_file.read(path)["w"]
    assert array.flags.aligned and array.tolist() == [1.5, 2.5]


def test_limits_are_inclusive(tmp_path: Path) -> None:
    header = {"n" * MAX_NAME_BYTES: entry(0, 4, [1] * MAX_RANK)}
    assert len(safetensors_file.read(raw_file(tmp_path / "x", header, bytes(4)))) == 1


BAD_HEADERS = {
    "unknown dtype": ({"w": entry(0, 4, dtype="F8_E4M3")}, 4, "F8_E4M3"),
    "real uint16 would be taken for bf16": ({"w": entry(0, 4, [2], "U16")}, 4, "U16"),
    "dtype not a string": ({"w": {**entry(0, 4), "dtype": ["F32"]}}, 4, "not supported"),
    "shape and bytes differ": ({"w": entry(0, 8, [3])}, 8, "needs 12 bytes"),
    "shape product overflows 64 bit": ({"w": entry(0, 4, [2**62, 4])}, 4, "needs"),
    "negative size": ({"w": entry(0, 4, [-1])}, 4, "non-negative"),
    "boolean size": ({"w": entry(0, 4, [True])}, 4, "non-negative"),
    "float size": ({"w": entry(0, 4, [1.0])}, 4, "non-negative"),
    "rank too high": ({"w": entry(0, 4, [1] * (MAX_RANK + 1))}, 4, "at most 8"),
    "offsets past the end": ({"w": entry(0, 8)}, 4, "truncated"),
    "offsets reversed": ({"w": {**entry(0, 4), "data_offsets": [4, 0]}}, 4, "begin <= end"),
    "three offsets": ({"w": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, 4, "begin, end"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps"),
    "same range twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "hole"),
    "hole at the start": ({"a": entry(4, 8)}, 8, "hole"),
    "bytes after the last tensor": ({"a": entry(0, 4)}, 8, "end at byte 4"),
    "surplus key in an entry": ({"w": {**entry(0, 4), "x": 1}}, 4, "exactly dtype"),
    "entry is a list": ({"w": [1]}, 0, "exactly dtype"),
    "metadata not strings": ({"__metadata__": {"a": 1}}, 0, "strings"),
    "name too long": ({"n" * (MAX_NAME_BYTES + 1): entry(0, 4)}, 4, "tensor name"),
    "empty name": ({"": entry(0, 4)}, 4, "tensor name"),
    "duplicate key": (b'{"w":{},"w":{}}', 0, "duplicate key 'w'"),
    "not JSON": (b'{"w":', 0, "not valid"),
    "NaN": (b'{"w": NaN}', 0, "not valid"),
    "not UTF-8": (b'{"\xff":{}}', 0, "not valid"),
    "deep nesting": (b'{"w":' + b"[" * 200_000, 0, "not valid"),
    "header is a list": (b"[]", 0, "starts with"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    header, n_data, message = BAD_HEADERS[case]
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(n_data))
    with pytest.raises(FormatError, match=message) as error:
        safetensors_file.read(path)
    assert str(path) in str(error.value) and error.value.path == str(path)


@pytest.mark.parametrize("n_header", [2**64 - 1, 2**63, 100_000_001, 50])
def test_header_length_beyond_limit_or_file(tmp_path: Path, n_header: int) -> None:
    with pytest.raises(FormatError, match="header of"):
        safetensors_file.read(raw_file(tmp_path / "x", b"{}", n_header=n_header))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "x", SAMPLE)
    whole = (tmp_path / "x").read_bytes()
    for n in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:n])
        with pytest.raises(FormatError):
            safetensors_file.read(tmp_path / "cut")


def test_missing_file_directory_and_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "not a regular"), (tmp_path / "fifo", "not a regular")):
        with pytest.raises(FormatError, match=message):
            safetensors_file.read(path)


@pytest.mark.parametrize("cut, status", [(True, -signal.SIGBUS), (False, 0)])
def test_a_mapped_file_may_be_replaced_but_not_cut(tmp_path: Path, cut: bool, status: int) -> None:
    """As tensor_file says: the system ends a process that reads a page that is gone. What is replaced whole, as our writers do, stays readable."""
    path = tmp_path / "x.safetensors"
    safetensors_file.write(path, {"w": np.ones(1 << 16)})
    change = "os.truncate(path, 4096)" if cut else "safetensors_file.write(path, {'w': np.zeros(1)})"
    code = f"""
import os, sys
import numpy as np
from stllava.checkpoint import safetensors_file
path = sys.argv[1]
w = safetensors_file.read(path)["w"]
{change}
assert w.sum() == 1 << 16
"""
    environment = {**os.environ, "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":handle_sigbus=0"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


def test_what_cannot_be_stored_is_refused_before_the_file_changes(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "x", {"w": np.ones(1)})
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(TypeError, match="complex"):
        safetensors_file.write(tmp_path / "x", {"w": np.ones(1, np.complex64)})
    with pytest.raises(FormatError, match="__metadata__"):
        safetensors_file.write(tmp_path / "x", {"__metadata__": np.ones(1)})
    assert (tmp_path / "x").read_bytes() == before


def test_bf16_widens_exactly_and_counts_nonfinite() -> None:
    bits = np.array([0x3F80, 0xBF00, 0x7F80, 0x7FC0, 0x7F7F], np.uint16)
    assert to_float32(bits)[:2].tolist() == [1.0, -0.5]
    assert count_nonfinite(bits) == 2
    assert count_nonfinite(np.arange(2**16, dtype=np.uint16).view(np.float16)) == 2 * 2**10  # every value there is
    assert count_nonfinite(np.arange(2**16, dtype=np.uint16)) == 2 * 2**7
    assert count_nonfinite(np.array([2**60])) == 0
