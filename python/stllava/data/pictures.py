"""Image names -> pixels, each read once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np

from stllava.image_source import ImageError, split_choice
from stllava.images import ImageProcessor

from .image_store import ImageStore

__all__ = ["Pictures", "picture_key"]


class Pictures:
    """Preprocessed pictures of one folder or archive, the most recently used kept in memory (`cache_bytes`)."""

    def __init__(self, folder: str | Path | None, processor: ImageProcessor, cache_bytes: int = 256 << 20) -> None:
        self.store = ImageStore(folder)
        self.processor = processor
        self._room = cache_bytes
        self._kept: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, name: object, key: Hashable | None = None) -> np.ndarray:
        """(3, S, S) float32 of a name, or of a picture inside a record. key: its `picture_key`, where known. Raises ImageError naming the file."""
        source, key = self.store.source(name), picture_key(name) if key is None else key
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pixels = self.processor(source)
        with self._lock:
            if key not in self._kept:
                self._room -= pixels.nbytes
                self._kept[key] = pixels
                while self._room < 0 and len(self._kept) > 1:
                    self._room += self._kept.popitem(last=False)[1].nbytes
        return pixels


def picture_key(image: object) -> Hashable:
    """Equal for equal pictures: the name, or a digest of the bytes in a record and what is chosen in them. Raises ImageError for what is neither."""
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        return "embedded", hashlib.blake2b(image["bytes"], digest_size=16).hexdigest(), split_choice(str(image.get("path")))[1]
    if not isinstance(image, Hashable):
        raise ImageError(f"image {str(image)[:120]!r} is a {type(image).__name__}, want a file name, or {{bytes, path}}")
    return image
