"""Lets one allocation of the core fail, or all from one on."""

from __future__ import annotations

from collections.abc import Callable

from stllava_c import _core


def failing(call: Callable[[], object], n: int, forever: bool) -> MemoryError | None:
    """What the call raises when the core's n-th allocation (1: the first) fails; None if it succeeds."""
    _core._fail_allocation(n, forever)
    try:
        call()
    except MemoryError as error:
        return error.with_traceback(None)
    finally:
        _core._fail_allocation(0)
    return None
