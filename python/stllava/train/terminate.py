"""SIGTERM, as a scheduler or a supervisor sends it: the running step is finished and saved, then the process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["TERMINATED", "Terminated", "noticing_sigterm"]

TERMINATED = 128 + signal.SIGTERM
"""Exit code: what a shell reports of a process that SIGTERM ended. A crash of ours is 1, Ctrl-C is 130."""


class Terminated(SystemExit):
    """`Trainer.train` was stopped by SIGTERM. `checkpoint`: directory of the last complete state. Uncaught, it ends the process with code 143."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(TERMINATED)
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"stopped by SIGTERM; resume from {self.checkpoint}"


@contextmanager
def noticing_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM has come since; afterwards the handler before is back.

    Nothing is noticed outside the main thread, where Python allows no handlers, and where the process ignores the signal or handles it in C.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) in (None, signal.SIG_IGN):
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:  # too late for `Terminated`: now it has the effect it would have had without us
        signal.raise_signal(signal.SIGTERM)
