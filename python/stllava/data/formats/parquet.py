"""Parquet as Hugging Face `datasets` writes it: rows with images inside ({bytes, path}) or by name. Extra: parquet (pyarrow)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stllava.errors import FormatError
from stllava.limits import MAX_DATA_BYTES, MAX_IMAGE_BYTES
from stllava.paths import read_head

__all__ = ["parquet_fields", "pyarrow", "read_parquet"]

BATCH_ROWS = 64


def pyarrow() -> Any:
    """The package with `parquet` imported. Raises ImportError in one line."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'stllava[parquet]'") from error
    return importlib.import_module("pyarrow")


def read_parquet(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows one after the other, a few at a time in memory. Fields without a value (null) are left out, an image with a name alone becomes the name.

    Raises:
        FormatError: damaged, or larger than the limits. ImportError: no pyarrow.
    """
    pa = pyarrow()
    read_head(path, 4)  # a regular file
    n_bytes = 0
    try:
        with pa.parquet.ParquetFile(path, thrift_string_size_limit=100 << 20, thrift_container_size_limit=1 << 20) as file:
            _check_sizes(file, path)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                n_bytes += batch.nbytes
                if n_bytes > MAX_DATA_BYTES:
                    raise FormatError(f"{path}: more than {MAX_DATA_BYTES} bytes of values", path=path)
                for row in batch.to_pylist():
                    yield {key: _image(value, path) if key in ("image", "images") else value for key, value in row.items() if value is not None}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, FormatError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise FormatError(f"{path}: not a readable Parquet file: {str(error)[:300]}", path=path) from error


def parquet_fields(path: str | Path) -> list[str]:
    pa = pyarrow()
    try:
        return list(pa.parquet.read_schema(path).names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError(f"{path}: not a readable Parquet file: {str(error)[:300]}", path=path) from error


def _check_sizes(file: Any, path: str | Path) -> None:
    """The sizes that the file announces for itself, before anything is unpacked."""
    metadata = file.metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if any(size < 0 for size in sizes) or sum(sizes) > MAX_DATA_BYTES:
        raise FormatError(f"{path}: announces {sum(sizes)} bytes of values, limit {MAX_DATA_BYTES}", path=path)


def _image(value: Any, path: str | Path) -> Any:
    if isinstance(value, list):
        return [_image(one, path) for one in value]
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        if value.get("bytes") is None:
            return value.get("path")
        if len(value["bytes"]) > MAX_IMAGE_BYTES:
            raise FormatError(f"{path}: an image of {len(value['bytes'])} bytes, limit {MAX_IMAGE_BYTES}", path=path)
        return {"bytes": value["bytes"], "path": value.get("path")}
    return value
