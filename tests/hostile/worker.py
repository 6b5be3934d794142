"""A process that reads damaged files, one after the other, so that whatever happens to it happens to it alone.

`python worker.py FORMAT FIRST STOP` writes one JSON line before each case and one after it; so does `python worker.py bombs FIRST STOP`. A case that takes more than 2 s of CPU or 20 s of clock
kills the process with a traceback; its parent sees which case it was.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats

import stllava_c
from stllava.errors import StllavaError

CPU_S, CLOCK_S = 2.0, 20.0
ALLOWED = (StllavaError, OSError)  # what the readers document


def watched(call: Callable[[], Any]) -> dict[str, Any]:
    """What came of a call: {"outcome": "read" or the exception's name, "bad": why this is not allowed, "mb", "cpu_ms"}."""
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", ".*the adapter was made for", UserWarning)  # meant for the user
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before_kb, before_s = _kb("VmRSS"), _cpu_s()
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        signal.setitimer(signal.ITIMER_REAL, CLOCK_S)
        try:
            value: Any = call()
            result = {"outcome": "read", "bad": None, "value": value}
        except ALLOWED as error:
            result = {"outcome": type(error).__name__, "bad": None, "value": str(error)}
        except BaseException as error:
            result = {"outcome": type(error).__name__, "bad": f"{type(error).__name__}: {str(error)[:300]}", "value": None}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        result |= {"mb": (_kb("VmHWM") - before_kb) / 1024, "cpu_ms": 1e3 * (_cpu_s() - before_s)}
    if leaked and result["bad"] is None:
        result["bad"] = f"warning: {leaked[0].message}"
    return result


def _kb(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def prepare() -> None:
    faulthandler.enable()
    for number in (signal.SIGPROF, signal.SIGALRM):
        faulthandler.register(number, chain=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not stllava_c.build_info()["sanitizers"]:  # AddressSanitizer reserves terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # for the machine's sake; the bar is on resident memory


def damaged(name: str, first: int, stop: int) -> None:
    """Variants of a format, each read twice."""
    with tempfile.TemporaryDirectory() as folder:
        built = formats.build(name, Path(folder))
        for path, data in built.files.items():  # every seed is valid, and what is loaded once is not counted below
            path.write_bytes(data)
            assert built.read(path) is not None
        for case in range(first, stop):
            path, data = formats.variant(name, built, case)
            path.write_bytes(data)
            say(begin=case)
            once, twice = (watched(lambda: built.read(path)) for _ in range(2))
            if once["bad"] is None and once["value"] != twice["value"]:
                once["bad"] = "two readings differ"
            once["mb"] = max(once["mb"], twice["mb"])
            say(case=case, **once | {"value": None})


def bombs(first: int, stop: int) -> None:
    from bombs import BOMBS
    for case, make in list(enumerate(BOMBS.values()))[first:stop]:
        with tempfile.TemporaryDirectory() as folder:
            read = make()(Path(folder))
            watched(lambda: None)  # what building left behind is not the reader's
            gc.collect()
            say(begin=case)
            result = watched(read)
            say(case=case, **result | {"value": str(result["value"])[:300]})


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    prepare()
    if sys.argv[1] == "bombs":
        bombs(int(sys.argv[2]), int(sys.argv[3]))
    else:
        damaged(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
