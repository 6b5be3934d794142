"""The images of records as training needs them: a key for each, equal for equal images, and its pixels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stllava.images import ImageProcessor

from .formats import images_of
from .pictures import Pictures, picture_key

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
        images = images_of(record)
        keys = tuple(picture_key(image) for image in images)
        for key, image in zip(keys, images, strict=True):
            if isinstance(image, Mapping):
                self._embedded.setdefault(key, image)
        return keys

    def pixels(self, key: Hashable) -> np.ndarray:
        """(3, S, S) float32. Raises ImageError naming the file."""
        return self._pictures(self._embedded.get(key, key), key)
