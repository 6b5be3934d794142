"""One record per item, appended to a JSON-lines file that can be continued, and a seed for every item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from stllava.checkpoint.atomic import appending, write_bytes
from stllava.checkpoint.lock import run_lock
from stllava.errors import FormatError
from stllava.progress import progress_bar

from .records import read_jsonl

__all__ = ["item_seed", "run_step"]

Item = TypeVar("Item")


def item_seed(seed: int, *key: object) -> int:
    """A 64-bit seed from (run seed, item): the same whatever the order or the batch an item is computed in (spec D38)."""
    text = "\x1f".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def run_step(items: Iterable[Item], key: Callable[[Item], str | int], work: Callable[[list[Item]], Iterator[dict[str, Any]]], *,
             out: str | Path | None = None, batch_size: int, label: str, progress: bool = True, field: str = "id",
             group: Callable[[Item], Hashable] | None = None, check: Callable[[Item, dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
    """Applies `work` to batches of items and returns one record per item, in the order of the items.

    `work` yields a record per item of its batch, in order; `key` names an item. With `out`, records are appended to that file as they come, and items
    whose key (in `field`) is there already are not computed again.

    group: items with the same value share work. They come into one batch, where they are no more than `batch_size`, and the finished file is brought
    into the order of the items; records of other items that it held before come first. check: called with an item and the record that `out` has of
    it; raises if that is another run's.

    Raises:
        LockedError: another run appends to the file. FormatError: the file holds something else. OSError: it cannot be written; what it holds stays.
    """
    items = list(items)
    with ExitStack() as stack:
        done: dict[str | int, dict[str, Any]] = {}
        lines = file = None
        if out is not None:
            stack.enter_context(run_lock(out))
            if Path(out).exists():
                done = {_key_of(row, field, out): row for row in read_jsonl(out, cut_off=True)}
            lines = stack.enter_context(ExitStack())
            file = lines.enter_context(appending(out))
        before = list(done)
        for item in items:
            if check is not None and key(item) in done:
                check(item, done[key(item)])
        todo = [item for item in items if key(item) not in done]
        bar = stack.enter_context(progress_bar(len(items), label=label, unit="item", done=len(items) - len(todo), show=progress))
        for batch in _batches(todo, batch_size, group):
            for item, record in zip(batch, work(batch), strict=True):
                done[key(item)] = record
                if file is not None:
                    file.write(json.dumps(record) + "\n")
            bar.update(len(batch))
        keys = [key(item) for item in items]
        if out is not None and lines is not None and group is not None:
            lines.close()
            wanted = [*(name for name in before if name not in set(keys)), *dict.fromkeys(keys)]
            if wanted != list(done):
                write_bytes(out, "".join(json.dumps(done[name]) + "\n" for name in wanted).encode())
    return [done[name] for name in keys]


def _key_of(row: Any, field: str, path: str | Path) -> str | int:
    name = row.get(field) if isinstance(row, dict) else None
    if not isinstance(name, (str, int)):
        raise FormatError(f"{path}: a line without {field!r}: {json.dumps(row)[:120]}; was it written by another step?", path=path, field=field)
    return name


def _batches(items: list[Item], batch_size: int, group: Callable[[Item], Hashable] | None) -> Iterator[list[Item]]:
    groups: dict[Hashable, list[Item]] = {}
    for number, item in enumerate(items):
        groups.setdefault(number if group is None else group(item), []).append(item)
    batch: list[Item] = []
    for members in groups.values():
        if batch and len(batch) + len(members) > batch_size:
            yield batch
            batch = []
        batch = batch + members
        while len(batch) > batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch
