"""Which template a checkpoint is taken to be made with."""

from __future__ import annotations

import pytest
from tiny import config

from stllava.conv_mode import choose_conv_mode, guess_conv_mode, model_name_of
from stllava.conversation import conv_templates
from stllava.errors import ConfigError


@pytest.mark.parametrize("name, changes, mode", [
    ("llava-v1.5-7b", {}, "v1"), ("vicuna-7b", {}, "v1"), ("stllava-med-7b", {}, "v1"), ("llava-med-v1.5-mistral-7b", {}, "mistral_instruct"),
    ("anything", {"model_type": "llava_mistral", "num_key_value_heads": 2}, "mistral_instruct"), ("llava-llama-2-13b-chat", {}, "llava_llama_2"), ("llava-mpt-7b", {}, "mpt"),
    ("my-prompt-tuned", {}, "v1"), ("llava-v0-7b", {}, "llava_v0"), ("", {"_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2"}, "mistral_instruct"),
    ("llava-v1.5-7b", {"conversation_template": "v1_sq"}, "v1_sq"), ("llava-v1.5-7b", {"conversation_template": "nonsense"}, "v1")])
def test_guess(name, changes, mode):
    assert guess_conv_mode(config(**changes), name) == mode and mode in conv_templates


def test_a_template_that_does_not_fit_is_said():
    assert choose_conv_mode(None, config(), "llava-v1.5-7b") == ("v1", None)
    for other in ("vicuna_v1", "v1_sq", "llava_v1"):  # the same turns
        assert choose_conv_mode(other, config(), "llava-v1.5-7b") == (other, None)
    chosen, warning = choose_conv_mode("mistral_instruct", config(), "llava-v1.5-7b")
    assert chosen == "mistral_instruct"
    assert all(word in warning for word in ("mistral_instruct", "llava-v1.5-7b looks like a checkpoint of v1"))
    with pytest.raises(ConfigError, match="template 'v9' is unknown, want one of default, dolly"):
        choose_conv_mode("v9", config(), "llava-v1.5-7b")


def test_model_names():
    assert model_name_of("/models/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert model_name_of("/runs/mine/checkpoint-200") == "mine_checkpoint-200"
