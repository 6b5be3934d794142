"""What hostile files once got through, one small case each. Every one of these was another exception, a hang or a wrong answer."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import bombs
import formats
import mutate
import numpy as np
import pytest
import tiny
from PIL import Image

from stllava.checkpoint import atomic, index, safetensors_file, strict_json, torch_zip
from stllava.checkpoint.peft import LoraConfig
from stllava.config import LlavaConfig
from stllava.data.records import read_records
from stllava.data.sft import SFTDataset
from stllava.errors import ConfigError, FormatError
from stllava.images import ImageError, ImageProcessor, load_image
from stllava.text.tokenizer import Tokenizer


@pytest.mark.parametrize("text", [b'{"a": 1e400}', b'{"a": -1e999}', b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", b'{"a": ' + b"9" * 5000 + b"}", b'{"a": {"b": 1, "b": 2}}'])
def test_json_that_was_read_as_infinity_or_too_deep(text: bytes) -> None:
    with pytest.raises(FormatError):
        strict_json.parse_object(text, "x.json")


@pytest.mark.parametrize("content", [b'[{"id": "\xff"}]', b"\xff\xfe[\0]\0", b"[" * 100_000, b'[{"id": ' + b"9" * 5000 + b"}]", b'[{"id": NaN}]', b'[{"id": 1, "id": 2}]'])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_data_files_that_are_no_json(tmp_path: Path, content: bytes, name: str) -> None:
    """UnicodeDecodeError, RecursionError and ValueError came out; NaN and duplicate keys were taken."""
    (tmp_path / name).write_bytes(content if name == "data.json" else content.strip(b"[]"))
    if (tmp_path / name).read_bytes():
        with pytest.raises(FormatError, match=name):
            read_records(tmp_path / name)


@pytest.mark.parametrize("turns", [["a", "b"], [1, 2], [None], "ab", 3, {"from": "human"}, True, [{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "b"}]])
def test_turns_that_are_no_turns(tmp_path: Path, turns: object) -> None:
    """AttributeError, TypeError and UnicodeEncodeError came out."""
    (tmp_path / "tokenizer.model").write_bytes(formats.small_tokenizer())
    good = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    data = SFTDataset([{"conversations": turns}, {"conversations": good}], Tokenizer(tmp_path / "tokenizer.model"), ImageProcessor(size=28), tokens_per_image=16,
                      on_bad_sample="skip")
    assert [problem.row for problem in data.problems] == [0]


def test_half_a_surrogate_pair_as_a_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "\ud800.safetensors"}}))
    with pytest.raises(FormatError, match="outside"):
        index.read_weights(tmp_path)
    header = json.dumps({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError, match="tensor name"):
        safetensors_file.read(tmp_path / "x.safetensors")


def test_empty_tensor_of_an_impossible_size(tmp_path: Path) -> None:
    """NumPy's ValueError came out."""
    for make in ("shape_empty_but_2_124", "pickle_with_an_empty_tensor_of_2_126"):
        with pytest.raises(FormatError):
            bombs.BOMBS[make]()(tmp_path)()


def test_stride_of_a_dimension_of_one(tmp_path: Path) -> None:
    """It is never used, and 2^63 - 1 of them raised OverflowError."""
    read = bombs.pickled(bombs.tensor(b"K\1", bombs.LARGE))(tmp_path)
    assert read()["w"].shape == (1,)


def test_zip_offset_beyond_the_address_space(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        bombs.BOMBS["zip_of_an_offset_of_2_64"]()(tmp_path)()


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_integers_that_no_float_holds(key: str) -> None:
    """math.isfinite raised OverflowError."""
    with pytest.raises(ConfigError):
        LlavaConfig.from_dict({key: 10**400})
    with pytest.raises(ConfigError):
        LoraConfig(lora_alpha=10**400)
    with pytest.raises(ConfigError):
        ImageProcessor(image_mean=(10**400, 0, 0))
    with pytest.raises(ConfigError):
        ImageProcessor(image_std=(1, 1, 1e308))
    ImageProcessor(image_std=(1, 2**64, 1))(np.zeros((4, 4, 3), np.uint8))  # TypeError


def test_more_clusters_than_tokens() -> None:
    """The core's ValueError came out, without the file's name."""
    with pytest.raises(ConfigError, match="num_latents 17"):
        tiny.config(num_latents=17)
    tiny.config(num_latents=16)
    tiny.config(num_latents=17, mm_vision_select_feature="cls_patch")


@pytest.mark.parametrize(("key", "value"), [("model_max_length", []), ("model_max_length", "<s>"), ("model_max_length", -1)])
def test_tokenizer_settings(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "tokenizer.model").write_bytes(formats.small_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=key):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("added", [{"a": "1"}, {"a": []}, {"a": {}}, {"a": None}, {"a": -1}, {"a": 2**20}, {"a": 1.5}, {"a": True}, {"": 5}])
def test_added_tokens(tmp_path: Path, added: dict[str, object]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(formats.small_tokenizer())
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(FormatError, match="added token"):
        Tokenizer.from_pretrained(tmp_path)


def test_pieces_that_are_no_text(tmp_path: Path) -> None:
    """The library takes them, and UnicodeDecodeError came out where they were met."""
    fields = mutate.split_fields(formats.small_tokenizer())
    fields.insert(300, (1, 2, mutate.join_fields([(1, 2, b"\xff\xfe")])))
    (tmp_path / "tokenizer.model").write_bytes(mutate.join_fields(fields))
    with pytest.raises(FormatError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x" * 300])
def test_picture_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError):
        load_image(tmp_path / name)


def test_fifos_do_not_wait(tmp_path: Path) -> None:
    """Opening one waited for ever."""
    for name, read in {"a.png": load_image, "a.json": read_records, "a.jsonl": read_records, "a.model": Tokenizer, "a.bin": torch_zip.load,
                       "a.safetensors": safetensors_file.read}.items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(FormatError, match="not a regular file"):
            read(tmp_path / name)
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(FormatError):
        atomic.verify(tmp_path)


def test_pillows_warnings_become_notes() -> None:
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\5" + b"\1\x12\0\3\0\0\0\1"  # five tags announced, one begun
    data = bombs.saved(Image.new("RGB", (8, 8)), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert any("Pillow: " in note for note in load_image(data).notes)
