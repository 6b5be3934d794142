"""`config.json` of Hugging Face's LlavaForConditionalGeneration <-> the LLaVA layout that :class:`stllava.config.LlavaConfig` reads.

Hugging Face nests the decoder under `text_config` and the tower under `vision_config`, and leaves out keys that have their default. The
defaults are those of transformers 5.23 (the same since 4.36): LlamaConfig or MistralConfig for `text_config` (models/llama, models/mistral),
CLIPVisionConfig for `vision_config` (models/clip), and ViT-L/14 at 336 px where `vision_config` is absent (models/llava/configuration_llava.py,
`sub_configs_defaults`).

`image_token_index` is the id that stands for an image in Hugging Face's token ids (32000 in llava-1.5); here that is -200, so its row of the
embedding is never read, and the key is only kept to be written back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stllava.config_fields import unsupported
from stllava.errors import ConfigError

if TYPE_CHECKING:
    from stllava.config import LlavaConfig

ARCHITECTURE = "LlavaForConditionalGeneration"
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
_FEATURES = {"default": "patch", "full": "cls_patch"}
_MODEL_TYPES = {"llama": "llava", "mistral": "llava_mistral"}
_VIT_L_336 = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_VOCABULARY_MULTIPLE = 64  # of the conversion script of transformers, which makes 32064 rows of 32000 + 2
# Keys of LLaVA's flat file that belong to `text_config`; those of the file that are left over stay on top.
_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
              "max_position_embeddings", "rms_norm_eps", "rope_theta")
_TEXT_EXTRA = ("bos_token_id", "eos_token_id", "initializer_range", "use_cache")
_DROPPED = ("architectures", "auto_map", "_name_or_path", "transformers_version", "rope_parameters", "image_aspect_ratio", "torch_dtype", "dtype")


def is_hf(values: Mapping[str, Any]) -> bool:
    """True for the JSON object of a LlavaForConditionalGeneration, with or without its `text_config`."""
    architectures = values.get("architectures")
    return values.get("text_config") is not None or (isinstance(architectures, list) and ARCHITECTURE in architectures)


def to_llava(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in the LLaVA layout. Raises ConfigError naming the key."""
    if (kind := values.get("model_type", "llava")) != "llava":
        raise ConfigError(f"config: model_type is {kind!r} with a text_config, supported: 'llava' ({ARCHITECTURE})", field="model_type")
    if (mixed := next((key for key in ("mm_vision_tower", "mm_projector_type") if key in values), None)) is not None:
        raise ConfigError(f"config: text_config is there, as in {ARCHITECTURE}, and {mixed}, as in LLaVA's own layout; remove one of them",
                          field="text_config")
    text, vision = (_object(values, key) for key in ("text_config", "vision_config"))
    if (kind := text.get("model_type", "llama")) not in tuple(_MODEL_TYPES):
        raise unsupported("config", "text_config.model_type", kind, tuple(_MODEL_TYPES))
    if (act := values.get("projector_hidden_act", "gelu")) != "gelu":
        raise unsupported("config", "projector_hidden_act", act, ("gelu",))
    if (bias := values.get("multimodal_projector_bias", True)) is not True:
        raise unsupported("config", "multimodal_projector_bias", bias, (True,))
    if (strategy := values.get("vision_feature_select_strategy", "default")) not in tuple(_FEATURES):
        raise unsupported("config", "vision_feature_select_strategy", strategy, tuple(_FEATURES))
    layer = values.get("vision_feature_layer", -2)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if type(layer) is not int:
        raise unsupported("config", "vision_feature_layer", layer, ("one integer",))
    image_token = values.get("image_token_index", values.get("image_token_id", 32000))
    if type(image_token) is not int or image_token < 0:
        raise unsupported("config", "image_token_index", image_token, ("a token id",))
    vision = vision or _VIT_L_336
    own = {"text_config", "vision_config", "projector_hidden_act", "multimodal_projector_bias", "vision_feature_select_strategy",
           "vision_feature_layer", "image_token_id", "architectures", *_TEXT_KEYS}  # on top, transformers does not read _TEXT_KEYS
    return {
        **{key: value for key, value in values.items() if key not in own},
        **{key: value for key, value in text.items()
           if key not in ("architectures", "_name_or_path", "torch_dtype", "dtype") and (value is not None or values.get(key) is None)},
        # LlavaConfig.__post_init__: tied if either says so
        "tie_word_embeddings": bool(values.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings")),
        "model_type": _MODEL_TYPES[kind], "image_token_index": image_token, "mm_vision_config": vision, "mm_vision_tower": _tower_name(vision),
        "mm_hidden_size": vision.get("hidden_size", 768), "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": layer,
        "mm_vision_select_feature": _FEATURES[strategy]}


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"config: {key} is a {type(value).__name__}, want an object", field=key)
    return value


def _tower_name(vision: Mapping[str, Any]) -> str:
    """What LLaVA would call the tower: its loader tells the two OpenAI ones by name."""
    size = vision.get("image_size", 224)
    if size in (224, 336) and {"hidden_act": "quick_gelu", **vision} == {
            **vision, **_VIT_L_336, "hidden_act": "quick_gelu", "image_size": size}:
        return "openai/clip-vit-large-patch14" + ("-336" if size == 336 else "")
    return "clip"


def with_image_token(config: LlavaConfig, token: int | None) -> LlavaConfig:
    """The configuration with `<image>` as this token and `<pad>` as the next one, unless it says itself which they are.

    token: the tokenizer's first free id, since tokenizers number what is added to them; None: the one behind the vocabulary.
    """
    if "image_token_index" in config.extra:
        return config
    token = config.vocab_size if token is None else token
    return dataclasses.replace(config, extra={**config.extra, "image_token_index": token, "pad_token_id": token + 1})


def padded(config: LlavaConfig) -> LlavaConfig:
    """The configuration with rows for the tokens `<image>` and `<pad>`, which Hugging Face looks up in the embedding; unchanged if it has them."""
    config = with_image_token(config, None)
    image, pad = config.extra["image_token_index"], config.extra.get("pad_token_id")
    if type(image) is not int or image < 0:
        raise unsupported("config", "image_token_index", image, ("a token id",))
    last = max(image, pad) if type(pad) is int else image
    if last < config.vocab_size:
        return config
    rows = -(-(last + 1) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return dataclasses.replace(config, vocab_size=rows)


def to_hf(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    """The JSON object of a LlavaForConditionalGeneration for a `padded` configuration; `dtype` as torch calls it ("float32").

    Raises ConfigError for what transformers has no class for: a decoder alone, the cluster projector, other projectors than two layers with GELU.
    """
    if config.mm_vision_tower is None or config.vision is None:
        raise ConfigError(f"config: {ARCHITECTURE} needs a vision tower, this model has none; write the LLaVA layout", field="mm_vision_tower")
    if config.projector_kind != ("mlp", 2):
        raise ConfigError(f"config: mm_projector_type is {config.mm_projector_type!r}, but transformers' {ARCHITECTURE} has only 'mlp2x_gelu'; "
                          "write the LLaVA layout", field="mm_projector_type")
    mistral = "mistral" in config.model_type
    text: dict[str, Any] = {key: getattr(config, key) for key in _TEXT_KEYS}
    text |= {key: config.extra[key] for key in _TEXT_EXTRA if key in config.extra}
    text |= {"model_type": "mistral" if mistral else "llama", "hidden_act": "silu", "tie_word_embeddings": config.tie_word_embeddings,
             "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}  # transformers 5; rope_theta is for those before
    text |= {"sliding_window": config.sliding_window} if mistral else {"attention_bias": False, "mlp_bias": False}
    n_tokens = config.vision.n_patches + (config.mm_vision_select_feature == "cls_patch")
    kept = {key: value for key, value in config.extra.items() if key not in (*_TEXT_EXTRA, *_DROPPED, *text)}
    return {**kept, "architectures": [ARCHITECTURE], "model_type": "llava", "image_seq_length": n_tokens, "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True, "vision_feature_layer": config.mm_vision_select_layer, "torch_dtype": dtype,
            "vision_feature_select_strategy": next(key for key, value in _FEATURES.items() if value == config.mm_vision_select_feature),
            "tie_word_embeddings": config.tie_word_embeddings, "text_config": text, "vision_config": config.vision.to_dict()}
