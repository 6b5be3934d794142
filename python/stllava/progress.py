"""The bar of long work: how far, how fast, how long yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int, *, label: str, unit: str, done: int = 0, show: bool = True) -> tqdm[Any]:
    """A context manager with `update()` and `set_postfix()`. `total`, `done`: units of the whole work, and of it before this process."""
    from tqdm import tqdm  # not above: it costs as much as NumPy, and a step that no one watches does not need it

    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=not show, dynamic_ncols=True)
