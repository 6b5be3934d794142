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

import stllava_c

if stllava_c.build_info()["sanitizers"]:
    pytest.skip("every killed process starts anew, which takes many minutes under AddressSanitizer, and the core knows nothing of it", allow_module_level=True)

HERE = Path(__file__).parent


KINDS = ("sft", "dpo", "selftrain", "eval")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def workers(tmp_path_factory, pytestconfig):
    """The kinds side by side, each on one thread; and how many points each takes."""
    n = dict.fromkeys(KINDS, 200 if pytestconfig.getoption("--long") else 25) | {"eval": 25 if pytestconfig.getoption("--long") else 5}
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    started = {kind: subprocess.Popen([sys.executable, str(HERE / "kill_worker.py"), kind, str(tmp_path_factory.mktemp("kill") / kind), str(n[kind]), "7"],
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for kind in KINDS}
    yield started, n
    for worker in started.values():
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_end_as_if_nothing_had_happened(workers, kind):
    started, n = workers[0], workers[1][kind]
    output, errors = started[kind].communicate(timeout=60 + 20 * n)
    assert started[kind].returncode == 0, errors
    points = [json.loads(line) for line in output.splitlines()]
    assert len(points) == n
    assert not [point for point in points if point["different"]]
    # all were killed where they were told to be, but for some that were done before their time
    assert all(point["killed"] for point in points if point["chain"][0][0] != "time")
    assert sum(point["killed"] for point in points) >= n
