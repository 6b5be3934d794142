"""Model configuration: `config.json` of LLaVA checkpoints (LLaMA or Mistral decoder) and of CLIP vision towers.

Two rules. A key that changes the maths and is not implemented is a ConfigError, never ignored. A key we do not know is kept
and written back verbatim, because other tools put their own into the same file.

The geometry of the vision tower lies in the tower's own directory in the LLaVA layout. Checkpoints written here repeat it
under `mm_vision_config`, so that they are complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from stllava import config_hf
from stllava.config_fields import FileConfig, check_divides, check_integer, check_integers, check_neutral, check_positive, unsupported
from stllava.errors import ConfigError
from stllava.limits import MAX_LAYERS, MAX_WIDTH

_LLAMA_TYPES = ("llava", "llava_llama", "llama")
_MISTRAL_TYPES = ("llava_mistral", "mistral")

# Keys with the values under which they do not change the maths; None stands for JSON null.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType({
    "hidden_act": ("silu",), "rope_scaling": (None,), "attention_bias": (False, None), "mlp_bias": (False, None),
    "attention_dropout": (0, None), "pretraining_tp": (1, None), "partial_rotary_factor": (1, None),
    "quantization_config": (None,), "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None), "image_aspect_ratio": ("pad", "square", None),
    "mm_patch_merge_type": ("flat", None), "mm_resampler_type": (None,), "mm_vision_resampler_type": (None,),
    "s2": (False, None), "use_s2": (False, None),
})
_VISION_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType({"attention_dropout": (0,), "num_channels": (3,)})
_ACTIVATIONS = ("quick_gelu", "gelu")
_MULTIMODAL_ONLY = ("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer",
                    "mm_vision_select_feature", "num_latents")


@dataclass(frozen=True)
class VisionConfig(FileConfig):
    """CLIP vision tower (transformers CLIPVisionConfig, same names and defaults). Sizes in pixels and channels."""

    image_size: int = 224
    patch_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON object of a CLIP vision model, or of a whole CLIP model (its `vision_config` is taken)."""
        if isinstance(values, Mapping) and values.get("model_type") == "clip":
            values = values.get("vision_config", {})
        if not isinstance(values, Mapping):
            raise ConfigError(f"vision tower: configuration is a {type(values).__name__}, want an object", field="vision_config")
        if values.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise ConfigError(f"vision tower: model_type is {values['model_type']!r}, supported: 'clip_vision_model', 'clip'",
                              field="model_type")
        return cls(**cls._split(values))

    def __post_init__(self) -> None:
        check_neutral(self.extra, _VISION_NEUTRAL, "vision tower")
        check_integers(self, "vision tower", MAX_WIDTH, "image_size", "patch_size", "hidden_size", "intermediate_size",
                        "num_attention_heads")
        check_integers(self, "vision tower", MAX_LAYERS, "num_hidden_layers")
        check_positive(self, "vision tower", "layer_norm_eps")
        if self.hidden_act not in _ACTIVATIONS:
            raise unsupported("vision tower", "hidden_act", self.hidden_act, _ACTIVATIONS)
        check_divides(self, "vision tower", "hidden_size", "num_attention_heads")
        check_divides(self, "vision tower", "image_size", "patch_size")

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "clip_vision_model", **super().to_dict()}

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def core_config(self, select_layer: int = -2, select_feature: str = "patch") -> dict[str, Any]:
        """The "vision" dictionary of the C core."""
        return {"image_size": self.image_size, "patch_size": self.patch_size, "hidden_size": self.hidden_size,
                "n_layers": self.num_hidden_layers, "n_heads": self.num_attention_heads,
                "intermediate_size": self.intermediate_size, "activation": self.hidden_act,
                "layer_norm_eps": float(self.layer_norm_eps), "select_layer": select_layer,
                "select_feature": select_feature}


@dataclass(frozen=True)
class LlavaConfig(FileConfig):
    """Decoder (transformers LlamaConfig / MistralConfig, same names and defaults) and LLaVA's `mm_*` keys.

    `mm_vision_tower` None means a decoder alone. `num_latents` is the number of centres of the cluster projector.
    `sliding_window` is in tokens, None = none; only Mistral decoders have one. `vision` is the tower's own configuration
    where it is known. `torch_dtype` describes the file and never converts anything.
    """

    model_type: str = "llava"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    mm_vision_tower: str | None = None
    mm_hidden_size: int = 1024
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    num_latents: int = 256
    vision: VisionConfig | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    _derived: ClassVar[tuple[str, ...]] = ("vision",)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON object of `config.json`; missing keys take transformers' defaults for the decoder's family.

        LLaVA's flat layout, or the nested one of Hugging Face's LlavaForConditionalGeneration (see `config_hf`).

        Raises ConfigError naming the key, its value and what is supported.
        """
        values = config_hf.to_llava(values) if config_hf.is_hf(values) else dict(values)
        model_type = values.setdefault("model_type", "llava")
        if model_type not in (*_LLAMA_TYPES, *_MISTRAL_TYPES):
            raise unsupported("config", "model_type", model_type, (*_LLAMA_TYPES, *_MISTRAL_TYPES))
        _take_rope_parameters(values)
        vision = values.pop("mm_vision_config", None)
        for key, value in _family_defaults(model_type in _MISTRAL_TYPES).items():
            values.setdefault(key, value)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values.get("head_dim") is None:
            check_integer("config", "num_attention_heads", values["num_attention_heads"], MAX_WIDTH)
            check_integer("config", "hidden_size", values["hidden_size"], MAX_WIDTH)
            if values["hidden_size"] % values["num_attention_heads"]:
                raise ConfigError(f"config: hidden_size {values['hidden_size']} is not a multiple of num_attention_heads "
                                  f"{values['num_attention_heads']}", field="hidden_size")
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        arguments = cls._split(values)
        return cls(**arguments, vision=None if vision is None else VisionConfig.from_dict(vision))

    def to_dict(self) -> dict[str, Any]:
        """As the base class; a decoder alone gets no multimodal keys, since LLaVA's loader asks for their presence."""
        values = super().to_dict()
        if self.vision is not None:
            values["mm_vision_config"] = self.vision.to_dict()
        if self.mm_vision_tower is None:
            values = {key: value for key, value in values.items() if key not in _MULTIMODAL_ONLY}
        if self.model_type not in _MISTRAL_TYPES and self.sliding_window is None:
            del values["sliding_window"]
        return values

    def __post_init__(self) -> None:
        check_neutral(self.extra, _NEUTRAL, "config")
        check_integers(self, "config", MAX_WIDTH, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                        "num_key_value_heads", "head_dim", "max_position_embeddings", "mm_hidden_size", "num_latents")
        check_integers(self, "config", MAX_LAYERS, "num_hidden_layers")
        check_positive(self, "config", "rms_norm_eps", "rope_theta")
        check_divides(self, "config", "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ConfigError(f"config: head_dim {self.head_dim} is odd; rotary embeddings need pairs", field="head_dim")
        if self.sliding_window is not None:
            check_integers(self, "config", MAX_WIDTH, "sliding_window")
        if not isinstance(self.tie_word_embeddings, bool):
            raise unsupported("config", "tie_word_embeddings", self.tie_word_embeddings, (True, False))
        if self.mm_vision_tower is not None:
            self._check_multimodal()

    def _check_multimodal(self) -> None:
        if not isinstance(self.mm_vision_tower, str):
            raise unsupported("config", "mm_vision_tower", self.mm_vision_tower, ("a name or path", None))
        if self.mm_vision_select_feature not in ("patch", "cls_patch"):
            raise unsupported("config", "mm_vision_select_feature", self.mm_vision_select_feature, ("patch", "cls_patch"))
        kind, _ = self.projector_kind
        if kind == "identity" and self.mm_hidden_size != self.hidden_size:
            raise ConfigError(f"config: mm_projector_type identity needs mm_hidden_size {self.mm_hidden_size} = hidden_size "
                              f"{self.hidden_size}", field="mm_projector_type")
        if type(self.mm_vision_select_layer) is not int:
            raise unsupported("config", "mm_vision_select_layer", self.mm_vision_select_layer, ("an integer",))
        if self.vision is not None:
            n_states = self.vision.num_hidden_layers + 1
            if not -n_states <= self.mm_vision_select_layer < n_states:
                raise ConfigError(f"config: mm_vision_select_layer {self.mm_vision_select_layer}: the tower has {n_states} hidden "
                                  f"states, want {-n_states} to {n_states - 1}", field="mm_vision_select_layer")
            if self.mm_hidden_size != self.vision.hidden_size:
                raise ConfigError(f"config: mm_hidden_size {self.mm_hidden_size}, but the vision tower's hidden_size is "
                                  f"{self.vision.hidden_size}; wrong tower?", field="mm_hidden_size")
            n_tokens = self.vision.n_patches + (self.mm_vision_select_feature == "cls_patch")
            if kind == "cluster" and self.num_latents > n_tokens:
                raise ConfigError(f"config: num_latents {self.num_latents} is more than the {n_tokens} tokens of an image, which are to be clustered",
                                  field="num_latents")

    @property
    def projector_kind(self) -> tuple[str, int]:
        """('cluster' | 'linear' | 'mlp' | 'identity', N of mlpNx_gelu or 0)."""
        name = self.mm_projector_type
        if name in ("cluster", "linear", "identity"):
            return name, 0
        match = re.fullmatch(r"mlp([1-9])x_gelu", name) if isinstance(name, str) else None
        if match is None:
            raise unsupported("config", "mm_projector_type", name, ("cluster", "linear", "mlp1x_gelu ... mlp9x_gelu", "identity"))
        return "mlp", int(match[1])

    @property
    def n_used_vision_layers(self) -> int:
        """Layers of the tower that can influence anything: hidden state k is the output of layer k, counted from 1."""
        if self.vision is None:
            return 0
        layer = self.mm_vision_select_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer

    @property
    def image_aspect_ratio(self) -> Literal["pad", "square"]:
        """'pad' (to a square) or 'square' (crop), LLaVA's default."""
        return "pad" if self.extra.get("image_aspect_ratio") == "pad" else "square"

    def decoder_config(self) -> dict[str, Any]:
        """The "decoder" dictionary of the C core; `sliding_window` 0 = none."""
        window = self.sliding_window or 0 if self.model_type in _MISTRAL_TYPES else 0
        return {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "n_layers": self.num_hidden_layers,
                "n_heads": self.num_attention_heads, "n_kv_heads": self.num_key_value_heads, "head_dim": self.head_dim,
                "intermediate_size": self.intermediate_size, "rms_norm_eps": float(self.rms_norm_eps),
                "rope_theta": float(self.rope_theta), "sliding_window": window,
                "tie_word_embeddings": self.tie_word_embeddings, "max_position_embeddings": self.max_position_embeddings}

    @property
    def n_layers(self) -> tuple[int, int]:
        """Of the tower (0: there is none) and of the decoder, as `Run.set_recompute` counts them."""
        return (0 if self.mm_vision_tower is None or self.vision is None else self.vision.num_hidden_layers), self.num_hidden_layers

    def core_config(self) -> dict[str, Any]:
        """The plain dictionary the C core takes: "vision", "projector" (None for a decoder alone) and "decoder".

        Raises ConfigError if the model has a vision tower whose geometry is not known.
        """
        decoder = self.decoder_config()
        if self.mm_vision_tower is None:
            return {"vision": None, "projector": None, "decoder": decoder}
        if self.vision is None:
            raise ConfigError(f"config: the geometry of the vision tower {self.mm_vision_tower!r} is not known; load the checkpoint "
                              "with vision_tower=DIR", field="mm_vision_tower")
        kind, depth = self.projector_kind
        return {"vision": self.vision.core_config(self.mm_vision_select_layer, self.mm_vision_select_feature),
                "projector": {"kind": kind, "depth": depth, "n_centers": self.num_latents, "n_rounds": 2,
                              "in_size": self.mm_hidden_size, "out_size": self.hidden_size},
                "decoder": decoder}


def _family_defaults(mistral: bool) -> dict[str, Any]:
    """Keys whose default in transformers differs between MistralConfig and LlamaConfig."""
    if mistral:
        return {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096}
    return {"hidden_size": 4096, "num_attention_heads": 32}


def known_tower(name: str) -> VisionConfig | None:
    """Geometry of the towers LLaVA checkpoints name without carrying their configuration; None for any other name."""
    image_sizes = {"openai/clip-vit-large-patch14": 224, "openai/clip-vit-large-patch14-336": 336}
    if name not in image_sizes:
        return None
    return VisionConfig(image_size=image_sizes[name], patch_size=14, hidden_size=1024, num_hidden_layers=24,
                        num_attention_heads=16, intermediate_size=4096)


def _take_rope_parameters(values: dict[str, Any]) -> None:
    """transformers 5 writes rope_parameters {rope_type, rope_theta} in place of rope_theta and rope_scaling."""
    parameters = values.get("rope_parameters")
    if parameters is None:
        return
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default" \
            or set(parameters) - {"rope_type", "rope_theta"}:
        raise ConfigError(f"config: rope_parameters is {parameters!r}, supported: rope_type 'default' with rope_theta",
                          field="rope_parameters")
    values.setdefault("rope_theta", parameters.get("rope_theta", 10000.0))
