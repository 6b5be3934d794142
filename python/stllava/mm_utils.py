"""LLaVA's `llava/mm_utils.py` by its names: images to pixels, prompts to ids, a checkpoint's short name, stopping at words."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping, Sequence as Seq
from typing import Any

import numpy as np
from PIL import Image

from stllava.compat import ScriptImageProcessor, as_array, as_tensors
from stllava.constants import IMAGE_TOKEN_INDEX
from stllava.conv_mode import model_name_of
from stllava.errors import FormatError
from stllava.images import ImageProcessor, Picture, expand2square, load_image, process_images as _process_images
from stllava.text import encode
from stllava.text.interface import AnyTokenizer

__all__ = ["KeywordsStoppingCriteria", "expand2square", "get_model_name_from_path", "load_image_from_base64", "process_images",
           "tokenizer_image_token"]


def process_images(images: Iterable[Picture], image_processor: ImageProcessor | ScriptImageProcessor, model_cfg: Any,
                   return_tensors: str | None = None) -> Any:
    """(n, 3, size, size) float32, padded to a square iff `model_cfg` (object or mapping) says image_aspect_ratio "pad", else cropped.

    return_tensors: "np", "pt", or None: as the processor of `load_pretrained_model` was loaded, NumPy's for an `ImageProcessor`.
    Raises ConfigError for aspect ratios that are not implemented ("anyres", ...); ImageError.
    """
    if isinstance(image_processor, ScriptImageProcessor):
        return as_tensors(_process_images(images, image_processor.ours, model_cfg), return_tensors or image_processor.tensors)
    return as_tensors(_process_images(images, image_processor, model_cfg), return_tensors)


def tokenizer_image_token(prompt: str, tokenizer: AnyTokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None) -> Any:
    """Ids of `prompt` with one `image_token_index` for every "<image>"; starts with the begin-of-sequence id, where the model has one.

    return_tensors: None for a list, "np" or "pt" for int64 (n,).
    """
    ids = encode.tokenizer_image_token(prompt, tokenizer, image_token_index)
    return ids if return_tensors is None else as_tensors(np.array(ids, np.int64), return_tensors)


def get_model_name_from_path(model_path: str | os.PathLike[str]) -> str:
    """A checkpoint's directory name; that of the run before it for a checkpoint-N."""
    return model_name_of(model_path)


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The picture, as RGB, by the rules of :func:`stllava.images.load_image`. Raises ImageError; FormatError where it is not base64."""
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"the image is not base64: {error}") from error
    return Image.fromarray(load_image(data).rgb)


class KeywordsStoppingCriteria:
    """Ends an answer at any of `keywords`, wherever token boundaries lie. Given to `generate` its words are looked for as the answer grows; a loop of
    one's own may call it with all ids so far.

    Args:
        keywords: a special token among them is looked for by its id. tokenizer: `load_pretrained_model`'s.
        input_ids: (n, length) of the prompt, which is not searched.
    """

    def __init__(self, keywords: Seq[str], tokenizer: Any, input_ids: Any) -> None:
        if isinstance(keywords, str):
            raise TypeError(f"keywords is the text {keywords!r}, want a list of texts")
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.start_len = as_array(input_ids).shape[1]
        special: Mapping[str, int] = tokenizer.special_ids
        self._ids = {special[word] for word in self.keywords if word in special}
        self._texts = [word for word in self.keywords if word not in special]

    def __call__(self, output_ids: Any, scores: Any = None, **kwargs: Any) -> bool:
        """Whether every row has ended."""
        return all(map(self._has_ended, as_array(output_ids)[:, self.start_len:].tolist()))

    def _has_ended(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return not self._ids.isdisjoint(ids) or any(word in text for word in self._texts)
