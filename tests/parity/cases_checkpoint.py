"""Replay of the golden case `checkpoint_files`: what our readers find in every file of the case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stllava.checkpoint import strict_json
from stllava.checkpoint.index import read_file, read_weights
from stllava.checkpoint.tensor_file import TensorFile, dtype_name, to_float32

_LISTED_DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def replay_checkpoint_files(case_dir: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> {tensor: [dtype, shape, sum]} for weight files, -> its JSON for index files.

    Directories with full weights are also read as a whole, so that index and shards are checked against each other.
    """
    case_dir = Path(case_dir)
    result: dict[str, dict[str, Any]] = {}
    for path in sorted(case_dir.rglob("*")):
        name = path.relative_to(case_dir).as_posix()
        if path.suffix in (".bin", ".safetensors"):
            result[name] = _describe(read_file(path))
        elif path.name.endswith(".index.json"):
            result[name] = strict_json.read_object(path)
            read_weights(path.parent)
    return result


def _describe(file: TensorFile) -> dict[str, list[Any]]:
    return {name: [_LISTED_DTYPES[dtype_name(array)], list(array.shape), _sum(array)] for name, array in file.items()}


def _sum(array: np.ndarray) -> float:
    values = to_float32(array) if dtype_name(array) == "bf16" else array
    return float(values.sum(dtype=np.float64))
