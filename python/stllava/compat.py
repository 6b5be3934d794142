"""What `load_pretrained_model` gives to scripts written for LLaVA: tokenizer, model and image processor with the names that those scripts call.

Each is a thin coat over ours: whatever is not named here is asked of the object inside, `.ours`. Arrays are NumPy's or torch's, as the
script works; see `load_pretrained_model`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np

from stllava.config import LlavaConfig
from stllava.constants import IMAGE_TOKEN_INDEX
from stllava.errors import ConfigError
from stllava.images import ImageProcessor, Picture
from stllava.model import LlavaModel
from stllava.text.interface import AnyTokenizer

__all__ = ["Entries", "ScriptConfig", "ScriptImageProcessor", "ScriptModel", "ScriptTokenizer", "Tensors", "as_array", "as_tensors", "import_torch"]

Tensors: TypeAlias = Literal["np", "pt"]

_WITHOUT_EFFECT = frozenset({"use_cache", "image_sizes", "modalities", "pad_token_id", "bos_token_id", "synced_gpus"})
_WITHOUT_CHANGE = frozenset({"eval", "train", "half", "float", "bfloat16", "cpu", "cuda", "to", "requires_grad_", "get_model"})
_OFF = {"no_repeat_ngram_size": (None, 0), "length_penalty": (None, 1, 1.0), "num_beams": (None, 1), "num_beam_groups": (None, 1),
        "early_stopping": (None, False), "typical_p": (None, 1, 1.0), "penalty_alpha": (None, 0), "return_dict_in_generate": (None, False),
        "output_scores": (None, False), "output_attentions": (None, False), "output_hidden_states": (None, False)}


class StoppingWords(Protocol):
    """A stopping criterion by words, as `stllava.mm_utils.KeywordsStoppingCriteria`."""

    keywords: Seq[str]


# ---- arrays --------------------------------------------------------------------------------------------------------------------------


def import_torch(what: str) -> Any:
    """The module torch. Raises ConfigError where it is not installed: `what` needs it."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"{what} needs torch: pip install 'stllava[torch]'") from error
    return torch


def as_tensors(array: np.ndarray, return_tensors: str | None) -> Any:
    """The array itself for "np" and None, a torch tensor over its memory for "pt". Raises ConfigError for anything else, or without torch."""
    if return_tensors in (None, "np"):
        return array
    if return_tensors != "pt":
        raise ConfigError(f"return_tensors is {return_tensors!r}, want 'np', 'pt' or None", field="return_tensors")
    return import_torch("return_tensors='pt'").from_numpy(np.ascontiguousarray(array))


def as_array(values: Any) -> np.ndarray:
    """A NumPy array of what a script holds: an array, a list, or a torch tensor on whatever device (bfloat16 becomes float32)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


# ---- what scripts ask ----------------------------------------------------------------------------------------------------------------


class Entries(dict[str, Any]):
    """A dictionary whose entries are attributes too, as transformers' BatchEncoding and BatchFeature."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"no entry {name!r}, there are {', '.join(self)}") from error


class ScriptConfig(SimpleNamespace):
    """config.json as attributes, with the neutral value for keys of LLaVA that a checkpoint may leave out."""

    def __init__(self, config: LlavaConfig, **more: Any) -> None:
        super().__init__(**{"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": None, "use_cache": True,
                            "_name_or_path": ""} | config.to_dict() | more)

    def get_text_config(self) -> Self:
        return self

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class _Coat:
    """Whatever it does not name itself, `ours` is asked."""

    def __init__(self, ours: Any) -> None:
        self.ours = ours

    def __getattr__(self, name: str) -> Any:
        if name == "ours":  # it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.ours, name)


class ScriptTokenizer(_Coat):
    """Ours under transformers' names. Special tokens in texts count, as there; `decode` keeps them unless told otherwise, as there."""

    padding_side = "right"
    ours: AnyTokenizer

    def __len__(self) -> int:
        return self.ours.vocab_size

    def __call__(self, text: str | Seq[str], *, return_tensors: str | None = None, add_special_tokens: bool = True,
                 padding: bool | str = False) -> Entries:
        """`input_ids` and `attention_mask`: lists of one text or of several, or arrays (n, longest) with `return_tensors`."""
        texts = [text] if isinstance(text, str) else list(text)
        ids = [self.ours.encode(t, add_bos=add_special_tokens) for t in texts]
        mask = [[1] * len(row) for row in ids]
        if padding or return_tensors is not None:
            longest = max(map(len, ids), default=0)
            if not padding and any(len(row) < longest for row in ids):
                raise ConfigError("the texts have different lengths: give padding=True with return_tensors", field="padding")
            ids = [row + [self.ours.pad_token_id] * (longest - len(row)) for row in ids]
            mask = [row + [0] * (longest - len(row)) for row in mask]
        if return_tensors is not None:
            return Entries(input_ids=as_tensors(np.array(ids, np.int64), return_tensors),
                            attention_mask=as_tensors(np.array(mask, np.int64), return_tensors))
        return Entries(input_ids=ids[0], attention_mask=mask[0]) if isinstance(text, str) else Entries(input_ids=ids, attention_mask=mask)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None) -> str:
        """Text of ids; spaces are never cleaned up, as LLaMA's tokenizer does not."""
        return self.ours.decode(as_array(token_ids).reshape(-1).tolist(), skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def _text(self, token_id: int | None) -> str | None:
        return next((text for text, i in self.ours.special_ids.items() if i == token_id), None)

    @property
    def bos_token(self) -> str | None:
        return self._text(self.ours.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        return self._text(self.ours.eos_token_id)

    @property
    def unk_token(self) -> str | None:
        return self._text(self.ours.unk_token_id)

    @property
    def pad_token(self) -> str | None:
        return self._text(self.ours.pad_token_id)


class ScriptImageProcessor(_Coat):
    """Ours under the names of CLIPImageProcessor: it crops what is not square, so that scripts pad before, or call `process_images`.

    tensors: what `process_images` of :mod:`stllava.mm_utils` gives for it, "np" or "pt".
    """

    ours: ImageProcessor

    def __init__(self, ours: ImageProcessor, tensors: Tensors) -> None:
        super().__init__(replace(ours, aspect="square"))
        self.tensors = tensors
        self.image_mean, self.image_std = list(ours.image_mean), list(ours.image_std)
        self.size, self.crop_size = {"shortest_edge": ours.size}, {"height": ours.size, "width": ours.size}

    def preprocess(self, images: Picture | Seq[Picture], return_tensors: str | None = None) -> Entries:
        """`pixel_values`: float32 (n, 3, size, size), also for a single image; a list of (3, size, size) without `return_tensors`."""
        pixels = self.ours.preprocess_many(list(images) if isinstance(images, (list, tuple)) else [images])  # type: ignore[list-item]
        return Entries(pixel_values=list(pixels) if return_tensors is None else as_tensors(pixels, return_tensors))

    __call__ = preprocess


class ScriptModel(_Coat):
    """Ours under the names of LlavaLlamaForCausalLM that inference scripts call.

    Weights stay in the dtype of their file and are computed with in float32, so `half()`, `to(...)` and their like change nothing.
    output_has_prompt: see `load_pretrained_model`.
    """

    training = False
    ours: LlavaModel

    def __init__(self, ours: LlavaModel, tensors: Tensors, *, output_has_prompt: bool = False) -> None:
        super().__init__(ours)
        self.tensors, self.output_has_prompt = tensors, output_has_prompt
        self.config = ScriptConfig(ours.config)

    def __getattr__(self, name: str) -> Any:
        return self._itself if name in _WITHOUT_CHANGE else super().__getattr__(name)

    @property
    def device(self) -> Any:
        return "cpu" if self.tensors == "np" else import_torch("model.device").device("cpu")

    @property
    def dtype(self) -> Any:
        kind = {"f32": "float32", "f64": "float64"}[self.ours.dtype]
        return np.dtype(kind) if self.tensors == "np" else getattr(import_torch("model.dtype"), kind)

    def _itself(self, *_args: Any, **_kwargs: Any) -> Self:
        return self

    def get_vision_tower(self) -> Any:
        """What scripts ask of it: `is_loaded`, `load_model()`, `image_processor`, and `to(...)`, which changes nothing."""
        tower = SimpleNamespace(is_loaded=True, load_model=lambda *args, **kwargs: None,
                                image_processor=ScriptImageProcessor(self.ours.image_processor, self.tensors))
        tower.to = lambda *args, **kwargs: tower
        return tower

    def generate(self, inputs: Any = None, images: Any = None, *, input_ids: Any = None, attention_mask: Any = None, do_sample: bool = False,
                 temperature: float | None = None, top_p: float | None = None, top_k: int | None = None, repetition_penalty: float | None = None,
                 max_new_tokens: int = 1024, min_new_tokens: int | None = None, num_return_sequences: int = 1,
                 eos_token_id: int | Seq[int] | None = None, stopping_criteria: Seq[StoppingWords] | None = None, streamer: Any = None,
                 seed: int | None = None, **more: Any) -> Any:
        """Continues prompts as `generate` of transformers does.

        Args:
            inputs (or input_ids): (n, length) ids, -200 for an image; with `attention_mask`, ids where it is 0 are left out.
            images: (m, 3, S, S), or a list of (3, S, S): as `process_images` gives them, one per -200, or one per prompt (then that of a prompt
                without -200 is not looked at, as in LLaVA).
            do_sample: False is greedy, and temperature, top_p and top_k have no effect. top_k: None is transformers' 50; 0 is off.
            stopping_criteria: objects with `keywords`; nothing else. streamer: `put(ids)` is called with the prompt, then with each token; `end()`.
            seed: of the draws; None: drawn from torch's global generator where the ids are torch's, else from NumPy's, so that `manual_seed`,
                `np.random.seed` or transformers' `set_seed` decide.

        Returns:
            (n * num_return_sequences, longest) int64, the new tokens with the end token, padded on the right with `pad_token_id`; torch's where the
            ids were torch's. Of models loaded with `output_has_prompt`, the prompts before them.

        Raises:
            ConfigError: an option that is not implemented (beam search), or unknown. ValueError: as :func:`stllava.generation.generate`.
        """
        _refuse(more)
        given = inputs if input_ids is None else input_ids
        if given is None:
            raise ConfigError("generate: no input_ids", field="input_ids")
        rows = as_array(given)
        rows = rows[None] if rows.ndim == 1 else rows
        mask = np.ones_like(rows) if attention_mask is None else as_array(attention_mask).reshape(rows.shape)
        prompts = [row[keep != 0].tolist() for row, keep in zip(rows, mask, strict=True)]
        is_torch = hasattr(given, "detach")
        words, ends = self._stops(stopping_criteria, eos_token_id)
        kind: Tensors = "pt" if is_torch else "np"
        if streamer is not None:
            streamer.put(as_tensors(rows, kind))
        made = self.ours.generate(
            prompts, _of_prompts(prompts, images), max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens or 0,
            temperature=(1.0 if temperature is None else temperature) if do_sample else 0.0, top_p=1.0 if top_p is None or not do_sample else top_p,
            top_k=(50 if top_k is None else top_k) if do_sample else 0, repetition_penalty=repetition_penalty or 1.0,
            num_return_sequences=num_return_sequences, stop=words, eos_token_id=ends,
            seed=_drawn_seed(is_torch) if seed is None and do_sample else seed,
            on_token=None if streamer is None else lambda _i, _j, token, _text: streamer.put(as_tensors(np.array([token]), kind)))
        if streamer is not None:
            streamer.end()
        ids = [answer.ids for answers in made for answer in answers]
        out = np.full((len(ids), max(map(len, ids), default=0)), self._pad_token_id, np.int64)
        for row, new in zip(out, ids, strict=True):
            row[:len(new)] = new
        if self.output_has_prompt:
            out = np.concatenate([np.repeat(rows, num_return_sequences, axis=0), out], axis=1)
        return as_tensors(out, kind)

    @property
    def _pad_token_id(self) -> int:
        return self.ours.tokenizer.pad_token_id if self.ours.has_tokenizer else 0

    def _stops(self, criteria: Seq[StoppingWords] | None, eos_token_id: int | Seq[int] | None) -> tuple[list[str], list[int] | None]:
        """Words that end an answer, and ids that do: a word that is a special token is one of these."""
        criteria = [] if criteria is None else [criteria] if hasattr(criteria, "keywords") else list(criteria)
        for criterion in criteria:
            if not hasattr(criterion, "keywords"):
                raise ConfigError(f"generate: stopping criterion {type(criterion).__name__} is not implemented, want one with its words, as "
                                  "stllava.mm_utils.KeywordsStoppingCriteria", field="stopping_criteria")
        words = [word for criterion in criteria for word in criterion.keywords]
        special = dict(self.ours.tokenizer.special_ids) if words else {}
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        if not ends and self.ours.has_tokenizer:
            ends = [self.ours.tokenizer.eos_token_id]
        return [word for word in words if word not in special], ends + [special[word] for word in words if word in special]


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _OFF and value not in _OFF[name]:
            raise ConfigError(f"generate: {name} is {value!r}, which is not implemented; supported: {', '.join(map(repr, _OFF[name]))}", field=name)
        if name not in _OFF and name not in _WITHOUT_EFFECT:
            raise ConfigError(f"generate: unknown option {name} = {value!r}", field=name)


def _of_prompts(prompts: Seq[Seq[int]], images: Any) -> list[tuple[np.ndarray, ...] | None] | None:
    """The images of each prompt: one per marker, in order; or one per prompt."""
    n_markers = [sum(1 for token in prompt if token == IMAGE_TOKEN_INDEX) for prompt in prompts]
    if images is None:
        return None
    pixels = [pixels for image in images for pixels in _single(as_array(image))]
    if len(pixels) == len(prompts) and max(n_markers) <= 1:
        return [(image,) if n else None for image, n in zip(pixels, n_markers, strict=True)]
    if len(pixels) != sum(n_markers):
        raise ConfigError(f"generate: {sum(n_markers)} image markers (-200) in {len(prompts)} prompts, but {len(pixels)} images", field="images")
    ends = np.cumsum(n_markers)
    return [tuple(pixels[end - n:end]) for end, n in zip(ends, n_markers, strict=True)]


def _single(pixels: np.ndarray) -> list[np.ndarray]:
    """A (3, S, S) image, or an (n, 3, S, S) stack of them, as float32."""
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3:
        raise ConfigError(f"generate: an image of shape {pixels.shape}, want (3, S, S), as process_images gives it", field="images")
    return [pixels.astype(np.float32)] if pixels.ndim == 3 else list(pixels.astype(np.float32))


def _drawn_seed(is_torch: bool) -> int:
    if is_torch:
        return int(sys.modules["torch"].randint(2**31, ()))
    return int(np.random.randint(2**31))
