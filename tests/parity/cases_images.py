"""Replays the recorded case `images`: 14 files, padded and cropped, at 56, 224 and 336 pixels, from the files alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from stllava.images import CLIP_MEAN, CLIP_STD, ImageProcessor, load_image

SIZES = (56, 224, 336)
FULL_TENSORS = 56  # the size whose results are recorded in full, besides EXTRA
EXTRA = ("retina_wide.jpg.pad336.uint8",)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _result(width: int, height: int, size: int, pad: bool, cropped: np.ndarray, pixels: np.ndarray) -> dict[str, Any]:
    padded = (max(width, height),) * 2 if pad else (width, height)
    wide = pixels.astype(np.float64)
    return {"padded_wh": list(padded), "resized_hw": [int(size * side / min(padded)) for side in reversed(padded)],
            "cropped_dtype": str(cropped.dtype), "cropped_sha256": _sha256(cropped), "cropped_sum": int(cropped.sum(dtype=np.int64)),
            "pixel_values_sum": float(wide.sum()), "pixel_values_sum_of_squares": float((wide * wide).sum()),
            "pixel_values_sha256": _sha256(pixels)}


def replay_images(case_dir: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors under the names of expected.safetensors; values {"images": [...]} with the fields of meta.json but `mode`.

    Crops of pictures of height 1 or 3 are left out: the reference mistook their rows for channels, so none is recorded.
    """
    tensors: dict[str, np.ndarray] = {}
    images = []
    for path in sorted((Path(case_dir) / "input").iterdir()):
        loaded = load_image(path, "compat")
        height, width = loaded.rgb.shape[:2]
        if path.suffix == ".jpg":
            tensors[f"{path.name}.rgb"] = loaded.rgb
        results = {}
        for size in SIZES:
            for aspect, case in (("pad", f"pad{size}"), ("square", f"crop{size}")):
                if aspect == "square" and height in (1, 3):
                    continue
                processor = ImageProcessor(size, CLIP_MEAN, CLIP_STD, aspect=aspect)
                cropped, pixels = processor.resize_crop(loaded), processor(loaded)
                results[case] = _result(width, height, size, aspect == "pad", cropped, pixels)
                for kind, tensor in (("uint8", cropped), ("pixel_values", pixels)):
                    name = f"{path.name}.{case}.{kind}"
                    if size == FULL_TENSORS or name in EXTRA:
                        tensors[name] = tensor
        images.append({"file": f"input/{path.name}", "size_wh": [width, height], "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                       "rgb_sha256": _sha256(loaded.rgb), "results": results})
    return tensors, {"images": images}
