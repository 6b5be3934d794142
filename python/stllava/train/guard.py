"""Proof that every trainable tensor really trains: it gets a gradient, and it moves. (The original's vision adapters never did: spec D1.)"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from stllava.errors import StllavaError
from stllava.model import LlavaModel

__all__ = ["TrainingGuard", "UntrainedError"]

PATIENCE = 5  # updates within which a gradient must have come


def _watched(names: Iterable[str], updates: int) -> list[str]:
    """An adapter's A has no gradient until its B has moved, and the first update of a warm-up moves nothing: shorter runs prove nothing of it."""
    return [name for name in names if updates >= PATIENCE or ".lora_A." not in name]


class UntrainedError(StllavaError):
    """A trainable tensor received no gradient, or did not move."""


class TrainingGuard:
    """Watches the first updates. Tensors no output depends on are not watched."""

    def __init__(self, model: LlavaModel, *, allow: bool) -> None:
        infos = model.tensor_infos()
        self._model = model
        self._allow = allow
        self._where = {name: where for name, where in model.trainable_slices().items() if infos[name].influences}
        self._silent = set(self._where)
        theta = model.theta
        self._before = {name: zlib.crc32(theta[where].tobytes()) for name, where in self._where.items()}

    def after_backward(self, step: int, total: int) -> None:
        """Looks at the gradients of update `step`; raises UntrainedError when patience is over."""
        if not self._silent:
            return
        grad = self._model.grad
        self._silent = {name for name in self._silent if not grad[self._where[name]].any()}
        late = _watched(self._silent, min(PATIENCE, total))
        if step + 1 == min(PATIENCE, total) and late:
            self._fail(sorted(late), "received no gradient")

    def at_end(self, updates: int) -> None:
        """Looks whether every tensor moved. One update at rate 0 (the first of a warm-up) moves nothing, so two are needed."""
        if updates < 2:
            return
        theta = self._model.theta
        still = [name for name in _watched(self._where, updates) if zlib.crc32(theta[self._where[name]].tobytes()) == self._before[name]]
        if still:
            self._fail(still, "did not move")

    def _fail(self, names: list[str], what: str) -> None:
        if not self._allow:
            raise UntrainedError(f"{len(names)} trainable tensors {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}. "
                                 "Freeze them, or set allow_untrained=True if the data cannot reach them.")
