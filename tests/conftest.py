"""Options of the suite. --goldens DIR: the recording tests/parity replays; default $STLLAVA_GOLDENS, else the copy in the tree."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))


def pytest_addoption(parser):
    parser.addoption("--goldens", default=os.environ.get("STLLAVA_GOLDENS", str(PARITY / "goldens")), help="folder of a recording")
