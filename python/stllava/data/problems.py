"""What is wrong with records, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stllava.errors import StllavaError

__all__ = ["SHOWN", "DataError", "Problem", "listed"]

SHOWN = 20
"""Problems printed in full."""


class DataError(StllavaError, ValueError):
    """Records that cannot be trained on; `problems` has all of them."""

    def __init__(self, message: str, problems: list[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Problem:
    """`row` counts from 0. `kind` is a short name for counting, `text` says what was found and what is wanted."""

    row: int
    id: str
    kind: str
    text: str


def listed(problems: Sequence[Problem]) -> str:
    """A line for each of the first `SHOWN`, and how many more there are."""
    lines = [f"  row {p.row} (id {p.id}): {p.text}" for p in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join(lines)
