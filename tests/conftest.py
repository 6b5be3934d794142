"""Options of the suite.

--goldens DIR   the recording tests/parity replays; default $STLLAVA_GOLDENS, else the copy in the tree
--long          the exhaustive form: tests marked `long` run too, and the fixture `amount` gives its larger number
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PARITY = TESTS / "parity"
sys.path[:0] = [str(PARITY), str(TESTS / "python")]  # so that every folder of tests may use tiny.py


def pytest_addoption(parser):
    parser.addoption("--goldens", default=os.environ.get("STLLAVA_GOLDENS", str(PARITY / "goldens")), help="folder of a recording")
    parser.addoption("--long", action="store_true", help="the exhaustive forms of the tests")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture
def amount(request):
    """amount(short, long): how many mutations, kills or rounds a test takes."""
    return lambda short, long: long if request.config.getoption("--long") else short
