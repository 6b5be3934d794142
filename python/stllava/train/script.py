"""The settings of the original training scripts that are not about the run itself: which model, which data, and how to run the script.

Names are the original's. Where a checkpoint's own configuration answers a question, the default here is None = "as the checkpoint has it", and where
it has no answer ORIGINAL_DEFAULTS. Settings of the run (rates, steps, saving ...) are `train.arguments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stllava.errors import ConfigError

__all__ = ["ORIGINAL_DEFAULTS", "DataArguments", "ModelArguments", "ScriptArguments"]

ORIGINAL_DEFAULTS: dict[str, Any] = {
    "mm_vision_select_layer": -1, "mm_vision_select_feature": "patch", "mm_projector_type": "linear", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": True, "num_latents": 256, "image_aspect_ratio": "square", "image_grid_pinpoints": None}
"""What the original takes for a flag that is not given, whatever the checkpoint says."""


@dataclass(slots=True)
class ModelArguments:
    """The model that trains: a base, its vision tower and projector, what is frozen, and the adapters.

    `pretrain_mm_mlp_adapter`: mm_projector.bin or non_lora_trainables.bin. `pretrain_lora`: a tower adapter to go on from. `lora_dropout_vit`: None
    as the original has it in its code, 0.2 for SFT and 0.1 for DPO (which drops nothing unless `disable_dropout` is False). `qav_loss`, `loss_alpha`:
    the original writes them to config.json and uses them nowhere.
    """

    model_name_or_path: str
    model_base: str | None = None
    vision_tower: str | None = None
    mm_vision_select_layer: int | None = None
    mm_vision_select_feature: str | None = None
    pretrain_mm_mlp_adapter: str | None = None
    mm_projector_type: str | None = None
    mm_use_im_start_end: bool | None = None
    mm_use_im_patch_token: bool | None = None
    num_latents: int | None = None
    freeze_backbone: bool = False
    tune_mm_mlp_adapter: bool = False
    freeze_mm_mlp_adapter: bool = False
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    lora_weight_path: str = ""
    use_dora: bool = False
    vit_lora_enable: bool = False
    lora_r_vit: int = 64
    lora_alpha_vit: int = 32
    lora_dropout_vit: float | None = None
    pretrain_lora: str | None = None
    bits: int = 16
    double_quant: bool = True
    quant_type: str = "nf4"
    qav_loss: bool = False
    loss_alpha: float = 0.5
    dtype: str = "f32"

    def __post_init__(self) -> None:
        _one_of(self, "mm_vision_select_feature", (None, "patch", "cls_patch"))
        _one_of(self, "lora_bias", ("none", "all", "lora_only"))
        _one_of(self, "bits", (16,), "; weights stay as they are stored: for less memory use a bf16 or f16 checkpoint")
        _one_of(self, "quant_type", ("nf4", "fp4"))
        _one_of(self, "dtype", ("f32", "f64"))
        for name in ("lora_r", "lora_alpha", "lora_r_vit", "lora_alpha_vit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, want at least 1", field=name)
        for name in ("lora_dropout", "lora_dropout_vit"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} is {value}, want a number in [0, 1)", field=name)
        if self.lora_weight_path:
            raise ConfigError(f"lora_weight_path is {self.lora_weight_path!r}: the original never reads it; to go on from an adapter give its "
                              "directory as model_name_or_path with model_base, or pretrain_lora for the tower's", field="lora_weight_path")
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ConfigError("tune_mm_mlp_adapter trains the projector alone, freeze_mm_mlp_adapter keeps it as it is; set one",
                              field="tune_mm_mlp_adapter")


@dataclass(slots=True)
class DataArguments:
    """The training data. `version`: conversation template. `model_max_length`: rows of a sample, image rows included. `sq_r`: how likely a turn after
    the first trains the question (template v1_sq). `on_bad_sample`: "error" or "skip". `image_grid_pinpoints`: kept in
    config.json, as the original does. `lazy_preprocess`, `is_multimodal`: no effect."""

    data_path: str
    version: str = "v1_sq"
    image_folder: str | None = None
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: str | None = None
    model_max_length: int = 2048
    sq_r: float = 0.5
    on_bad_sample: str = "error"
    eval_data_path: str | None = None
    data_aug: bool = False
    lazy_preprocess: bool = False
    is_multimodal: bool = False

    def __post_init__(self) -> None:
        _one_of(self, "image_aspect_ratio", (None, "pad", "square"))
        _one_of(self, "on_bad_sample", ("error", "skip"))
        if not 0 <= self.sq_r <= 1:
            raise ConfigError(f"sq_r is {self.sq_r}, want a probability between 0 and 1", field="sq_r")
        if self.model_max_length < 1:
            raise ConfigError(f"model_max_length is {self.model_max_length}, want at least 1", field="model_max_length")


@dataclass(slots=True)
class ScriptArguments:
    """How the script runs. `deepspeed`: a JSON file, see `train.deepspeed`. `config`: files of settings that the command line overrides.
    `original_compat`: the original's quirks, for comparison."""

    deepspeed: str | None = None
    config: list[str] = field(default_factory=list)
    original_compat: bool = False
    num_threads: int = 0


def _one_of(arguments: Any, name: str, choices: tuple[Any, ...], advice: str = "") -> None:
    value = getattr(arguments, name)
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, supported: {', '.join(str(c) for c in choices if c is not None)}{advice}", field=name)

