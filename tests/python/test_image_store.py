"""One door: files, archives, rows; names that lead out; archives that are damaged, hostile or large; threads and forks."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scans
import tiny
from PIL import Image

from stllava.data.archives import Archive
from stllava.data.image_store import ImageStore, open_picture
from stllava.data.pictures import Pictures
from stllava.errors import FormatError
from stllava.image_source import byte_limit
from stllava.images import ImageError, ImageProcessor, load_image


def png(value: int, size: tuple[int, int] = (9, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"a.png": png(1), "deep/er/b.png": png(2), "deep/c.PNG": png(3), "scan.dcm": scans.dicom(np.arange(2 * 12, dtype=np.uint8).reshape(2, 3, 4)),
         "vol.nii.gz": scans.nifti(np.arange(60, dtype=np.int16).reshape(3, 4, 5), gzipped=True), "notes.txt": b"no picture"}
KINDS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda path: path,
    "x.zip": lambda path: scans.write_zip(path, FILES),
    "stored.zip": lambda path: scans.write_zip(path, FILES, zipfile.ZIP_STORED),
    "x.tar": lambda path: scans.write_tar(path, FILES),
    "x.tar.gz": lambda path: scans.write_tar(path, FILES, "w:gz"),
    "x.tgz": lambda path: scans.write_tar(path, FILES, "w:gz"),
    "x.tar.xz": lambda path: scans.write_tar(path, FILES, "w:xz"),
    "x.TAR.BZ2": lambda path: scans.write_tar(path, FILES, "w:bz2"),
}


def make(folder: Path, kind: str) -> Path:
    path = KINDS[kind](folder / kind)
    if kind == "folder":
        for name, content in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_wherever_they_lie(tmp_path: Path, kind: str) -> None:
    """The image folder itself, and something in the image folder."""
    whole = make(tmp_path, kind)
    for store, prefix in ((ImageStore(whole), ""), (ImageStore(tmp_path), f"{kind}/")):
        assert store.names() == sorted(prefix + name for name in FILES if name != "notes.txt")
        for name, content in FILES.items():
            assert store.read(prefix + name) == content and store.exists(prefix + name)
        for name in store.names():
            assert store.size(name) == load_image(store.source(name)).rgb.shape[1::-1]
        assert (load_image(store.source(f"{prefix}scan.dcm#frame=0")).rgb[0, :, 0] == [0, 1, 2, 3]).all()
        assert store.size(f"{prefix}vol.nii.gz#axis=0") == (4, 5) and store.exists(f"{prefix}vol.nii.gz#axis=0")
        assert store.read(f"{prefix}./deep//er/b.png") == FILES["deep/er/b.png"]
        for missing in ("b.png", "deep", "deep/er/b.png/c", "a.png#frame=1x/..", "a.PNG"):
            assert not store.exists(prefix + missing), missing
            with pytest.raises(ImageError):
                store.read(prefix + missing)
        with pytest.raises(ImageError, match="only a DICOM or NIfTI file has something to choose"):
            load_image(store.source(f"{prefix}a.png#frame=1"))
    if kind != "folder":
        with pytest.raises(ImageError, match=r"no member 'er/b\.png'; it has 'deep/er/b\.png'"):
            store.read(f"{kind}/er/b.png")
    assert load_image(open_picture(whole / "deep/c.PNG")).rgb[0, 0, 0] == 3
    assert load_image(open_picture(f"{whole}/scan.dcm#frame=0")).rgb[0, 1, 0] == 1
    processor = ImageProcessor(size=28)
    np.testing.assert_array_equal(Pictures(whole, processor)("a.png"), processor(FILES["a.png"]))


def test_pictures_inside_records() -> None:
    store = ImageStore(None)
    record = {"bytes": FILES["a.png"], "path": "somewhere/a.png"}
    assert store.read(record) == FILES["a.png"] and store.exists(record) and store.size(record) == (9, 5)
    assert load_image({"bytes": FILES["a.png"], "path": None}).rgb[0, 0, 0] == load_image(store.source(record)).rgb[0, 0, 0] == 1
    first, second = ({"bytes": FILES["scan.dcm"], "path": f"x.dcm#frame={frame}"} for frame in (0, 1))
    pictures = Pictures(None, ImageProcessor(size=28))
    assert pictures(record) is pictures(dict(record)) and (pictures(first) != pictures(second)).any()
    for bad in ({"bytes": "text"}, {"path": None}, {}, {"bytes": b""}, 3, None, ["a.png"]):
        with pytest.raises(ImageError):
            load_image(store.source(bad))
    with pytest.raises(ImageError, match=r"somewhere/b\.png: cannot be read: not one of"):
        load_image({"bytes": b"nonsense", "path": "somewhere/b.png"})


def test_a_name_may_have_a_number_sign(tmp_path: Path) -> None:
    for name in ("a#1.png", "b#frame.png", "c#frame=2.d/e.png", "#.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(7))
    assert all(ImageStore(tmp_path).exists(name) for name in ImageStore(tmp_path).names()) and len(ImageStore(tmp_path).names()) == 4


def test_dicom_files_without_a_suffix_are_found(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(FILES["scan.dcm"])
    (tmp_path / "README").write_bytes(b"text")
    os.mkfifo(tmp_path / "PIPE")
    assert ImageStore(tmp_path).names() == ["IM0001"]


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

OUT = ["../x.png", "/etc/passwd", "..", ".", "", "a/../../x.png", "..\\x.png", "C:\\x.png", "a\0b", "x.zip/../../secret.png", "link.zip/secret.png", "\ud800"]


def test_names_that_lead_out(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    scans.write_zip(root / "x.zip", FILES)
    scans.write_zip(tmp_path / "out.zip", {"secret.png": png(9)})
    (root / "link.zip").symlink_to(tmp_path / "out.zip")
    for store in (ImageStore(root), ImageStore(root / "x.zip")):
        for name in OUT:
            assert not store.exists(name), name
            with pytest.raises(ImageError):
                store.read(name)


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, io.BytesIO(content)


def test_members_that_are_no_files_or_lead_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for info, content in (entry("ok.png", png(1)), entry("../up.png", b"x"), entry("/abs.png", b"x"), entry("a/../../up.png", b"x"), entry("sym.png", kind=tarfile.SYMTYPE, link="ok.png"),
                              entry("hard.png", kind=tarfile.LNKTYPE, link="ok.png"), entry("dev.png", kind=tarfile.CHRTYPE), entry("fifo.png", kind=tarfile.FIFOTYPE),
                              entry("twice.png", b"1"), entry("./twice.png", b"2"), entry("dir", kind=tarfile.DIRTYPE)):
            archive.addfile(info, content)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("ok.png", png(1))
        for name in ("../up.png", "/abs.png", "a/../../up.png"):
            archive.writestr(name, b"x")
        link = zipfile.ZipInfo("sym.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "ok.png")
        archive.writestr(zipfile.ZipInfo("lzma.png"), b"x" * 100, zipfile.ZIP_LZMA)
        archive.writestr("twice.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("twice.png", b"2")
    store = ImageStore(tmp_path)
    assert store.names() == ["x.tar/ok.png", "x.zip/ok.png"]
    for name, reason in {"x.tar/sym.png": "a link, a device", "x.tar/hard.png": "a link, a device", "x.tar/dev.png": "a link, a device", "x.tar/fifo.png": "a link, a device",
                         "x.tar/twice.png": "there twice", "x.zip/sym.png": "a link, a device", "x.zip/lzma.png": "compressed by method 14", "x.zip/twice.png": "there twice",
                         "x.zip/up.png": "no member 'up.png'", "x.tar/abs.png": "no member 'abs.png'", "x.tar/dir": "no member 'dir'"}.items():
        with pytest.raises(ImageError, match=reason):
            store.read(name)


def test_encrypted_and_damaged_members(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(1000)
    good = scans.write_zip(tmp_path / "x.zip", {"a": content}, zipfile.ZIP_STORED).read_bytes()

    def read(data: bytes) -> bytes:
        (tmp_path / "y.zip").write_bytes(data)
        return Archive(tmp_path / "y.zip").read("a", byte_limit)

    assert read(good) == content
    central = good.index(b"PK\x01\x02")
    for data, reason in ((good[:central + 8] + b"\x01" + good[central + 9:], "encrypted"), (good[:500] + b"xyz" + good[503:], "its checksum is wrong"),
                         (b"PK\x03\x04" + b"z" * 26 + good[30:], "damaged"), (good[:4] + b"PK" + good[6:-22], "not a readable zip or tar"), (b"PK\x05\x06" + bytes(18), "no member"),
                         (good[:central + 42] + b"\xff" * 4 + good[central + 46:], "outside the file|not a readable"), (b"", "not a readable"), (b"\x1f\x8b" + bytes(50), "not a readable"),
                         (good[:central + 24] + struct.pack("<L", 2**31) + good[central + 28:], "bomb")):
        with pytest.raises(FormatError, match=reason):
            read(data)
    deflated = scans.write_zip(tmp_path / "x.zip", {"a": b"ab" * 500}).read_bytes()
    assert read(deflated) == b"ab" * 500
    for at in (31, 33, 35):
        with pytest.raises(FormatError, match="damaged"):
            read(deflated[:at] + b"\xff" + deflated[at + 1:])


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, bz2.compress, lzma.compress])
def test_tars_that_are_cut_off(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Nothing of them is read, since it cannot be known what is missing; a tar that lacks only its end mark is whole."""
    data = scans.write_tar(tmp_path / "x.tar", {f"{i}.bin": random.Random(i).randbytes(3000) for i in range(4)}).read_bytes()
    path = tmp_path / "y.tar.any"
    path.write_bytes(pack(data[:4 * 3584]))
    assert len(Archive(path).names()) == 4
    for cut in (4 * 3584 - 600, 2000, 600, 3584 * 2 + 100):
        path.write_bytes(pack(data[:cut]))
        with pytest.raises(FormatError, match="not a readable zip or tar archive"):
            Archive(path)
    path.write_bytes(pack(data[:3584] + b"garbage!" * 64 + data[3584:]))
    with pytest.raises(FormatError, match="damaged at byte 3584"):
        Archive(path)
    if pack(b"") != b"":
        path.write_bytes(pack(data)[:-600])
        with pytest.raises(FormatError):
            Archive(path)


def test_bombs(tmp_path: Path) -> None:
    zeros = bytes(40 << 20)
    scans.write_zip(tmp_path / "x.zip", {"a.png": zeros})
    with pytest.raises(ImageError, match="a decompression bomb"):
        ImageStore(tmp_path / "x.zip").read("a.png")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(zeros, 1))
    with pytest.raises(ImageError, match="unpacks to more than"):
        ImageStore(tmp_path / "x.tar.gz").read("a.png")
    info, _ = entry("a")
    info.size = 2**40  # a tar with a header for a terabyte
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ImageError, match="unexpected end of data"):
        ImageStore(tmp_path / "x.tar").read("a")
    info.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "y.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ImageError, match="a header of 1099511627776 bytes"):
        ImageStore(tmp_path / "y.tar").read("a")


def test_an_archive_that_cannot_be_read_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 nonsense")
    store, opened = ImageStore(tmp_path), []
    monkeypatch.setattr("stllava.data.image_store.Archive", lambda path: opened.append(path) or Archive(path))
    for _ in range(3):
        with pytest.raises(ImageError, match=r"x\.zip: not a readable zip or tar archive"):
            store.read("x.zip/a.png")
    assert len(opened) == 1 and not store.exists("x.zip/a.png")


# ---- many at once --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_threads_and_forks_read_at_once(tmp_path: Path, kind: str) -> None:
    members = {f"{i}.bin": random.Random(i).randbytes(20_000 + i) for i in range(40)}
    path = tmp_path / f"x.{kind}"
    scans.write_zip(path, members) if kind == "zip" else scans.write_tar(path, members, "w:gz" if kind == "tar.gz" else "w")
    store = ImageStore(tmp_path)
    names = [*members] * 10
    random.Random(1).shuffle(names)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda name: store.read(f"x.{kind}/{name}") == members[name], names))
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            os._exit(0 if all(store.read(f"x.{kind}/{name}") == members[name] for name in names[:200]) else 1)
        children.append(child)
    assert all(store.read(f"x.{kind}/{name}") == members[name] for name in names[:200])
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_descriptors_are_closed(tmp_path: Path) -> None:
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    for kind in ("x.zip", "x.tar", "x.tar.gz"):
        make(tmp_path, kind)
        archive = Archive(tmp_path / kind)
        assert n_open() == before + 1
        del archive
        (tmp_path / "bad").write_bytes((tmp_path / kind).read_bytes()[:60])
        with pytest.raises(FormatError):
            Archive(tmp_path / "bad")
    assert n_open() == before


# ---- the places that use it --------------------------------------------------------------------------------------------------------


def test_training_reads_archives_and_scans(tmp_path: Path) -> None:
    from stllava.data.sft import SFTDataset
    from stllava.text.tokenizer import Tokenizer
    names, tokenizer = tiny.write_pictures(tmp_path, 2), Tokenizer(tiny.TOKENIZER)
    scans.write_zip(tmp_path / "x.zip", {name: (tmp_path / name).read_bytes() for name in names} | {"scan.dcm": FILES["scan.dcm"]})
    records = tiny.sft_records(names)
    records = [record for record in records if "image" in record]
    data = [[{**record, "image": image(record["image"])} for record in records] for image in (
        lambda name: name, lambda name: f"x.zip/{name}", lambda name: {"bytes": (tmp_path / name).read_bytes(), "path": name})]
    sets = [SFTDataset(rows, tokenizer, ImageProcessor(size=28), image_folder=tmp_path, tokens_per_image=16) for rows in data]
    pixels = [[one.pixels(key) for item in range(len(one)) for sequence in one.sequences(item, 0) for key in sequence.images] for one in sets]
    for other in pixels[1:]:
        np.testing.assert_array_equal(pixels[0], other)
    records[0]["image"] = "x.zip/scan.dcm#frame=7"
    bad = SFTDataset(records, tokenizer, ImageProcessor(size=28), image_folder=tmp_path, tokens_per_image=16, on_bad_sample="skip")
    assert [(problem.row, problem.kind) for problem in bad.problems] == [(0, "image")] and "frame 7 is asked for, the file has 2" in bad.problems[0].text
