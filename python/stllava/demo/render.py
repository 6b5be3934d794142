"""Draws one picture of the atlas together with its facts.

What image number `index` of a split looks like depends on (seed, split, index) alone: each image has its own counter-based
random stream, so a larger data set begins with the images of a smaller one.

Brain slices are shown in the radiological way: the patient's right at the left of axial and coronal slices, front up in axial
slices, top up in the others, front to the left in sagittal ones. Sources are averaged over about one picture element before they
are sampled, so that fine detail does not alias.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFilter

from .anatomy import AXES, Anatomy
from .questions import COLOURS, QUADRANTS, Facts
from .splits import ECHO_FRAMES, PICTURE_SHARES, Region, region_of_position, region_of_split
from .volumes import Pictures, t2_like

__all__ = ["Renderer", "stream"]

T = TypeVar("T")

# What an image shows, with its share. 62 % are brain slices.
KINDS = {
    "T1": 0.24, "T2": 0.19, "GM": 0.08, "WM": 0.05, "EPI": 0.06,
    "retina": 0.08, "ihc": 0.07, "cell": 0.05, "ct": 0.05, "abdomen": 0.05, "doppler": 0.04, "echo": 0.04,
}  # fmt: skip

# By its tags the abdomen is a T1-weighted gradient echo (TR 5.5 ms, TE 2.8 ms, contrast agent); it and the CT are axial.
FACTS = {
    "T1": Facts("T1 MRI", "brain"),
    "T2": Facts("T2 MRI", "brain"),
    "GM": Facts("grey matter map", "brain"),
    "WM": Facts("white matter map", "brain"),
    "EPI": Facts("EPI MRI", "brain", "axial"),
    "retina": Facts("fundus photograph", "eye"),
    "ihc": Facts("histology", "colon"),
    "cell": Facts("microscopy", "cell"),
    "ct": Facts("CT", "spine", "axial"),
    "abdomen": Facts("T1 MRI", "abdomen", "axial"),
    "doppler": Facts("ultrasound", "lymph node"),
    "echo": Facts("ultrasound", "heart"),
}

# Slice positions in MNI mm: the ends of each axis, where the brain is a small disc, are left out. Starts and `VAL_BLOCK` are so
# chosen that validation and test both hold slices with and without each structure, and few whose answer is uncertain.
SLICES_MM = {"sagittal": (-64, 64), "coronal": (-100, 58), "axial": (-60, 64)}
VAL_BLOCK = {"sagittal": 0, "coronal": 2, "axial": 0}
EPI_VAL_BLOCK = 2

# Centre of the brain and field of view, mm.
CENTRE_MM = (0.0, -17.0, 6.0)
FIELD_MM = 205.0

# Side of a crop from a 2-D picture as a share of the shorter side of what may be cropped. Fundus and histology crops have a
# fixed size in pixels instead, the same for the wide training part and the narrow held-out part.
CROP_SHARE = (0.72, 1.0)
CROP_PIXELS = {"retina": (90, 140), "ihc": (100, 160)}

_GREYS = np.arange(256) / 255

MARKER_SHARE = 0.58
MARKER_RGB = {"red": (235, 30, 30), "green": (30, 210, 50), "blue": (40, 80, 255), "yellow": (250, 230, 30)}


def stream(seed: int, purpose: str, split: str, index: int) -> np.random.Generator:
    """The random stream of one image for one purpose ("image", "questions", …)."""
    key = hashlib.blake2b(f"{purpose}/{split}/{index}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=[seed, int.from_bytes(key, "little")]))


@dataclass(frozen=True, slots=True)
class _View:
    """A picture to sample from: pixel pitch in mm is 1 unless `pitch` (x, y) says otherwise."""

    image: Image.Image
    centre: tuple[float, float]
    pitch: tuple[float, float] = (1.0, 1.0)


class Renderer:
    """Draws images of `size` x `size` pixels."""

    def __init__(self, pictures: Pictures, *, seed: int, size: int = 64) -> None:
        self.seed, self.size = seed, size
        self._pictures = pictures
        self._anatomy = Anatomy.from_pictures(pictures)
        self._views: dict[tuple[object, ...], _View] = {}
        #: Slice positions (MNI mm; for "epi" slice numbers) of each (plane, region).
        self.positions: dict[tuple[str, Region], list[int]] = {}
        for plane, (low, high) in SLICES_MM.items():
            for position in range(low, high + 1):
                self._place(plane, position, region_of_position(position - low, val_block=VAL_BLOCK[plane]))
        for slice_ in range(pictures.epi.shape[2]):
            depth_mm = slice_ * pictures.epi_spacing_mm[2]
            self._place("epi", slice_, region_of_position(depth_mm, val_block=EPI_VAL_BLOCK))

    def _place(self, plane: str, position: int, region: Region | None) -> None:
        if region is not None:
            self.positions.setdefault((plane, region), []).append(position)

    def draw(self, split: str, index: int) -> tuple[Image.Image, Facts]:
        """The RGB image number `index` of a split and what is true of it."""
        rng = stream(self.seed, "image", split, index)
        region = region_of_split(split)
        kind = _pick(rng, tuple(KINDS), tuple(KINDS.values()))
        if kind in ("T1", "T2", "GM", "WM", "EPI"):
            canvas, facts = self._brain(rng, kind, region)
        else:
            canvas, facts = self._crop(rng, kind, region), FACTS[kind]
        gamma = np.rint(255 * _GREYS ** rng.uniform(0.8, 1.25)).astype(np.uint8)
        pixels = gamma[np.asarray(canvas.convert("RGB"))]
        if rng.random() < MARKER_SHARE:
            facts = self._mark(rng, pixels, facts)
        return Image.fromarray(pixels), facts

    def slice_image(self, kind: str, plane: str, position_mm: int) -> tuple[Image.Image, Facts]:
        """One MNI slice without any random change, with the facts of its anatomy."""
        image = self._sample(self._mni_view(kind, plane, position_mm), FIELD_MM, 0.0, (0.0, 0.0))
        return image, self._facts(kind, plane, position_mm)

    def _brain(self, rng: np.random.Generator, kind: str, region: Region) -> tuple[Image.Image, Facts]:
        if kind == "EPI":
            slice_ = _pick(rng, self.positions["epi", region])
            view, facts = self._epi_view(slice_, int(rng.integers(self._pictures.epi.shape[3]))), FACTS[kind]
        else:
            plane = _pick(rng, tuple(AXES))
            position = _pick(rng, self.positions[plane, region])
            view, facts = self._mni_view(kind, plane, position), self._facts(kind, plane, position)
        field = FIELD_MM / rng.uniform(0.88, 1.1)
        return self._sample(view, field, rng.uniform(-9, 9), tuple(rng.uniform(-7, 7, 2))), facts

    def _crop(self, rng: np.random.Generator, kind: str, region: Region) -> Image.Image:
        frame = _pick(rng, ECHO_FRAMES[region]) if kind == "echo" else 0
        image = self._flat_view(kind, region, frame).image
        low, high = _crop_range(kind, image.size)
        angle = rng.uniform(-9, 9)
        # Half the extent of the rotated square; it stays inside the picture when it can, otherwise it shrinks.
        spread = abs(np.cos(np.radians(angle))) + abs(np.sin(np.radians(angle)))
        side = min(rng.uniform(low, high), min(image.size) / spread)
        half = side * spread / 2
        x, y = (rng.uniform(half, length - half) if length > 2 * half else length / 2 for length in image.size)
        return self._sample(_View(image, (x, y)), side, angle, (0.0, 0.0))

    def _facts(self, kind: str, plane: str, position_mm: int) -> Facts:
        facts = replace(FACTS[kind], plane=plane)
        if kind == "WM":
            return facts  # on a white matter map fluid, grey matter and background are equally black
        return replace(
            facts,
            cerebellum=self._anatomy.cerebellum(plane, position_mm),
            ventricles=self._anatomy.ventricles(plane, position_mm),
        )

    def _mni_view(self, kind: str, plane: str, position_mm: int) -> _View:
        key = (kind, plane, position_mm)
        if key not in self._views:
            axis = AXES[plane]
            origin = self._pictures.mni_origin
            at = int(position_mm - origin[axis])
            slices = {name: volume.take(at, axis) for name, volume in self._pictures.mni.items()}
            values = t2_like(slices["T1"], slices["GM"], slices["WM"]) if kind == "T2" else slices[kind]
            across, up = (a for a in range(3) if a != axis)
            # Of the two remaining axes the second runs upwards, the first to the left: x = right of the patient, y = front.
            values = values.T[::-1, ::-1]
            x, y = (n - 1 - (CENTRE_MM[a] - origin[a]) for n, a in zip(values.shape[::-1], (across, up), strict=True))
            self._views[key] = _View(self._smooth(values, FIELD_MM), (x, y))
        return self._views[key]

    def _epi_view(self, slice_: int, time: int) -> _View:
        key = ("EPI", slice_, time)
        if key not in self._views:
            values = self._pictures.epi[:, :, slice_, time].T[::-1]  # stored from right to left, back to front
            pitch = self._pictures.epi_spacing_mm[:2]
            self._views[key] = _View(self._smooth(values, FIELD_MM / pitch[0]), (values.shape[1] / 2, values.shape[0] / 2), pitch)
        return self._views[key]

    def _flat_view(self, kind: str, region: Region, frame: int) -> _View:
        """What a region may see of a 2-D picture. It is cut out first, so no crop can reach across the border."""
        key = (kind, region, frame)
        if key not in self._views:
            values = self._pictures.echo[frame] if kind == "echo" else self._pictures.flat[kind]
            height, width = values.shape[:2]
            if kind in CROP_PIXELS:
                left, upper, right, lower = PICTURE_SHARES[region]
                values = values[round(upper * height) : round(lower * height), round(left * width) : round(right * width)]
            side = sum(_crop_range(kind, values.shape[:2])) / 2
            self._views[key] = _View(self._smooth(values, side), (0.0, 0.0))
        return self._views[key]

    def _smooth(self, values: np.ndarray, side: float) -> Image.Image:
        """The picture averaged over one element of our raster, of which `size` span `side` source pixels."""
        return Image.fromarray(np.ascontiguousarray(values)).filter(ImageFilter.BoxBlur(max(0.0, (side / self.size - 1) / 2)))

    def _sample(self, view: _View, field: float, angle_degrees: float, shift: tuple[float, float]) -> Image.Image:
        """Samples a square of `field` mm around the view's centre plus `shift` mm, turned by the angle."""
        n = self.size
        step = field / n
        cos, sin = step * np.cos(np.radians(angle_degrees)), step * np.sin(np.radians(angle_degrees))
        (px, py), (cx, cy) = view.pitch, view.centre
        x0 = cx + (shift[0] - (cos - sin) * n / 2) / px
        y0 = cy + (shift[1] - (sin + cos) * n / 2) / py
        matrix = (cos / px, -sin / px, x0, sin / py, cos / py, y0)
        return view.image.transform((n, n), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    def _mark(self, rng: np.random.Generator, pixels: np.ndarray, facts: Facts) -> Facts:
        """Draws a filled disc with a dark rim of one pixel well inside one quadrant."""
        colour, quadrant = _pick(rng, COLOURS), _pick(rng, QUADRANTS)
        x, y, radius = rng.uniform(0.17, 0.33), rng.uniform(0.17, 0.33), rng.uniform(0.07, 0.1) * self.size
        x = 1 - x if "right" in quadrant else x
        y = 1 - y if "lower" in quadrant else y
        x, y = x * self.size, y * self.size
        across, down = (slice(int(c - radius - 1), int(c + radius + 2)) for c in (x, y))
        rows, columns = np.ogrid[down, across]
        distance = np.hypot(columns + 0.5 - x, rows + 0.5 - y)[..., None]
        window = pixels[down, across].astype(np.float64)
        for edge, rgb in ((radius, (0, 0, 0)), (radius - 1, MARKER_RGB[colour])):
            window += np.clip(edge + 0.5 - distance, 0, 1) * (np.array(rgb) - window)
        pixels[down, across] = np.rint(window)
        return replace(facts, marker=True, colour=colour, quadrant=quadrant)


def _crop_range(kind: str, lengths: tuple[int, ...]) -> tuple[float, float]:
    """Smallest and largest side of a crop, in source pixels."""
    low, high = CROP_SHARE
    return CROP_PIXELS.get(kind) or (low * min(lengths), high * min(lengths))


def _pick(rng: np.random.Generator, values: Sequence[T], shares: Sequence[float] | None = None) -> T:
    """One of `values`, uniformly or by shares that add up to 1, from one draw."""
    u = rng.random()
    if shares is None:
        return values[int(u * len(values))]
    return values[min(int(np.searchsorted(np.cumsum(shares), u, side="right")), len(values) - 1)]
