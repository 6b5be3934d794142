"""Names that leave the folder, in every kind of file that holds names: an index, a manifest, a data file. Links, FIFOs and devices included."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import formats
import numpy as np
import pytest
from PIL import Image

from stllava.checkpoint import atomic, index, safetensors_file
from stllava.data.dpo import DPODataset
from stllava.data.records import DataError
from stllava.data.sft import SFTDataset
from stllava.errors import FormatError
from stllava.images import ImageProcessor
from stllava.paths import inside
from stllava.text.tokenizer import Tokenizer

# FILE is a file beside the folder that would be read if a name reached it; OUT its absolute path; FOLDER the folder's own.
NAMES = """
../FILE|../../FILE|../../../../../../etc/passwd|OUT|/etc/passwd|//etc/passwd|///OUT|/|.|..|./|../|/..|sub/..|sub/../..|sub/../../FILE|./../FILE|.//..//FILE
sub/./.././../FILE|a/../../FILE|sub/sub/../../../FILE|missing/../../FILE|FOLDER/../FILE|../FOLDERNAME/../FILE|..\\FILE|sub\\..\\..\\FILE|\\FILE|\\\\server\\share\\FILE|..\\/FILE
..%2fFILE|%2e%2e/FILE|%2e%2e%2fFILE|..%252fFILE|..%c0%afFILE|%00../FILE|..;/FILE|．．/FILE|．．／FILE|‥/FILE|…/FILE|․․/FILE|..∕FILE|C:\\FILE|C:/FILE|c:FILE|/dev/zero|/dev/stdin|/dev/fd/0
/proc/self/mem|/proc/self/environ|/proc/self/cwd/FILE|/proc/self/root/OUT|/proc/self/fd/0|~/FILE|~root/FILE|$HOME/FILE|${PWD}/../FILE|`pwd`/FILE|file://OUT|file:OUT|file:///etc/passwd
http://localhost/FILE|data:image/png;base64,AAAA|.. /FILE|../FILE |../FILE.|  ../FILE|../FILE\0|good\0/../../FILE|\0|good.png\0.txt|../FILE\n|link|linkdir/FILE|linkdir/../FILE|linkup/FILE|loop|fifo|device|directory.png|chain|socket|../FILE#x|../FILE?x
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """in/ with a good picture and traps; secret.png, secret.safetensors beside it."""
    root = tmp_path / "in"
    (root / "sub" / "sub").mkdir(parents=True)
    (root / "directory.png").mkdir()
    Image.fromarray(np.full((20, 20, 3), 7, np.uint8)).save(tmp_path / "secret.png")
    shutil.copy(tmp_path / "secret.png", root / "good.png")
    safetensors_file.write(tmp_path / "secret.safetensors", {"w": np.ones(1, np.float32)})
    for name, target in {"link": tmp_path / "secret.png", "linkdir": tmp_path, "linkup": Path(".."), "loop": Path("loop"), "device": Path("/dev/zero"), "chain": Path("link")}.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    return root


def names(folder: Path, file: str) -> list[str]:
    out = folder.parent / file
    found = [name.replace("FOLDERNAME", folder.name).replace("FOLDER", str(folder)).replace("FILE", file).replace("OUT", str(out))
             for line in NAMES.strip("\n").splitlines() for name in line.split("|")]
    found += ["", "x" * 300, "x/" * 3000, "\ud800", "\x7f\x1b[2J/../../" + file]
    assert len(set(found)) >= 60
    return found


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except (FormatError, OSError):
        return True
    return False


@pytest.mark.parametrize("kind", [SFTDataset, DPODataset])
def test_images_of_data_files(folder: Path, tmp_path: Path, kind: type) -> None:
    (tmp_path / "tokenizer.model").write_bytes(formats.small_tokenizer())
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")

    def read(*images: object):
        turns = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
        other = [*turns[:1], {"from": "gpt", "value": "c"}]
        records = [{"id": str(i), "image": image, "conversations": turns, "chosen_conversations": turns, "reject_conversations": other}
                   for i, image in enumerate(images)]
        (tmp_path / "data.json").write_text(json.dumps(records))
        return kind(tmp_path / "data.json", tokenizer, ImageProcessor(size=28), image_folder=folder, tokens_per_image=16, on_bad_sample="skip")

    bad = [*names(folder, "secret.png"), 3, True, {}, 1.5]
    data = read("good.png", *bad)
    assert len(data) == 1 and [problem.row for problem in data.problems] == list(range(1, len(bad) + 1))
    assert {problem.kind for problem in data.problems} == {"image"}
    for name in ("../secret.png", str(folder.parent / "secret.png"), "link", "linkdir/secret.png", "chain"):
        with pytest.raises(DataError) as error:
            read(name)
        assert "lies outside" in error.value.problems[0].text
    several = [["good.png", "../secret.png"], [["good.png"]], [{}], {"bytes": 3, "path": "good.png"}, {"path": "../secret.png"}]
    data = read("good.png", *several)
    assert len(data) == 1 and {problem.kind for problem in data.problems} == {"conversation", "image"}
    assert len(read("good.png", ["good.png"], "./good.png", "sub/..//good.png")) == 3  # ".." is refused even where it comes back


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / "sub" / "again.png").symlink_to("../good.png")
    assert inside(folder, "sub/again.png") == folder / "sub" / "again.png"
    (folder.parent / "alias").symlink_to(folder)  # the folder itself may be a link
    assert inside(folder.parent / "alias", "good.png").exists()


def test_shards_of_an_index(tmp_path: Path, folder: Path) -> None:
    safetensors_file.write(folder / "good.safetensors", {"w": np.zeros(1, np.float32)})

    def read(name: object):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        return index.read_weights(folder)

    assert read("good.safetensors")[0]["w"][0] == 0
    for name in [*names(folder, "secret.safetensors"), None, 3, True, [], {}, ["good.safetensors"]]:
        assert refused(lambda name=name: read(name)), name
    for kind in ("safetensors", "bin"):
        os.mkfifo(folder / f"fifo.{kind}")
        (folder / f"zero.{kind}").symlink_to("/dev/zero")
        (folder / f"out.{kind}").symlink_to(folder.parent / "secret.safetensors")
        (folder / f"dir.{kind}").mkdir()
        assert all(refused(lambda name=name: read(name)) for name in (f"fifo.{kind}", f"zero.{kind}", f"out.{kind}", f"dir.{kind}"))


def test_files_of_a_manifest(tmp_path: Path, folder: Path) -> None:
    entry = atomic.file_entry(folder.parent / "secret.png")

    def read(name: str):
        (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": {name: entry}}))
        return atomic.verify(folder)

    assert list(read("good.png")) == ["good.png"]
    for name in names(folder, "secret.png"):
        assert refused(lambda name=name: read(name)), name


def test_weight_files_that_are_no_files(tmp_path: Path) -> None:
    """The directory itself is hostile: a FIFO or device where weights, configuration or tokenizer should be."""
    from stllava.model import LlavaModel
    formats.small_model().save_pretrained(tmp_path / "m")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        path = tmp_path / "m" / name
        kept = path.read_bytes()
        for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink("nowhere", p), lambda p: os.symlink(p, p)):
            path.unlink() if path.is_file() or path.is_symlink() or path.is_fifo() else path.rmdir()
            make(path)
            if name != "preprocessor_config.json" or path.exists():  # an absent one is allowed
                assert refused(lambda: LlavaModel.from_pretrained(tmp_path / "m")), (name, make)
        path.unlink()
        path.write_bytes(kept)
    LlavaModel.from_pretrained(tmp_path / "m")
