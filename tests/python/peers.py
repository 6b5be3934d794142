"""What transformers and peft make of a directory of ours. They live in an environment of their own: STLLAVA_PEERS names its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MAKE = Path(__file__).parents[1] / "recorded" / "make.py"


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
    python = os.environ.get("STLLAVA_PEERS")
    if python is None:
        pytest.skip("STLLAVA_PEERS does not name an interpreter with transformers and peft; what they wrote is in tests/recorded")
    (directory / "request.json").write_text(json.dumps(request))
    subprocess.run([python, str(MAKE), str(directory)], check=True, capture_output=True)
