"""LLaVA's preprocessing: Pillow, expand2square, transformers' CLIPImageProcessor (on Pillow; torchvision is not needed). A worker."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from cases import PICTURE, PICTURE_SIZE
from PIL import Image
from transformers import CLIPImageProcessor
from worker import serve


def expand_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def picture_step() -> Callable[[], float]:
    data = PICTURE.read_bytes()
    processor = CLIPImageProcessor(size={"shortest_edge": PICTURE_SIZE}, crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE})
    background = tuple(int(255 * mean) for mean in processor.image_mean)

    def step() -> float:
        image = expand_to_square(Image.open(io.BytesIO(data)).convert("RGB"), background)
        return float(np.abs(processor(image, return_tensors="np")["pixel_values"]).mean())

    return step


if __name__ == "__main__":
    serve(picture_step)
