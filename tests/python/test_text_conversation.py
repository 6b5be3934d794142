"""Templates against the recorded system texts and open prompts."""

import hashlib

import pytest
from text_data import TEMPLATES, load, tokenizer

from stllava.conversation import ConversationError, as_template, check_template, conv_templates
from stllava.demo.base import load_base
from stllava.text import Tokenizer, encode_conversation, tokenizer_image_token

SYSTEM_TEXTS = load(TEMPLATES / "system_texts.json")
OPEN_PROMPTS = [entry for entry in load(TEMPLATES / "open_prompts.json") if "question" in entry]
# spec 2.2: length in bytes and SHA-256 of the system texts that checkpoints were trained with
HASHES = {
    "v1_sq": (490, "d6856b8f1a91aa2ef01877d2d089a64846392ec9a9c954518335755ebbc71dc5"),
    "v1": (154, "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"),
    "vicuna_v1": (154, "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"),
    "llava_v1": (156, "ace78a978005f68aa52ba3b02ee1b2d779e64b05c23bec09f5726a5003412dd4"),
    "llama_2": (508, "d52c188a3c969c4ece4e68846b15aaf27ef75639b76c08bdd71f062e52c7b9fc"),
    "llava_llama_2": (186, "790f4cfc05523b0eecbc061d3b2a427d84204164119832ccffb22deaae07cb29"),
}


@pytest.mark.parametrize("name", HASHES)
def test_system_text_hashes(name):
    system = conv_templates[name].system.encode()
    assert (len(system), hashlib.sha256(system).hexdigest()) == HASHES[name]


@pytest.mark.parametrize("name", SYSTEM_TEXTS)
def test_recorded_templates(name):
    template, recorded = conv_templates[name], SYSTEM_TEXTS[name]
    assert template.system == recorded["system"]
    assert list(template.roles) == recorded["roles"]
    assert (template.sep_style.name, template.sep, template.sep2) == (recorded["sep_style"], recorded["sep"], recorded["sep2"])
    assert template.version == recorded["version"]


@pytest.mark.parametrize("entry", OPEN_PROMPTS, ids=lambda entry: f"{entry['template']}-{len(entry['earlier_turns'])}")
def test_recorded_open_prompts(entry):
    conv = conv_templates[entry["template"]].copy()
    for i, (question, answer) in enumerate([*entry["earlier_turns"], [entry["question"], None]]):
        conv.append_message(conv.roles[0], question if i else f"<image>\n{question}")
        conv.append_message(conv.roles[1], answer)
    if "error" in entry:
        with pytest.raises(ConversationError):
            conv.get_prompt()
        return
    assert conv.get_prompt() == entry["prompt"]
    assert tokenizer_image_token(conv.get_prompt(), tokenizer()) == entry["input_ids"]
    assert encode_conversation(conv, tokenizer(), n_images=1) == entry["input_ids"]


def test_asking_prompt():
    recorded = next(entry for entry in load(TEMPLATES / "open_prompts.json") if "question" not in entry)
    conv = conv_templates["v1_sq"].copy()
    conv.append_message(conv.roles[0], "<image>\nCan you describe the image in detail?")
    conv.append_message(conv.roles[1], "It shows a lung.")
    conv.append_message(conv.roles[2], None)
    assert conv.get_prompt() == recorded["prompt"]
    assert encode_conversation(conv, tokenizer()) == recorded["input_ids"]


def test_a_question_cannot_end_the_prompt():
    conv = conv_templates["v1"].copy()
    conv.append_message("USER", "What does </s> mean?")
    conv.append_message("ASSISTANT", None)
    ids = encode_conversation(conv, tokenizer())
    assert tokenizer().eos_token_id not in ids
    assert tokenizer().eos_token_id in tokenizer_image_token(conv.get_prompt(), tokenizer())


def test_copies_are_independent():
    first = conv_templates["v1"].copy()
    first.append_message("USER", "a")
    second = first.copy()
    second.append_message("ASSISTANT", "b")
    assert first.messages == [["USER", "a"]] and conv_templates["v1"].messages == ()


def test_errors():
    with pytest.raises(ValueError, match="v9.*v1_sq"):
        as_template("v9")
    with pytest.raises(ConversationError, match="copy"):
        conv_templates["v1"].append_message("USER", "a")
    conv = conv_templates["v1"].copy()
    with pytest.raises(ConversationError, match="VUSER"):
        conv.append_message("VUSER", "a")
    conv.append_message("USER", "no picture")
    with pytest.raises(ConversationError, match="0 <image> markers for 1 images"):
        encode_conversation(conv, tokenizer(), n_images=1)
    llama = conv_templates["llama_2"].copy()
    llama.append_message("ASSISTANT", "a")
    with pytest.raises(ConversationError, match="first message"):
        llama.get_prompt()


class _OtherTokens(Tokenizer):
    """The recorded tokenizer with its end token renamed, as tokenizers of other model families have it."""

    def __init__(self):
        super().__init__(TEMPLATES / "tokenizer.model")
        self.special_ids = {"<unk>": 0, "<s>": 1, "<|end|>": 2}


class _JoiningTokens(Tokenizer):
    """A tokenizer with pieces that reach across the space after a tag."""

    def encode_piecewise(self, text, after_special=False):
        return [len(text)], [0]


def test_check_template():
    for name, template in conv_templates.items():
        if not template.prompt_only:
            for legacy in (True, False):
                check_template(name, tokenizer(legacy))
    check_template("v1", load_base().tokenizer)  # whose vocabulary has no capital Y
    with pytest.raises(ValueError, match="'</s>' is not a special token"):
        check_template("v1", _OtherTokens())
    with pytest.raises(ValueError, match="joins the tag"):
        check_template("v1", _JoiningTokens(TEMPLATES / "tokenizer.model"))
