"""The record of a run, in the manifest of its result: what ran, on what, with what, and what came out; enough to run it again.

manifest.json of an output directory has "files" (size and sha256 of each file of the result, see `checkpoint.atomic`) and, of a run by `stllava sft`
or `dpo`, "run". Neither has the name of a machine or a user; paths are as they were given.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import Any

from stllava.checkpoint import atomic, strict_json
from stllava.checkpoint.lock import run_lock
from stllava.data.image_store import ImageStore
from stllava.errors import FormatError
from stllava.image_source import ImageError

from .resolve import Settings

__all__ = ["RunRecord", "check_inputs", "hash_inputs", "read_run"]

SCHEMA = 1
INPUTS = ("model_name_or_path", "model_base", "vision_tower", "pretrain_mm_mlp_adapter", "pretrain_lora", "data_path", "eval_data_path")
WEIGHTS = (".bin", ".safetensors")


class RunRecord:
    """Begun before a run, written behind it. inputs: what `hash_inputs` gave."""

    def __init__(self, settings: Settings, command: Seq[str], inputs: Mapping[str, Any]) -> None:
        self._settings, self._command, self._inputs = settings, list(command), dict(inputs)
        self._started = _now()

    def write(self, directory: str | os.PathLike[str], *, counts: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
        """Into the manifest of `directory`, whose files are those of the result. Returns what was written under "run"."""
        with run_lock(directory):
            return self._write(Path(directory) / atomic.MANIFEST, counts, metrics)

    def _write(self, path: Path, counts: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
        content = strict_json.read_object(path)
        identity = hashlib.sha256(strict_json.dump_object({"settings": self._settings.given, "inputs": self._inputs, "started": self._started}))
        content["run"] = {
            "schema": SCHEMA, "id": identity.hexdigest()[:16], "started": self._started, "ended": _now(), "command": self._command,
            "stage": self._settings.stage, "settings": self._settings.given, "configuration": self._settings.to_dict(), "machine": machine(),
            "deterministic": True, "generator": "Philox, counter-based: drawn from (seed, place), not from a state", "inputs": self._inputs,
            "counts": dict(counts), "metrics": dict(metrics), "weights_sha256": _weights(content["files"])}
        atomic.write_bytes(path, strict_json.dump_object(content))
        run: dict[str, Any] = content["run"]
        return run


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a run, from a manifest or the directory that has it. Raises FormatError, FileNotFoundError."""
    path = Path(path)
    path = path / atomic.MANIFEST if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; want the manifest.json of a directory that `stllava sft` or `stllava dpo` wrote")
    run = strict_json.read_object(path).get("run")
    if not isinstance(run, dict):
        raise FormatError(f"{path}: has no record of a run; the output directory of a finished `stllava sft` or `stllava dpo` has one", path=path)
    wanted = {"schema": int, "stage": str, "settings": dict, "inputs": dict, "weights_sha256": str}
    if bad := [key for key, kind in wanted.items() if not isinstance(run.get(key), kind)]:
        raise FormatError(f"{path}: run.{bad[0]} is {run.get(bad[0])!r}, want {wanted[bad[0]].__name__}", path=path, field=f"run.{bad[0]}")
    if run["schema"] != SCHEMA or run["stage"] not in ("sft", "dpo"):
        raise FormatError(f"{path}: a run of schema {run['schema']} and stage {run['stage']!r}; this version knows schema {SCHEMA}, sft and dpo",
                          path=path)
    return run


def hash_inputs(settings: Mapping[str, Any], images: Iterable[object] = ()) -> dict[str, Any]:
    """Setting -> its file, or the files of its directory -> sha256, for what the run reads; "images": how many, and one sha256 over those of each.

    A name that is no path here (a tower that the checkpoint holds) is left out. images: what records call their pictures; one that is in the record
    is in that file's hash, one that cannot be read is counted only.
    """
    found: dict[str, Any] = {}
    for name in INPUTS:
        path = settings.get(name)
        if path and Path(path).exists():
            root = Path(path)
            files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file() and _is_input(file.relative_to(root)))
            top = root if root.is_dir() else root.parent
            found[name] = {"path": str(path), "files": {file.relative_to(top).as_posix(): atomic.file_entry(file)["sha256"] for file in files}}
    found["images"] = _hash_images(ImageStore(settings.get("image_folder")), images)
    return found


def _hash_images(store: ImageStore, images: Iterable[object]) -> dict[str, Any]:
    names = sorted({name for entry in images for name in (entry if isinstance(entry, list) else [entry]) if isinstance(name, str)})
    hashes = []
    for name in names:
        with suppress(ImageError):
            hashes.append(hashlib.sha256(store.read(name)).hexdigest())
    return {"names": len(names), "files": len(hashes), "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest()}


def check_inputs(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises FormatError where a run would read something else than was recorded."""
    for name in recorded.keys() | now.keys():
        if recorded.get(name) == now.get(name):
            continue
        if name == "images":
            raise FormatError(f"images are not those of the recorded run: {now[name]['files']} files now, {recorded[name]['files']} then; put "
                              "them back where they were", field="image_folder")
        before, after = (side.get(name, {}).get("files", {}) for side in (recorded, now))
        changed = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
        raise FormatError(f"{name} {recorded.get(name, now.get(name))['path']}: not what the recorded run read: {', '.join(changed[:5])} "
                          f"{'is' if len(changed) == 1 else 'are'} missing, new or changed; put it back, or train anew", field=name)


def machine() -> dict[str, Any]:
    """Versions and processor; no name of the machine."""
    import stllava_c
    from stllava.doctor import doctor
    facts = doctor()
    return {"python": facts["python"], "system": platform.system(), "machine": platform.machine(), "cpu": _cpu(), "threads": facts["threads"],
            "build": {key: value for key, value in stllava_c.build_info().items() if isinstance(value, (str, int, bool, type(None)))},
            "packages": {name: version for name, version in facts["packages"].items() if version is not None}}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _weights(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash over names and contents of the result's weight files."""
    lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()) if name.endswith(WEIGHTS)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_input(file: Path) -> bool:
    """Not the checkpoints of a run, its logs and what is hidden."""
    return not any(part.startswith((".", "checkpoint-")) for part in file.parts) and file.name not in ("log.jsonl", atomic.MANIFEST)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
