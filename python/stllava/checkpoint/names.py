"""Canonical tensor names, the shapes a configuration asks for, and the names each file form uses.

Canonical = the full LLaVA checkpoint:

    model.embed_tokens.weight                  model.norm.weight                  lm_head.weight
    model.layers.{i}.self_attn.{q,k,v,o}_proj.weight          model.layers.{i}.mlp.{gate,up,down}_proj.weight
    model.layers.{i}.{input,post_attention}_layernorm.weight  model.mm_projector.*
    model.vision_tower.vision_tower.vision_model.*            MODULE.lora_A.weight, MODULE.lora_B.weight
                                                              of DoRA: MODULE.lora_magnitude_vector.weight

| file                            | its name for `model.mm_projector.c.weight` / a tower tensor / an adapter         |
|---------------------------------|----------------------------------------------------------------------------------|
| full or merged weights          | canonical                                                                        |
| LlavaForConditionalGeneration   | [model.]multi_modal_projector.linear_1.weight, [model.]vision_tower.*,           |
|                                 | language_model.model.* or [model.]language_model.*, [language_model.]lm_head     |
| directory of a vision tower     | vision_model.*, since transformers 5 without `vision_model.`                     |
| non_lora_trainables             | base_model.model.model.mm_projector.c.weight (run-time prefixes of PEFT)         |
| mm_projector.bin                | anything up to `mm_projector.`, then c.weight                                    |
| adapter_model (decoder)         | base_model.model. + canonical, or + names of LlavaForConditionalGeneration       |
| Vit-lora/adapter_model (tower)  | base_model.model.vision_tower.vision_model.*  (no `model.vision_tower.` before)  |
| both of these, of DoRA          | MODULE.lora_magnitude_vector, without `.weight` (read with it too)               |
"""

from __future__ import annotations

from collections.abc import Iterable

from stllava.config import LlavaConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]

DECODER = "model."
PROJECTOR = "model.mm_projector."
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # one row per token
TOWER = "model.vision_tower.vision_tower."
_TOWER_OWNER = "model.vision_tower."  # the module that PEFT wraps for Vit-lora
_PEFT = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"
_LORA_ENDINGS = (".lora_A.weight", ".lora_B.weight", _MAGNITUDE + ".weight", _MAGNITUDE)

_HF_OWNERS = ("language_model.", "vision_tower.", "multi_modal_projector.")
_HF_PROJECTOR = {"0": "linear_1", "2": "linear_2"}

# Buffers that old transformers versions saved; they are recomputed from the configuration.
_BUFFER_ENDINGS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
# The text half of a whole CLIP model.
_CLIP_TEXT_PREFIXES = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
# In the state dictionary, but never used by the forward pass: loaded and saved, and allowed to be absent.
_UNUSED = (PROJECTOR + "ln_1.weight", PROJECTOR + "ln_1.bias")
_UNUSED_BY_LLAVA = tuple(f"{TOWER}vision_model.post_layernorm.{kind}" for kind in ("weight", "bias"))  # llama.cpp's files leave it out


def decoder_linears(config: LlavaConfig) -> Shapes:
    """Modules of the decoder that LoRA may adapt: canonical module -> (out, in)."""
    d, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: Shapes = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + "self_attn.q_proj": (q, d), layer + "self_attn.k_proj": (kv, d), layer + "self_attn.v_proj": (kv, d),
                   layer + "self_attn.o_proj": (d, q), layer + "mlp.gate_proj": (ffn, d), layer + "mlp.up_proj": (ffn, d),
                   layer + "mlp.down_proj": (d, ffn)}
    return shapes


def vision_linears(vision: VisionConfig) -> Shapes:
    """Modules of the vision tower that LoRA may adapt: canonical module -> (out, in)."""
    d, ffn = vision.hidden_size, vision.intermediate_size
    shapes: Shapes = {}
    for i in range(vision.num_hidden_layers):
        layer = f"{TOWER}vision_model.encoder.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}": (d, d) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        shapes |= {layer + "mlp.fc1": (ffn, d), layer + "mlp.fc2": (d, ffn)}
    return shapes


def decoder_shapes(config: LlavaConfig) -> Shapes:
    """Canonical name -> shape of the language model's tensors; no lm_head if it is tied to the embedding."""
    d = config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, d)}
    shapes |= {module + ".weight": shape for module, shape in decoder_linears(config).items()}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def projector_shapes(config: LlavaConfig) -> Shapes:
    """Canonical name -> shape of the projector's tensors (see the projector types in `config`)."""
    n_in, n_out = config.mm_hidden_size, config.hidden_size
    kind, depth = config.projector_kind
    linears: Shapes = {}
    shapes: Shapes = {}
    if kind == "linear":
        return {PROJECTOR + "weight": (n_out, n_in), PROJECTOR + "bias": (n_out,)}
    if kind == "mlp":
        linears = {f"{2 * i}": (n_out, n_in if i == 0 else n_out) for i in range(depth)}
    if kind == "cluster":
        shapes = {PROJECTOR + "sim_alpha": (1, 1, 1), PROJECTOR + "sim_beta": (1, 1, 1)}
        shapes |= dict.fromkeys(_UNUSED, (n_in,))
        linears = {"c": (n_in, n_in), "v": (n_in, n_in), "f": (n_in, n_in), "mlp.0": (n_out, n_in), "mlp.2": (n_out, n_out)}
    return shapes | _weight_and_bias(PROJECTOR, linears)


def vision_shapes(vision: VisionConfig) -> Shapes:
    """Canonical name -> shape of the vision tower's tensors."""
    d, patch = vision.hidden_size, vision.patch_size
    root = TOWER + "vision_model."
    shapes: Shapes = {root + "embeddings.class_embedding": (d,), root + "embeddings.patch_embedding.weight": (d, 3, patch, patch),
                      root + "embeddings.position_embedding.weight": (vision.n_patches + 1, d)}
    norms = ["pre_layrnorm", "post_layernorm"]  # the first one is spelt so in every CLIP checkpoint
    norms += [f"encoder.layers.{i}.layer_norm{k}" for i in range(vision.num_hidden_layers) for k in (1, 2)]
    shapes |= {f"{root}{norm}.{part}": (d,) for norm in norms for part in ("weight", "bias")}
    return shapes | _weight_and_bias("", vision_linears(vision))


def _weight_and_bias(prefix: str, linears: Shapes) -> Shapes:
    shapes: Shapes = {}
    for module, (n_out, n_in) in linears.items():
        shapes |= {f"{prefix}{module}.weight": (n_out, n_in), f"{prefix}{module}.bias": (n_out,)}
    return shapes


def expected_shapes(config: LlavaConfig) -> Shapes:
    """Every canonical tensor of the model with its shape: decoder, projector, tower (if `config.vision` is set)."""
    shapes = decoder_shapes(config)
    if config.mm_vision_tower is not None:
        shapes |= projector_shapes(config)
    if config.vision is not None:
        shapes |= vision_shapes(config.vision)
    return shapes


def may_be_absent(name: str) -> bool:
    """True for canonical tensors that exist in files but influence nothing."""
    return name in _UNUSED or name in _UNUSED_BY_LLAVA


def is_tower(name: str) -> bool:
    """True for tensors and modules of the vision tower."""
    return name.startswith(TOWER)


def is_projector(name: str) -> bool:
    """True for tensors and modules of the projector."""
    return name.startswith(PROJECTOR)


def part_of(name: str) -> str:
    """"vision tower", "projector" or "decoder": where a tensor or module belongs, for people."""
    return "vision tower" if is_tower(name) else "projector" if is_projector(name) else "decoder"


def is_lora(name: str) -> bool:
    return name.endswith(_LORA_ENDINGS)


def lora_module(name: str) -> str:
    """Canonical module of a LoRA tensor's canonical name."""
    return name.rpartition(".lora_")[0]


def lora_pair(module: str) -> tuple[str, str]:
    """Canonical names (A, B) of a module's adapter; A is (r, in), B is (out, r)."""
    return module + _LORA_ENDINGS[0], module + _LORA_ENDINGS[1]


def lora_magnitude(module: str) -> str:
    """Canonical name of a module's DoRA magnitudes, (out,)."""
    return module + _LORA_ENDINGS[2]


def from_full(name: str) -> str | None:
    """Full or merged weights of either layout -> canonical; None for buffers that are recomputed."""
    if name.endswith(_BUFFER_ENDINGS):
        return None
    return _in_tower(name.removeprefix(TOWER)) if is_tower(name) else from_hf(name)


def is_hf(name: str) -> bool:
    """True for tensors and modules that are named as in one of the versions of LlavaForConditionalGeneration."""
    return name.removeprefix("model.").startswith(_HF_OWNERS) and not name.startswith(TOWER)


def from_hf(name: str) -> str:
    """Tensor or module of LlavaForConditionalGeneration, as transformers 4.36 to 5 name them -> canonical; other names stay as they are."""
    if not is_hf(name):
        return name
    owner, _, rest = name.removeprefix("model.").partition(".")
    if owner == "language_model":
        return rest if rest.startswith(("model.", "lm_head.")) or rest == "lm_head" else f"model.{rest}"
    if owner == "vision_tower":
        return _in_tower(rest)
    for ours, theirs in _HF_PROJECTOR.items():
        if rest.startswith(theirs):
            return PROJECTOR + ours + rest.removeprefix(theirs)
    return PROJECTOR + rest


def to_hf(name: str) -> str:
    """Canonical -> the names of transformers 4.36, which every later version reads too."""
    if is_tower(name):
        return "vision_tower." + name.removeprefix(TOWER)
    if is_projector(name):
        number, _, rest = name.removeprefix(PROJECTOR).partition(".")
        return f"multi_modal_projector.{_HF_PROJECTOR[number]}.{rest}"
    return "language_model." + name


def _in_tower(name: str) -> str:
    """transformers 5 has no module `vision_model` inside the tower."""
    return TOWER + (name if name.startswith("vision_model.") else f"vision_model.{name}")


def from_tower(name: str) -> str | None:
    """Directory of a CLIP vision tower, or of a whole CLIP model -> canonical; None for buffers and the text half."""
    if name.endswith(_BUFFER_ENDINGS) or name.startswith(_CLIP_TEXT_PREFIXES):
        return None
    return _in_tower(name)


def to_tower(name: str) -> str:
    return name.removeprefix(TOWER)


def from_non_lora(names: Iterable[str]) -> dict[str, str]:
    """All names of a non_lora_trainables file -> canonical, by the rule of LLaVA's loader.

    The rule looks at the whole file: cut `base_model.`; then, if any name starts with `model.model.`, cut one `model.`
    from each name that has it.
    """
    short = {name: name.removeprefix("base_model.") for name in names}
    if any(value.startswith("model.model.") for value in short.values()):
        short = {name: value.removeprefix("model.") for name, value in short.items()}
    return short


def to_non_lora(name: str) -> str:
    return _PEFT + name


def from_projector_file(name: str) -> str:
    """mm_projector.bin -> canonical; a name without `mm_projector.` stays as it is and will be reported as unknown."""
    _, found, rest = name.partition("mm_projector.")
    return PROJECTOR + rest if found else name


def from_decoder_adapter(name: str) -> str:
    return from_hf(from_peft(name))


def to_decoder_adapter(name: str) -> str:
    return _to_peft(name)


def from_tower_adapter(name: str) -> str:
    return _in_tower(from_peft(name).removeprefix("vision_tower."))


def to_tower_adapter(name: str) -> str:
    return _to_peft(name.removeprefix(_TOWER_OWNER))


def from_peft(name: str) -> str:
    """A key of an adapter's file -> the tensor as PEFT's model knows it, magnitudes with `.weight`."""
    name = name.removeprefix(_PEFT)
    return name + ".weight" if name.endswith(_MAGNITUDE) else name


def _to_peft(name: str) -> str:
    """PEFT has kept the magnitudes' name from when they were a parameter, not a layer's weight, in every version's files."""
    return _PEFT + (name.removesuffix(".weight") if name.endswith(_MAGNITUDE + ".weight") else name)
