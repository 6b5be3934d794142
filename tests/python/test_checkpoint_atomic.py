"""atomic: what stands under a final name is complete, whichever system call fails or is the last one before a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stllava.checkpoint import atomic
from stllava.errors import FormatError

CALLS = ("open", "write", "fsync", "close", "replace", "rename", "mkdir", "unlink", "read", "fstat")


@pytest.fixture(autouse=True)
def no_disk_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are counted, the waiting for the disk is left out."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class FaultyOs:
    """The `os` module with system call number `fail_at` replaced by `fault`; counts calls."""

    def __init__(self, fail_at: int, fault: Callable[[], Exception]) -> None:
        self.n_calls, self._fail_at, self._fault = 0, fail_at, fault

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.n_calls += 1
            if self.n_calls == self._fail_at:
                raise self._fault()
            return real(*args, **kwargs)

        return call


class Killed(BaseException):
    """Stands for a kill: nothing of ours runs afterwards."""


def save(path: Path, text: str) -> None:
    with atomic.atomic_directory(path) as directory:
        atomic.write_bytes(directory / "a.bin", text.encode())
        (directory / "sub").mkdir()
        atomic.write_bytes(directory / "sub" / "b.bin", text.encode() * 2)


def n_calls_of(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> int:
    counting = FaultyOs(0, OSError)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", counting)
        action()
    return counting.n_calls


def test_write_bytes_replaces(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "x", b"one")
    atomic.write_bytes(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["x"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(atomic.os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    atomic.write_bytes(tmp_path / "x", b"0123456789")
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full at each system call in turn: the file is the old or the new one, and no temporary file stays."""
    def write() -> None:
        atomic.write_bytes(tmp_path / "x", b"new")

    atomic.write_bytes(tmp_path / "x", b"old")
    n = n_calls_of(monkeypatch, write)
    assert n >= 5
    for k in range(1, n + 1):
        atomic.write_bytes(tmp_path / "x", b"old")
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "os", FaultyOs(k, lambda: OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                write()
        assert (tmp_path / "x").read_bytes() in (b"old", b"new")
        assert os.listdir(tmp_path) == ["x"]


def test_exception_in_the_block_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic.atomic_directory(tmp_path / "d") as directory:
        (directory / "x").write_bytes(b"1")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    save(tmp_path / "d", "hello")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}
    assert manifest["files"]["a.bin"] == {"sha256": hashlib.sha256(b"hello").hexdigest(), "size": 5}
    assert atomic.verify(tmp_path / "d") == manifest["files"]
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "a.bin").unlink(), "a.bin is missing"),
    (lambda d: (d / "a.bin").write_bytes(b"hell"), "a.bin has 4 bytes, want 5"),
    (lambda d: (d / "sub" / "b.bin").write_bytes(b"hellohellO"), "sub/b.bin has another content"),
    (lambda d: (d / "manifest.json").unlink(), "no such file"),
    (lambda d: (d / "manifest.json").write_text('{"version": 2, "files": {}}'), "want version 1"),
    (lambda d: (d / "manifest.json").write_text('{"version": 1, "files": {"../a": {}}}'), "outside"),
    (lambda d: (d / "manifest.json").write_text('{"version": 1, "files": {"a": 1}}'), "exactly sha256"),
])
def test_verify_names_the_damage(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    save(tmp_path / "d", "hello")
    damage(tmp_path / "d")
    with pytest.raises(FormatError, match=message):
        atomic.verify(tmp_path / "d")


def test_existing_directory_keeps_what_is_not_ours(tmp_path: Path) -> None:
    """The final save goes into the output directory, beside checkpoint-*; files of the previous save go."""
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "log.txt").write_text("log")
    with atomic.atomic_directory(tmp_path / "out") as directory:
        (directory / "model-00001-of-00002.bin").write_bytes(b"old")
    save(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.bin", "checkpoint-1", "log.txt", "manifest.json", "sub"]
    assert set(atomic.verify(tmp_path / "out")) == {"a.bin", "sub/b.bin"}
    assert os.listdir(tmp_path) == ["out"]


def test_damaged_old_manifest_does_not_stop_a_save(tmp_path: Path) -> None:
    save(tmp_path / "out", "old")
    (tmp_path / "out" / "manifest.json").write_text("{")
    save(tmp_path / "out", "new")
    atomic.verify(tmp_path / "out")


@pytest.mark.parametrize("fault", [Killed, lambda: OSError(errno.EIO, "Input/output error")])
def test_fault_at_every_call_leaves_a_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          fault: Callable[[], Exception]) -> None:
    n = n_calls_of(monkeypatch, lambda: save(tmp_path / "count" / "checkpoint-20", "new"))
    assert n >= 20
    for k in range(1, n + 1):
        root = tmp_path / str(k)
        save(root / "checkpoint-9", "old")
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "os", FaultyOs(k, fault))
            if fault is Killed:  # a killed process does not clean up
                patch.setattr(atomic.shutil, "rmtree", lambda *args, **kwargs: None)
            with pytest.raises((OSError, Killed)):
                save(root / "checkpoint-20", "new")
        latest = atomic.latest_complete(root)
        assert latest is not None and latest.name in ("checkpoint-9", "checkpoint-20")
        assert (latest.name == "checkpoint-20") == (root / "checkpoint-20").exists()
        save(root / "checkpoint-20", "new")  # the next attempt cleans up what the killed one left
        assert sorted(os.listdir(root)) == ["checkpoint-20", "checkpoint-9"]


@pytest.mark.parametrize("fault", [Killed, lambda: OSError(errno.EIO, "Input/output error")])
def test_half_updated_directory_never_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               fault: Callable[[], Exception]) -> None:
    save(tmp_path / "count", "old")
    n = n_calls_of(monkeypatch, lambda: save(tmp_path / "count", "new"))
    for k in range(1, n + 1):
        target = tmp_path / f"t{k}"
        save(target, "old")
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "os", FaultyOs(k, fault))
            with pytest.raises((OSError, Killed)):
                save(target, "new")
        contents = {(target / "a.bin").read_bytes(), (target / "sub" / "b.bin").read_bytes()[:3]}
        try:
            atomic.verify(target)
        except FormatError:
            continue
        assert contents in ({b"old"}, {b"new"})


def test_latest_complete(tmp_path: Path) -> None:
    assert atomic.latest_complete(tmp_path) is None
    for step in (2, 10, 9):
        save(tmp_path / f"checkpoint-{step}", str(step))
    (tmp_path / "checkpoint-last").mkdir()
    assert atomic.latest_complete(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "a.bin").write_bytes(b"torn")
    assert atomic.latest_complete(tmp_path) == tmp_path / "checkpoint-9"
