"""What transformers and peft make of a directory of ours. They live in an environment of their own, the one of `make bench`, or STLLAVA_PEERS names its
interpreter; where there is none, what they wrote is in tests/recorded."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
MAKE = TESTS / "recorded" / "make.py"
PYTHON = os.environ.get("STLLAVA_PEERS", str(TESTS.parent / "build" / "peers" / "bin" / "python"))


def processed(directory: Path, text: str, picture: np.ndarray) -> Any:
    """What LlavaProcessor and the model make of a text with `<image>` and a picture: ids, pixels (3, S, S), logits, float32."""
    np.save(directory / "picture.npy", picture)
    _run(directory, {"text": text})
    return np.load(directory / "processed.npz")


def logits(directory: Path, ids: list[int], base: Path | None = None) -> np.ndarray:
    """(rows, vocabulary) float64 logits of a model, or of an adapter on `base`, for the picture of tests/recorded/make.py. Skips without peers."""
    _run(directory, {"ids": ids} | ({} if base is None else {"base": str(base)}))
    return np.load(directory / "logits.npy")


def _run(directory: Path, request: dict[str, Any]) -> None:
    if not Path(PYTHON).exists():
        pytest.skip(f"no {PYTHON}: STLLAVA_PEERS may name an interpreter with transformers and peft, `make bench` makes one")
    (directory / "request.json").write_text(json.dumps(request))
    subprocess.run([PYTHON, str(MAKE), str(directory)], check=True, capture_output=True)
