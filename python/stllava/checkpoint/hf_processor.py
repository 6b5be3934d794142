"""The files beside the weights that transformers' LlavaProcessor reads: picture settings, and a tokenizer that knows `<image>`.

    preprocessor_config.json   CLIPImageProcessor, or LlavaImageProcessor with do_pad where pictures are padded to a square
    processor_config.json      how many tokens an image takes; since transformers 5 the picture settings too, under "image_processor"
    tokenizer_config.json, added_tokens.json, tokenizer.json   with `<image>` and `<pad>` behind the vocabulary
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from stllava.checkpoint.atomic import write_bytes
from stllava.checkpoint.strict_json import dump_object, read_object
from stllava.config import LlavaConfig
from stllava.config_hf import IMAGE_TOKEN, PAD_TOKEN
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_ADDED_TOKENS, MAX_VOCABULARY
from stllava.text.interface import AnyTokenizer
from stllava.text.tokenizer import Tokenizer

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_ADDED, _TOKENIZER, _TOKENIZER_CONFIG = "added_tokens.json", "tokenizer.json", "tokenizer_config.json"
_PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
_MAX_TOKENIZER_ITEMS = 16 * MAX_VOCABULARY
T = TypeVar("T", dict[str, Any], list[Any])


def picture_settings(directory: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """(file, settings) of a directory's image processor, as any version of transformers writes them; None if there are none."""
    own, whole = (Path(directory) / name for name in (PREPROCESSOR, PROCESSOR))
    if own.exists():
        return own, read_object(own)
    nested = read_object(whole).get("image_processor") if whole.exists() else None
    if nested is not None and not isinstance(nested, dict):
        raise FormatError(f"{whole}: image_processor is a {type(nested).__name__}, want an object", path=whole, field="image_processor")
    return None if nested is None else (whole, nested)


def pads(directory: str | os.PathLike[str]) -> bool:
    """Whether the directory's image processor is a LlavaImageProcessor that pads pictures to a square."""
    found = picture_settings(directory)
    return found is not None and found[1].get("do_pad") is True and str(found[1].get("image_processor_type")).startswith("Llava")


def image_token(tokenizer: AnyTokenizer) -> int:
    """Id of `<image>`, or the first that is free."""
    return tokenizer.special_ids.get(IMAGE_TOKEN, tokenizer.vocab_size)


def image_token_of_files(directory: str | os.PathLike[str]) -> int | None:
    """The same of a directory's tokenizer; None if there is none."""
    directory = Path(directory)
    if (directory / _TOKENIZER).exists():
        entries = [entry for entry in _entry(directory / _TOKENIZER, "added_tokens", []) if isinstance(entry, dict) and type(entry.get("id")) is int]
        vocabulary = _entry(directory / _TOKENIZER, "model", {}).get("vocab")
        added: dict[str, int] = {str(entry.get("content")): entry["id"] for entry in entries}
        return added.get(IMAGE_TOKEN, max([len(vocabulary) if isinstance(vocabulary, dict | list) else 0, *(i + 1 for i in added.values())]))
    if (directory / "tokenizer.model").exists():
        return image_token(Tokenizer.from_pretrained(directory))
    return None


def write_processor(directory: str | os.PathLike[str], config: LlavaConfig) -> None:
    """Complete the picture settings and tokenizer files of a directory for LlavaProcessor; `config` is the `padded` one whose weights lie there."""
    directory = Path(directory)
    assert config.vision is not None  # or there were no weights to write
    write_bytes(directory / PROCESSOR, dump_object({
        "processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "num_additional_image_tokens": 1, "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "default" if config.mm_vision_select_feature == "patch" else "full"}))
    if (directory / PREPROCESSOR).exists():
        pad = config.image_aspect_ratio == "pad"
        _update(directory / PREPROCESSOR, {"image_processor_type": "LlavaImageProcessor", "do_pad": True} if pad else {})
    image = config.extra["image_token_index"]
    ours = config.extra.get("pad_token_id") == image + 1  # else the tokenizer has a padding token of its own
    _add_tokens(directory, {IMAGE_TOKEN: image} | ({PAD_TOKEN: image + 1} if ours else {}))


def _add_tokens(directory: Path, tokens: dict[str, int]) -> None:
    if (directory / _TOKENIZER_CONFIG).exists():
        known = _entry(directory / _TOKENIZER_CONFIG, "added_tokens_decoder", {})
        known |= {str(i): {"content": token, **_PLAIN} for token, i in tokens.items()}
        _update(directory / _TOKENIZER_CONFIG, {"added_tokens_decoder": known, "image_token": IMAGE_TOKEN, "processor_class": "LlavaProcessor"}
                | ({"pad_token": PAD_TOKEN} if PAD_TOKEN in tokens else {}))
    if (directory / "tokenizer.model").exists():
        path = directory / _ADDED
        added = read_object(path, MAX_ADDED_TOKENS) if path.exists() else {}
        for token, i in tokens.items():
            if added.setdefault(token, i) != i or any(other != token and added[other] == i for other in added):
                raise ConfigError(f"{path}: {token} is to be token {i}, but the tokenizer has {added}; the vocabulary does not fit the weights",
                                  path=path, field=token)
        write_bytes(path, dump_object(added))
    if (directory / _TOKENIZER).exists():
        entries = _entry(directory / _TOKENIZER, "added_tokens", [])
        there = [entry.get("content") for entry in entries if isinstance(entry, dict)]
        entries += [{"id": i, "content": token, **_PLAIN} for token, i in tokens.items() if token not in there]
        _update(directory / _TOKENIZER, {"added_tokens": entries})


def _entry(path: Path, key: str, default: T) -> T:
    value = read_object(path, _MAX_TOKENIZER_ITEMS).get(key)
    if not isinstance(value, type(default) | None):
        raise FormatError(f"{path}: {key} is a {type(value).__name__}, want a {type(default).__name__}", path=path, field=key)
    return default if value is None else value


def _update(path: Path, values: dict[str, Any]) -> None:
    write_bytes(path, dump_object(read_object(path, _MAX_TOKENIZER_ITEMS) | values))
