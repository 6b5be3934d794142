"""The model that the original scripts' flags describe: base, vision tower, projector, adapters, and what trains.

    base        a LLaVA checkpoint, a decoder alone (LLaMA, Vicuna, Mistral), or an adapter directory with `model_base`
    tower       `vision_tower`; another one than the checkpoint names wins over what it holds (spec D21)
    projector   the checkpoint's; where it has none, or is of another type, a fresh one; `pretrain_mm_mlp_adapter` replaces its values
    adapters    of decoder and tower: new, or those of an adapter directory and of `pretrain_lora`, which train on

Source: LLaVA's train.py and llava_arch.py (initialize_vision_modules), with what the original adds. A flag that has no effect there, or breaks, works
here, or is refused. `lora_bias` changes nothing: LLaMA and Mistral have no biases.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

import stllava_c
from stllava.checkpoint import atomic, directory, names, peft
from stllava.checkpoint.adapters import VIT_LORA
from stllava.checkpoint.directory import Checkpoint
from stllava.checkpoint.hf_processor import picture_settings
from stllava.checkpoint.index import has_weights, read_file, read_weights
from stllava.checkpoint.peft import LoraConfig
from stllava.checkpoint.tensor_file import dtype_name
from stllava.config import LlavaConfig, VisionConfig
from stllava.config_fields import CONFIG_FILE
from stllava.errors import ConfigError, FormatError
from stllava.images import ImageProcessor
from stllava.model import LlavaModel
from stllava.text.interface import has_tokenizer, load_tokenizer

from .arguments import DPOConfig, TrainingArguments
from .script import ORIGINAL_DEFAULTS, DataArguments, ModelArguments

__all__ = ["build_model", "fresh_projector"]

_TORCH_DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def build_model(model_args: ModelArguments, training_args: TrainingArguments, data_args: DataArguments | None = None) -> tuple[LlavaModel, list[str]]:
    """The model, and the names of the tensors that train (`Trainer(..., trainable=names)`).

    Raises:
        ConfigError, FormatError: naming the flag or the file, and what to do.
    """
    _refuse(model_args)
    own = _own_config(model_args)
    tower = _directory_of_tower(model_args, own)
    base = atomic.current(model_args.model_name_or_path)
    found = _read(model_args, base, tower, own)
    _set_up_projector(found, model_args, training_args.seed)
    if model_args.pretrain_lora is not None:
        _continue_tower_adapter(found, model_args)
    found.config = _as_written(found, model_args, training_args, data_args)
    found.lora_configs = _with_dropout(found.lora_configs, model_args, training_args)
    directory.check_shapes(found.config, directory.shapes_of(found.tensors), found.sources, [base])
    directory.check_finite_values(found, None)
    places = [Path(p) for p in (tower, base, model_args.model_base) if p is not None]
    settings = next((p for p in places if picture_settings(p) is not None), None)
    aspect, vision = found.config.image_aspect_ratio, found.config.vision
    assert vision is not None  # `check_shapes` has seen the tower
    processor = ImageProcessor(size=vision.image_size, aspect=aspect) if settings is None else ImageProcessor.from_pretrained(settings, aspect=aspect)
    where = next((p for p in (base, model_args.model_base) if p is not None and has_tokenizer(p)), None)
    model = LlavaModel.from_checkpoint(found, dtype="f64" if model_args.dtype == "f64" else "f32",
                                       tokenizer=None if where is None else load_tokenizer(where), image_processor=processor)
    return model, _adapt(model, model_args, training_args)


def fresh_projector(config: LlavaConfig, seed: int) -> dict[str, np.ndarray]:
    """A projector as torch makes it: weights and biases of nn.Linear uniform within 1/sqrt(in); sim_alpha 1, sim_beta 0, ln_1 1 and 0.

    Drawn from (seed, name), so with other numbers than torch's generator gives. Canonical name -> float32 array.
    """
    shapes = names.projector_shapes(config)
    tensors = {}
    for name, shape in shapes.items():
        array = np.zeros(shape, np.float32)
        if name.endswith(("sim_alpha", "ln_1.weight")):
            array[...] = 1.0
        elif not name.endswith(("sim_beta", "ln_1.bias")):
            bound = 1 / math.sqrt(shapes[f"{name.rpartition('.')[0]}.weight"][1])
            stllava_c.fill_uniform(array, -bound, bound, seed=seed, stream=zlib.crc32(name.encode()))
        tensors[name] = array
    return tensors


def _refuse(args: ModelArguments) -> None:
    """What contradicts itself, or is not there."""
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if getattr(args, name):
            raise ConfigError(f"{name} is True, supported: False; it adds tokens to the vocabulary, which neither LLaVA-1.5 nor the original's "
                              "scripts do", field=name)
    if args.model_name_or_path.endswith(".gguf"):
        raise ConfigError(f"{args.model_name_or_path}: what is trained refers to its base, which cannot be a .gguf file; write a directory of it "
                          "first: LlavaModel.from_pretrained(FILE, vision_tower=MMPROJ).save_pretrained(DIR)", field="model_name_or_path")
    if args.tune_mm_mlp_adapter and (args.lora_enable or args.vit_lora_enable):
        raise ConfigError("tune_mm_mlp_adapter trains the projector alone; leave lora_enable and vit_lora_enable out", field="tune_mm_mlp_adapter")
    if args.pretrain_lora is not None and not args.vit_lora_enable:
        raise ConfigError("pretrain_lora goes on from an adapter of the tower: set vit_lora_enable too", field="pretrain_lora")
    if args.lora_bias != "none" and args.vit_lora_enable:
        raise ConfigError(f"lora_bias is {args.lora_bias!r}: biases of the tower cannot train beside its adapters, and the decoder has none; "
                          "leave it out", field="lora_bias")
    if args.vit_lora_enable and not args.lora_enable and not args.freeze_backbone:
        raise ConfigError("vit_lora_enable without lora_enable would train the whole decoder beside adapters, and no directory holds both: set "
                          "lora_enable, or freeze_backbone for the tower's adapters alone", field="lora_enable")


def _own_config(args: ModelArguments) -> LlavaConfig | None:
    """The configuration that describes the model, as `read_checkpoint` finds it."""
    places = (Path(place) / CONFIG_FILE for place in (args.model_name_or_path, args.model_base) if place is not None)
    found = next((place for place in places if place.exists()), None)
    return None if found is None else LlavaConfig.from_pretrained(found)


def _directory_of_tower(args: ModelArguments, own: LlavaConfig | None) -> Path | None:
    """`vision_tower`, unless it is the tower that the checkpoint names itself: then that one stands, which may be inside, merged."""
    if args.vision_tower is None or (own is not None and args.vision_tower == own.mm_vision_tower):
        return None
    if not Path(args.vision_tower).is_dir():
        raise FormatError(f"vision_tower {args.vision_tower!r} is not a directory here, and nothing is downloaded; fetch it (for example "
                          f"`hf download {args.vision_tower} --local-dir DIR`) and pass vision_tower=DIR", field="vision_tower")
    return Path(args.vision_tower)


def _read(args: ModelArguments, base: Path, tower: Path | None, own: LlavaConfig | None) -> Checkpoint:
    is_decoder = own is not None and own.mm_vision_tower is None
    if is_decoder and tower is None:
        raise ConfigError(f"{base}: is a decoder without a vision tower: pass vision_tower=DIR", path=base, field="vision_tower")
    found = directory.read_checkpoint(base, args.model_base, None if is_decoder else tower, check_finite=False)  # later, of all together
    if is_decoder and tower is not None:
        _add_tower(found, tower)
    changes: dict[str, Any] = {name: value for name in ("mm_vision_select_layer", "mm_vision_select_feature")
                               if (value := getattr(args, name)) is not None}
    if tower is not None:
        changes["mm_vision_tower"] = str(args.vision_tower)
    found.config = dataclasses.replace(found.config, **changes)
    return found


def _add_tower(found: Checkpoint, tower: Path) -> None:
    """Makes a decoder alone a LLaVA model that has no projector yet."""
    vision = VisionConfig.from_pretrained(tower)
    given = {name: ORIGINAL_DEFAULTS[name] for name in ("mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "num_latents")}
    kind = "llava_mistral" if "mistral" in found.config.model_type else "llava"
    extra = {key: value for key, value in found.config.extra.items() if key != "architectures"}
    found.config = dataclasses.replace(found.config, **given, model_type=kind, mm_vision_tower=str(tower), mm_hidden_size=vision.hidden_size,
                                       vision=vision, extra=extra)
    if not has_weights(tower):
        raise FormatError(f"{tower}: holds no weights of a vision tower", path=tower, field="vision_tower")
    for file in read_weights(tower):
        found.add(file, names.from_tower)


def _set_up_projector(found: Checkpoint, args: ModelArguments, seed: int) -> None:
    """A projector of the wanted type, from the checkpoint, a file, or fresh."""
    config = found.config
    changes = {name: value for name in ("mm_projector_type", "num_latents") if (value := getattr(args, name)) is not None}
    found.config = dataclasses.replace(config, **changes)
    wanted = names.projector_shapes(found.config)
    is_there = any(map(names.is_projector, found.tensors))
    if args.pretrain_mm_mlp_adapter is not None:
        _load_projector(found, Path(args.pretrain_mm_mlp_adapter), wanted)
    elif not is_there or found.config.projector_kind != config.projector_kind:
        found.drop(names.PROJECTOR, f"of another type than mm_projector_type {found.config.mm_projector_type}, of which a fresh one is made")
        fresh = fresh_projector(found.config, seed)
        found.tensors |= fresh
        found.sources |= dict.fromkeys(fresh, Path("fresh projector"))


def _load_projector(found: Checkpoint, path: Path, wanted: names.Shapes) -> None:
    """The tensors of a file whose key has `mm_projector.` in it, as the original takes them."""
    if path.is_dir():
        candidates = [path / f"{stem}.{kind}" for stem in (directory.PROJECTOR_ONLY, directory.NON_LORA) for kind in ("bin", "safetensors")]
        path = next((candidate for candidate in candidates if candidate.exists()), path)
    if not path.is_file():
        raise FormatError(f"pretrain_mm_mlp_adapter {path}: no such file; want mm_projector.bin or non_lora_trainables.bin", path=path,
                          field="pretrain_mm_mlp_adapter")
    file = read_file(path)
    tensors = {names.from_projector_file(key): file[key] for key in file if "mm_projector." in key}
    problem = next((f"{name} of shape {array.shape}, not {wanted.get(name, 'known')}" for name, array in tensors.items()
                    if wanted.get(name) != array.shape), None)
    problem = problem or next((f"no {name}" for name in wanted if name not in tensors and not names.may_be_absent(name)), None)
    if problem:
        raise FormatError(f"pretrain_mm_mlp_adapter {path}: has {problem}; is the projector of another type than mm_projector_type "
                          f"{found.config.mm_projector_type!r}, or of another model?", path=path, field="pretrain_mm_mlp_adapter")
    found.drop(names.PROJECTOR, f"replaced by {path}")
    found.tensors |= tensors
    found.sources |= dict.fromkeys(tensors, path)


def _continue_tower_adapter(found: Checkpoint, args: ModelArguments) -> None:
    """`pretrain_lora`: a directory with adapter_config.json, or the weights of one with rank and alpha of the flags."""
    path = Path(str(args.pretrain_lora))
    if found.lora_configs[1] is not None:
        raise ConfigError(f"pretrain_lora {path}: {args.model_name_or_path} has an adapter of the tower already; give one of them",
                          field="pretrain_lora")
    path = path / VIT_LORA if peft.has_adapter(path / VIT_LORA) else path
    config = LoraConfig(r=args.lora_r_vit, lora_alpha=args.lora_alpha_vit, use_dora=args.use_dora)
    if path.is_dir():
        adapter = peft.read_adapter(path, names.from_tower_adapter)
        config, tensors, path = adapter.config, adapter.tensors, adapter.path
    elif path.is_file():
        file = read_file(path)
        tensors = {names.from_tower_adapter(key): file[key] for key in file}
    else:
        raise FormatError(f"pretrain_lora {path}: no such file or directory; want Vit-lora or its adapter_model.bin", path=path,
                          field="pretrain_lora")
    assert found.config.vision is not None
    modules = {names.lora_module(name).rpartition(".")[2] for name in tensors}
    config = dataclasses.replace(config, target_modules=config.target_modules or frozenset(modules))
    peft.check_pairs(peft.Adapter(config, tensors, path), names.vision_linears(found.config.vision), lambda module: False)
    found.lora |= tensors
    found.sources |= dict.fromkeys(tensors, path)
    found.lora_configs = (found.lora_configs[0], config)


def _as_written(found: Checkpoint, args: ModelArguments, training: TrainingArguments, data: DataArguments | None) -> LlavaConfig:
    """The configuration with the fields that the original writes into config.json."""
    config = found.config
    own = {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "use_cache": True,
           "mm_projector_lr": training.mm_projector_lr, "vision_tower_lr": training.vision_tower_lr,
           "tune_mm_mlp_adapter": args.tune_mm_mlp_adapter, "freeze_mm_mlp_adapter": args.freeze_mm_mlp_adapter,
           "qav_loss": args.qav_loss, "loss_alpha": args.loss_alpha}
    for name in ("image_aspect_ratio", "image_grid_pinpoints"):
        given = None if data is None else getattr(data, name)
        own[name] = config.extra.get(name, ORIGINAL_DEFAULTS[name]) if given is None else given
    defaults = {"architectures": ["LlavaMistralForCausalLM" if "mistral" in config.model_type else "LlavaLlamaForCausalLM"],
                "torch_dtype": _TORCH_DTYPES[dtype_name(found.tensors["model.embed_tokens.weight"])], "transformers_version": "4.31.0"}
    return dataclasses.replace(config, extra={**defaults, **config.extra, **own})


def _with_dropout(configs: tuple[LoraConfig | None, LoraConfig | None], args: ModelArguments,
                  training: TrainingArguments) -> tuple[LoraConfig | None, LoraConfig | None]:
    """Adapters from files train on with the dropout of the flags."""
    decoder, tower = configs
    return (decoder if decoder is None or not args.lora_enable else dataclasses.replace(decoder, lora_dropout=args.lora_dropout),
            tower if tower is None or not args.vit_lora_enable else dataclasses.replace(tower, lora_dropout=_tower_dropout(args, training)))


def _tower_dropout(args: ModelArguments, training: TrainingArguments) -> float:
    if args.lora_dropout_vit is not None:
        return args.lora_dropout_vit
    return 0.1 if isinstance(training, DPOConfig) else 0.2


def _adapt(model: LlavaModel, args: ModelArguments, training: TrainingArguments) -> list[str]:
    """Puts the adapters on that are not there, and says what trains."""
    wanted = {"llm": LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora,
                                task_type="CAUSAL_LM", base_model_name_or_path=args.model_name_or_path) if args.lora_enable else None,
              "vit": LoraConfig(r=args.lora_r_vit, lora_alpha=args.lora_alpha_vit, lora_dropout=_tower_dropout(args, training),
                                use_dora=args.use_dora) if args.vit_lora_enable else None}
    for part, config in wanted.items():
        there = model.lora.get(part)
        if config is not None and there is None:
            model.add_lora(config, part, all_layers=True, seed=training.seed)
        elif config is not None and there is not None and (config.r, config.lora_alpha) != (there.r, there.lora_alpha):
            raise ConfigError(f"the adapter there has r {there.r} and alpha {there.lora_alpha:g}, the flags say {config.r} and "
                              f"{config.lora_alpha:g}; give its own to train it on, or merge it first",
                              field="lora_r" if part == "llm" else "lora_r_vit")
    if "llm" in model.lora and not args.lora_enable:
        raise ConfigError(f"{args.model_name_or_path} has an adapter of the decoder: set lora_enable to train it on, or merge it first "
                          "(`stllava merge`)", field="lora_enable")
    names_ = [info.name for info in model.core.tensors() if info.bound and _trains(info.name, args)]
    if not names_:
        raise ConfigError("nothing is left to train: everything is frozen, and no adapter is asked for", field="freeze_backbone")
    return names_


def _trains(name: str, args: ModelArguments) -> bool:
    if names.is_projector(name) and not names.is_lora(name):
        return not args.freeze_mm_mlp_adapter
    if names.is_lora(name):
        return args.vit_lora_enable if names.is_tower(name) else args.lora_enable
    return not (names.is_tower(name) or args.lora_enable or args.vit_lora_enable or args.tune_mm_mlp_adapter or args.freeze_backbone)
