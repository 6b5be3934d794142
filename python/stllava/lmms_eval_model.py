"""stllava as a model of lmms-eval (0.7 and later), found through the entry-point group `lmms_eval.models`:

    python -m lmms_eval --model stllava --model_args pretrained=DIR --tasks slake_en --batch_size 32

Requests about equal pictures share the picture's rows, whatever documents they come from. Tasks of log-likelihoods (multiple_choice) need
`--force_simple`, since lmms-eval asks models of its chat kind for texts only, and a version of it other than 0.7.3, which turns every model's
log-likelihoods into texts before it reads them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import ImageFile

import stllava_c
from stllava.chat import ChatPrompt, chat_prompt
from stllava.conv_mode import choose_conv_mode, model_name_of
from stllava.generation import DecodingSettings, generate
from stllava.model import Dtype, LlavaModel

if TYPE_CHECKING:
    from stllava.images import Picture

__all__ = ["MANIFEST", "StllavaChat", "StllavaSimple"]

MANIFEST = ModelManifest("stllava", simple_class_path=f"{__name__}.StllavaSimple", chat_class_path=f"{__name__}.StllavaChat")

_NOT_USED = frozenset({"do_sample", "image_aspect_ratio", "num_beams", "until", "use_cache"})
"""Settings of tasks that are read otherwise, or say what is so anyway."""


class StllavaChat(lmms):  # type: ignore[misc] # lmms-eval is not there where types are checked
    """Model arguments (`--model_args a=b,c=d`).

    Args:
        pretrained: checkpoint directory, or .gguf file. model_base: the base of an adapter directory. vision_tower, dtype: as for
            `LlavaModel.from_pretrained`. template: conversation template; default: what the checkpoint seems to be made with.
        num_threads: 0: one per core. batch_size: requests answered together. device, max_batch_size: lmms-eval names them always; the core
            computes on the CPU, in batches of batch_size.
    """

    is_simple = False

    def __init__(self, pretrained: str, model_base: str | None = None, vision_tower: str | None = None, dtype: Dtype = "f32",
                 template: str | None = None, num_threads: int = 0, batch_size: int | str = 1, device: str | None = None,
                 max_batch_size: int | None = None) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}, want a number >= 1")
        if num_threads > 0:
            stllava_c.set_num_threads(num_threads)
        self.batch_size = int(batch_size)
        self.model = LlavaModel.from_pretrained(pretrained, model_base, vision_tower=vision_tower, dtype=dtype)
        self.template, warning = choose_conv_mode(template, self.model.config, model_name_of(pretrained))
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
        self._pictures: dict[bytes, Picture] = {}

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Requests with the same settings are answered together, in batches of `batch_size`."""
        found: dict[int, GenerationResult] = {}
        groups: dict[DecodingSettings, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(decoding(self._settings_of(request)), []).append(row)
        for settings, rows in groups.items():
            prompts = [self._prompt(requests[row]) for row in rows]
            with _damaged_pictures_refused():
                answers = generate(self.model, [prompt.ids for prompt in prompts], [prompt.images for prompt in prompts], batch_size=self.batch_size,
                                   seeds=rows, max_new_tokens=settings.max_new_tokens, **settings.core_arguments(),
                                   stop=(*settings.stops, *prompts[0].stop))
            for row, prompt, [answer] in zip(rows, prompts, answers, strict=True):
                n_rows = len(prompt.ids) + len(prompt.images) * (self.model.core.tokens_per_image - 1)
                found[row] = GenerationResult(answer.text, TokenCounts(input_tokens=n_rows, output_tokens=len(answer.ids)))
        self._pictures.clear()
        return [found[row] for row in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("stllava answers single rounds; lmms-eval's tasks of several rounds bring pictures between them")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(loss, whether greedy decoding gives this continuation) of each request; continuations of one prompt are computed together.

        The loss is the mean negative log-probability of the continuation's tokens and the end token: as in lmms-eval's LLaVA, and as its choice among
        answers, which takes the smallest, wants it, though its interface speaks of a log-likelihood.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row, request in enumerate(requests):
            context, _, *where = request.args
            groups.setdefault((context, *(where[1:] if where else [row])), []).append(row)
        found: dict[int, tuple[float, bool]] = {}
        for rows in groups.values():
            prompt = self._context(requests[rows[0]])
            texts = [self._continuation(requests[row]) for row in rows]
            ids = [[*self.model.tokenizer.encode(text, add_bos=False, parse_special=False), self.model.tokenizer.eos_token_id] for text in texts]
            with _damaged_pictures_refused():
                logps = self.model.score(prompt.ids, texts, prompt.images)
                [[greedy]] = generate(self.model, [prompt.ids], [prompt.images], max_new_tokens=max(map(len, ids)))
            for row, logp, tail in zip(rows, logps, ids, strict=True):
                found[row] = (-float(logp) / len(tail), greedy.ids[:len(tail)] == tail)
        self._pictures.clear()
        return [found[row] for row in range(len(requests))]

    # ---- what a request says -----------------------------------------------------------------------------------------

    def _settings_of(self, request: Instance) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = request.args[2]
        return settings

    def _prompt(self, request: Instance) -> ChatPrompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = [{"role": message["role"], "content": [self._part(part, task) for part in message["content"]]}
                    for message in doc_to_messages(self.task_dict[task][split][doc_id])]
        return chat_prompt(self.model, messages, template=self.template)

    def _context(self, request: Instance) -> ChatPrompt:
        """The prompt of a request that brings a context, and a function that returns the document's pictures."""
        context, _, *where = request.args
        pictures: list[Any] = []
        if where:  # nothing for a continuation's probability by itself
            doc_to_visual, doc_id, task, split = where
            pictures = list(doc_to_visual(self.task_dict[task][split][doc_id]) or []) if doc_to_visual is not None else []
        return chat_prompt(self.model, [{"role": "user", "content": context}], [self._same(picture) for picture in pictures], template=self.template)

    def _part(self, part: Mapping[str, Any], task: str) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        if part["type"] != "image":
            raise ValueError(f"task {task}: a message has {part['type']}; this model reads text and images")
        return {"type": "image", "image": self._same(part["url"])}

    def _same(self, image: Any) -> Picture:
        """One object for equal pictures, since prompts that show the same object share its encoding."""
        if isinstance(image, str):
            return image
        return self._pictures.setdefault(hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest(), image)

    def _continuation(self, request: Instance) -> str:
        _, target, *where = request.args
        if callable(target):
            _, doc_id, task, split = where
            target = target(self.task_dict[task][split][doc_id])
        return str(target).strip()  # the template has the space before an answer


class StllavaSimple(StllavaChat):
    """lmms-eval's other kind of model, whose requests bring a context and a function that returns the pictures (`--force_simple`)."""

    is_simple = True

    def _settings_of(self, request: Instance) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = request.args[1]
        return settings

    def _prompt(self, request: Instance) -> ChatPrompt:
        return self._context(request)


@contextmanager
def _damaged_pictures_refused() -> Iterator[None]:
    """lmms-eval tells Pillow to fill what is missing of a damaged picture, for the whole process; we read none while that holds."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decoding(given: Mapping[str, Any]) -> DecodingSettings:
    """A task's `generation_kwargs`, which are those of transformers and `until`. What we have no setting for is named in a warning.

    Raises:
        ValueError: beam search.
    """
    if (given.get("num_beams") or 1) != 1:
        raise ValueError(f"num_beams is {given['num_beams']}: there is no beam search, want 1")
    known = {name: value for name, value in given.items() if name in DecodingSettings.__dataclass_fields__ and value is not None}
    unknown = sorted(given.keys() - DecodingSettings.__dataclass_fields__.keys() - _NOT_USED)
    if unknown:
        warnings.warn(f"generation settings that are not used: {', '.join(unknown)}", stacklevel=2)
    if given.get("do_sample") is False:
        known["temperature"] = 0.0
    elif given.get("do_sample") and "temperature" not in known:
        known["temperature"] = 1.0
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    return DecodingSettings(**{**known, "stop": tuple(text for text in stop if text)})
