"""Checkpoints of a run: complete or not there at all.

    checkpoint-{step}/   the model as `save_pretrained` writes it (adapters, projector, tower adapters, configuration, tokenizer)
                         trainer.safetensors   trainable tensors and both moments, by name: independent of how many processes saved them
                         trainer_state.json    transformers' fields, and under "stllava" what resuming must agree with
                         manifest.json         sha256 of every file, written last

Updates are a function of (settings, step), so the data cursor is the step number and no generator state exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stllava.checkpoint import atomic, safetensors_file
from stllava.errors import ConfigError, FormatError

from .callbacks import TrainerState
from .plan import Plan
from .update import Updater

__all__ = ["save_checkpoint", "resume_checkpoint", "find_checkpoint", "rotate"]

STATE_FILE = "trainer_state.json"
TENSOR_FILE = "trainer.safetensors"


def save_checkpoint(directory: Path, updater: Updater, state: TrainerState, plan: Plan) -> Path:
    """Writes checkpoint-{global_step} under `directory`; an older one of the same name is replaced only when the new one is complete."""
    target = directory / f"checkpoint-{state.global_step}"
    model = updater.model
    infos = model.tensor_infos()
    tensors = {key: flat[where].reshape(infos[name].shape) for key, name, flat, where in _pieces(updater)}
    with atomic.atomic_directory(target) as temporary:
        model.write_files(temporary)
        safetensors_file.write(temporary / TENSOR_FILE, tensors)
        atomic.write_bytes(temporary / STATE_FILE, state_json(state, updater, plan).encode())
    return target


def _pieces(updater: Updater) -> Iterator[tuple[str, str, np.ndarray, slice]]:
    """(key in the file, tensor, flat buffer, its place there) of everything the optimiser works on."""
    flats = {"param": updater.model.theta, "exp_avg": updater.exp_avg, "exp_avg_sq": updater.exp_avg_sq}
    for name, where in updater.model.trainable_slices().items():
        for label, flat in flats.items():
            yield f"{label}.{name}", name, flat, where


def state_json(state: TrainerState, updater: Updater, plan: Plan) -> str:
    ours = {"plan": asdict(plan), "n_updates": updater.n_updates, "n_skipped": updater.n_skipped,
            "n_skipped_in_a_row": updater.n_skipped_in_a_row, "dtype": updater.model.dtype,
            "trainable": updater.groups.order, "window": state.window, "total_loss": state.total_loss}
    fields = {"best_metric": state.best_metric, "best_model_checkpoint": None, "epoch": state.epoch, "global_step": state.global_step,
              "is_hyper_param_search": False, "is_local_process_zero": True, "is_world_process_zero": True, "log_history": state.log_history,
              "max_steps": state.max_steps, "num_train_epochs": state.num_train_epochs, "total_flos": 0, "trial_name": None, "trial_params": None,
              "stllava": ours}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def find_checkpoint(output_dir: Path, wanted: str | bool | None) -> Path | None:
    """A path as given; True (or "true"): the newest complete checkpoint of the output directory; "auto": the same, or None where there is none."""
    if not wanted:
        return None
    if wanted is not True and wanted not in ("true", "auto"):
        return Path(wanted)
    newest = atomic.latest_complete(output_dir)
    if newest is None and wanted != "auto":
        raise FormatError(f"{output_dir}: resume_from_checkpoint={wanted!r}, but there is no complete checkpoint-* here; \"auto\" begins anew then",
                          path=output_dir)
    return newest


def resume_checkpoint(path: Path, updater: Updater, plan: Plan) -> TrainerState:
    """Puts weights, moments and counters back. Raises FormatError (damaged files) or ConfigError (another run's checkpoint)."""
    atomic.verify(path)
    fields: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    ours = fields["stllava"]
    for key, mine in (("plan", asdict(plan)), ("dtype", updater.model.dtype), ("trainable", updater.groups.order)):
        if ours[key] != mine:
            detail = "" if key == "trainable" else f": saved {ours[key]}, now {mine}"
            raise ConfigError(f"{path}: {key} differs from this run's{detail}; resume with the settings the run was started with", field=key)
    tensors = safetensors_file.read(path / TENSOR_FILE)
    for key, _, flat, where in _pieces(updater):
        flat[where] = np.asarray(tensors[key]).reshape(-1)
    updater.n_updates, updater.n_skipped, updater.n_skipped_in_a_row = ours["n_updates"], ours["n_skipped"], ours["n_skipped_in_a_row"]
    return TrainerState(max_steps=fields["max_steps"], global_step=fields["global_step"], epoch=fields["epoch"],
                        num_train_epochs=fields["num_train_epochs"], log_history=fields["log_history"], best_metric=fields["best_metric"],
                        window=ours["window"], total_loss=ours["total_loss"])


def rotate(newest: Path, keep: int | None) -> None:
    """Deletes the oldest checkpoints before `newest`, which is complete, so that `keep` are left with it. Later ones are of another run and stay."""
    if keep is None:
        return
    last = _step(newest)
    older = sorted((p for p in newest.parent.glob("checkpoint-*") if p.is_dir() and 0 <= _step(p) < last), key=_step)
    for old in older[:max(0, len(older) + 1 - keep)]:
        atomic.remove_directory(old)


def _step(checkpoint: Path) -> int:
    """N of checkpoint-N; -1 for another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1
