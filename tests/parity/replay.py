"""Computes every case of a recording from its inputs alone.

    python tests/parity/replay.py DIR --out OUT [--dtype f32|f64] [--case NAME ...]

writes OUT/CASE/: each tensor file the case records, under the same file and tensor names, and values.json with everything recorded as JSON. Nothing
recorded is read: files expected*, grads*, final_* may be absent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import cases_checkpoint
import cases_decoder
import cases_images
import cases_metrics
import cases_parts
import cases_templates
import cases_training

from stllava.checkpoint import safetensors_file

Result = tuple[dict[str, dict[str, np.ndarray]], dict | None]


def _tensors_only(function: Callable) -> Callable[[Path, str], Result]:
    return lambda case, dtype: (function(case, dtype), None)


def _values_only(function: Callable) -> Callable[[Path, str], Result]:
    return lambda case, dtype: ({}, function(case))


def _images(case: Path, dtype: str) -> Result:
    found, values = cases_images.replay_images(case)
    return {"expected": found}, values


CASES: list[tuple[str, Callable[[Path, str], Result]]] = [  # first match by the start of the case's name
    ("clip_vision", _tensors_only(cases_parts.clip_vision)),
    ("projector_", _tensors_only(cases_parts.projector)),
    ("llama", _tensors_only(cases_decoder.decoder)),
    ("mistral", _tensors_only(cases_decoder.decoder)),
    ("llava_e2e", _tensors_only(cases_decoder.llava_e2e)),
    ("generation", cases_decoder.generation),
    ("dpo_losses", lambda case, dtype: ({}, cases_training.dpo_losses(case, dtype))),
    ("dpo", cases_training.dpo),
    ("trajectory_", cases_training.trajectory),
    ("templates", _values_only(cases_templates.replay_templates)),
    ("metrics", _values_only(cases_metrics.replay_metrics)),
    ("images", _images),
    ("checkpoint_files", _values_only(cases_checkpoint.replay_checkpoint_files)),
]


def case_names(recording: Path) -> list[str]:
    """Cases of a recording that can be replayed (tiny_llava is the model other cases use, not a case)."""
    return sorted(path.name for path in recording.iterdir()
                  if (path / "meta.json").exists() and any(path.name.startswith(start) for start, _ in CASES))


def replay(case: Path, dtype: str) -> Result:
    function = next(function for start, function in CASES if case.name.startswith(start))
    return function(case, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("f32", "f64"), default="f64")
    parser.add_argument("--case", nargs="+", default=None)
    args = parser.parse_args()
    for name in args.case or case_names(args.recording):
        files, values = replay(args.recording / name, args.dtype)
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            safetensors_file.write(folder / f"{file}.safetensors", {key: np.ascontiguousarray(array) for key, array in content.items()})
        if values is not None:
            (folder / "values.json").write_text(json.dumps(values))
        print(f"{name}: {', '.join([f'{file} ({len(content)})' for file, content in files.items()] + (['values.json'] if values is not None else []))}")


if __name__ == "__main__":
    main()
