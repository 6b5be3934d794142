"""Which conversation template a checkpoint was trained with, as far as its configuration and its name tell."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .config import LlavaConfig
from .conversation import conv_templates
from .errors import ConfigError

__all__ = ["choose_conv_mode", "guess_conv_mode", "model_name_of"]

# First match decides. LLaVA takes names with "v1" for `llava_v1` and all others for `llava_v0`; its evaluation scripts, and every checkpoint since
# 1.5, say `vicuna_v1`, whose text is that of `v1`.
_BY_NAME = ((r"mistral", "mistral_instruct"), (r"llama[-_]?2", "llava_llama_2"), (r"(?<![a-z])mpt", "mpt"), (r"vicuna|v1", "v1"),
            (r"(?<![a-z])v0", "llava_v0"))


def guess_conv_mode(config: LlavaConfig, name: str = "") -> str:
    """Name of a template: the one the configuration names (`conversation_template`), else by the decoder's family, else by the checkpoint's name,
    else by the base's (`_name_or_path`), else `v1`.

    Source: `llava/serve/cli.py`, with the differences said above.
    """
    named = config.extra.get("conversation_template")
    if isinstance(named, str) and named in conv_templates:
        return named
    for text in (config.model_type, name, str(config.extra.get("_name_or_path", ""))):
        for pattern, template in _BY_NAME:
            if re.search(pattern, text.lower()):
                return template
    return "v1"


def choose_conv_mode(given: str | None, config: LlavaConfig, name: str) -> tuple[str, str | None]:
    """The template to use, and a warning where the one asked for is not the one the checkpoint seems to be made with.

    Raises ConfigError for an unknown template.
    """
    guessed = guess_conv_mode(config, name)
    if given is None:
        return guessed, None
    if given not in conv_templates:
        raise ConfigError(f"--conv_mode: template {given!r} is unknown, want one of {', '.join(sorted(conv_templates))}", field="conv_mode")
    if _form(given) == _form(guessed):  # they differ in the system text at most
        return given, None
    return given, f"--conv_mode is {given}, but {name} looks like a checkpoint of {guessed}; using {given}"


def _form(name: str) -> tuple[object, ...]:
    template = conv_templates[name]
    return template.sep_style, template.sep, template.sep2, template.roles[:2]


def model_name_of(path: str | os.PathLike[str]) -> str:
    """A short name for a checkpoint. Source: `get_model_name_from_path` of `llava/mm_utils.py`: the run's directory for its checkpoint-N."""
    parts = Path(os.path.abspath(path)).parts
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") and len(parts) > 2 else parts[-1]
