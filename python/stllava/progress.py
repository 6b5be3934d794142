"""The bar of long work: how far, how fast, how long yet. A line of text in a terminal, one element that changes in a notebook."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["in_notebook", "progress_bar"]


def progress_bar(total: int, *, label: str, unit: str, done: int = 0, show: bool = True) -> tqdm[Any]:
    """A context manager with `update()` and `set_postfix()`. `total`, `done`: units of the whole work, and of it before this process."""
    if show and in_notebook():
        from stllava.notebook import NotebookBar
        return NotebookBar(total=total, initial=done, desc=label, unit=unit)
    from tqdm import tqdm  # not above: it costs as much as NumPy, and a step that no one watches does not need it

    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=not show, dynamic_ncols=True)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs us, which shows elements; an IPython terminal does not."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
