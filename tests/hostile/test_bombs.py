"""Files that ask for much are refused before it is given."""

from __future__ import annotations

import isolate
from bombs import BOMBS, MAX_CPU_MS, MAX_MB, READ

import stllava_c


def test_bombs_are_refused_at_once() -> None:
    assert len(BOMBS) >= 30
    report = isolate.run("bombs", len(BOMBS))
    assert not report.failures, str(report)
    wrong = []
    for name, case in zip(BOMBS, report.cases, strict=True):
        if (case["outcome"] == "read") != (name in READ):
            wrong.append(f"{name}: {case['outcome']}")
        if not stllava_c.build_info()["sanitizers"] and (case["cpu_ms"] > MAX_CPU_MS or case["mb"] > MAX_MB):  # which take their own time and memory
            wrong.append(f"{name}: {case['cpu_ms']:.0f} ms, {case['mb']:.0f} MB")
    assert not wrong, wrong
