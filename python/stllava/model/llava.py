"""LlavaModel: configuration, weights, adapters and trainable set around one core model.

Everything that computes is in the core (:mod:`stllava_c`); this class knows names and files.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

import stllava_c
from stllava.checkpoint import directory, names
from stllava.checkpoint.atomic import atomic_directory, current
from stllava.checkpoint.hf_processor import image_token, picture_settings, write_processor
from stllava.checkpoint.index import Format
from stllava.checkpoint.peft import LoraConfig
from stllava.checkpoint.rounding import round_tensor
from stllava.checkpoint.tensor_file import dtype_name, row_norms, to_float32
from stllava.config import LlavaConfig
from stllava.config_hf import padded, with_image_token
from stllava.errors import ConfigError, FormatError
from stllava.images import ImageProcessor, Picture
from stllava.text.interface import AnyTokenizer, has_tokenizer, load_tokenizer
from stllava.tree import Sequence, TreeBatch, build_trees

if TYPE_CHECKING:
    from stllava.chat import ChatSession
    from stllava.generation import Generation

__all__ = ["LlavaModel", "Dtype", "StoredDtype", "NUMPY_DTYPE", "sequence_sums"]

Dtype: TypeAlias = Literal["f32", "f64"]
StoredDtype: TypeAlias = Literal["f16", "bf16", "f32", "f64"]
NUMPY_DTYPE = {"f32": np.float32, "f64": np.float64}


class LlavaModel:
    """A vision-language model, its tokenizer and its image preprocessing.

    Args:
        config: the model's configuration.
        tensors: canonical name -> array; every tensor that can influence a result must be there. Arrays of `dtype`, of float16 and of uint16
            (which means bfloat16: its bits) are used where they lie, a memory map stays one; others are converted. What trains is copied.
        dtype: of what is computed: ``"f32"``, or ``"f64"`` as the slow, exact check. Narrower weights are widened where they are read, so
            results have the bits of the model with widened weights.
        tokenizer, image_processor: may be None when only ids and pixels are used.

    Raises:
        FormatError: missing, surplus or misshapen tensors (all of them are named).
    """

    def __init__(self, config: LlavaConfig, tensors: Mapping[str, np.ndarray], *, dtype: Dtype = "f32", tokenizer: AnyTokenizer | None = None,
                 image_processor: ImageProcessor | None = None) -> None:
        if dtype not in NUMPY_DTYPE:
            raise ConfigError(f"dtype is {dtype!r}, supported: {', '.join(NUMPY_DTYPE)}", field="dtype")
        self.config = config
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self.lora: dict[str, LoraConfig] = {}
        self.adapters_enabled = True
        self.core = stllava_c.Model(config.core_config(), dtype=dtype)
        self._bind(tensors)
        self.run = stllava_c.Run(self.core)

    def __repr__(self) -> str:
        from .summary import model_line
        return model_line(self)

    def _repr_html_(self) -> str:
        from .summary import model_html
        return model_html(self)

    # ---- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None, *, dtype: Dtype = "f32",
                        vision_tower: str | os.PathLike[str] | None = None, check_finite: bool | None = None) -> Self:
        """Reads a checkpoint directory: full (merged or sharded), or adapters on `model_base`; or a .gguf file of llama.cpp.

        Args:
            path: the directory or file. model_base: the base an adapter directory belongs to.
            vision_tower: the tower's directory, where the checkpoint does not hold the tower and names one that is not here; for a .gguf file the
                mmproj file, without which it is a decoder alone.
            check_finite: look for NaN and Inf in every value; None: unless there are more than 2 GiB of them, which are mapped and read when used.

        Raises:
            FormatError, ConfigError, NumericsError: naming file and key.
        """
        if Path(path).suffix == ".gguf":
            return cls._from_gguf(path, model_base, vision_tower, dtype, check_finite)
        path, model_base = current(path), None if model_base is None else current(model_base)
        found = directory.read_checkpoint(path, model_base=model_base, vision_tower=vision_tower, check_finite=check_finite)
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
        where = next((p for p in (path, model_base) if p is not None and has_tokenizer(p)), None)
        tower = next((Path(p) for p in (path, vision_tower, model_base) if p is not None and picture_settings(p) is not None), None)
        return cls.from_checkpoint(found, dtype=dtype, tokenizer=None if where is None else load_tokenizer(where),
                                   image_processor=cls._processor(found.config, tower))

    @classmethod
    def from_checkpoint(cls, found: directory.Checkpoint, *, dtype: Dtype = "f32", tokenizer: AnyTokenizer | None = None,
                        image_processor: ImageProcessor | None = None) -> Self:
        """The model of a checkpoint in memory, its adapters attached. Raises FormatError."""
        model = cls(found.config, found.tensors, dtype=dtype, tokenizer=tokenizer, image_processor=image_processor)
        for part, lora_config in zip(("llm", "vit"), found.lora_configs, strict=True):
            if lora_config is not None:
                model.attach_lora(lora_config, {n: t for n, t in found.lora.items() if names.is_tower(n) == (part == "vit")}, part)
        return model

    @classmethod
    def _from_gguf(cls, path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None, mmproj: str | os.PathLike[str] | None,
                   dtype: Dtype, check_finite: bool | None) -> Self:
        from stllava.checkpoint import gguf_file
        from stllava.text import gguf_tokenizer
        if model_base is not None:
            raise ConfigError(f"{path}: a GGUF file holds a whole model, but model_base {model_base} is given too; leave it out", path=path)
        found = gguf_file.read_gguf(path, mmproj, check_finite=check_finite, show_progress=sys.stderr.isatty())
        return cls(found.config, found.tensors, dtype=dtype, tokenizer=gguf_tokenizer.read_tokenizer(path),
                   image_processor=cls._processor(found.config, None))

    @staticmethod
    def _processor(config: LlavaConfig, tower: Path | None) -> ImageProcessor | None:
        if config.vision is None:
            return None
        if tower is not None:
            return ImageProcessor.from_pretrained(tower, aspect=config.image_aspect_ratio)
        return ImageProcessor(size=config.vision.image_size, aspect=config.image_aspect_ratio)

    def save_pretrained(self, path: str | os.PathLike[str], *, format: Format = "safetensors", shard_size: int = 5 * 10**9,
                        layout: directory.Layout = "llava") -> None:
        """Writes a directory that `from_pretrained` reads back bit for bit; whatever fails, it is the old one or the new one.

        A model with adapters saves adapters, projector and configuration, as LLaVA's LoRA training does, for use with the same base;
        `merge_and_unload` first for a full checkpoint. Every tensor keeps the dtype it is stored in; what has trained is of the model's.

        Args:
            format: ``"safetensors"`` or ``"bin"`` (torch zip files). shard_size: bytes per file of a full checkpoint.
            layout: ``"llava"``, or ``"hf"`` for transformers' LlavaForConditionalGeneration (projector mlp2x_gelu, no adapters).

        Raises:
            ConfigError: the model has no form in that layout.
            OSError: disk full, unwritable directory; naming the file and what to do. What `path` held before still loads.
        """
        with atomic_directory(path) as temporary:
            self.write_files(temporary, format=format, shard_size=shard_size, layout=layout)

    def write_files(self, directory_: str | os.PathLike[str], *, format: Format = "safetensors", shard_size: int = 5 * 10**9,
                    layout: directory.Layout = "llava", repeat_vit_lora: bool = False) -> None:
        """The files of `save_pretrained` into an existing directory, for those who add their own.

        repeat_vit_lora: the decoder's adapter file repeats the tower's adapter, as the original's does.
        """
        if self.lora and layout != "llava":
            raise ConfigError(f"layout {layout!r} is of full weights, but the model has adapters; merge_and_unload() them first", field="layout")
        config = self.config if layout != "hf" else with_image_token(self.config, None if self._tokenizer is None else image_token(self._tokenizer))
        if self.lora:
            lora, llm = self.lora_tensors(), self.lora.get("llm")
            directory.write_adapter(directory_, self.config, {n: t for n, t in lora.items() if not names.is_tower(n)},
                                    {n: t for n, t in lora.items() if names.is_tower(n)},
                                    {n: t for n, t in self.tensors().items() if names.is_projector(n)},
                                    (llm, self.lora.get("vit")), format=format, compat=repeat_vit_lora,
                                    saved={n: t for n, t in self.tensors().items() if llm is not None and llm.saves(n)})
        else:
            directory.write_full(directory_, config, self.tensors(), shard_size=shard_size, format=format, layout=layout)
        self.write_processors(directory_)
        if layout == "hf":
            write_processor(directory_, padded(config))

    def write_processors(self, directory_: str | os.PathLike[str]) -> None:
        """The files of tokenizer and image processor, where the model has them, into an existing directory."""
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(directory_)
        if self._image_processor is not None:
            self._image_processor.save_pretrained(directory_)

    def _bind(self, tensors: Mapping[str, np.ndarray]) -> None:
        wanted = self.tensor_infos()
        problems = [f"{name}: not a tensor of this model" for name in tensors if name not in wanted]
        for name, info in wanted.items():
            if name not in tensors:
                if not info.optional:
                    problems.append(f"{name}: missing, want {tuple(info.shape)}")
            elif tuple(tensors[name].shape) != tuple(info.shape):
                problems.append(f"{name}: want {tuple(info.shape)}, found {tuple(tensors[name].shape)}")
        if problems:
            raise FormatError(f"{len(problems)} tensors do not fit the configuration:\n  " + "\n  ".join(problems[:20]))
        for name, array in tensors.items():
            self.core.bind(name, self._as_stored(array))

    def _as_stored(self, array: np.ndarray) -> np.ndarray:
        """The values in a dtype that the core takes: the array itself if it can be."""
        halves = array.dtype.newbyteorder("=")
        if halves in (np.float16, np.uint16):
            return np.require(array, halves, ["C", "A"])
        return np.ascontiguousarray(array, NUMPY_DTYPE[self.dtype])

    @property
    def tokenizer(self) -> AnyTokenizer:
        """Raises ConfigError where the model was made without one (`has_tokenizer`)."""
        if self._tokenizer is None:
            raise ConfigError("the model has no tokenizer; pass ids, or load it from a directory with tokenizer.model or tokenizer.json",
                              field="tokenizer")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def image_processor(self) -> ImageProcessor:
        """Raises ConfigError where the model was made without one, as a decoder alone is."""
        if self._image_processor is None:
            raise ConfigError("the model has no image processor; pass preprocessed (3, S, S) float arrays", field="image_processor")
        return self._image_processor

    # ---- tensors and what trains -------------------------------------------------------------------------------------

    @property
    def dtype(self) -> Dtype:
        return self.core.dtype

    def tensor_infos(self) -> dict[str, stllava_c.TensorInfo]:
        """The core's table by name: shape, size, place in the flat buffer, whether any output depends on it."""
        return {info.name: info for info in self.core.tensors()}

    def trainable_slices(self) -> dict[str, slice]:
        """Where each training tensor lies in the flat buffers (`theta`, `grad`, optimiser moments), in their order."""
        infos = sorted((info for info in self.core.tensors() if info.offset >= 0), key=lambda info: info.offset)
        return {info.name: slice(info.offset, info.offset + info.size) for info in infos}

    def named_parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, zero-copy array) of every bound tensor, adapters included, in the dtype it is stored in (bfloat16 as uint16).

        Views forbid moving what they look at.
        """
        for info in self.core.tensors():
            if info.bound:
                yield info.name, self.core.tensor(info.name).numpy()

    def tensors(self) -> dict[str, np.ndarray]:
        """Base tensors (no adapters), zero-copy, in the dtypes they are stored in (bfloat16 as uint16)."""
        return {name: array for name, array in self.named_parameters() if not names.is_lora(name)}

    def lora_tensors(self) -> dict[str, np.ndarray]:
        """Adapter tensors, zero-copy."""
        return {name: array for name, array in self.named_parameters() if names.is_lora(name)}

    @property
    def theta(self) -> np.ndarray:
        """(n_trainable,) values of what trains, zero-copy: `core.theta`, empty where nothing trains."""
        return self._flat(self.core.theta)

    @property
    def grad(self) -> np.ndarray:
        """(n_trainable,) gradients, zero-copy: `core.grad`, empty where nothing trains."""
        return self._flat(self.core.grad)

    def _flat(self, tensor: stllava_c.Tensor | None) -> np.ndarray:
        return np.zeros(0, NUMPY_DTYPE[self.dtype]) if tensor is None else tensor.numpy()

    def set_trainable(self, wanted: Iterable[str]) -> None:
        """These tensors train, in this order; all others are frozen. Optimiser state refers to this order."""
        self.core.set_trainable(list(wanted))

    @property
    def trainable(self) -> list[str]:
        """Names of the training tensors, in the order of the flat buffer."""
        return list(self.trainable_slices())

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig, part: str = "llm", *, all_layers: bool = False, seed: int = 0) -> list[str]:
        """Puts fresh adapters (A Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)); B zero) on decoder (``"llm"``) or tower (``"vit"``).

        With `use_dora` each has magnitudes too, the lengths of its weight's rows, so that the model still computes what it did.

        Args:
            config: rank, alpha, dropout, target module names (None: every linear of the part), patterns.
            all_layers: also on tower layers behind the feature layer, which can never train (spec D2).
            seed: of A's draws, together with the tensor's name.

        Returns:
            names of the new tensors.

        Raises:
            ConfigError: no module matches, or the part has adapters already. MemoryError: for the values, and nothing has changed; or, for
                the few kilobytes of the tables, and some modules have adapters, others not: load the model anew.
        """
        modules = self._lora_modules(config, part)
        if not all_layers:
            infos = self.tensor_infos()
            modules = [module for module in modules if infos[f"{module}.weight"].influences]
        if not config.target_modules:  # saved adapters say where they sit
            config = replace(config, target_modules=frozenset(module.rsplit(".", 1)[1] for module in modules))
        infos, fresh = self.tensor_infos(), {}
        for module in modules:
            (n_out, n_in), rank, (a, b) = infos[f"{module}.weight"].shape, config.rank(module), names.lora_pair(module)
            fresh[a], fresh[b] = np.zeros((rank, n_in), NUMPY_DTYPE[self.dtype]), np.zeros((n_out, rank), NUMPY_DTYPE[self.dtype])
            if config.use_dora:
                norms = row_norms(self.core.tensor(f"{module}.weight").numpy())
                fresh[names.lora_magnitude(module)] = norms.astype(NUMPY_DTYPE[self.dtype])
            stllava_c.fill_uniform(fresh[a], -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), seed=seed, stream=zlib.crc32(a.encode()))
        self._add(part, config, modules)
        for name, array in fresh.items():
            self.core.bind(name, array)
        return list(fresh)

    def attach_lora(self, config: LoraConfig, tensors: Mapping[str, np.ndarray], part: str = "llm") -> None:
        """Attaches adapters with values, e.g. from files: canonical name -> array, kept in the model's dtype; they go on the modules the names say.

        Raises:
            FormatError: a tensor does not fit (another base?). ConfigError: the part has adapters already.
        """
        self._add(part, config, sorted({names.lora_module(name) for name in tensors}))
        infos = self.tensor_infos()
        for name, array in tensors.items():
            if name not in infos:
                raise FormatError(f"adapter tensor {name}: is of DoRA, but the adapter's settings do not say use_dora")
            if tuple(array.shape) != tuple(infos[name].shape):
                raise FormatError(f"adapter tensor {name}: want {tuple(infos[name].shape)}, found {tuple(array.shape)}; "
                                  "was it trained on another base?")
            self.core.bind(name, np.ascontiguousarray(to_float32(array) if dtype_name(array) == "bf16" else array, NUMPY_DTYPE[self.dtype]))

    def _add(self, part: str, config: LoraConfig, modules: Seq[str]) -> None:
        if part in self.lora:
            raise ConfigError(f"the {part} part has adapters already; merge_and_unload() them first")
        if not modules:
            raise ConfigError(f"no linear module of the {part} part matches target_modules {config.to_dict()['target_modules']}")
        del self.run  # adapters change the model's tables; runs made before are of no use
        for module in modules:
            self.core.add_lora(module, config.rank(module), config.scaling(module), config.lora_dropout, config.use_dora)
        self.run = stllava_c.Run(self.core)
        self.lora[part] = config

    def _lora_modules(self, config: LoraConfig, part: str) -> list[str]:
        if part not in ("llm", "vit"):
            raise ConfigError(f"part is {part!r}, supported: 'llm', 'vit'")
        vision = self.config.vision
        of_part = names.decoder_linears(self.config) if part == "llm" else names.vision_linears(vision) if vision is not None else ()
        return [module for module in of_part if not config.target_modules or config.targets(module)]

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Inside the block the model computes without its adapters; weights that came with one (`modules_to_save`) stay."""
        before, self.adapters_enabled = self.adapters_enabled, False
        try:
            yield
        finally:
            self.adapters_enabled = before

    def merge_lora(self) -> None:
        """Computes with W + s B A, the base kept beside it; `unmerge_lora` is exact."""
        self.core.merge_lora()

    def unmerge_lora(self) -> None:
        self.core.unmerge_lora()

    def merge_and_unload(self, *, dtype: StoredDtype | None = None) -> Self:
        """A new model whose weights are the merged ones, without adapters.

        Args:
            dtype: of the weights that adapters change; None: as each is stored in the base. Where that is f16 or bf16, merging rounds to
                nearest even, and the new model differs from this one by it; the model's own dtype keeps every bit of what it computes.

        Raises:
            ConfigError: dtype is neither f16, bf16 nor the model's. NumericsError: a merged weight does not fit f16; it is named.
        """
        if dtype not in (None, "f16", "bf16", self.dtype):
            raise ConfigError(f"dtype is {dtype!r}, supported: 'f16', 'bf16', {self.dtype!r}, or None for the base's", field="dtype")
        merged = dict(self.tensors())
        for module in {names.lora_module(name) for name in self.lora_tensors()}:
            name = f"{module}.weight"
            weight = self.core.effective_weight(module).reshape(merged[name].shape)
            merged[name] = round_tensor(name, weight, dtype or dtype_name(merged[name]))
        return type(self)(self.config, merged, dtype=self.dtype, tokenizer=self._tokenizer, image_processor=self._image_processor)

    # ---- computing ---------------------------------------------------------------------------------------------------

    def pixels(self, images: Iterable[Picture]) -> np.ndarray:
        """(n, 3, S, S) of the model's dtype from anything `ImageProcessor` takes, or from preprocessed (3, S, S) arrays."""
        rows = []
        for image in images:
            if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim == 3 and image.shape[0] == 3:
                rows.append(image)
            else:
                rows.append(self.image_processor(image))
        return np.ascontiguousarray(np.stack(rows), NUMPY_DTYPE[self.dtype])

    def batch(self, sequences: Iterable[Sequence] | TreeBatch, *, share: bool = True) -> tuple[TreeBatch, stllava_c.Batch]:
        """Packs sequences for this model."""
        trees = sequences if isinstance(sequences, TreeBatch) else build_trees(sequences, share=share)
        return trees, stllava_c.Batch(self.core, **trees.core_arguments())

    def logps(self, sequences: Iterable[Sequence], pixels: Mapping[Any, np.ndarray] | None = None, *, share: bool = True) -> NDArray[np.float64]:
        """Summed log-probability of each sequence's targets, in input order, (n,) float64. pixels: image key -> (3, S, S)."""
        trees, batch = self.batch(sequences, share=share)
        values = self.run.forward(batch, pixels=self._stack(trees, pixels), adapters=self.adapters_enabled)
        return sequence_sums(batch, values)[trees.order]

    def logits(self, ids: Seq[int], images: Seq[np.ndarray] = ()) -> np.ndarray:
        """(rows, vocab_size) next-token logits at every row of one sequence; an image stands on `tokens_per_image` rows."""
        _trees, batch = self.batch([Sequence(ids, None, tuple(range(len(images))))])
        self.run.forward(batch, pixels=self.pixels(images) if images else None, adapters=self.adapters_enabled)
        return self.run.logits(np.arange(batch.n_rows))

    def _stack(self, trees: TreeBatch, pixels: Mapping[Any, np.ndarray] | None) -> np.ndarray | None:
        if not trees.image_keys:
            return None
        if pixels is None:
            raise ValueError(f"the sequences name {len(trees.image_keys)} images, but no pixels are given")
        return np.ascontiguousarray(np.stack([pixels[key] for key in trees.image_keys]), NUMPY_DTYPE[self.dtype])

    def encode_images(self, images: Iterable[Picture]) -> np.ndarray:
        """Projected image features, (n, tokens_per_image, hidden_size)."""
        pixels = self.pixels(images)
        return self.run.encode(pixels, adapters=self.adapters_enabled).reshape(len(pixels), self.core.tokens_per_image, -1)

    def score(self, prompt: str | Seq[int], answers: Seq[str], images: Seq[Picture] = ()) -> NDArray[np.float64]:
        """Summed log-probability of each answer after the prompt, (len(answers),) float64; the prompt is computed once."""
        from stllava.generation import score
        return score(self, prompt, answers, images)

    def generate(self, prompts: Seq[str] | Seq[Seq[int]], images: Seq[Picture | tuple[Picture, ...] | None] | None = None,
                 **options: Any) -> list[list[Generation]]:
        """Continuations of each prompt: see :func:`stllava.generation.generate`."""
        from stllava.generation import generate
        return generate(self, prompts, images, **options)

    def chat(self, messages: Seq[Mapping[str, Any]], images: Seq[Picture] = (), **options: Any) -> str:
        """The assistant's answer to a conversation: see :func:`stllava.chat.chat`."""
        from stllava.chat import chat
        return chat(self, messages, images, **options)

    def stream(self, prompt: str | Seq[int], images: Seq[Picture] = (), **options: Any) -> Iterator[str]:
        """The text of one continuation, piece by piece: see :func:`stllava.generation.stream`."""
        from stllava.generation import stream
        return stream(self, prompt, images, **options)

    def chat_session(self, template: str | None = None, **options: Any) -> ChatSession:
        """A conversation that streams and computes only what is new in each turn: see :class:`stllava.chat.ChatSession`."""
        from stllava.chat import ChatSession
        return ChatSession(self, template, **options)


def sequence_sums(batch: stllava_c.Batch, values: np.ndarray) -> NDArray[np.float64]:
    """Sum of `values` (n_targets,) over each sequence's targets, (n_sequences,); 0 for a sequence without targets."""
    begin, counts = batch.sequence_begin[:-1], np.diff(batch.sequence_begin)
    sums = np.zeros(batch.n_sequences)
    sums[counts > 0] = np.add.reduceat(values, begin[counts > 0]) if len(values) else 0.0
    return sums
