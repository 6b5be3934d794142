"""The end of a benchmark that works: a process of its own per side, driven over pipes by `harness.Worker`.

    run 5  ->  {"seconds": per step, "cpu_seconds": per step, "value": of the last step, "peak_bytes": highest resident memory
               of the process so far, "growth_bytes": of that, what came after preparing}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def serve(prepare: Callable[[], Callable[[], float]]) -> None:
    """Prepares once, then steps as often as it is told until the pipe closes. A step returns a number both sides must agree on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    step = prepare()
    prepared = _status_bytes("VmRSS")
    for line in sys.stdin:
        repeat = int(line.split()[1])
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeat):
            value = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"seconds": wall / repeat, "cpu_seconds": cpu / repeat, "value": value, "peak_bytes": _status_bytes("VmHWM"),
                          "growth_bytes": _status_bytes("VmHWM") - prepared}), file=answers)


def _status_bytes(key: str) -> int:
    """A size that the kernel states of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
