"""DICOM frames -> 8-bit RGB, against pydicom's own pipeline, recorded numbers, and the formulas of PS3.3."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import scans
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

from stllava.data.image_store import ImageStore
from stllava.errors import ConfigError
from stllava.images import ImageError, LoadedImage, image_size, load_image

SAYS_NOTHING = "ultrasound or secondary capture that does not say whether text is burned into the pixels; it may identify a patient"


def real(name: str) -> Path:
    """A file that lies in the package: nothing is fetched."""
    found = get_testdata_file(name, download=False)
    assert isinstance(found, str), name
    return Path(found)


def grey(loaded: LoadedImage) -> np.ndarray:
    assert (loaded.rgb == loaded.rgb[..., :1]).all()
    return loaded.rgb[..., 0]


def frame_of(path: Path, index: int | None = None) -> tuple[np.ndarray, Dataset]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        n = int(ds.get("NumberOfFrames") or 1)
        return pixel_array(ds, index=n // 2 if index is None else index), ds


# ---- real files ------------------------------------------------------------------------------------------------------------------

WINDOWED = ("693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
            "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm", "examples_overlay.dcm")
COLOUR = ("ExplVR_BigEnd.dcm", "GDCMJ2K_TextGBR.dcm", "SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb_gdcm_KY.dcm",
          "SC_rgb_jls_lossy_sample.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm",
          "SC_ybr_full_422_uncompressed.dcm", "examples_jpeg2k.dcm", "examples_rgb_color.dcm", "examples_ybr_color.dcm")


@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_files_are_what_pydicom_makes_of_them(name: str) -> None:
    stored, ds = frame_of(real(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = apply_voi_lut(apply_modality_lut(stored, ds), ds)
    # pydicom's output has the modality's range of all stored values
    bits, signed = ds.BitsStored, ds.PixelRepresentation
    ends = np.array([-(1 << (bits - 1)), (1 << (bits - 1)) - 1] if signed else [0, (1 << bits) - 1]) * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
    want = (values - ends[0]) / (ends[1] - ends[0]) * 255
    assert np.abs(grey(load_image(real(name))) - want).max() <= 0.501  # rounding
    assert image_size(real(name)) == stored.shape[::-1]


@pytest.mark.parametrize("name", COLOUR)
def test_colour_files_are_what_pydicom_makes_of_them(name: str) -> None:
    stored, _ = frame_of(real(name))
    loaded = load_image(real(name))
    np.testing.assert_array_equal(loaded.rgb, stored)
    assert image_size(real(name)) == loaded.rgb.shape[1::-1]


def test_palette() -> None:
    stored, ds = frame_of(real("examples_palette.dcm"))
    want = apply_color_lut(stored, ds)
    assert want.dtype == np.uint16 and want.max() > 255
    loaded = load_image(real("examples_palette.dcm"))
    np.testing.assert_array_equal(loaded.rgb, want >> 8)
    assert loaded.notes == [SAYS_NOTHING, "PALETTE COLOR converted to RGB", "16-bit samples reduced to their high bytes"]


@pytest.mark.parametrize(("name", "shift"), [("SC_rgb_rle_16bit.dcm", 8), ("SC_rgb_rle_32bit.dcm", 24)])
def test_deep_colour_keeps_its_high_bytes(name: str, shift: int) -> None:
    np.testing.assert_array_equal(load_image(real(name)).rgb, frame_of(real(name))[0] >> shift)


def test_files_without_a_window_have_their_own_range() -> None:
    stored, ds = frame_of(real("CT_small.dcm"))
    assert ds.PixelPaddingValue == -2000 and not (stored == -2000).any()
    values = stored.astype(float) - 1024
    loaded = load_image(real("CT_small.dcm"))
    np.testing.assert_array_equal(grey(loaded), np.rint((values - values.min()) * 255 / np.ptp(values)))
    assert loaded.notes == ["no window, range -896..1167"]


def test_one_bit_and_deflated_and_dose() -> None:
    segmentation, _ = frame_of(real("liver_1frame.dcm"))
    np.testing.assert_array_equal(grey(load_image(real("liver_1frame.dcm"))), segmentation * 255)
    np.testing.assert_array_equal(load_image(real("liver_expb_1frame.dcm")).rgb, load_image(real("liver_1frame.dcm")).rgb)
    np.testing.assert_array_equal(grey(load_image(real("image_dfl.dcm"))), frame_of(real("image_dfl.dcm"))[0])
    dose, _ = frame_of(real("rtdose.dcm"), 7)
    np.testing.assert_array_equal(grey(load_image(real("rtdose.dcm"))), np.rint((dose - float(dose.min())) * (255 / np.ptp(dose.astype(float)))))
    np.testing.assert_array_equal(load_image(real("rtdose_rle.dcm")).rgb, load_image(real("rtdose.dcm")).rgb)


RECORDED = {  # as first read; they differ when a library decodes otherwise
    "693_J2KI.dcm": 44.3, "CT_small.dcm": 96.0, "MR_small.dcm": 113.1, "examples_overlay.dcm": 48.1, "examples_palette.dcm": 20.5, "examples_ybr_color.dcm": 10.7,
    "examples_jpeg2k.dcm": 34.5, "rtdose.dcm": 120.1}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_means(name: str) -> None:
    assert load_image(real(name)).rgb.mean() == pytest.approx(RECORDED[name], abs=0.06)


@pytest.mark.parametrize(("name", "reason"), [
    ("rtplan.dcm", "without pixels"), ("reportsi.dcm", "without pixels"), ("waveform_ecg.dcm", "without pixels"), ("MR_truncated.dcm", "cut off"),
    ("badVR.dcm", "NumberOfFrames is not a number"), ("SC_rgb_jpeg_gdcm.dcm", r"JPEG Lossless.*no decoder is installed; pip install 'stllava\[dicom\]'"),
    ("JPEG2000-embedded-sequence-delimiter.dcm", "compressed frame of"), ("JPGExtended.dcm", "not as the header says"), ("meta_missing_tsyntax.dcm", "Columns is missing")])
def test_what_cannot_be_read_says_why(name: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(real(name))
    assert caught.value.__cause__ is None and caught.value.__context__ is None and "\n" not in str(caught.value)


# ---- the rules -------------------------------------------------------------------------------------------------------------------

RAMP = np.arange(-50, 250, dtype=np.int16).reshape(1, 15, 20)


def by_the_formula(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and .2, written as there, pixel by pixel."""
    out = np.empty(values.shape)
    for at, x in np.ndenumerate(values.astype(float)):
        if function == "LINEAR":
            out[at] = 0 if x <= centre - 0.5 - (width - 1) / 2 else 1 if x > centre - 0.5 + (width - 1) / 2 else (x - (centre - 0.5)) / (width - 1) + 0.5
        elif function == "LINEAR_EXACT":
            out[at] = 0 if x <= centre - width / 2 else 1 if x > centre + width / 2 else (x - centre) / width + 0.5
        else:
            out[at] = 1 / (1 + np.exp(-4 * (x - centre) / width))
    return np.rint(255 * out)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(100, 80), (40.5, 1), (0, 2), (-20, 1000), (100, 33.3)])
def test_windows(function: str, centre: float, width: float) -> None:
    loaded = load_image(scans.dicom(RAMP, WindowCenter=centre, WindowWidth=width, VOILUTFunction=function))
    np.testing.assert_array_equal(grey(loaded), by_the_formula(RAMP[0], centre, width, function))
    assert loaded.notes == [f"window {centre:g},{width:g} {function}"]


def test_choice_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(scans.dicom(RAMP, WindowCenter=[100, 20], WindowWidth=[80, 10], RescaleSlope=2, RescaleIntercept=-10))
    values = 2 * RAMP[0] - 10
    for choice, window in (("", (100, 80)), ("#window=0", (100, 80)), ("#window=1", (20, 10)), ("#window=50,61", (50, 61)), ("#window=-5.5,2e2", (-5.5, 200))):
        np.testing.assert_array_equal(grey(load_image(f"{tmp_path}/a.dcm{choice}")), by_the_formula(values, *window, "LINEAR"))
    for choice, reason in (("window=2", "the file has 2 centres"), ("window=1,0", "the width above 0"), ("window=a", "counts from 0"), ("window=nan,1", "two numbers"),
                           ("slice=1", "'slice' is not known here"), ("frame=1", "the file has 1"), ("frame=0&frame=0", "stands twice"), ("frame=-1", "counts from 0")):
        with pytest.raises(ImageError, match=reason):
            load_image(f"{tmp_path}/a.dcm#{choice}")


def lut(first: int, entries: list[int], bits: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], entries
    item["LUTData"].VR = "US"
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    return item


def test_lookup_tables() -> None:
    """Below the table its first entry, above it its last; first the modality's, then that of interest."""
    np.testing.assert_array_equal(grey(load_image(scans.dicom(RAMP, VOILUTSequence=[lut(-2, [0, 1023, 512, 256], 10)]))),
                                  np.rint(np.array([0, 1023, 512, 256])[np.clip(RAMP[0] + 2, 0, 3)] * 255 / 1023))
    modality, interest = [5, 6, 7, 9], [0, 0, 100, 200, 255]
    values = np.array(modality)[np.clip(RAMP[0] - 10, 0, 3)]
    np.testing.assert_array_equal(grey(load_image(scans.dicom(RAMP, ModalityLUTSequence=[lut(10, modality, 8)], VOILUTSequence=[lut(5, interest, 8)]))),
                                  np.array(interest)[np.clip(values - 5, 0, 4)])
    both = scans.dicom(RAMP, VOILUTSequence=[lut(0, [0, 255], 8)], WindowCenter=1, WindowWidth=2)
    assert set(np.unique(load_image(both).rgb)) == {0, 255}
    assert load_image(both).notes == ["VOI lookup table"]


@pytest.mark.parametrize("table", [lut(0, [1, 2, 3], 10), lut(0, [0, 65535], 16), lut(3, list(range(256)), 12)])
def test_lookup_tables_as_pydicom(table: Dataset) -> None:
    """Of more than 8 bits: with those pydicom 3.0 lets values from 256 on begin anew at 0."""
    pixels = np.arange(300, dtype=np.uint16).reshape(1, 15, 20)
    ds = scans.dataset(pixels, VOILUTSequence=[table])
    bits = table.LUTDescriptor[2]
    np.testing.assert_array_equal(grey(load_image(scans.encoded(ds))), np.rint(apply_voi_lut(pixels[0], ds).astype(float) * 255 / ((1 << bits) - 1)))


def test_monochrome1_padding_and_ranges() -> None:
    window = {"WindowCenter": 100, "WindowWidth": 80}
    plain, inverted = (load_image(scans.dicom(RAMP, PhotometricInterpretation=name, **window)) for name in ("MONOCHROME2", "MONOCHROME1"))
    np.testing.assert_array_equal(inverted.rgb, 255 - plain.rgb)
    assert inverted.notes == ["window 100,80 LINEAR", "MONOCHROME1 inverted"]

    pixels = RAMP.copy()
    pixels[0, 0] = -2000
    for name in ("MONOCHROME2", "MONOCHROME1"):  # padding is black, and does not count for the range
        shown = grey(load_image(scans.dicom(pixels, PhotometricInterpretation=name, PixelPaddingValue=-2000)))
        rest = np.rint((RAMP[0, 1:] + 30.0) * 255 / 279)
        np.testing.assert_array_equal(shown, np.vstack([np.zeros((1, 20)), rest if name == "MONOCHROME2" else 255 - rest]))
    ranged = grey(load_image(scans.dicom(RAMP, PixelPaddingValue=-50, PixelPaddingRangeLimit=0, **window)))
    np.testing.assert_array_equal(ranged, np.where(RAMP[0] <= 0, 0, by_the_formula(RAMP[0], 100, 80, "LINEAR")))
    assert load_image(scans.dicom(np.full((1, 4, 4), 7, np.int16), PixelPaddingValue=7)).rgb.max() == 0
    assert load_image(scans.dicom(np.full((1, 4, 4), 700, np.int16))).rgb.max() == 0  # no range


def test_eight_bits_stay_as_they_are_stored() -> None:
    pixels = np.arange(100, 160, dtype=np.uint8).reshape(1, 6, 10)
    np.testing.assert_array_equal(grey(load_image(scans.dicom(pixels))), pixels[0])
    np.testing.assert_array_equal(grey(load_image(scans.dicom(pixels, RescaleSlope=3, RescaleIntercept=-7))), pixels[0])
    signed = (pixels.astype(np.int16) - 128).astype(np.int8)
    np.testing.assert_array_equal(grey(load_image(scans.dicom(signed))), pixels[0])
    twelve = np.array([[[0, 4095, 2048, 16]]], np.uint16)
    np.testing.assert_array_equal(grey(load_image(scans.dicom(twelve, BitsStored=12, HighBit=11))), [[0, 255, 128, 1]])


def test_colour_layouts() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_image(scans.dicom(rgb)).rgb, rgb[0])
    planes = scans.dataset(rgb, PlanarConfiguration=1)
    planes.PixelData = rgb[0].transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(load_image(scans.encoded(planes)).rgb, rgb[0])
    with pytest.raises(ImageError, match="PhotometricInterpretation is none of those that are read"):
        load_image(scans.dicom(rgb, PhotometricInterpretation="HSV"))
    with pytest.raises(ImageError, match="3 samples a pixel"):
        load_image(scans.dicom(rgb, PhotometricInterpretation="MONOCHROME2"))
    with pytest.raises(ImageError, match="in colour"):
        load_image({"bytes": scans.dicom(rgb), "path": "a#window=1,2"})


def test_frames(tmp_path: Path) -> None:
    frames = np.stack([np.full((4, 6), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    (tmp_path / "a.dcm").write_bytes(scans.dicom(frames))
    for choice, value, frame in (("", 30, 2), ("#frame=0", 10, 0), ("#frame=4", 50, 4)):
        loaded = load_image(f"{tmp_path}/a.dcm{choice}")
        assert (loaded.rgb == value).all() and loaded.notes[0] == f"frame {frame} of 5"
        assert ImageStore(tmp_path).size(f"a.dcm{choice}") == (6, 4)
    with pytest.raises(ImageError, match="frame 5 is asked for, the file has 5"):
        load_image(f"{tmp_path}/a.dcm#frame=5")


def test_frames_of_enhanced_objects_have_windows_of_their_own() -> None:
    frames = np.stack([RAMP[0], RAMP[0]])

    def groups(window: tuple[float, float] | None, slope: float | None) -> Dataset:
        item = Dataset()
        if window:
            item.FrameVOILUTSequence = [Dataset()]
            item.FrameVOILUTSequence[0].WindowCenter, item.FrameVOILUTSequence[0].WindowWidth = window
        if slope:
            item.PixelValueTransformationSequence = [Dataset()]
            item.PixelValueTransformationSequence[0].RescaleSlope, item.PixelValueTransformationSequence[0].RescaleIntercept = slope, 5
        return item

    data = scans.dicom(frames, SharedFunctionalGroupsSequence=[groups(None, 3)], PerFrameFunctionalGroupsSequence=[groups((100, 80), None), groups((30, 60), None)])
    for frame, window in ((0, (100, 80)), (1, (30, 60))):
        np.testing.assert_array_equal(grey(load_image({"bytes": data, "path": f"x#frame={frame}"})), by_the_formula(RAMP[0] * 3 + 5, *window, "LINEAR"))


@pytest.mark.parametrize(("tags", "note"), [
    ({"BurnedInAnnotation": "YES"}, "text is burned into the pixels, the file says; it may identify a patient"), ({"BurnedInAnnotation": "NO", "Modality": "US"}, None),
    ({"Modality": "US"}, SAYS_NOTHING), ({"SOPClassUID": scans.SECONDARY_CAPTURE}, SAYS_NOTHING), ({"SOPClassUID": scans.SECONDARY_CAPTURE + ".1"}, SAYS_NOTHING),
    ({"Modality": "CT"}, None), ({}, None)])
def test_burned_in_text_is_noted(tags: dict[str, Any], note: str | None) -> None:
    notes = load_image(scans.dicom(RAMP, **tags)).notes
    assert notes == ([note] if note else []) + ["no window, range -50..249"]


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "PhotometricInterpretation", "BitsAllocated", "PixelData"])
def test_missing_elements(keyword: str) -> None:
    with pytest.raises(ImageError, match="without pixels" if keyword == "PixelData" else f"{keyword} is missing" if keyword != "BitsAllocated" else "header says"):
        load_image(scans.dicom(**{keyword: None}))


def test_a_compressed_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    ds = pydicom.dcmread(real("MR_small_jp2klossless.dcm"))
    at = ds.PixelData.index(b"\xff\x4f\xff\x51")
    for offset in (8, 12):
        data = bytearray(ds.PixelData)
        data[at + offset:at + offset + 4] = (60_000).to_bytes(4)
        ds.PixelData = bytes(data)
        with pytest.raises(ImageError, match="compressed frame of .*60000"):
            load_image(scans.encoded(ds))


def test_a_compressed_frame_must_end_and_say_its_size() -> None:
    """Only JPEG-LS must end: other decoders notice it themselves, and some writers leave the mark out."""
    ds = pydicom.dcmread(real("SC_rgb_jls_lossy_line.dcm"))
    whole = ds.PixelData
    end, start = whole.rindex(b"\xff\xd9"), whole.index(b"\xff\xd8")
    for data, reason in ((whole[:end] + b"\xfe" + whole[end + 1:], "without its end mark"), (whole[:start + 2] + b"\xfe" + whole[start + 3:], "does not say its size")):
        ds.PixelData = data
        with pytest.raises(ImageError, match=reason):
            load_image(scans.encoded(ds))


def test_without_preamble_and_without_meta() -> None:
    whole = scans.dicom(RAMP)
    want = load_image(whole).rgb
    np.testing.assert_array_equal(load_image(whole[132:]).rgb, want)
    ds = pydicom.dcmread(io.BytesIO(whole))
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    for implicit in (True, False):
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, Dataset(ds), implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        bare = buffer.getvalue()
        assert bare[:4] == b"\x08\0\x16\0"
        np.testing.assert_array_equal(load_image(bare).rgb, want)
    with pytest.raises(ImageError, match="not one of"):  # a group of pixels alone is no sign
        load_image(bare[bare.index(b"\x28\0\x02\0"):])


def test_without_pydicom_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "stllava.medical_images.dicom", raising=False)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"DICOM files need pydicom: pip install 'stllava\[dicom\]'"):
        load_image(scans.dicom(RAMP))
