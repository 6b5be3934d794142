"""Preprocessing a picture against LLaVA's: Pillow, expand2square, CLIPImageProcessor. `bench_image.py`"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import PICTURE, PICTURE_SIZE
from harness import OURS, PEERS, Row, Worker, main, make_row, take_turns
from PIL import Image

WIDTH, HEIGHT = 1500, 1200


def make_picture() -> None:
    """Waves under noise: about as many bytes as a photograph."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = np.stack([127 + 80 * np.sin(x / 97 + c) * np.cos(y / 61 - c) for c in range(3)], axis=2)
    noisy = waves + np.random.default_rng(0).normal(0, 8, waves.shape)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(PICTURE, quality=90)


def preprocess_jpeg() -> Iterator[Row]:
    make_picture()
    with Worker(OURS, "ours.py", "picture") as ours, Worker(PEERS, "peers/hf_image.py") as peer:
        a, b = take_turns(ours, peer, rounds=7, repeat=20)
    yield make_row("preprocess_jpeg", f"{WIDTH}x{HEIGHT} JPEG to {PICTURE_SIZE}: decode, pad, bicubic, normalise", 1 / a.seconds, 1 / b.seconds,
                   "Pillow + CLIPImageProcessor", "images/s")


if __name__ == "__main__":
    main("image", {"preprocess_jpeg": preprocess_jpeg})
