"""Checkpoints of a run: complete or not there at all.

    checkpoint-{step}/   the model's files (see `output`: adapters, projector, tower adapters, configuration, tokenizer)
                         trainer.safetensors   trainable tensors and both moments, by name: independent of how many processes saved them
                         trainer_state.json    transformers' fields; its TrainerState.load_from_json reads them
                         run_state.json        what resuming must agree with, and counters that transformers has no field for
                         manifest.json         sha256 of every file, written last

Updates are a function of (settings, step), so the data cursor is the step number and no generator state exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stllava.checkpoint import atomic, safetensors_file
from stllava.errors import ConfigError, FormatError

from .arguments import TrainingArguments
from .callbacks import TrainerState
from .output import write_model
from .plan import Plan
from .update import Updater

__all__ = ["STATE_FILE", "find_checkpoint", "load_weights", "resume_checkpoint", "rotate", "save_checkpoint", "state_json"]

STATE_FILE = "trainer_state.json"
RUN_FILE = "run_state.json"
TENSOR_FILE = "trainer.safetensors"


def save_checkpoint(directory: Path, updater: Updater, state: TrainerState, plan: Plan) -> Path:
    """Writes checkpoint-{global_step} under `directory`; an older one of the same name is replaced only when the new one is complete."""
    target = directory / f"checkpoint-{state.global_step}"
    model = updater.model
    infos = model.tensor_infos()
    tensors = {key: flat[where].reshape(infos[name].shape) for key, name, flat, where in _pieces(updater)}
    with atomic.atomic_directory(target) as temporary:
        write_model(temporary, model, updater.args)
        safetensors_file.write(temporary / TENSOR_FILE, tensors)
        atomic.write_bytes(temporary / STATE_FILE, state_json(state, updater.args, plan).encode())
        ours = {name: getattr(updater, name) for name in _COUNTERS} | {name: getattr(state, name) for name in _OWN}
        atomic.write_bytes(temporary / RUN_FILE, _json(_agreed(updater, plan) | ours).encode())
    return target


_STATE = ("max_steps", "global_step", "epoch", "num_train_epochs", "log_history", "best_metric", "best_model_checkpoint")
_OWN = ("best_global_step", "window", "total_loss")  # of TrainerState, but no fields of transformers' 4.31
_COUNTERS = ("n_updates", "n_skipped", "n_skipped_in_a_row")


def _agreed(updater: Updater, plan: Plan) -> dict[str, Any]:
    """What a run that goes on must have in common with the one before."""
    return {"plan": plan.settings(), "dtype": updater.model.dtype, "trainable": updater.groups.order}


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _pieces(updater: Updater) -> Iterator[tuple[str, str, np.ndarray, slice]]:
    """(key in the file, tensor, flat buffer, its place there) of everything the optimiser works on."""
    flats = {"param": updater.model.theta, "exp_avg": updater.exp_avg, "exp_avg_sq": updater.exp_avg_sq}
    for name, where in updater.model.trainable_slices().items():
        for label, flat in flats.items():
            yield f"{label}.{name}", name, flat, where


def state_json(state: TrainerState, args: TrainingArguments, plan: Plan) -> str:
    """trainer_state.json with exactly the fields that the transformers of `hf_compat` takes."""
    fields: dict[str, Any] = {name: getattr(state, name) for name in _STATE}
    fields |= {"is_hyper_param_search": False, "is_local_process_zero": True, "is_world_process_zero": True, "total_flos": 0, "trial_name": None,
               "trial_params": None}
    if args.hf_compat != "4.31":
        fields |= {name: args.steps_of(name, plan.total_steps) for name in ("logging_steps", "eval_steps", "save_steps")}
        fields |= {"best_global_step": state.best_global_step, "train_batch_size": args.per_device_train_batch_size, "num_input_tokens_seen": 0,
                   "stateful_callbacks": {}}
    return _json(fields)


def find_checkpoint(output_dir: Path, wanted: str | bool | None) -> Path | None:
    """A path as given; True (or "true"): the newest complete checkpoint of the output directory; "auto": the same, or None where there is none."""
    if not wanted:
        return None
    if wanted is not True and wanted not in ("true", "auto"):
        if not Path(wanted).is_dir():
            raise FormatError(f"resume_from_checkpoint {wanted}: no such directory; want a checkpoint-* directory, true for the newest of "
                              "output_dir, or auto", path=wanted)
        return Path(wanted)
    newest = atomic.latest_complete(output_dir)
    if newest is None and wanted != "auto":
        raise FormatError(f"{output_dir}: resume_from_checkpoint={wanted!r}, but there is no complete checkpoint-* here; \"auto\" begins anew then",
                          path=output_dir)
    return newest


def resume_checkpoint(path: Path, updater: Updater, plan: Plan) -> TrainerState:
    """Puts weights, moments and counters back. Raises FormatError (damaged files) or ConfigError (another run's checkpoint)."""
    atomic.verify(path)
    fields, ours = (json.loads((path / name).read_text()) for name in (STATE_FILE, RUN_FILE))
    for key, mine in _agreed(updater, plan).items():
        if ours[key] != mine:
            detail = "" if key == "trainable" else f": saved {ours[key]}, now {mine}"
            raise ConfigError(f"{path}: {key} differs from this run's{detail}; resume with the settings the run was started with", field=key)
    tensors = safetensors_file.read(path / TENSOR_FILE)
    for key, _, flat, where in _pieces(updater):
        flat[where] = np.asarray(tensors[key]).reshape(-1)
    for name in _COUNTERS:
        setattr(updater, name, ours[name])
    return TrainerState(**{name: fields[name] for name in _STATE}, **{name: ours[name] for name in _OWN})


def load_weights(path: Path, updater: Updater) -> None:
    """Puts the weights of a checkpoint of this run back, and nothing else. Raises FormatError."""
    atomic.verify(path)
    tensors = safetensors_file.read(path / TENSOR_FILE)
    theta = updater.model.theta
    for name, where in updater.model.trainable_slices().items():
        theta[where] = np.asarray(tensors[f"param.{name}"]).reshape(-1)


def rotate(newest: Path, keep: int | None, best: str | None = None) -> None:
    """Deletes the oldest checkpoints before `newest`, which is complete, so that `keep` are left with it. Later ones are of another run and stay.

    `best` stays too; it is among the `keep` if those are more than one.
    """
    if keep is None:
        return
    last = _step(newest)
    older = sorted((p for p in newest.parent.glob("checkpoint-*") if p.is_dir() and 0 <= _step(p) < last), key=_step)
    others = [p for p in older if best is None or p.name != Path(best).name]
    n_kept = max(0, keep - 1 - (len(older) - len(others)))
    for old in others[:len(others) - n_kept] if n_kept < len(others) else ():
        atomic.remove_directory(old)


def _step(checkpoint: Path) -> int:
    """N of checkpoint-N; -1 for another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1
