"""Disk faults: whichever system call fails, a complete checkpoint loads, nothing leaks, and the next save succeeds."""

from __future__ import annotations

import ast
import contextlib
import copy
import errno
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model

import stllava
from stllava.checkpoint import atomic
from stllava.checkpoint.peft import LoraConfig
from stllava.data.records import read_jsonl
from stllava.data.steps import run_step
from stllava.errors import FormatError
from stllava.model import LlavaModel
from stllava.train.arguments import SFTConfig
from stllava.train.sft import SFTTrainer
from stllava.train.state import find_checkpoint, resume_checkpoint, rotate, save_checkpoint
from stllava.tree import Sequence

CALLS = ("open", "write", "pread", "pwrite", "fsync", "close", "replace", "rename", "mkdir", "link", "unlink", "rmdir", "ftruncate")
ONCE = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT, "EINTR": errno.EINTR}
KINDS = (*ONCE, "short", "full", "dead")
TAKES_ROOM = ("open", "write", "mkdir", "link")


class Faults:
    """Counts the system calls that os makes for anyone, and lets number `fail_at` fail.

    ENOSPC, EIO, EDQUOT, EINTR: that call. short: it writes half. full: from there on all calls that take room; dead: from there on all calls.
    A close that fails has closed the descriptor, as in Linux. fsync waits for nothing.
    """

    def __init__(self, kind: str = "ENOSPC", fail_at: int = 0) -> None:
        self.kind, self.fail_at, self.names, self.n_failed_reads = kind, fail_at, [], 0

    def __enter__(self) -> Faults:
        self._patch = pytest.MonkeyPatch()
        for name in CALLS:
            self._patch.setattr(os, name, self._faulty(name, getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _faulty(self, name: str, real: Any) -> Any:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            code = self._code(name)
            if name == "write" and self.kind == "short" and len(self.names) == self.fail_at:
                return real(args[0], args[1][:len(args[1]) // 2 or 1])
            if code is None:
                return None if name == "fsync" else real(*args, **kwargs)
            if name == "close":
                real(*args)
            if name == "open" and args[1] & os.O_NONBLOCK:  # how the package reads
                self.n_failed_reads += 1
            raise OSError(code, os.strerror(code), *([] if isinstance(args[0], int) else [str(args[0])]))
        return call

    def _code(self, name: str) -> int | None:
        n = len(self.names)
        if self.kind in ONCE:
            return ONCE[self.kind] if n == self.fail_at else None
        if self.fail_at and n >= self.fail_at:
            if self.kind == "dead":
                return errno.EIO
            if self.kind == "full" and name in TAKES_ROOM:
                return errno.ENOSPC
        return None


# ---- what is saved -----------------------------------------------------------------------------------------------------------


class Numbers:
    """Text-only samples without a tokenizer."""

    def __len__(self) -> int:
        return 4

    def sequences(self, item: int, epoch: int) -> list[Sequence]:
        ids = np.arange(3, 9, dtype=np.int64) + item
        return [Sequence(ids, ids, (), sample=item)]

    def pixels(self, key: object) -> np.ndarray:
        raise AssertionError("no pictures")


def model_of(seed: int, adapter: bool) -> LlavaModel:
    model = tiny_model(seed=seed, vocab_size=64)
    if adapter:
        model.add_lora(LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0), "llm", seed=seed)
        for array in model.lora_tensors().values():
            array[...] = seed + 1
    return model


def trainer_in(folder: Path, **settings: Any) -> SFTTrainer:
    args = SFTConfig(str(folder), **{"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "disable_tqdm": True,
                                     "allow_untrained": True, **settings})
    return SFTTrainer(model_of(0, adapter=True), args, Numbers())


@dataclass
class Scenario:
    """`prepare` fills a folder; `save` is what fails; `load` says which of the states in `allowed` is there, by really loading it."""

    prepare: Any
    save: Any
    load: Any
    allowed: tuple[Any, ...]


def saves_of_models(adapter: bool, target: str, **options: Any) -> Any:
    def build(base: Path) -> Scenario:
        old, new = (model_of(seed, adapter) for seed in (0, 1))

        def fingerprint(model: LlavaModel) -> bytes:
            return b"".join(np.asarray(a).tobytes() for _, a in sorted((model.lora_tensors() if adapter else model.tensors()).items()))

        def load(root: Path) -> bytes:
            place = root if target == "." else atomic.latest_complete(root)
            atomic.verify(atomic.current(place))
            return fingerprint(LlavaModel.from_pretrained(place, base if adapter else None))

        def prepare(root: Path) -> None:
            old.save_pretrained(root if target == "." else root / "checkpoint-1", **options)
            old.save_pretrained(root / "checkpoint-1")
        return Scenario(prepare, lambda root: new.save_pretrained(root / target, **options), load, (fingerprint(old), fingerprint(new)))
    return build


def saves_of_a_trainer(step: int, keep: int | None) -> Any:
    def build(base: Path) -> Scenario:
        trainer, reader = trainer_in(base / "run"), trainer_in(base / "run")
        trainer.train()
        first, second = copy.copy(trainer.state), copy.copy(trainer.state)
        first.global_step, second.global_step, second.total_loss = 1, step, 99.0

        def prepare(root: Path) -> None:
            save_checkpoint(root, trainer.updater, first, trainer.plan)

        def save(root: Path) -> None:
            rotate(save_checkpoint(root, trainer.updater, second, trainer.plan), keep)

        def load(root: Path) -> float:
            reader.updater.exp_avg[:] = reader.model.core.theta.numpy()[:] = 7
            state = resume_checkpoint(find_checkpoint(root, True), reader.updater, reader.plan)
            np.testing.assert_array_equal(reader.updater.exp_avg, trainer.updater.exp_avg)
            np.testing.assert_array_equal(reader.model.core.theta.numpy(), trainer.model.core.theta.numpy())
            return state.total_loss
        return Scenario(prepare, save, load, (first.total_loss, second.total_loss))
    return build


SCENARIOS = {"full": saves_of_models(False, "checkpoint-2"), "sharded": saves_of_models(False, "checkpoint-2", shard_size=60_000),
             "adapter": saves_of_models(True, "checkpoint-2", format="bin"), "final save into the output directory": saves_of_models(False, "."),
             "rotating": saves_of_a_trainer(2, keep=1), "a step saved again": saves_of_a_trainer(1, keep=None)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (scenario, its prepared folder, the calls of its save)."""
    root = tmp_path_factory.mktemp("faults")

    @functools.cache
    def build(name: str) -> tuple[Scenario, Path, list[str]]:
        base = root / name.replace(" ", "-")
        model_of(0, False).save_pretrained(base / "base")
        scenario = SCENARIOS[name](base / "base")
        (base / "before").mkdir()
        scenario.prepare(base / "before")
        shutil.copytree(base / "before", base / "count")
        with Faults() as counting:
            scenario.save(base / "count")
        assert scenario.load(base / "count") == scenario.allowed[1] != scenario.load(base / "before")
        return scenario, base / "before", counting.names
    return build


def left_behind(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".*")]


def fail_once(scenario: Scenario, before: Path, root: Path, kind: str, n: int) -> bool:
    """Whether the save failed; every promise about it is checked."""
    shutil.copytree(before, root)
    n_descriptors = len(os.listdir("/proc/self/fd"))
    failed = None
    with Faults(kind, n) as faults:
        try:
            scenario.save(root)
        except OSError as error:
            failed = error
    where = f"{kind} at call {n}: {failed}"
    assert len(os.listdir("/proc/self/fd")) == n_descriptors, where
    loaded = scenario.load(root)
    assert loaded in scenario.allowed, where
    if failed is None:
        assert loaded == scenario.allowed[1], where
    else:
        assert failed.filename and str(root) in str(failed), where
        assert faults.n_failed_reads or "still stands" in str(failed), where
        assert faults.n_failed_reads or failed.errno not in (errno.ENOSPC, errno.EDQUOT) or "are free: make room" in str(failed), where
    with Faults():
        scenario.save(root)
    assert scenario.load(root) == scenario.allowed[1], where
    shutil.rmtree(root)
    return failed is not None


def test_every_call_of_a_save_over_another_may_fail(tmp_path: Path, built: Any) -> None:
    scenario, before, calls = built("final save into the output directory")
    assert {"open", "write", "fsync", "close", "replace", "rename", "mkdir", "link", "unlink", "rmdir"} <= set(calls)
    passed = [calls[n - 1] for n in range(1, len(calls) + 1) if not fail_once(scenario, before, tmp_path / "run", "ENOSPC", n)]
    assert set(passed) <= {"mkdir", "unlink"}  # of a directory that is there already, of a file that is not


@pytest.mark.parametrize("name", SCENARIOS)
def test_any_call_may_fail_in_any_way(tmp_path: Path, built: Any, amount: Any, name: str) -> None:
    scenario, before, calls = built(name)
    every = [(kind, n) for kind in KINDS for n in range(1, len(calls) + 1)]
    sample = random.Random(f"disk {name}").sample(every, amount(25, len(every)))
    failed = sum(fail_once(scenario, before, tmp_path / "run", kind, n) for kind, n in sample)
    assert failed > len(sample) / 2


def test_leftovers_of_a_dead_disk_go_with_the_next_run(tmp_path: Path, built: Any) -> None:
    scenario, before, calls = built("rotating")
    for n in range(1, len(calls) + 1, 5):
        shutil.copytree(before, tmp_path / str(n))
        with Faults("dead", n), pytest.raises(OSError):
            scenario.save(tmp_path / str(n))
        atomic.recover(tmp_path / str(n))
        assert left_behind(tmp_path / str(n)) == []
        assert scenario.load(tmp_path / str(n)) in scenario.allowed


def test_a_full_disk_says_what_is_needed(tmp_path: Path) -> None:
    with Faults("full", 2), pytest.raises(OSError, match=r"No space left on device; 5000 bytes are needed, \d+ are free: make room") as caught:
        atomic.write_bytes(tmp_path / "x", bytes(5000))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target, message", [("gone/rows.jsonl", "its directory is not there: make it first"), ("x/rows.jsonl", "Not a directory")])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "x").write_text("a file")
    for write in (lambda path: atomic.write_bytes(path, b"1"),
                  lambda path: run_step("a", str, lambda batch: iter(()), out=path, batch_size=1, label="x", progress=False)):
        with pytest.raises(OSError, match=f"{message}.*{target.partition('/')[0]}"):
            write(tmp_path / target)


def test_a_run_that_met_a_fault_resumes_to_the_same_weights(tmp_path: Path, amount: Any) -> None:
    """Training as a whole: lock, log, checkpoints, rotation. Whatever failed, the next run goes on from what is there."""
    def run(folder: Path) -> SFTTrainer:
        trainer = trainer_in(folder, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
        trainer.train(resume_from_checkpoint=atomic.latest_complete(folder) is not None)
        return trainer

    with Faults() as counting:
        whole = run(tmp_path / "whole")
    n_calls = len(counting.names)
    every = [(kind, n) for kind in KINDS for n in range(1, n_calls + 1)]
    for kind, n in random.Random("train").sample(every, amount(12, 1500)):
        folder = tmp_path / f"{kind}-{n}"
        with Faults(kind, n), contextlib.suppress(OSError):
            run(folder)
        again = run(folder)
        np.testing.assert_array_equal(again.model.core.theta.numpy(), whole.model.core.theta.numpy(), err_msg=f"{kind} at call {n} of {n_calls}")
        assert (folder / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
        assert sorted(os.listdir(folder)) == ["checkpoint-3", "log.jsonl", "trainer_state.json"]
        shutil.rmtree(folder)


def test_a_resumed_run_deletes_what_the_one_before_could_not(tmp_path: Path) -> None:
    """A fault in the last rotation leaves a checkpoint too many, and a run that is done saves no other."""
    trainer_in(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=1).train()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 3
    trainer_in(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-3", "log.jsonl", "trainer_state.json"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_links_gets_copies(tmp_path: Path, built: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    scenario, before, _ = built("final save into the output directory")
    shutil.copytree(before, tmp_path / "run")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "link", refuse)
    scenario.save(tmp_path / "run")
    assert scenario.load(tmp_path / "run") == scenario.allowed[1] and left_behind(tmp_path / "run") == []


def test_rotation_leaves_later_checkpoints_and_the_one_just_saved(tmp_path: Path) -> None:
    """A later one may be damaged: deleting by number alone would leave nothing."""
    for step in (1, 2, 3, 10, 20, 400):
        with atomic.atomic_directory(tmp_path / f"checkpoint-{step}") as folder:
            atomic.write_bytes(folder / "x", b"x")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-400" / "x").write_bytes(b"damaged")
    for keep, left in ((9, {1, 2, 3, 10, 20}), (4, {2, 3, 10, 20}), (2, {10, 20}), (1, {20})):
        rotate(tmp_path / "checkpoint-20", keep)
        assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-best", "checkpoint-400", *(f"checkpoint-{n}" for n in left)}
    assert atomic.latest_complete(tmp_path) == tmp_path / "checkpoint-20"


def test_what_is_half_deleted_has_lost_its_name(tmp_path: Path) -> None:
    with atomic.atomic_directory(tmp_path / "checkpoint-1") as folder:
        for name in "abc":
            atomic.write_bytes(folder / name, b"x")
    with Faults() as counting:
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "copy")
        counting.names.clear()
        atomic.remove_directory(tmp_path / "copy")
    for n in range(1, len(counting.names) + 1):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "copy")
        with Faults("dead", n), contextlib.suppress(OSError):
            atomic.remove_directory(tmp_path / "copy")
        if (tmp_path / "copy").exists():
            atomic.verify(tmp_path / "copy")
            atomic.remove_directory(tmp_path / "copy")
        else:
            shutil.rmtree(tmp_path / ".copy.partial", ignore_errors=True)


# ---- a disk that is really full ----------------------------------------------------------------------------------------------


def test_a_small_file_system(tmp_path: Path, request: pytest.FixtureRequest, built: Any, amount: Any) -> None:
    """The same promises with the kernel's own ENOSPC, at every amount of room that is left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        if "STLLAVA_TEST_NAMESPACE" in os.environ:
            pytest.skip(f"mount is refused, in a user namespace too: {mounted.stderr.strip()}")
        done = subprocess.run(["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--basetemp", tmp_path / "inside",
                               f"{__file__}::{request.node.name}"], env=os.environ | {"STLLAVA_TEST_NAMESPACE": "1"}, capture_output=True, text=True)
        if "1 passed" not in done.stdout and done.returncode in (0, 1) and "FAILED" not in done.stdout:
            pytest.skip(f"mount is refused: {mounted.stderr.strip()} {done.stderr.strip()} {done.stdout.strip()[-200:]}")
        assert done.returncode == 0, done.stdout
        return
    try:
        for name in amount(("rotating", "full"), tuple(SCENARIOS)):
            scenario, before, _ = built(name)
            outcomes = []
            for n_pages in range(0, 400, amount(20, 1)):
                root = disk / "run"
                shutil.copytree(before, root)
                fill(disk / "ballast", n_pages)
                try:
                    scenario.save(root)
                    outcomes.append("saved")
                except OSError as error:
                    assert error.errno == errno.ENOSPC and "are free: make room" in str(error) and str(disk) in str(error)
                    outcomes.append("full")
                assert scenario.load(root) == scenario.allowed[outcomes[-1] == "saved"], n_pages
                (disk / "ballast").unlink()
                scenario.save(root)
                assert scenario.load(root) == scenario.allowed[1]
                shutil.rmtree(root)
            assert set(outcomes) == {"saved", "full"} and outcomes == sorted(outcomes)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(ballast: Path, n_pages: int) -> None:
    """Takes all room of a file system but `n_pages` of 4 KiB."""
    status = os.statvfs(ballast.parent)
    with open(ballast, "wb", buffering=0) as file:
        file.write(bytes(status.f_bavail * status.f_frsize - 4096 * n_pages))


# ---- JSON lines that grow ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_torn", range(1, 16))
def test_a_torn_last_line_is_cut_and_its_item_done_again(tmp_path: Path, n_torn: int) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": key}) + "\n" for key in "ab"]
    path.write_text(lines[0] + lines[1][:min(n_torn, len(lines[1]))])
    asked: list[str] = []

    def work(batch: list[str]) -> Any:
        asked.extend(batch)
        yield from ({"id": key} for key in batch)
    run_step("abc", str, work, out=path, batch_size=2, label="x", progress=False)
    assert [row["id"] for row in read_jsonl(path)] == ["a", "b", "c"] and path.read_text().count("\n") == 3
    assert asked == (["c"] if n_torn >= len(lines[1]) - 1 else ["b", "c"])  # a whole object only lacks its newline
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("content", ["notes of mine", '{"id": "a"}\nnot ours\n{"id": "b"}\n', "[1, 2"])
def test_a_file_that_is_not_ours_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(FormatError, match=r"notes.txt: line \d is not JSON"):
        run_step("abc", str, lambda batch: iter(()), out=path, batch_size=2, label="x", progress=False)
    assert path.read_text() == content


@pytest.mark.parametrize("kind", KINDS)
def test_lines_survive_a_fault_at_every_call(tmp_path: Path, kind: str) -> None:
    """After the fault the file goes on with the same object where that is possible, and is never torn in the middle."""
    def rows(path: Path) -> list[int]:
        with atomic.appending(path) as file:
            for n in range(4):
                with contextlib.suppress(OSError):
                    file.write(json.dumps({"n": n}) + "\n")
        return list(range(4))

    with Faults() as counting:
        rows(tmp_path / "count")
    for n in range(1, len(counting.names) + 1):
        path = tmp_path / f"{kind}-{n}"
        path.write_text('{"n": -1}\n{"n"')
        with Faults(kind, n), contextlib.suppress(OSError):
            rows(path)
        found = [row["n"] for row in read_jsonl(path, cut_off=True)]
        assert found[0] == -1 and found == sorted(found)
        with atomic.appending(path) as file:
            file.write('{"n": 9}\n')
        assert [row["n"] for row in read_jsonl(path)] == [*found, 9]


def test_a_torn_line_longer_than_a_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_BLOCK", 7)
    (tmp_path / "x").write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 100)
    with atomic.appending(tmp_path / "x") as file:
        file.write("{}\n")
    assert (tmp_path / "x").read_bytes() == b'{"a": 1}\n{}\n'


# ---- order on disk -----------------------------------------------------------------------------------------------------------


def test_order_of_a_save_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files fsynced, then the manifest, then the directories, then the name, then the name's directory."""
    names: dict[int, str] = {}
    log: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "rename")}

    def shown(path: Any) -> str:
        return os.path.relpath(path, tmp_path)

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real["open"](path, *args, **kwargs)
        names[descriptor] = shown(path)
        return descriptor

    def on_descriptor(name: str) -> Any:
        return lambda descriptor, *args: (log.append((name, names[descriptor])), real[name](descriptor, *args))[1]
    monkeypatch.setattr(os, "open", opened)
    for name in ("write", "fsync"):
        monkeypatch.setattr(os, name, on_descriptor(name))
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, lambda source, target, name=name: (log.append((name, shown(target))), real[name](source, target))[1])
    with atomic.atomic_directory(tmp_path / "checkpoint-1") as folder:
        atomic.write_bytes(folder / "weights", b"1")
        (folder / "other").write_bytes(b"2")  # by someone who knows nothing of fsync
        atomic.make_directory(folder / "sub")
        atomic.write_bytes(folder / "sub" / "config", b"3")
    monkeypatch.undo()
    at = ".checkpoint-1.partial"
    manifest = log.index(("write", f"{at}/.manifest.json.partial"))
    for file in ("weights", "other", "sub/config"):
        assert ("fsync", f"{at}/{file}") in log[:manifest]
    assert log.index(("write", f"{at}/.weights.partial")) < log.index(("fsync", f"{at}/.weights.partial")) < log.index(("replace", f"{at}/weights"))
    assert log[manifest + 1:manifest + 4] == [("fsync", f"{at}/.manifest.json.partial"), ("replace", f"{at}/manifest.json"), ("fsync", at)]
    assert log[-4:] == [("fsync", f"{at}/sub"), ("fsync", at), ("rename", "checkpoint-1"), ("fsync", ".")]


# ---- one file layer ----------------------------------------------------------------------------------------------------------

WRITERS = {"write_text", "write_bytes", "mkdir", "makedirs", "touch", "unlink", "rename", "renames", "rmdir", "rmtree", "removedirs", "remove",
           "symlink", "link", "copy", "copy2", "copyfile", "copytree", "move", "truncate", "ftruncate", "pwrite", "savefig", "save", "savez", "tofile",
           "savetxt", "memmap", "dump", "extractall", "extract", "ZipFile", "TemporaryDirectory", "NamedTemporaryFile", "mkstemp", "mkdtemp",
           "symlink_to", "hardlink_to", "write_image"}
MODULES = {"os", "shutil", "tempfile", "zipfile", "np", "json", "pickle"}
ALLOWED = {
    ("checkpoint/lock.py", "os.open"): "the kernel's lock belongs to the open file, so its content is written in place",
    ("checkpoint/lock.py", "os.ftruncate"): "as above", ("checkpoint/lock.py", "os.pwrite"): "as above", ("checkpoint/lock.py", "os.unlink"): "as above",
    ("checkpoint/torch_zip.py", "zipfile.ZipFile"): "into the file of atomic.writing",
    ("checkpoint/index.py", "torch_zip.save"): "our own writer",
    ("checkpoint/torch_zip.py", "torch_pickle.dump"): "returns bytes",
    ("demo/atlas.py", "image.save"): "into memory", ("demo/report.py", "figure.savefig"): "into memory",
    ("demo/sources.py", "tempfile.TemporaryDirectory"): "pip downloads into it", ("demo/sources.py", "os.replace"): "a wheel that pip has completed",
    ("demo/sources.py", "bundle.extractall"): "a cache: its stamp is written last, so a torn one is unpacked again",
    ("datacheck/pictures.py", "image.save"): "into memory", ("evaluate/render/page.py", "image.save"): "into memory",
    ("notebook.py", "picture.save"): "into memory", ("train/from_script.py", "Image.fromarray(processor.load(value).rgb).save"): "into memory",
    ("pytest_plugin.py", "cache.mkdir"): "a folder of pytest's cache", ("pytest_plugin.py", "tempfile.TemporaryDirectory"): "where pytest has no cache",
    ("torch_adapter/dpo.py", "tempfile.TemporaryDirectory"): "transformers reads a tokenizer from it",
}


def writes_of(tree: ast.AST) -> set[str]:
    """Calls that may write a file, as 'owner.name'; open() only with a mode that is not plainly for reading."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if ast.unparse(function) == "system_call":
            function = node.args[1]
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        if name == "open":
            modes = [a.value for a in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")] if isinstance(a, ast.Constant)]
            if owner == "os":
                reads = not any(flag in ast.unparse(node) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"))
            else:
                reads = not any(isinstance(mode, str) and set(mode) & set("wax+") for mode in modes)
            if owner == "archive" or reads:
                continue
        elif name == "replace":
            if owner in ("", "dataclasses") or (len(node.args) != 1 and owner != "os"):  # str.replace takes two
                continue
        elif name == "write" and owner == "os":
            pass
        elif (name == "ZipFile" and len(node.args) < 2 and not node.keywords) or name not in WRITERS or (owner == "" and name != "ZipFile") or owner == "atomic" or (name in ("copy", "dump", "remove", "extract") and owner not in MODULES and "torch_pickle" not in owner):
            continue
        found.add(f"{owner}.{name}")
    return found


def test_the_walk_sees_every_way_to_write() -> None:
    seen = writes_of(ast.parse("open(p, 'w')\nopen(p, mode='ab')\npath.open('x')\npath.write_text('')\npath.write_bytes(b'')\nos.open(p, os.O_RDWR)\n"
                               "os.write(1, b'')\nsystem_call(p, os.rename, a, b)\nos.replace(a, b)\npath.replace(b)\nnp.save(p, a)\njson.dump(a, f)\nfigure.savefig(p)\npath.touch()"))
    assert seen == {".open", "path.open", "path.write_text", "path.write_bytes", "os.open", "os.write", "os.rename", "os.replace", "path.replace", "np.save",
                    "json.dump", "figure.savefig", "path.touch"}
    assert not writes_of(ast.parse("open(p)\nopen(p, 'rb')\npath.open('rb')\n'a'.replace('b', 'c')\nos.open(p, os.O_RDONLY)\njson.dumps(x)\nx.copy()"))


def test_there_is_one_file_layer() -> None:
    package = Path(stllava.__file__).parent
    found = {(path.relative_to(package).as_posix(), call) for path in package.rglob("*.py") for call in writes_of(ast.parse(path.read_text()))}
    others = {(file, call) for file, call in found if file != "checkpoint/atomic.py"}
    assert others - set(ALLOWED) == set()
    assert set(ALLOWED) - others == set(), "an exception that nothing needs any more"


WATCHED_RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_disk_faults as t
from stllava.data.steps import run_step
out = Path(sys.argv[2])
trainer = t.trainer_in(out / "run", save_strategy="steps", save_steps=1, save_total_limit=1)
writers = set()
def watch(event, args):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
        writers.add(sys._getframe(1).f_code.co_filename)
sys.addaudithook(watch)
trainer.train()
trainer.save_model()
t.model_of(0, False).save_pretrained(out / "full", shard_size=60_000)
run_step("abc", str, lambda batch: ({"id": i} for i in batch), out=out / "rows.jsonl", batch_size=2, label="x", progress=False)
print(sorted(Path(name).name for name in writers))
"""


def test_no_other_file_opens_for_writing_while_training(tmp_path: Path) -> None:
    """The same as seen by the interpreter, libraries included."""
    done = subprocess.run([sys.executable, "-c", WATCHED_RUN, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['atomic.py']"
