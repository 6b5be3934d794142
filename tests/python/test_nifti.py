"""NIfTI slices -> 8-bit RGB: nibabel's canonical orientation as oracle, the convention of radiologists by marked voxels."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scans

from stllava.data.image_store import ImageStore
from stllava.images import ImageError, image_size, load_image

DATA = Path(nibabel.__file__).parent / "tests" / "data"
VOLUME = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5) ** 2


def shown(data: bytes, choice: str = "") -> np.ndarray:
    loaded = load_image({"bytes": data, "path": f"x.nii#{choice}" if choice else None})
    assert (loaded.rgb == loaded.rgb[..., :1]).all()
    return loaded.rgb[..., 0]


def by_hand(canonical: np.ndarray, axis: int, position: int, window: tuple[float, float]) -> np.ndarray:
    plane = np.take(canonical, position, axis).astype(float)
    low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    return np.rint(np.clip((plane[::-1, ::-1].T - low) / (high - low), 0, 1) * 255)


@pytest.mark.parametrize("codes", ["".join(signs) for order in itertools.permutations(("LR", "PA", "IS")) for signs in itertools.product(*order)])
def test_every_orientation_is_turned_as_nibabel_turns_it(codes: str) -> None:
    """All 48. The affine of a volume whose stored axes run to `codes`."""
    affine = np.eye(4)[:, [*("RAS".index({"L": "R", "P": "A", "I": "S"}.get(code, code)) for code in codes), 3]] * [*(1 if code in "RAS" else -1 for code in codes), 1]
    assert "".join(nibabel.aff2axcodes(affine)) == codes
    canonical = np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(VOLUME, affine)).dataobj)
    data = scans.nifti(VOLUME, affine)
    for axis in range(3):
        for position in range(canonical.shape[axis]):
            np.testing.assert_array_equal(shown(data, f"axis={axis}&slice={position}&window=900,1800"), by_hand(canonical, axis, position, (900, 1800)))


def test_pictures_are_as_radiologists_look_at_them() -> None:
    """Bright spots at the right, the front and the head of a volume stored the other way round."""
    volume = np.zeros((9, 11, 13), np.uint8)  # RAS+
    volume[8, 5, 6], volume[4, 10, 6], volume[4, 5, 12] = 100, 150, 200  # right, front, head
    affine = np.diag([1, 1, 1, 1])
    for data in (scans.nifti(volume, affine), scans.nifti(volume[::-1, ::-1, ::-1], np.diag([-1, -1, -1, 1]))):
        axial, coronal, sagittal = (shown(data, f"axis={name}&window=128,256") for name in ("axial", "coronal", "sagittal"))
        assert (axial.shape, coronal.shape, sagittal.shape) == ((11, 9), (13, 9), (13, 11))
        assert axial[5, 0] == 100 and axial[0, 4] == 149  # right at the left, front up
        assert coronal[6, 0] == 100 and coronal[0, 4] == 199  # head up
        assert sagittal[6, 0] == 149 and sagittal[0, 5] == 199  # front at the left


def test_the_default_is_the_middle_axial_slice_between_percentiles() -> None:
    volume = np.random.default_rng(0).normal(size=(20, 30, 7)).astype(np.float32)
    data = scans.nifti(volume, slope=None)
    plane = volume[..., 3].astype(float)
    low, high = np.percentile(plane, (0.5, 99.5))
    np.testing.assert_array_equal(shown(data), np.rint(np.clip((plane[::-1, ::-1].T - low) * (255 / (high - low)), 0, 255)))
    assert load_image(data).notes == ["axial slice 3 of 7", f"range {low:g}..{high:g}"]
    np.testing.assert_array_equal(shown(scans.nifti(volume, gzipped=True)), shown(data))
    np.testing.assert_array_equal(shown(scans.nifti(volume, two=True)), shown(data))
    np.testing.assert_array_equal(shown(scans.nifti(volume.astype(">f4"))), shown(data))


def test_scale_and_values_that_are_not_finite() -> None:
    data = scans.nifti(VOLUME, slope=0.5, intercept=-3)
    np.testing.assert_array_equal(shown(data, "slice=0&window=100,200"), by_hand(VOLUME * 0.5 - 3, 2, 0, (100, 200)))
    holes = VOLUME.astype(np.float32)
    holes[0, 0, 2], holes[1, 0, 2] = np.nan, np.inf
    loaded = load_image(scans.nifti(holes))
    assert loaded.notes[-1] == "values that are not finite are black" and loaded.rgb[3, 2, 0] == loaded.rgb[3, 1, 0] == 0
    with pytest.raises(ImageError, match="no value of the slice is finite"):
        load_image(scans.nifti(np.full((3, 3, 3), np.nan, np.float32)))
    assert load_image(scans.nifti(np.full((3, 3, 3), 7, np.int16))).rgb.max() == 0
    sparse = np.zeros((40, 40, 1), np.uint8)
    sparse[3, 3] = 1  # beyond the percentiles
    assert load_image(scans.nifti(sparse)).rgb.max() == 255


def test_series_and_flat_volumes() -> None:
    series = np.stack([VOLUME, VOLUME[::-1]], axis=-1)
    data = scans.nifti(series)
    for volume in (0, 1):
        np.testing.assert_array_equal(shown(data, f"volume={volume}&slice=1&window=900,1800"), by_hand(series[..., volume], 2, 1, (900, 1800)))
    assert load_image(data).notes[0] == "axial slice 2 of 5, volume 0 of 2"
    np.testing.assert_array_equal(shown(scans.nifti(VOLUME[:, :, 0]), "window=900,1800"), by_hand(VOLUME, 2, 0, (900, 1800)))
    np.testing.assert_array_equal(shown(scans.nifti(series[:, :, :, None, :1]), "window=900,1800"), by_hand(VOLUME, 2, 2, (900, 1800)))
    with pytest.raises(ImageError, match="its shape"):
        load_image(scans.nifti(series[:, :, :, None]))


def test_colours() -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    colours = values.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    np.testing.assert_array_equal(load_image(scans.nifti(colours)).rgb, values[::-1, ::-1, 2].transpose(1, 0, 2))
    with pytest.raises(ImageError, match="neither real numbers nor colours"):
        load_image(scans.nifti(np.zeros((3, 3, 3), np.complex64)))


def test_pixels_are_made_square() -> None:
    volume = np.repeat(np.array([[[0, 0, 250, 250]]], np.uint8), 8, axis=0).repeat(8, axis=1)
    data = scans.nifti(volume, np.diag([1, 1, 5, 1]))
    loaded = load_image({"bytes": data, "path": "x#axis=coronal&window=125,250"})
    assert loaded.rgb.shape == (20, 8, 3) and "pixels of 1 x 5 mm made square" in loaded.notes
    assert (loaded.rgb[:6] == 255).all() and (loaded.rgb[-6:] == 0).all()
    assert load_image(data).rgb.shape == (8, 8, 3)
    assert load_image({"bytes": scans.nifti(volume, np.diag([1, 1, 500, 1])), "path": "x#axis=1"}).rgb.shape == (4, 8, 3)


@pytest.mark.parametrize("name", ["anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "functional.nii", "reoriented_anat_moved.nii", "standard.nii.gz"])
def test_real_files(name: str) -> None:
    canonical = nibabel.as_closest_canonical(nibabel.load(DATA / name))
    values, store = np.asarray(canonical.dataobj), ImageStore(DATA)
    volume = values if values.ndim == 3 else values[..., 0]
    zooms = canonical.header.get_zooms()
    for axis in range(3):
        choice = f"{name}#axis={axis}&slice=1&window=500,1000"
        loaded = load_image(store.source(choice))
        assert store.size(choice) == loaded.rgb.shape[1::-1]
        across, up = [zoom for other, zoom in enumerate(zooms[:3]) if other != axis]
        if 0.98 < across / up < 1.02:
            np.testing.assert_array_equal(loaded.rgb[..., 0], by_hand(volume, axis, 1, (500, 1000)))
        else:
            assert any("made square" in note for note in loaded.notes)


def test_refusals(tmp_path: Path) -> None:
    good = scans.nifti(VOLUME)
    cases = {"slice 5 is asked for, the file has 5": (good, "slice=5"), "volume 1 is asked": (good, "volume=1"), "axis 'up'": (good, "axis=up"), "CENTRE,WIDTH": (good, "window=1"),
             "'frame' is not known here": (good, "frame=1"), "cut off": (good[:-1], ""), "in another file": (good[:344] + b"ni1\0" + good[348:], ""),
             "gzip stream that holds no NIfTI": (gzip.compress(b"x" * 600), ""), "gzip stream is damaged": (gzip.compress(good)[:-20] + bytes(20), "")}
    for reason, (data, choice) in cases.items():
        with pytest.raises(ImageError, match=reason):
            load_image({"bytes": data, "path": f"x.nii#{choice}" if choice else None})
    assert image_size(good) == (3, 4)
