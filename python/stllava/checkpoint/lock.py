"""One run per output: a lock file names the run that writes there, and the second run is refused with that name.

    DIRECTORY/.lock, or .NAME.lock beside a file     {"pid", "process_start", "host", "boot", "started", "command"}

Who holds it is decided by the kernel (flock), so the lock of a killed run is free at once, whatever its process number has become since, in a
restarted container too. The content decides where the kernel cannot know: an owner on another machine (another host name and another boot) is
never overridden, since a slow run cannot be told from a dead one by its age; the message says which file to delete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stllava.checkpoint.atomic import system_call
from stllava.errors import StllavaError

__all__ = ["LOCK", "LockedError", "run_lock"]

LOCK = ".lock"
"""Its name in a directory."""


class LockedError(StllavaError):
    """Another run writes there. `owner`: its lock's content, {} if it has not been written yet."""

    def __init__(self, message: str, *, path: Path, owner: dict[str, Any]) -> None:
        super().__init__(message, path=path)
        self.owner = owner


@contextmanager
def run_lock(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Holds the lock of `output`, a directory that exists or a file that need not, until the block ends, however it ends; yields it as a path.

    Raises:
        LockedError: naming pid, host, start and command of the run that holds it. OSError: the lock file cannot be made.
    """
    output = Path(output)
    path = output / LOCK if output.is_dir() else output.with_name(f".{output.name}.lock")
    descriptor = _open(path, output)
    try:
        system_call(path, os.ftruncate, descriptor, 0)
        system_call(path, os.pwrite, descriptor, (json.dumps(_ourselves()) + "\n").encode(), 0)
        system_call(path, os.fsync, descriptor)
        yield output
    finally:
        with suppress(OSError):  # a file that stays names a run that is over
            os.unlink(path)
        with suppress(OSError):
            os.close(descriptor)


def _open(path: Path, output: Path) -> int:
    """Descriptor of the lock file, ours alone until it is closed."""
    while True:
        descriptor = system_call(path, os.open, path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            is_ours = _flock(descriptor)
            owner = _read(path, descriptor)
            if not is_ours or _is_alive(owner):
                raise LockedError(_refusal(output, path, owner), path=path, owner=owner)
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        system_call(path, os.close, descriptor)  # its owner removed it between our open and our flock


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the content alone decides
        pass
    return True


def _read(path: Path, descriptor: int) -> dict[str, Any]:
    content = system_call(path, os.pread, descriptor, 1 << 16, 0)
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the run that a lock names may still be there, although the kernel gave us the lock."""
    ours = _ourselves()
    if not owner or (owner.get("pid") == ours["pid"] and owner.get("boot") == ours["boot"]):
        return False
    if owner.get("boot") == ours["boot"]:
        return _process_start(owner.get("pid")) == owner.get("process_start")
    return ours["host"] != owner.get("host")  # the same host since started anew holds no run of before


def _refusal(output: Path, path: Path, owner: dict[str, Any]) -> str:
    who = ", ".join(f"{label} {owner[key]}" for key, label in
                    (("pid", "pid"), ("host", "host"), ("started", "started"), ("command", "command")) if key in owner) or "which is just starting"
    return f"{output}: another run writes there ({who}). Wait for it, or choose another output; if that run is over, delete {path}"


def _ourselves() -> dict[str, object]:
    return {"pid": os.getpid(), "process_start": _process_start(os.getpid()), "host": os.uname().nodename, "boot": _boot(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(shlex.join(sys.orig_argv).split())[:200]}


def _boot() -> str:
    """Names this start of this machine's kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def _process_start(pid: object) -> int:
    """Clock ticks from boot to the start of a process: with the number it names the process for good. -1 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    return int(stat.rpartition(")")[2].split()[19])
