"""Parquet as Hugging Face `datasets` writes it: rows with images inside ({bytes, path}) or by name. Extra: parquet (pyarrow)."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stllava.errors import ConfigError, FormatError
from stllava.image_source import byte_limit
from stllava.limits import MAX_DATA_BYTES, MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE
from stllava.paths import read_head

__all__ = ["encode_parquet", "pyarrow", "read_parquet"]

BATCH_ROWS = 8
ROW_GROUP_ROWS = 100
"""As `datasets` has it where images are inside: a group is what a reader unpacks at once."""


def pyarrow() -> Any:
    """The package with `parquet` imported. Raises ConfigError: it is not there."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError("Parquet files need the package pyarrow: pip install 'stllava[parquet]'") from error
    return importlib.import_module("pyarrow")


def read_parquet(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows one after the other, a few at a time in memory. Fields without a value (null) are left out, an image with a name alone becomes the name.

    Raises:
        FormatError: damaged, or larger than the limits. ConfigError: no pyarrow.
    """
    pa = pyarrow()
    read_head(path, 4)  # a regular file
    limit, n_bytes = min(MAX_DATA_BYTES, max(MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE * os.path.getsize(path))), 0
    try:
        with pa.parquet.ParquetFile(path, thrift_string_size_limit=100 << 20, thrift_container_size_limit=1 << 20) as file:
            _check_sizes(file, path, limit)
            for field in file.schema_arrow:
                if not _is_plain(pa, field.type):
                    raise FormatError(f"{path}: field {field.name!r} is of the type {str(field.type)[:100]}, want text, numbers, bytes, lists or "
                                      "structs", path=path, field=field.name)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                batch = _decoded(pa, batch)
                n_bytes += batch.nbytes
                if n_bytes > limit:
                    raise _bomb(path, limit)
                for row in batch.to_pylist():
                    yield {key: _image(value, path) if key in ("image", "images") else value for key, value in row.items() if value is not None}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, FormatError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise FormatError(f"{path}: not a readable Parquet file: {str(error)[:300]}", path=path) from error


def _is_plain(pa: Any, kind: Any, inside: bool = False) -> bool:
    """Are its values all there? Dictionaries are, in a column of their own; views and runs share one value among many rows, however long it is."""
    types = pa.types
    if types.is_struct(kind):
        return all(_is_plain(pa, field.type, True) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(pa, kind.value_type, True)
    if types.is_dictionary(kind):
        return not inside and _is_plain(pa, kind.value_type, True)
    plain = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_temporal, types.is_string,
             types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in plain)


def _decoded(pa: Any, batch: Any) -> Any:
    columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _bomb(path: str | Path, limit: int) -> FormatError:
    return FormatError(f"{path}: unpacks to more than {limit} bytes, the limit for a file of its size", path=path)


def _check_sizes(file: Any, path: str | Path, limit: int) -> None:
    """The sizes that the file announces for itself, before anything is unpacked."""
    metadata = file.metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if any(size < 0 for size in sizes) or sum(sizes) > limit:
        raise _bomb(path, limit)


def _image(value: Any, path: str | Path) -> Any:
    if isinstance(value, list):
        return [_image(one, path) for one in value]
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        if value.get("bytes") is None:
            return value.get("path")
        if len(value["bytes"]) > (limit := byte_limit(value["bytes"])):
            raise FormatError(f"{path}: an image of {len(value['bytes'])} bytes, limit {limit}", path=path)
        return {"bytes": value["bytes"], "path": value.get("path")}
    return value


def encode_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """The rows as a Parquet file, columns in the order of their first appearance, missing fields null.

    A column has one type: ids that are partly text become text; images that are partly names become {bytes, path}. `datasets` is told which columns
    are images. Raises FormatError naming the field of any other mixture.
    """
    pa = pyarrow()
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, Any] = {}
    images: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name in ("id", "question_id") and {type(value) for value in values} >= {int, str}:
            values = [value if value is None else str(value) for value in values]
        kind = None
        if name in ("image", "images"):
            values, feature = _image_column(values)
            if feature is not None:
                images[name] = feature
                kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                kind = pa.list_(kind) if "feature" in feature else kind
        try:
            columns[name] = pa.array(values, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"field {name!r} has values of different types, which no Parquet column holds: {str(error)[:200]}",
                              field=name) from error
    table = pa.table(columns)
    if images:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": images}})})
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, row_group_size=ROW_GROUP_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _image_column(values: list[Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """Values of one type, and what `datasets` calls it where the images are inside."""
    lists = any(isinstance(value, list) for value in values)
    values = [[value] if lists and value is not None and not isinstance(value, list) else value for value in values]
    inside = any(isinstance(image, dict) for value in values for image in (value if isinstance(value, list) else [value]))
    if not inside:
        return values, None

    def stored(image: Any) -> Any:
        return {"bytes": None, "path": image} if isinstance(image, str) else image

    values = [[stored(one) for one in value] if isinstance(value, list) else stored(value) for value in values]
    return values, {"feature": {"_type": "Image"}, "_type": "List"} if lists else {"_type": "Image"}
