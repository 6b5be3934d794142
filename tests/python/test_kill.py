"""kill -9 at points all over a run: what goes on afterwards ends with the same bytes as the run that nobody killed.

Compared is every file that is left, hidden ones too: weights, both moments and counters (trainer.safetensors, trainer_state.json), log, exported
adapters, and that nothing else lies around.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["sft", "dpo", "selftrain"])
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, amount, kind):
    n = amount(25, 200)
    command = [sys.executable, str(HERE / "kill_worker.py"), kind, str(tmp_path / "runs"), str(n), "7"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, timeout=60 + 20 * n)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == n
    assert not [point for point in points if point["different"]]
    # all were killed where they were told to, but for some that were done before their time
    assert all(point["killed"] for point in points if point["chain"][0][0] != "time")
    assert sum(point["killed"] for point in points) >= n
