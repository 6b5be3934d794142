"""stllava.images against Pillow: the bytes, the loading rules, damaged files, the configuration."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image, ImageFile, ImageOps

import stllava_c
from stllava.errors import ConfigError, FormatError
from stllava.images import BACKGROUND, FORMATS, ImageError, ImageProcessor, LoadedImage, expand2square, load_image, process_images

RNG = np.random.default_rng(20)
BICUBIC = Image.Resampling.BICUBIC


def noise(width: int, height: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, lines: bytes, extra: bytes = b"", interlace: int = 0) -> bytes:
    """`lines`: scanlines with filter bytes. `extra`: chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def with_chunk(file: bytes, name: bytes, data: bytes) -> bytes:
    """The PNG file with one more chunk behind its header."""
    return file[:33] + chunk(name, data) + file[33:]


# ---- resize ---------------------------------------------------------------------------------------------------------------------


def pillow_result(rgb: np.ndarray, size: int, pad: bool) -> np.ndarray:
    """One direction at a time, horizontal first: what one call did in Pillow <= 12 (13 may take the vertical first)."""
    image = Image.fromarray(rgb)
    image = expand2square(image, BACKGROUND) if pad else image
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    whole = np.asarray(image.resize((width, image.height), BICUBIC).resize((width, height), BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return whole[top:top + size, left:left + size]


sides = st.one_of(st.integers(1, 300), st.sampled_from([1, 2, 3, 97, 127, 224, 257, 337]))


@settings(max_examples=150, deadline=None)
@given(width=sides, height=sides, size=st.sampled_from([1, 2, 7, 28, 56, 97]), pad=st.booleans(), seed=st.integers(0, 2**32 - 1))
@example(1, 1, 56, True, 0)
@example(1, 300, 28, True, 0)
@example(1, 300, 28, False, 0)
@example(300, 1, 28, False, 0)
@example(2000, 1, 56, True, 0)
@example(1, 2000, 56, True, 0)
@example(100, 224, 97, False, 0)  # here Pillow 13 starts with the vertical pass
def test_resize_has_pillows_bytes(width: int, height: int, size: int, pad: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if seed % 3 == 0:
        rgb = np.where(rgb < 128, 0, 255).astype(np.uint8)  # overshoots of the filter are clipped
    processor = ImageProcessor(size, aspect="pad" if pad else "square")
    np.testing.assert_array_equal(processor.resize_crop(rgb), pillow_result(rgb, size, pad))


def test_pixels_are_the_resized_bytes_normalised() -> None:
    rgb = noise(50, 31)
    processor = ImageProcessor(28)
    want = (processor.resize_crop(rgb) / 255 - processor.image_mean) / processor.image_std
    got = processor(rgb)
    assert got.dtype == np.float32 and got.shape == (3, 28, 28)
    np.testing.assert_allclose(got, want.transpose(2, 0, 1), rtol=0, atol=5e-7)


@pytest.mark.parametrize("height", [1, 3])
def test_rows_are_never_taken_for_channels(height: int) -> None:
    rgb = noise(40, height)
    np.testing.assert_array_equal(ImageProcessor(8, aspect="square").resize_crop(rgb), pillow_result(rgb, 8, False))


def test_padding_in_the_core_is_expand2square() -> None:
    rgb = noise(41, 30)
    squared = np.asarray(expand2square(Image.fromarray(rgb), BACKGROUND))
    assert squared.shape == (41, 41, 3)
    np.testing.assert_array_equal(squared[5:35], rgb)
    np.testing.assert_array_equal(squared[:5], np.broadcast_to(np.uint8(BACKGROUND), (5, 41, 3)))
    np.testing.assert_array_equal(ImageProcessor(28)(rgb), ImageProcessor(28, aspect="square")(squared))
    tall = Image.fromarray(noise(4, 7))
    np.testing.assert_array_equal(np.asarray(expand2square(tall, BACKGROUND))[:, 1:5], np.asarray(tall))
    same = Image.fromarray(noise(5, 5))
    assert expand2square(same, BACKGROUND) is same


# ---- what the core decodes, and what it leaves to Pillow --------------------------------------------------------------------------


def palette_png(n_colours: int) -> bytes:
    image = Image.frombytes("P", (16, 16), bytes(i % n_colours for i in range(256)))
    image.putpalette(RNG.integers(0, 256, 3 * n_colours, dtype=np.uint8).tobytes())
    return encode(image)


def adam7_png() -> tuple[bytes, np.ndarray]:
    rgb = noise(13, 11)
    lines = b""
    for x0, y0, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        lines += b"".join(b"\0" + row.tobytes() for row in rgb[y0::dy, x0::dx])
    return png(13, 11, 8, 2, lines, interlace=1), rgb


PLAIN = {
    "rgb": encode(Image.fromarray(noise(37, 23))),
    "rgb, smooth": encode(Image.linear_gradient("L").convert("RGB")),  # filters other than none
    "grey": encode(Image.fromarray(noise(37, 23)).convert("L")),
    "1 bit": encode(Image.fromarray(noise(37, 23)).convert("1")),
    "2 bits": png(5, 2, 2, 0, bytes([0, 0x1B, 0x40, 0, 0xE4, 0x80])),
    "4 bits": png(3, 2, 4, 0, bytes([0, 0x01, 0x70, 0, 0x9A, 0xF0])),
    "palette of 256": palette_png(256),
    "palette of 16": palette_png(16),
    "adam7": adam7_png()[0],
    "with gamma and text": with_chunk(with_chunk(encode(Image.fromarray(noise(4, 4))), b"gAMA", bytes(4)), b"tEXt", b"Software\0x"),
    "bmp": encode(Image.fromarray(noise(37, 23)), "BMP"),
}
LEFT_TO_PILLOW = {
    "rgba": encode(Image.fromarray(noise(9, 9)).convert("RGBA")),
    "grey + alpha": encode(Image.fromarray(noise(9, 9)).convert("LA")),
    "16-bit grey": encode(Image.fromarray(RNG.integers(0, 65536, (5, 7), dtype=np.uint16))),
    "16-bit rgb": png(1, 1, 16, 2, bytes([0, 1, 2, 3, 4, 5, 6])),
    "transparent colour": with_chunk(encode(Image.fromarray(noise(4, 4))), b"tRNS", bytes(6)),
    "short palette": png(4, 1, 2, 3, bytes([0, 0x1B]), chunk(b"PLTE", bytes(range(6)))),
    "orientation": with_chunk(encode(Image.fromarray(noise(4, 4))), b"eXIf", b"MM\0*\0\0\0\x08\0\0"),
    "orientation in a text": with_chunk(encode(Image.fromarray(noise(4, 4))), b"tEXt", b"Raw profile type exif\0x"),
    "8-bit bmp": encode(Image.fromarray(noise(9, 9)).convert("L"), "BMP"),
    "jpeg": encode(Image.fromarray(noise(9, 9)), "JPEG"),
}


def test_adam7_example_is_what_it_claims() -> None:
    file, rgb = adam7_png()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), rgb)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_read_as_by_pillow(name: str) -> None:
    want = np.asarray(Image.open(io.BytesIO(PLAIN[name])).convert("RGB"))
    for mode in ("default", "compat"):
        loaded = load_image(PLAIN[name], mode)
        assert loaded.notes == []
        np.testing.assert_array_equal(loaded.rgb, want)


@pytest.mark.parametrize("name", PLAIN)
def test_core_decodes_plain_files_as_pillow(name: str) -> None:
    if not stllava_c.build_info()["stb_image"]:
        pytest.skip("this build has no stb_image")
    want = np.asarray(Image.open(io.BytesIO(PLAIN[name])).convert("RGB"))
    np.testing.assert_array_equal(stllava_c.image_decode(PLAIN[name]), want)
    height, width = want.shape[:2]
    assert stllava_c.image_probe(PLAIN[name])[:2] == (width, height)


@pytest.mark.parametrize("name", LEFT_TO_PILLOW)
def test_core_refuses_what_needs_a_rule(name: str) -> None:
    with pytest.raises(stllava_c.Error) as caught:
        stllava_c.image_decode(LEFT_TO_PILLOW[name])
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("name", LEFT_TO_PILLOW)
def test_compat_is_pillows_conversion(name: str) -> None:
    image = Image.open(io.BytesIO(LEFT_TO_PILLOW[name]))
    np.testing.assert_array_equal(load_image(LEFT_TO_PILLOW[name], "compat").rgb, np.asarray(image.convert("RGB")))


# ---- the rules ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(Image.fromarray(noise(6, 4)), kind, exif=exif, **options)
    stored = Image.open(io.BytesIO(file))
    default, compat = load_image(file), load_image(file, "compat")
    np.testing.assert_array_equal(compat.rgb, np.asarray(stored.convert("RGB")))
    np.testing.assert_array_equal(default.rgb, np.asarray(ImageOps.exif_transpose(stored).convert("RGB")))
    assert default.rgb.shape[:2] == ((4, 6) if orientation < 5 else (6, 4))
    assert default.notes == ([] if orientation == 1 else [f"EXIF orientation {orientation} applied"])
    assert compat.notes == ([] if orientation == 1 else [f"EXIF orientation {orientation} ignored"])


def test_no_memory_is_not_an_unreadable_exif(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(image: Image.Image) -> Image.Exif:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "getexif", without_memory)
    with pytest.raises(MemoryError):
        load_image(encode(Image.fromarray(noise(6, 4)), "JPEG"))


def test_unreadable_exif_counts_as_upright() -> None:
    file = with_chunk(encode(Image.fromarray(noise(4, 4))), b"eXIf", b"garbage")
    assert load_image(file).notes == []


def test_alpha_is_composited_on_the_background() -> None:
    rgba = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0
    rgba[1, :, 3] = 255
    file = encode(Image.fromarray(rgba))
    default, compat = load_image(file, background=(10, 20, 30)), load_image(file, "compat")
    alpha = rgba[..., 3:] / 255
    want = rgba[..., :3] * alpha + np.array([10, 20, 30]) * (1 - alpha)
    assert np.abs(default.rgb - want).max() <= 1  # Pillow rounds twice
    np.testing.assert_array_equal(default.rgb[0], np.broadcast_to(np.uint8([10, 20, 30]), (8, 3)))
    np.testing.assert_array_equal(default.rgb[1], rgba[1, :, :3])
    np.testing.assert_array_equal(compat.rgb, rgba[..., :3])
    assert (default.notes, compat.notes) == (["alpha composited on (10, 20, 30)"], ["alpha dropped"])


def test_opaque_alpha_changes_nothing() -> None:
    rgb = noise(5, 5)
    loaded = load_image(encode(Image.fromarray(rgb).convert("RGBA")))
    np.testing.assert_array_equal(loaded.rgb, rgb)
    assert loaded.notes == []


def test_transparent_palette_entry() -> None:
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([9, 9, 9, 50, 60, 70])
    loaded = load_image(encode(image, transparency=0))
    np.testing.assert_array_equal(loaded.rgb, [[BACKGROUND, (50, 60, 70)]])


def test_sixteen_bit_grey() -> None:
    values = np.array([[1000, 1200, 3000], [200, 5000, 2600]], dtype=np.uint16)
    default, compat = load_image(encode(Image.fromarray(values))), load_image(encode(Image.fromarray(values)), "compat")
    want = np.rint((values - 200.0) * 255 / 4800)
    np.testing.assert_array_equal(default.rgb, np.repeat(want[..., None], 3, axis=2))
    np.testing.assert_array_equal(compat.rgb, np.repeat(np.minimum(values, 255)[..., None], 3, axis=2))
    assert default.notes == ["I;16 grey windowed from 200..5000 to 0..255"]
    assert compat.notes == ["I;16 grey clamped at 255 (range 200..5000)"]
    assert load_image(encode(Image.fromarray(np.full((2, 2), 700, np.uint16)))).rgb.max() == 0  # no range


def test_float_grey_must_be_finite() -> None:
    values = np.array([[0.0, 0.5], [1.0, 0.25]], dtype=np.float32)
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(values), "TIFF")).rgb[..., 0], [[0, 128], [255, 64]])
    values[0, 0] = np.nan
    with pytest.raises(ImageError, match="NaN"):
        load_image(encode(Image.fromarray(values), "TIFF"))


def test_other_conversions_are_noted() -> None:
    cmyk = encode(Image.fromarray(noise(8, 8)).convert("CMYK"), "JPEG")
    assert load_image(cmyk).notes == ["CMYK converted to RGB by Pillow's formula"]
    assert load_image(LEFT_TO_PILLOW["16-bit rgb"]).notes == ["16-bit samples reduced to their high bytes"]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    loaded = load_image(animation)
    assert loaded.notes == ["first of several frames"] and tuple(loaded.rgb[0, 0]) == (255, 0, 0)


def test_an_opened_image_is_read_and_left_open(tmp_path: Path) -> None:
    rgb = noise(5, 4)
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(rgb)))
    with Image.open(path) as image:
        np.testing.assert_array_equal(load_image(image).rgb, rgb)
        np.testing.assert_array_equal(np.asarray(image), rgb)
    np.testing.assert_array_equal(load_image(path).rgb, rgb)
    np.testing.assert_array_equal(load_image(str(path)).rgb, rgb)


# ---- damaged files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"])
def test_truncated_files_are_named(kind: str, tmp_path: Path) -> None:
    file = encode(Image.fromarray(noise(40, 40)), kind)
    path = tmp_path / f"scan.{kind.lower()}"
    for n in (1, 20, len(file) // 2, len(file) * 9 // 10):
        path.write_bytes(file[:n])
        for mode in ("default", "compat"):
            with pytest.raises(ImageError, match=path.name) as caught:
                load_image(path, mode)
            assert caught.value.path == str(path)


def test_missing_empty_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="gone.png: cannot be read: No such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="empty.png: the file is empty"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match=f"picture in memory: cannot be read: not one of {', '.join(FORMATS)}"):
        load_image(b"not a picture")
    assert issubclass(ImageError, FormatError) and issubclass(ImageError, ValueError)


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536), (20_000, 20_000)])
def test_too_large_is_refused_from_the_header(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="limit"):
            load_image(png(*size, 8, 2, b""))


def test_files_over_the_byte_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = encode(Image.fromarray(noise(4, 4)))
    (tmp_path / "a.png").write_bytes(file)
    monkeypatch.setattr("stllava.image_source.MAX_IMAGE_BYTES", len(file))
    load_image(tmp_path / "a.png")
    monkeypatch.setattr("stllava.image_source.MAX_IMAGE_BYTES", len(file) - 1)
    with pytest.raises(ImageError, match="larger than the limit"):
        load_image(tmp_path / "a.png")


def test_pillows_tolerance_of_damage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(LEFT_TO_PILLOW["jpeg"])


@pytest.mark.parametrize("name", ["rgb", "palette of 16", "bmp", "adam7"])
def test_the_core_survives_changed_bytes(name: str) -> None:
    """A status or a picture; for PNG, whose chunks have checksums, never a picture that differs."""
    rng = random.Random(7)
    file = PLAIN[name]
    want = load_image(file).rgb
    for _ in range(300):
        changed = bytearray(file)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(file))] = rng.randrange(256)
        try:
            rgb = stllava_c.image_decode(bytes(changed))
        except stllava_c.Error:
            continue
        if name != "bmp":
            np.testing.assert_array_equal(rgb, want)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_changed_bytes_end_in_an_image_error_or_a_picture(kind: str) -> None:
    rng = random.Random(8)
    file = encode(Image.fromarray(noise(16, 16)), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            changed = bytearray(file)
            for _ in range(rng.randint(1, 6)):
                changed[rng.randrange(min(len(file), 200))] = rng.randrange(256)
            try:
                loaded = load_image(bytes(changed))
            except ImageError as error:
                assert str(error).startswith("picture in memory: ")
            else:
                assert loaded.rgb.dtype == np.uint8 and loaded.rgb.ndim == 3 and loaded.rgb.shape[2] == 3


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="mode 'exact'"):
        load_image(PLAIN["rgb"], "exact")


# ---- the processor ----------------------------------------------------------------------------------------------------------------

CLIP_CONFIG = {
    "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.4, 0.3], "image_processor_type": "CLIPImageProcessor", "image_std": [0.2, 0.3, 0.4],
    "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 28},
}


def read(directory: Path, **changes) -> ImageProcessor:
    values = {**CLIP_CONFIG, **changes}
    (directory / "preprocessor_config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return ImageProcessor.from_pretrained(directory)


def test_configuration_round_trip(tmp_path: Path) -> None:
    processor = read(tmp_path)
    assert processor == ImageProcessor(28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (127, 102, 76), "pad")
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == CLIP_CONFIG
    assert ImageProcessor.from_pretrained(tmp_path) == processor
    assert ImageProcessor.from_pretrained(tmp_path, aspect="square").aspect == "square"
    assert ImageProcessor().background == BACKGROUND


@pytest.mark.parametrize("changes", [
    {"size": 28, "crop_size": 28}, {"crop_size": ...}, {"do_rescale": ..., "rescale_factor": ...}, {"resample": ...}, {"do_pad": None},
    {"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": ...}, {"processor_class": "CLIPProcessor"},
    {"_valid_processor_keys": ["images"]}, {"do_convert_rgb": False}, {"data_format": "channels_first"}])
def test_configuration_forms_that_mean_the_same(changes: dict, tmp_path: Path) -> None:
    assert read(tmp_path, **changes) == read(tmp_path)


@pytest.mark.parametrize(("key", "value"), [
    ("resample", 2), ("do_center_crop", False), ("do_resize", False), ("do_normalize", False), ("do_rescale", False), ("do_pad", True),
    ("rescale_factor", 1.0), ("rescale_factor", "1/255"), ("size", {"height": 28, "width": 28}), ("size", {"shortest_edge": 32}), ("size", "28"),
    ("crop_size", {"height": 28, "width": 14}), ("crop_size", 14), ("crop_size", [28, 28]), ("image_processor_type", "SiglipImageProcessor"),
    ("image_grid_pinpoints", [[336, 672]]), ("image_mean", [0.5, 0.5]), ("image_mean", 0.5), ("image_mean", ["a", "b", "c"]),
    ("image_std", [0.5, 0.0, 0.5]), ("size", {"shortest_edge": 0}), ("data_format", "channels_last")])
def test_configuration_that_changes_the_maths_is_an_error(key: str, value: object, tmp_path: Path) -> None:
    changes = {key: value, "crop_size": ...} if value == {"shortest_edge": 0} else {key: value}
    with pytest.raises(ConfigError, match="preprocessor_config.json: ") as caught:
        read(tmp_path, **changes)
    assert caught.value.field in (key, "crop_size") and str(caught.value.path).startswith(str(tmp_path))


def test_configuration_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("arguments", [
    {"size": 0}, {"size": 4097}, {"size": 336.0}, {"aspect": "anyres"}, {"mode": "exact"}, {"background": (1, 2)}, {"background": (1, 2, 256)},
    {"image_std": (1, 1, float("nan"))}])
def test_processor_arguments(arguments: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageProcessor(**arguments)
    assert caught.value.field == next(iter(arguments))


def test_processor_takes_everything_that_loads(tmp_path: Path) -> None:
    rgb = noise(30, 20)
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(rgb)))
    processor = ImageProcessor(14)
    want = processor(rgb)
    for source in (path, str(path), path.read_bytes(), Image.fromarray(rgb), LoadedImage(rgb, []), np.asfortranarray(rgb)):
        np.testing.assert_array_equal(processor(source), want)
    for array in (rgb.astype(np.float32), rgb[..., 0], rgb.transpose(2, 0, 1)):
        with pytest.raises(ImageError, match=r"want uint8 \(height, width, 3\)"):
            processor(array)


def test_processor_mode_reaches_the_loader() -> None:
    file = encode(Image.fromarray(np.array([[0, 1000]], np.uint16)))
    assert ImageProcessor(2, mode="default").resize_crop(file).max() == 255
    np.testing.assert_array_equal(ImageProcessor(2, mode="compat").load(file).rgb[0, :, 0], [0, 255])
    transparent = encode(Image.new("RGBA", (2, 2)))
    np.testing.assert_array_equal(ImageProcessor(2, background=(5, 6, 7)).resize_crop(transparent)[0, 0], [5, 6, 7])


@pytest.mark.parametrize("threads", [1, 2, 4, None])
def test_threads_change_nothing(threads: int | None) -> None:
    pictures = [noise(20 + i, 30 - i) for i in range(12)]
    processor = ImageProcessor(28)
    np.testing.assert_array_equal(processor.preprocess_many(pictures, threads), np.stack([processor(p) for p in pictures]))
    assert processor.preprocess_many([], threads).shape == (0, 3, 28, 28)


def test_many_names_the_damaged_one() -> None:
    with pytest.raises(ImageError) as caught:
        ImageProcessor(28).preprocess_many([noise(4, 4), b"damaged", noise(4, 4)], 2)
    assert "picture 1 of 3" in caught.value.__notes__


@pytest.mark.parametrize("config", [dict, SimpleNamespace])
def test_process_images_follows_the_model(config) -> None:
    pictures = [Image.fromarray(noise(30, 20)), Image.fromarray(noise(20, 30))]
    processor = ImageProcessor(14)
    padded = process_images(pictures, processor, config(image_aspect_ratio="pad"))
    assert padded.shape == (2, 3, 14, 14) and padded.dtype == np.float32
    np.testing.assert_array_equal(padded, processor.preprocess_many(pictures))
    cropped = process_images(pictures, processor, config())
    np.testing.assert_array_equal(cropped, ImageProcessor(14, aspect="square").preprocess_many(pictures))
    np.testing.assert_array_equal(process_images(pictures, processor, config(image_aspect_ratio="square")), cropped)
    with pytest.raises(ConfigError, match="anyres"):
        process_images(pictures, processor, config(image_aspect_ratio="anyres"))
