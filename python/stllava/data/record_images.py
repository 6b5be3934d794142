"""The images of records as training needs them: a key for each, equal for equal images, and its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stllava.image_source import ImageError, split_choice
from stllava.images import ImageProcessor

from .formats import images_of
from .pictures import Pictures

__all__ = ["RecordImages"]


class RecordImages:
    """Names are their own keys. An image inside a record, {"bytes", "path"} as `datasets` has it, has a digest of its bytes.

    Args:
        folder: where names start; None: in `data` where that is a directory, else here.
    """

    def __init__(self, folder: str | Path | None, processor: ImageProcessor, data: object = None) -> None:
        if folder is None and isinstance(data, (str, Path)) and Path(data).is_dir():
            folder = data
        self._pictures = Pictures(folder, processor)
        self._embedded: dict[Hashable, Any] = {}

    def keys(self, record: Mapping[str, Any]) -> tuple[Hashable, ...]:
        """One key per image of the record, in order. Raises ImageError for what is no image at all."""
        return tuple(self._key(image) for image in images_of(record))

    def _key(self, image: Any) -> Hashable:
        if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
            choice = split_choice(str(image.get("path")))[1]  # the frame or slice of a medical file
            key = ("embedded", hashlib.blake2b(image["bytes"], digest_size=16).hexdigest(), choice)
            self._embedded.setdefault(key, image)
            return key
        if not isinstance(image, Hashable):
            raise ImageError(f"image {str(image)[:120]!r} is a {type(image).__name__}, want a file name, or {{bytes, path}}")
        return image

    def pixels(self, key: Hashable) -> np.ndarray:
        """(3, S, S) float32. Raises ImageError naming the file."""
        return self._pictures(self._embedded.get(key, key))
