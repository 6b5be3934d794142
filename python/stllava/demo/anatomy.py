"""Is a structure visible in a slice of the MNI152 head? Yes, no, or too close to call.

Two structures, from voxel coordinates and tissue maps alone:

Cerebellum. Its extent in MNI space is known (spatially unbiased atlas of the cerebellum, Diedrichsen 2006: x -55..55, y -95..-30,
z -62..-3, its top under the tentorium), and in these ranges the skull-stripped template holds no other tissue that low and far
back. Slices well inside the extent say yes, slices outside it say no, and a guard of several millimetres at each border, where
only a thin cap is cut, says None.

Lateral ventricles. They are the fluid (grey + white matter below one half inside the brain mask) that is connected to the body
of the ventricle inside a box around it; the box stops above the third ventricle and leaves out the cisterns behind the midline.
A slice says yes when it cuts at least VENTRICLE_YES_MM2 of them (10 pixels of a 64-pixel picture), no when it cuts at most
VENTRICLE_NO_MM2 (less than one pixel), None between and where VENTRICLE_UNSURE_MM says so.

A question whose answer is None is never asked, and a caption does not mention the structure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .volumes import Pictures, fluid

__all__ = ["AXES", "Anatomy"]

# The axis that a plane cuts: sagittal slices lie at one x, coronal at one y, axial at one z.
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}

# Per plane: slice positions in MNI mm (low, high) that certainly show the cerebellum, and the limits outside of which none does.
CEREBELLUM_YES = {"sagittal": (-48, 48), "coronal": (-90, -38), "axial": (-58, -14)}
CEREBELLUM_LIMITS = {"sagittal": (-58, 58), "coronal": (-98, -27), "axial": (-66, 2)}

VENTRICLE_BOX = ((-40, 40), (-64, 38), (-6, 34))
VENTRICLE_SEEDS = ((8, -5, 22), (-8, -5, 22))
VENTRICLE_YES_MM2 = 100
VENTRICLE_NO_MM2 = 10
# Within 2 mm of the midline a sagittal slice runs along the septum between the two ventricles. Lateral and axial slices at the
# temporal horns cut a few square millimetres of ventricle that lie outside the box.
VENTRICLE_UNSURE_MM = {"sagittal": ((-42, -32), (-2, 2), (32, 42)), "coronal": (), "axial": ((-28, -3),)}


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Ventricle area in mm² per plane and slice index; `origin` is the RAS position of slice 0 of each axis."""

    origin: np.ndarray
    ventricle_area: dict[str, np.ndarray]

    @classmethod
    def from_pictures(cls, pictures: Pictures) -> Anatomy:
        ventricles = _ventricles(pictures)
        area = {}
        for plane, axis in AXES.items():
            others = tuple(a for a in range(3) if a != axis)
            area[plane] = np.count_nonzero(ventricles, axis=others)
        return cls(pictures.mni_origin, area)

    def cerebellum(self, plane: str, position_mm: int) -> bool | None:
        low, high = CEREBELLUM_YES[plane]
        if low <= position_mm <= high:
            return True
        low, high = CEREBELLUM_LIMITS[plane]
        return False if not low < position_mm < high else None

    def ventricles(self, plane: str, position_mm: int) -> bool | None:
        if any(low <= position_mm <= high for low, high in VENTRICLE_UNSURE_MM[plane]):
            return None
        area = self.ventricle_area[plane][int(position_mm - self.origin[AXES[plane]])]
        if area >= VENTRICLE_YES_MM2:
            return True
        return False if area <= VENTRICLE_NO_MM2 else None


def _ventricles(pictures: Pictures) -> np.ndarray:
    """bool mask of the lateral ventricles over the whole head, by flooding the fluid of the box from the seeds."""
    box = tuple(slice(int(low - o), int(high - o) + 1) for (low, high), o in zip(VENTRICLE_BOX, pictures.mni_origin, strict=True))
    mostly_fluid = fluid(*(pictures.mni[name][box] for name in ("T1", "GM", "WM"))) > 127
    x, y, z = np.meshgrid(*(np.arange(low, high + 1) for low, high in VENTRICLE_BOX), indexing="ij", sparse=True)
    mostly_fluid &= ~((abs(x) <= 5) & (z < 10))  # third ventricle
    mostly_fluid &= ~((abs(x) <= 8) & (y < -32) & (z < 16))  # cisterns behind and under the splenium
    flooded = np.zeros_like(mostly_fluid)
    for seed in VENTRICLE_SEEDS:
        flooded[tuple(int(p - low) for p, (low, _) in zip(seed, VENTRICLE_BOX, strict=True))] = True
    while True:
        before = np.count_nonzero(flooded)
        for axis in range(3):
            forward = flooded.swapaxes(0, axis)
            allowed = mostly_fluid.swapaxes(0, axis)
            # Sweeping slice by slice carries the flood along the whole axis in one pass, forth and back.
            for i in range(1, len(forward)):
                forward[i] |= forward[i - 1] & allowed[i]
            for i in range(len(forward) - 2, -1, -1):
                forward[i] |= forward[i + 1] & allowed[i]
        if np.count_nonzero(flooded) == before:
            break
    mask = np.zeros(pictures.mni["T1"].shape, bool)
    mask[box] = flooded
    return mask
