"""Run lock: one run per output; the second is refused and told who is there; a run that is dead holds nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_disk_faults import Faults, trainer_in

from stllava import cli
from stllava.checkpoint import lock
from stllava.checkpoint.lock import LockedError, run_lock
from stllava.data.steps import run_step
from stllava.train.callbacks import TrainerCallback

HOLD = """
import sys
from stllava.checkpoint.lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path until its stdin ends."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def holds(output: Path) -> bool:
    try:
        with run_lock(output):
            return True
    except LockedError:
        return False


def test_the_second_run_is_told_who_is_there(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    with pytest.raises(LockedError) as caught, run_lock(tmp_path):
        pass
    owner = caught.value.owner
    assert owner["pid"] == other_run.pid and owner["host"] == socket.gethostname() and "run_lock(sys.argv[1])" in owner["command"]
    for part in (str(tmp_path), f"pid {other_run.pid}", f"host {owner['host']}", f"started {owner['started']}", str(tmp_path / ".lock")):
        assert part in str(caught.value)
    other_run.communicate("\n")
    assert holds(tmp_path) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_run_after_a_kill_takes_over(tmp_path: Path, other_run: subprocess.Popen[str], number: int) -> None:
    other_run.send_signal(number)
    other_run.wait()
    assert (tmp_path / ".lock").exists()
    assert holds(tmp_path) and not (tmp_path / ".lock").exists()


def owner_of(**changes: Any) -> str:
    return json.dumps(lock._ourselves() | changes)


@pytest.mark.parametrize("content, is_free", [
    ("", True), ("{", True), ("[1]", True), ("\0" * 40, True),  # killed while it wrote
    (owner_of(pid=2**22 + 1), True),  # no such process
    (owner_of(pid=os.getppid(), process_start=1), True),  # the number belongs to another process by now
    (owner_of(pid=os.getppid(), process_start=lock._process_start(os.getppid())), False),  # alive, where the file system knows no locks
    (owner_of(pid=2**22 + 1, boot="before"), True),  # the machine was started anew
    (owner_of(pid=os.getppid(), process_start=lock._process_start(os.getppid()), boot="before"), True),
    (owner_of(pid=2**22 + 1, host="renamed"), True),  # a container: same kernel, another name
    (owner_of(host="elsewhere", boot="another"), False),  # a shared file system
    (owner_of(host="elsewhere", boot="another", started="2001-01-01T00:00:00+00:00"), False),  # age proves nothing
])
def test_what_a_lock_left_behind_means(tmp_path: Path, content: str, is_free: bool) -> None:
    (tmp_path / ".lock").write_text(content)
    assert holds(tmp_path) == is_free
    assert (tmp_path / ".lock").exists() != is_free


def test_a_lock_of_another_machine_says_which_file_to_delete(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(owner_of(host="elsewhere", boot="another"))
    with pytest.raises(LockedError, match=rf"host elsewhere.*if that run is over, delete {tmp_path}/.lock"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_the_lock_goes_however_the_block_ends(tmp_path: Path, error: type[BaseException]) -> None:
    n_descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error), run_lock(tmp_path):
        raise error
    assert os.listdir(tmp_path) == [] and holds(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == n_descriptors


def test_a_fault_at_any_call_leaves_no_lock_behind(tmp_path: Path) -> None:
    n_descriptors = len(os.listdir("/proc/self/fd"))
    for kind in ("ENOSPC", "dead", "short"):
        for n in range(1, 8):
            with Faults(kind, n):
                try:
                    with run_lock(tmp_path):
                        pass
                except OSError as error:
                    assert error.filename == str(tmp_path / ".lock")
            assert holds(tmp_path) and len(os.listdir("/proc/self/fd")) == n_descriptors, (kind, n)


def test_many_processes_never_hold_it_together(tmp_path: Path, amount: Any) -> None:
    """Each turns a counter back and forth while it holds the lock; two at once would see it turned."""
    code = ("import sys, os, time\nfrom pathlib import Path\nfrom stllava.checkpoint.lock import LockedError, run_lock\nout = Path(sys.argv[1])\n"
            "left, inside = int(sys.argv[2]), out.parent / 'inside'\nwhile left:\n    try:\n        with run_lock(out):\n"
            "            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))\n            os.unlink(inside)\n            left -= 1\n"
            "    except LockedError:\n        time.sleep(0)\n")
    (tmp_path / "out").mkdir()
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out"), str(amount(30, 2000))]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert os.listdir(tmp_path / "out") == []


# ---- who takes it ------------------------------------------------------------------------------------------------------------


def test_training_refuses_a_second_run_and_lets_go(tmp_path: Path) -> None:
    class Second(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for other in (trainer_in(tmp_path / "out").train, trainer_in(tmp_path / "out").save_model):
                with pytest.raises(LockedError, match=f"pid {os.getpid()}"):
                    other()
            raise KeyboardInterrupt

    trainer = trainer_in(tmp_path / "out")
    trainer.callbacks.append(Second())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = trainer_in(tmp_path / "out")
    again.train()
    again.save_model()
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_file_of_answers_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"

    def rows(batch: list[str]) -> Iterator[dict[str, str]]:
        yield from ({"id": key} for key in batch)

    def work(batch: list[str]) -> Iterator[dict[str, str]]:
        with pytest.raises(LockedError, match=f"{out}: another run writes there"):
            run_step("xyz", str, rows, out=out, batch_size=2, label="x", progress=False)
        yield from rows(batch)

    run_step("abc", str, work, out=out, batch_size=2, label="x", progress=False)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b", "c"]
    assert os.listdir(tmp_path) == ["answers.jsonl"]


def test_commands_end_with_one_line(tmp_path: Path, other_run: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The demo stops before it fetches or trains anything."""
    assert cli.main(["demo", "--out", str(tmp_path), "--quick"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"stllava demo: {tmp_path}: another run writes there (pid {other_run.pid}") and error.count("\n") == 1


def test_pairs_are_written_under_the_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "judged.jsonl").write_text('{"id": "1", "image": "a.png", "question": "What?", "candidates": []}\n')
    with run_lock(tmp_path / "pairs.json"):
        assert cli.main(["pairs", "--judged", str(tmp_path / "judged.jsonl"), "--out", str(tmp_path / "pairs.json")]) == 1
    assert "another run writes there" in capsys.readouterr().err
    assert cli.main(["pairs", "--judged", str(tmp_path / "judged.jsonl"), "--out", str(tmp_path / "pairs.json")]) == 0
