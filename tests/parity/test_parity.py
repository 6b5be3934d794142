"""Replays a recording of the reference implementation and compares: every case, in f32 and in f64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from compare import compare_file, compare_numbers
from replay import case_names, replay

from stllava.checkpoint import safetensors_file

TOKENS = {"f32": 1e-4, "f64": 1e-9}  # logits of generation, absolute
TRAJECTORY = {"f32": {"loss": 1e-5, "micro_batch_losses": 1e-5, "grad_norm_before_clipping": 5e-5, "logps": 1e-4, "default": 1e-5}, "f64": {"default": 1e-6}}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--goldens"))
        metafunc.parametrize("case", [folder / name for name in case_names(folder)], ids=lambda case: case.name)


@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_case(case: Path, dtype: str) -> None:
    files, values = replay(case, dtype)
    recorded = [path for path in case.glob("*.safetensors") if path.name.startswith(("expected", "grads", "final", "sampling"))]
    assert {path.stem for path in recorded} == set(files), "files recorded and files computed"
    info = json.loads((case / "meta.json").read_text())
    problems = []
    for path in recorded:
        if case.name == "images":
            problems += _images(path, files[path.stem])
            continue
        zero = set(info["float32_vs_float64"].get(path.name, {}).get("mathematically_zero_tensors", ())) if "float32_vs_float64" in info else set()
        problems += compare_file(path, files[path.stem], case.name, dtype, zero)
    if values is not None:
        problems += _values(case, info, values, dtype)
    assert not problems, "\n".join(problems[:40])


def _values(case: Path, info: dict, values: dict, dtype: str) -> list[str]:
    name = case.name
    if name.startswith("trajectory"):
        problems = []
        for got, want in zip(values["log"], info["log"], strict=True):
            for key in want:
                limits = TRAJECTORY[dtype]
                limit = next((bound for start, bound in limits.items() if start in key), limits["default"])
                problems += compare_numbers(f"step {want['step']}.{key}", got[key], want[key], limit)
        return problems
    if name == "dpo":
        limit = 5e-5 if dtype == "f32" else 1e-8
        return [p for key in ("metrics_policy_image_features", "metrics_frozen_image_features")
                for p in compare_numbers(key, values[key], info[key], limit if "policy" not in key else max(limit, 2e-8))]
    if name == "dpo_losses":
        want = json.loads((case / "expected.json").read_text())["cases"]
        problems = []
        for i, (got, expected) in enumerate(zip(values["cases"], want, strict=True)):
            limit = 1e-7 if expected["loss_types"][0] == "exo_pair" else 1e-12
            for key in ("loss", "per_pair", "dloss_dchosen", "dloss_drejected"):
                if "discopop" in expected["loss_types"] and key == "loss" and expected[key] != expected[key]:
                    continue
                problems += compare_numbers(f"case {i} {expected['loss_types']}.{key}", got[key], expected[key], limit)
        return problems
    if name == "generation":
        problems = []
        for i, (got, want) in enumerate(zip(values["prompts"], info["prompts"], strict=True)):
            if got["new_tokens"] != want["new_tokens"]:
                problems.append(f"prompt {i}: tokens {got['new_tokens']}, want {want['new_tokens']}")
            problems += compare_numbers(f"prompt {i}.logits", got["logits_first5"], want["logits_first5"], TOKENS[dtype])
        return problems
    if name == "templates":
        problems = []
        for file, content in values.items():
            want = json.loads((case / file).read_text())["samples"]
            for got, sample in zip(content["samples"], want, strict=True):
                problems += [f"{file}: {key} of {sample.get('name')} differs" for key in ("prompt", "input_ids", "labels")
                             if key in sample and got[key] != sample[key]]
        return problems
    if name == "metrics":
        want = json.loads((case / "expected.json").read_text())
        return [f"{key}" for key in ("items", "corpus_percent") if not _equal(values[key], want[key])]
    if name == "images":
        return _image_values(values, info)
    if name == "checkpoint_files":
        return _listing(values, json.loads((case / "listing.json").read_text()))
    raise AssertionError(f"no comparison for {name}")


def _listing(got: dict, want: dict) -> list[str]:
    """dtype and shape exact, sums to the last bits; index files exact."""
    problems = [f"{file}: not read" for file in want.keys() - got.keys()]
    for file in want.keys() & got.keys():
        problems += [] if _equal(got[file], want[file]) else [f"{file}: listing differs"]
    return problems


JPEG_LEVELS = 2  # decoders may differ by so much; everything after decoding is exact


def _images(path: Path, got: dict) -> list[str]:
    problems = []
    for name, array in safetensors_file.read(path).items():
        want, found = np.asarray(array), got.get(name)
        if found is None or found.shape != want.shape:
            problems.append(f"{name}: missing or of another shape")
        elif want.dtype == np.uint8:
            levels = JPEG_LEVELS if ".jpg." in name else 0
            worst = int(np.abs(found.astype(int) - want.astype(int)).max())
            problems += [f"{name}: off by {worst} levels"] if worst > levels else []
        else:
            worst = float(np.abs(found - want).max())
            problems += [f"{name}: off by {worst:.3g}"] if not worst <= (5e-7 if ".jpg." not in name else 0.05) else []
    return problems


def _image_values(values: dict, info: dict) -> list[str]:
    """Hashes of 8-bit results are exact but for JPEG files, whose decoding may differ by a level or two."""
    problems = []
    recorded = {entry["file"]: entry for entry in info["images"]}
    for entry in values["images"]:
        want = recorded[entry["file"]]["results"]
        for key, result in entry["results"].items():
            for field in ("padded_wh", "resized_hw", "cropped_dtype", *(() if entry["file"].endswith(".jpg") else ("cropped_sha256", "cropped_sum"))):
                problems += [] if result[field] == want[key][field] else [f"{entry['file']} {key}: {field} {result[field]}, want {want[key][field]}"]
            close = np.isclose(result["pixel_values_sum_of_squares"], want[key]["pixel_values_sum_of_squares"], rtol=1e-6)
            problems += [] if close or entry["file"].endswith(".jpg") else [f"{entry['file']} {key}: sum of squares"]
    return problems


def _equal(got: object, want: object) -> bool:
    """Exact but for the last bits of a float (1e-12)."""
    if isinstance(want, dict):
        return got.keys() >= want.keys() and all(_equal(got[key], want[key]) for key in want)
    if isinstance(want, list):
        return len(got) == len(want) and all(map(_equal, got, want))
    if isinstance(want, float):
        return abs(got - want) <= 1e-12 * max(1.0, abs(want))
    return got == want
