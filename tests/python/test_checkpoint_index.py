"""index: sharded weights of both kinds, and every way in which index and shards can disagree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stllava.checkpoint import index, safetensors_file
from stllava.errors import FormatError

TENSORS = {name: np.full(8, k, np.float32) for k, name in enumerate("abcdef")}  # 32 bytes each


def read_all(directory: Path) -> dict[str, np.ndarray]:
    return {name: array for file in index.read_weights(directory) for name, array in file.items()}


def edit_index(directory: Path, **changes: object) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"].update(changes)
    path.write_text(json.dumps(content))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    index.write_weights(tmp_path, TENSORS, shard_size=64)
    return tmp_path


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shard_size, n_shards", [(192, 1), (191, 2), (96, 2), (64, 3), (63, 6), (1, 6)])
def test_round_trip_at_every_shard_size(tmp_path: Path, format: index.Format, shard_size: int, n_shards: int) -> None:
    paths = index.write_weights(tmp_path, TENSORS, shard_size, format)
    assert len(paths) == n_shards
    assert len(list(tmp_path.glob("*.index.json"))) == (n_shards > 1)
    found = read_all(tmp_path)
    assert sorted(found) == sorted(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)


def test_index_content(sharded: Path) -> None:
    content = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert content["metadata"] == {"total_size": 192}
    assert content["weight_map"]["c"] == "model-00002-of-00003.safetensors"


def test_safetensors_preferred_over_bin(sharded: Path) -> None:
    index.write_weights(sharded, {"other": np.zeros(1)}, format="bin")
    assert "a" in read_all(sharded)


def test_no_weights(tmp_path: Path) -> None:
    assert not index.has_weights(tmp_path)
    with pytest.raises(FormatError, match="no weights; want one of model.safetensors"):
        index.read_weights(tmp_path)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match="model-00002-of-00003.safetensors is missing"):
        read_all(sharded)


def test_tensor_of_the_index_not_in_its_file(sharded: Path) -> None:
    edit_index(sharded, ghost="model-00001-of-00003.safetensors")
    with pytest.raises(FormatError, match="00001-of-00003.*not in this file, first ghost"):
        read_all(sharded)


def test_tensor_listed_for_another_shard(sharded: Path) -> None:
    edit_index(sharded, a="model-00002-of-00003.safetensors")
    with pytest.raises(FormatError, match="first a"):
        read_all(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    safetensors_file.write(sharded / "model-00003-of-00003.safetensors", {name: TENSORS[name] for name in "aef"})
    with pytest.raises(FormatError, match="does not list for this file, first a"):
        read_all(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", 3, None,
                                  "a\\b.safetensors", "x\0.safetensors"])
def test_file_outside_the_directory(sharded: Path, name: object) -> None:
    edit_index(sharded, a=name)
    with pytest.raises(FormatError, match="outside the directory"):
        read_all(sharded)


def test_link_out_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    index.write_weights(tmp_path / "in", TENSORS, shard_size=64)
    shard = tmp_path / "in" / "model-00001-of-00003.safetensors"
    shard.rename(tmp_path / "secret.safetensors")
    shard.symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(FormatError, match="outside the directory"):
        read_all(tmp_path / "in")


def test_links_of_a_hugging_face_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "rev", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for k, path in enumerate(index.write_weights(snapshot, TENSORS, shard_size=64)):
        path.rename(blobs / str(k))
        path.symlink_to(Path("..") / ".." / "blobs" / str(k))
    assert sorted(read_all(snapshot)) == sorted(TENSORS)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "x.exe"}}',
                                     '{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "{"])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError):
        read_all(tmp_path)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format 'gguf'"):
        index.write_weights(tmp_path, TENSORS, format="gguf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard_size 0"):
        index.write_weights(tmp_path, TENSORS, shard_size=0)
