"""Weights of one directory: a single file, or numbered shards with an index.

    model.safetensors | model-00001-of-0000n.safetensors + model.safetensors.index.json
    pytorch_model.bin | pytorch_model-00001-of-0000n.bin + pytorch_model.bin.index.json

The index is {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}. It and the shards must agree exactly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from stllava.checkpoint import atomic, safetensors_file, strict_json, torch_zip
from stllava.checkpoint.tensor_file import Tensor, TensorFile
from stllava.errors import FormatError
from stllava.limits import MAX_SHARDS
from stllava.paths import inside

Format = Literal["safetensors", "bin"]
DEFAULT_SHARD_BYTES = 5 * 10**9
_STEMS: dict[str, str] = {"safetensors": "model", "bin": "pytorch_model"}


def read_file(path: str | os.PathLike[str]) -> TensorFile:
    """One weight file of either kind, told apart by its ending."""
    return torch_zip.load(path) if Path(path).suffix == ".bin" else safetensors_file.read(path)


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """One weight file of either kind, told apart by its ending."""
    if Path(path).suffix == ".bin":
        torch_zip.save(path, tensors)
    else:
        safetensors_file.write(path, tensors)


def has_weights(directory: str | os.PathLike[str]) -> bool:
    """True if the directory holds full weights (whole or sharded) under one of the four usual names."""
    return _find(Path(directory)) is not None


def read_weights(directory: str | os.PathLike[str]) -> list[TensorFile]:
    """All weight files of a directory, safetensors preferred as Hugging Face does, checked for completeness.

    Raises FormatError: no weights, missing shard, tensor of the index missing in its file, tensor in a file that the
    index does not list there, file outside the directory.
    """
    directory = Path(directory)
    found = _find(directory)
    if found is None:
        raise FormatError(f"{directory}: no weights; want one of {', '.join(_candidates())}", path=directory)
    return [read_file(found)] if found.suffix != ".json" else _read_shards(found)


def _candidates() -> list[str]:
    return [name for kind, stem in _STEMS.items() for name in (f"{stem}.{kind}", f"{stem}.{kind}.index.json")]


def _find(directory: Path) -> Path | None:
    return next((directory / name for name in _candidates() if (directory / name).exists()), None)


def _read_shards(index_path: Path) -> list[TensorFile]:
    weight_map = strict_json.read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path}: want a table 'weight_map' {{tensor: file}}", path=index_path, field="weight_map")
    tensors_of: dict[str, set[str]] = {}
    for tensor, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise FormatError(f"{index_path}: tensor {tensor}: file {str(file_name)[:120]!r} lies outside the directory: it is no name",
                              path=index_path, field=tensor)
        tensors_of.setdefault(file_name, set()).add(tensor)
        if len(tensors_of) > MAX_SHARDS:
            raise FormatError(f"{index_path}: more than {MAX_SHARDS} files", path=index_path, field="weight_map")
    paths = {}
    for file_name in sorted(tensors_of):
        path = paths[file_name] = _shard_path(index_path, file_name)
        if not path.exists():
            raise FormatError(f"{index_path}: shard {file_name} is missing; copy or download it again", path=index_path,
                              field=file_name)
    shards = []
    for file_name, path in paths.items():
        shard, listed = read_file(path), tensors_of[file_name]
        if missing := sorted(listed - set(shard)):
            raise FormatError(f"{shard.path}: {len(missing)} tensors that {index_path.name} lists are not in this file, first "
                              f"{missing[0]}", path=shard.path, field=missing[0])
        if surplus := sorted(set(shard) - listed):
            raise FormatError(f"{shard.path}: {len(surplus)} tensors that {index_path.name} does not list for this file, first "
                              f"{surplus[0]}", path=shard.path, field=surplus[0])
        shards.append(shard)
    return shards


def _shard_path(index_path: Path, file_name: str) -> Path:
    """A shard is a plain name beside the index. A link may lead to the blobs folder of a Hugging Face cache only."""
    directory = index_path.parent
    snapshots = directory.resolve().parent
    blobs = [snapshots.parent / "blobs"] if snapshots.name == "snapshots" else []
    try:
        path = inside(directory, file_name, blobs)
    except FormatError as error:
        raise FormatError(f"{index_path}: {error}", path=index_path, field=file_name) from error
    if path.parent != directory or path.suffix not in (".safetensors", ".bin"):
        raise FormatError(f"{index_path}: file {file_name[:120]!r} lies outside the directory, or is neither .safetensors nor .bin",
                          path=index_path, field=file_name)
    return path


def write_weights(directory: str | os.PathLike[str], tensors: Mapping[str, Tensor],
                  shard_size: int = DEFAULT_SHARD_BYTES, format: Format = "safetensors") -> list[Path]:
    """Write tensors in the order given, opening a new shard when the next tensor would pass `shard_size` bytes.

    One shard is written without an index under the plain name. A tensor larger than the limit gets a shard of its own.
    Returns the paths of the weight files.
    """
    directory = Path(directory)
    if format not in _STEMS:
        raise ValueError(f"format {format!r}: want one of {', '.join(_STEMS)}")
    if shard_size <= 0:
        raise ValueError(f"shard_size {shard_size}: want a positive number of bytes")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    stem, n = _STEMS[format], len(shards)
    names = [f"{stem}.{format}"] if n == 1 else [f"{stem}-{k:05d}-of-{n:05d}.{format}" for k in range(1, n + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        write_file(directory / file_name, shard)
    if n > 1:
        weight_map = {tensor: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic.write_bytes(directory / f"{stem}.{format}.index.json", strict_json.dump_object(index))
    return [directory / file_name for file_name in names]
