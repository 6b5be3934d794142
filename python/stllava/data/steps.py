"""One record per item, appended to a JSON-lines file that can be continued, and a seed for every item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from stllava.checkpoint.atomic import appending
from stllava.checkpoint.lock import run_lock
from stllava.progress import progress_bar

from .records import read_jsonl

__all__ = ["item_seed", "run_step"]

Item = TypeVar("Item")


def item_seed(seed: int, *key: object) -> int:
    """A 64-bit seed from (run seed, item): the same whatever the order or the batch an item is computed in (spec D38)."""
    text = "\x1f".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def run_step(items: Iterable[Item], key: Callable[[Item], str], work: Callable[[list[Item]], Iterator[dict[str, Any]]], *,
             out: str | Path | None = None, batch_size: int, label: str, progress: bool = True) -> list[dict[str, Any]]:
    """Applies `work` to batches of items and returns one record per item, in the order of the items.

    `work` yields a record per item of its batch, in order; `key` names an item. With `out`, records are appended to that file as they come, and items
    whose key (field "id") is there already are not computed again.

    Raises:
        LockedError: another run appends to the file. FormatError: the file holds something else. OSError: it cannot be written; what it holds stays.
    """
    items = list(items)
    with ExitStack() as stack:
        done: dict[str, dict[str, Any]] = {}
        file = None
        if out is not None:
            stack.enter_context(run_lock(out))
            if Path(out).exists():
                done = {row["id"]: row for row in read_jsonl(out, cut_off=True)}
            file = stack.enter_context(appending(out))
        todo = [item for item in items if key(item) not in done]
        bar = stack.enter_context(progress_bar(len(items), label=label, unit="item", done=len(items) - len(todo), show=progress))
        for start in range(0, len(todo), batch_size):
            batch = todo[start:start + batch_size]
            for item, record in zip(batch, work(batch), strict=True):
                done[key(item)] = record
                if file is not None:
                    file.write(json.dumps(record) + "\n")
            bar.update(len(batch))
    return [done[key(item)] for item in items]
