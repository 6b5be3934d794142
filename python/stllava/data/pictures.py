"""Image files -> pixels, each read once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from stllava.errors import FormatError
from stllava.images import ImageError, ImageProcessor
from stllava.paths import inside

__all__ = ["Pictures"]


class Pictures:
    """Preprocessed pictures of one folder, the most recently used kept in memory (`cache_bytes`)."""

    def __init__(self, folder: str | Path | None, processor: ImageProcessor, cache_bytes: int = 256 << 20) -> None:
        self.folder = Path(folder) if folder is not None else Path()
        self.processor = processor
        self._room = cache_bytes
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, name: object) -> Path:
        """Where the picture lies, which must be in the folder. Raises ImageError."""
        try:
            return inside(self.folder, name)
        except FormatError as error:
            raise ImageError(str(error), path=self.folder) from error

    def __call__(self, name: object) -> np.ndarray:
        """(3, S, S) float32. Raises ImageError naming the file."""
        if not isinstance(name, str):
            raise ImageError(f"image {str(name)[:120]!r} is a {type(name).__name__}, want a file name")
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        pixels = self.processor(self.path(name))
        with self._lock:
            if name not in self._kept:
                self._room -= pixels.nbytes
                self._kept[name] = pixels
                while self._room < 0 and len(self._kept) > 1:
                    self._room += self._kept.popitem(last=False)[1].nbytes
        return pixels
