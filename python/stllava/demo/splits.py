"""Which part of each picture belongs to training, validation and test.

Every picture here comes from very few subjects, so the split is by *position*, not by subject: a held-out image shows anatomy
that lies between training slices of the same head. Numbers measured on it say that the method learns, not how it would do on
another patient.

Volumes are cut along the slice axis into blocks of 16 mm:

    mm in the block   0 ........ 10 | 11    | 12 13 14 | 15
                      training      | guard | held out | guard

The held-out part of every third block is validation, the others are test. A guard millimetre on each side keeps neighbouring,
nearly equal slices apart. Wide 2-D pictures give their left 62 % to training and their right 34 % to held-out images (upper
part test, lower part validation); the echo cine is cut by frame number. Four pictures (CT, abdomen, Doppler, cell) are too
small to cut: all splits crop the same picture, so questions about them measure memorisation, and nothing else.
"""

from __future__ import annotations

from typing import Literal

Region = Literal["train", "val", "test"]

SPLITS = ("base", "sft", "unlabelled", "val", "test")

BLOCK_MM = 16
TRAIN_MM = 11
HELD_OUT_MM = (12, 15)

# Width and height shares (left, upper, right, lower) of a wide 2-D picture.
PICTURE_SHARES: dict[Region, tuple[float, float, float, float]] = {
    "train": (0.0, 0.0, 0.62, 1.0),
    "test": (0.66, 0.0, 1.0, 0.58),
    "val": (0.66, 0.62, 1.0, 1.0),
}

ECHO_FRAMES: dict[Region, range] = {"train": range(18), "val": range(19, 22), "test": range(23, 30)}


def region_of_split(split: str) -> Region:
    """base, sft and unlabelled images are cut from training positions; val and test have their own."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    return "val" if split == "val" else "test" if split == "test" else "train"


def region_of_position(position_mm: float, *, val_block: int) -> Region | None:
    """The region of a slice `position_mm` millimetres from the start of its axis; None in a guard.

    `val_block` (0..2) says which of three consecutive blocks gives its held-out part to validation.
    """
    block, offset = divmod(position_mm, BLOCK_MM)
    if offset < TRAIN_MM:
        return "train"
    if HELD_OUT_MM[0] <= offset < HELD_OUT_MM[1]:
        return "val" if block % 3 == val_block else "test"
    return None
