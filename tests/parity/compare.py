"""Tolerances against a recording (goldens/README.md, column by column) and how results are compared with them.

f32 tolerances are several times the error a float32 run of the reference itself shows ("measured" there). In f64 every case must agree to 1e-8
(trajectories 1e-6), as the recording's own error is about 1e-13.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stllava.checkpoint import safetensors_file


@dataclass(frozen=True)
class Tolerance:
    """m-rel for values and gradients; `sim` for the two scalars of the cluster projector, whose gradients cancel; `absolute` where given replaces
    m-rel; `zero` bounds tensors that are mathematically zero."""

    values: float
    grads: float
    sim: float = 0.0
    absolute: dict[str, float] | None = None
    zero: float = 1e-5


_PART = Tolerance(1e-5, 5e-5)
_PROJECTOR = Tolerance(5e-6, 5e-6)
_CLUSTER = Tolerance(2e-5, 2e-5, 2e-5)
F32 = {
    "clip_vision": _PART, "llama": _PART, "mistral": _PART, "projector_linear": _PROJECTOR, "projector_mlp": _PROJECTOR,
    "projector_cluster": _CLUSTER, "llava_e2e": Tolerance(1e-5, 1e-4, 1e-3),
    "dpo": Tolerance(5e-5, 1e-4, 1e-3, {"losses": 1e-5, "logps": 5e-5, "rewards": 1e-5}),
    "generation": Tolerance(1e-6, 0), "trajectory_sft": Tolerance(2e-4, 0, 2e-4), "trajectory_dpo": Tolerance(3e-4, 0, 3e-4),
}
F64 = {"trajectory": 1e-6, "other": 1e-8}


def tolerance_of(case: str, dtype: str) -> Tolerance:
    if dtype == "f64":
        value = F64["trajectory" if case.startswith("trajectory") else "other"]
        return Tolerance(value, value, value, None, 1e-10)
    return next(value for start, value in sorted(F32.items(), key=lambda item: -len(item[0])) if case.startswith(start))


def m_rel(got: np.ndarray, want: np.ndarray) -> float:
    """max |difference| / max |expected|."""
    scale = np.abs(want).max(initial=0.0)
    worst = np.abs(np.asarray(got, np.float64) - want).max(initial=0.0)
    return float(worst / scale) if scale > 0 else float(worst)


def compare_file(path: Path, got: dict[str, np.ndarray], case: str, dtype: str, zero: set[str]) -> list[str]:
    """What differs between a recorded tensor file and what was computed; empty if nothing."""
    want = {name: np.asarray(array) for name, array in safetensors_file.read(path).items()}
    tolerance = tolerance_of(case, dtype)
    out = [f"{path.name}: {name} was not computed" for name in want.keys() - got.keys()]
    out += [f"{path.name}: {name} is not recorded" for name in got.keys() - want.keys()]
    is_grad = path.stem.startswith("grad")
    for name in sorted(want.keys() & got.keys()):
        a, b = np.asarray(got[name]), want[name]
        if a.shape != b.shape:
            out.append(f"{path.name}: {name} has shape {a.shape}, want {b.shape}")
            continue
        if b.dtype.kind in "iu":
            if not np.array_equal(a, b):
                out.append(f"{path.name}: {name} differs in {int((a != b).sum())} of {b.size} places")
            continue
        if name == "inputs_embeds":  # collator padding is compared only where something stands
            mask = np.asarray(safetensors_file.read(path.parent / "expected.safetensors")["expanded_attention_mask"]).astype(bool)
            a, b = a[mask], b[mask]
        limit = tolerance.sim if "sim_" in name and tolerance.sim else tolerance.grads if is_grad or name == "grad_input" else tolerance.values
        if name == "margin" and dtype == "f32":
            limit = 2e-4  # a difference of near-equal numbers: README measures 4e-5 for float32
        error = m_rel(a, b)
        if name in zero:
            error, limit = float(np.abs(a - b).max()), tolerance.zero
        elif tolerance.absolute:
            for key, bound in tolerance.absolute.items():
                if key in name:
                    error, limit = float(np.abs(a - b).max()), bound
        if not error <= limit:
            out.append(f"{path.name}: {name} is off by {error:.3g}, allowed {limit:.3g}")
    return out




def compare_numbers(where: str, got: object, want: object, limit: float) -> list[str]:
    """Nested lists and dictionaries of numbers, absolute differences scaled by the larger of 1 and the largest recorded magnitude of that list."""
    if isinstance(want, dict):
        out = [f"{where}: {key} was not computed" for key in want.keys() - got.keys()]
        return out + [line for key in want.keys() & got.keys() for line in compare_numbers(f"{where}.{key}", got[key], want[key], limit)]
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if a.shape != b.shape:
        return [f"{where}: shape {a.shape}, want {b.shape}"]
    finite = np.isfinite(b)
    error = float(np.abs(a - b)[finite].max(initial=0.0) / max(1.0, np.abs(b[finite]).max(initial=0.0)))
    return [] if error <= limit else [f"{where}: off by {error:.3g}, allowed {limit:.3g}"]
