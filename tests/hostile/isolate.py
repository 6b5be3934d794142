"""Runs cases in a worker process and counts what came of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MAX_MB = 512
MAX_FAILURES = 10  # then the rest would say the same


@dataclass
class Report:
    """outcomes: exception name or "read" -> number of cases. failures: one text each, with the command that replays it. cases: as the worker says."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak_mb: float = 0.0
    cases: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{dict(self.outcomes)}, at most {self.peak_mb:.0f} MB\n" + "\n".join(self.failures)


def run(name: str, n_cases: int, max_failures: int = MAX_FAILURES) -> Report:
    """Cases 0 .. n_cases - 1 of a format; after a dead worker a new one goes on with the next case."""
    report, first = Report(), 0
    while first < n_cases and len(report.failures) < max_failures:
        first = _worker(name, first, n_cases, report)
    return report


def _worker(name: str, first: int, stop: int, report: Report) -> int:
    """The case to go on with."""
    case = None
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen([sys.executable, str(HERE / "worker.py"), name, str(first), str(stop)],
                                                                  stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            case = message.get("begin", case)
            if "case" in message:
                report.cases.append(message)
                report.outcomes[message["outcome"]] += 1
                report.peak_mb = max(report.peak_mb, message["mb"])
                bad = message["bad"] or (f"{message['mb']:.0f} MB of memory" if message["mb"] > MAX_MB else None)
                if bad:
                    report.failures.append(_failure(name, case, bad))
        process.wait()
        errors.seek(0)
        text = errors.read()
    if process.returncode == 0:
        return stop
    if case is None or process.returncode > 0:
        raise RuntimeError(f"{name}: the worker failed outside a case:\n{text[-3000:]}")
    report.failures.append(_failure(name, case, f"{signal.Signals(-process.returncode).name}\n{text[-1500:]}"))
    return case + 1


def _failure(name: str, case: int | None, why: str) -> str:
    return f"{name} case {case}: {why}   (replay: python tests/hostile/formats.py {name} {case})"
