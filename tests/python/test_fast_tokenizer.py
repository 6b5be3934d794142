"""tokenizer.json against what transformers makes of the same files, and against the slow tokenizer of the same model.

recorded/fast_tokenizer.json holds three small tokenizers with the ids and texts of transformers 5.23 (AutoTokenizer, tokenizers 0.23.3) for 104
awkward strings; recorded/small_tokenizer.model is the SentencePiece model (560 pieces) that the two LLaMA-like ones were converted from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from text_data import load

from stllava.conversation import Segment, check_template
from stllava.errors import ConfigError, FormatError
from stllava.text import Tokenizer, encode_conversation, load_tokenizer, tokenizer_image_token
from stllava.text.encode import encode_segments
from stllava.text.fast_tokenizer import FastTokenizer
from stllava.text.labels import build_sample

tokenizers = pytest.importorskip("tokenizers", reason="pip install 'stllava[tokenizers]'")

RECORDED_DIR = Path(__file__).parent / "recorded"
SMALL_MODEL = RECORDED_DIR / "small_tokenizer.model"
RECORDED = load(RECORDED_DIR / "fast_tokenizer.json")
CASES, TEXTS = RECORDED["cases"], RECORDED["texts"]


def write(folder: Path, case: str, values: dict | None = None, **config) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(values or CASES[case]["tokenizer"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(CASES[case]["config"] | config))
    return folder


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    return CASES[request.param], FastTokenizer.from_pretrained(write(tmp_path, request.param))


def test_ids_and_texts_are_those_of_transformers(case):
    recorded, tokenizer = case
    assert [tokenizer.encode(text) for text in TEXTS] == recorded["ids"]
    assert [tokenizer.encode(text, add_bos=False, parse_special=False) for text in TEXTS] == recorded["plain_ids"]
    assert [tokenizer.decode(ids) for ids in recorded["ids"]] == recorded["decoded"]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in recorded["ids"]] == recorded["decoded_with_special"]


def test_text_of_a_user_never_becomes_a_special_id(case):
    _, tokenizer = case
    special = set(tokenizer.special_ids.values())
    for text in (*TEXTS, *(f"a{token}{token} b{token}" for token in tokenizer.special_ids)):
        assert special.isdisjoint(tokenizer.encode(text, add_bos=False, parse_special=False))


def test_letters_that_merge_into_a_special_token_are_taken_apart(tmp_path):
    values = {"model": {"type": "BPE", "vocab": {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4, "x": 5}, "merges": [["<", "e"], ["<e", ">"]]},
              "added_tokens": [{"id": 4, "content": "<e>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}]}
    values |= {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    tokenizer = FastTokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)), eos_token="<e>")
    assert tokenizer.encode("x<e>x") == [5, 4, 5]
    ids, begins = tokenizer.encode_piecewise("x<e>x<e>")
    assert 4 not in ids and begins == sorted(begins)
    assert "".join("<e>x"[[0, 1, 2, 5].index(i)] if i != 3 else "<e" for i in ids) == "x<e>x<e>"


def test_the_slow_tokenizer_of_the_same_model_agrees(tmp_path):
    slow, fast = Tokenizer(SMALL_MODEL), FastTokenizer.from_pretrained(write(tmp_path, "llama_prepend"))
    for text in filter(None, TEXTS):
        assert fast.encode(text) == slow.encode(text)
        assert fast.encode_piecewise(text) == slow.encode_piecewise(text)
        assert fast.decode(fast.encode(text)) == slow.decode(slow.encode(text))
    assert (fast.bos_token_id, fast.eos_token_id, fast.unk_token_id, fast.pad_token_id, fast.vocab_size) == (
        slow.bos_token_id, slow.eos_token_id, slow.unk_token_id, slow.pad_token_id, slow.vocab_size)
    assert fast.special_ids == slow.special_ids


def test_after_a_special_token_only_the_first_scheme_drops_the_blank(tmp_path):
    slow = Tokenizer(SMALL_MODEL, legacy=False)
    fast = FastTokenizer.from_pretrained(write(tmp_path, "llama_first"))
    for text in ("in", "x in 12", "e\n"):
        for after_special in (False, True):
            assert fast.encode_piecewise(text, after_special) == slow.encode_piecewise(text, after_special)
    assert fast.encode_piecewise("in", True) != fast.encode_piecewise("in", False)
    assert fast.encode("</s>in") == [1, 2, *fast.encode_piecewise("in", True)[0]]


def test_prompts_begin_with_the_begin_token_where_the_model_has_one(tmp_path):
    byte_level = FastTokenizer.from_pretrained(write(tmp_path, "byte_level"))
    assert not byte_level.add_bos and byte_level.encode("") == []
    ids = tokenizer_image_token("USER: <image>\nin", byte_level)
    assert ids == [*byte_level.encode("USER: "), -200, *byte_level.encode("\nin")]
    segments = [Segment("USER: ", None), Segment("<image>\nin", 0), Segment("<|im_end|>", None, special=True)]
    assert encode_segments(segments, byte_level).ids == [*ids, byte_level.eos_token_id]
    with_bos = FastTokenizer.from_pretrained(write(tmp_path, "byte_level", add_bos_token=True))
    assert with_bos.encode("in") == [byte_level.bos_token_id, *byte_level.encode("in")]
    assert tokenizer_image_token("in", with_bos)[0] == with_bos.bos_token_id
    assert FastTokenizer.from_pretrained(write(tmp_path, "byte_level", add_bos_token=True, bos_token=None)).encode("") == []


def test_whole_dialogues_are_those_of_the_slow_tokenizer(tmp_path):
    from stllava.conversation import conv_templates
    from stllava.text.prompts import dialogue_about_image
    dialogue = dialogue_about_image(conv_templates["v1"], "Is the </s> heart enlarged? 😀")
    dialogue.append_message(dialogue.roles[1], "No, it is not.")
    dialogue.append_message(dialogue.roles[0], "Sure?")
    dialogue.append_message(dialogue.roles[1], None)
    fast = FastTokenizer.from_pretrained(write(tmp_path, "llama_prepend"))
    assert encode_conversation(dialogue, fast, 1) == encode_conversation(dialogue, Tokenizer(SMALL_MODEL), 1)


def test_training_samples_are_those_of_the_slow_tokenizer(tmp_path):
    turns = [{"from": "human", "value": "<image>\nIs it </s> large?"}, {"from": "gpt", "value": "Yes, it is 12 mm."},
             {"from": "human", "value": "What else?"}, {"from": "gpt", "value": "Nothing."}]
    fast = FastTokenizer.from_pretrained(write(tmp_path, "llama_prepend"))
    for template, options in (("v1", {}), ("v1_sq", {"switched": {2}}), ("llava_llama_2", {})):
        check_template(template, fast)
        assert build_sample(turns, template, fast, has_image=True, **options) == build_sample(turns, template, Tokenizer(SMALL_MODEL), has_image=True, **options)


def test_directory_round_trip(case, tmp_path):
    recorded, tokenizer = case
    tokenizer.save_pretrained(tmp_path / "again")
    again = FastTokenizer.from_pretrained(tmp_path / "again")
    assert [again.encode(text) for text in TEXTS] == recorded["ids"]
    assert vars(again).keys() == vars(tokenizer).keys()
    for key in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "add_bos", "special_ids", "vocab_size", "model_max_length"):
        assert getattr(again, key) == getattr(tokenizer, key), key
    written = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert written["post_processor"] == recorded["tokenizer"]["post_processor"] and written["model"]["vocab"] == recorded["tokenizer"]["model"]["vocab"]


def test_the_slow_tokenizer_is_preferred(tmp_path):
    write(tmp_path, "byte_level")
    assert isinstance(load_tokenizer(tmp_path), FastTokenizer)
    (tmp_path / "tokenizer.model").write_bytes(SMALL_MODEL.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
    with pytest.raises(FormatError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokens_may_be_objects_or_come_from_the_map(tmp_path):
    write(tmp_path, "byte_level", eos_token={"content": "<|im_end|>", "lstrip": False}, bos_token=None, pad_token=None, unk_token=None)
    tokenizer = FastTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (None, 2, None, 2)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert FastTokenizer.from_pretrained(tmp_path).eos_token_id == 0


def changed(**values):
    return CASES["byte_level"]["tokenizer"] | values


@pytest.mark.parametrize(("values", "config", "names"), [
    (None, {"add_eos_token": True}, "add_eos_token"), (None, {"add_bos_token": "yes"}, "add_bos_token"), (None, {"eos_token": None}, "eos_token"),
    (None, {"eos_token": 3}, "eos_token"), (None, {"eos_token": "<nope>"}, "eos_token"), (None, {"model_max_length": 0}, "model_max_length"),
    (None, {"split_special_tokens": True}, "split_special_tokens"),
    (changed(model={"type": "Unigram", "vocab": []}), {}, "model.type"), (changed(model=3), {}, "model"),
    (changed(model=CASES["byte_level"]["tokenizer"]["model"] | {"dropout": 0.1}), {}, "dropout"),
    (changed(model=CASES["byte_level"]["tokenizer"]["model"] | {"vocab": {"a": -1}}), {}, "'a'"),
    (changed(model=CASES["byte_level"]["tokenizer"]["model"] | {"merges": [["nope", "nope"]]}), {}, "model.merges: merge 0"),
    (changed(added_tokens=[{"id": 2**40, "content": "<x>"}]), {}, "<x>"), (changed(pre_tokenizer={"type": "Nope"}), {}, "pre_tokenizer.type is 'Nope'"),
    # on these the package ends the thread, now or later, or computes for ever
    (changed(model=CASES["byte_level"]["tokenizer"]["model"] | {"continuing_subword_prefix": "##"}), {}, "continuing_subword_prefix"),
    (changed(added_tokens=[], model=CASES["byte_level"]["tokenizer"]["model"] | {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", "ab b"]}), {}, "merge 1 is 'ab b'"),
    (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), {}, "normalizer.type is 'Precompiled'"),
    (changed(normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": ""}, "content": "x"}]}), {}, "normalizers[0].pattern"),
    (changed(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 100_000}), {}, "normalizer.content"),
    (changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "((a+)+)+b"}, "behavior": "Isolated", "invert": False}), {}, "pre_tokenizer.pattern"),
    (changed(pre_tokenizer={"type": "FixedLength", "length": 0}), {}, "pre_tokenizer.type"), (changed(decoder={"type": "CTC"}), {}, "decoder.type"),
    (changed(post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}], "pair": [], "special_tokens": {}}), {},
     "names 'zz'"),
    (changed(post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
                             "pair": [], "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}}), {}, "post-processor"),
])
def test_what_is_refused_is_named(tmp_path, values, config, names):
    with pytest.raises((ConfigError, FormatError), match="tokenizer") as caught:
        FastTokenizer.from_pretrained(write(tmp_path, "byte_level", values, **config))
    assert names in str(caught.value) and caught.value.path is not None


def test_ids_outside_the_vocabulary_are_refused(case):
    with pytest.raises(ValueError, match="-200 is outside the vocabulary"):
        case[1].decode([1, -200])


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path, "byte_level")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'stllava\[tokenizers\]'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("config", "legacy"), [({}, True), ({"legacy": None}, True), ({"legacy": True}, True), ({"legacy": False}, False)])
def test_legacy_comes_from_the_configuration(tmp_path, config, legacy):
    (tmp_path / "tokenizer.model").write_bytes(SMALL_MODEL.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.legacy is legacy
    assert tokenizer.encode("</s>in") == Tokenizer(SMALL_MODEL, legacy=legacy).encode("</s>in")
    assert (tokenizer.encode("</s>in")[2:] == tokenizer.encode("in")[1:]) is legacy


@pytest.mark.parametrize("legacy", ["false", 0, 1, []])
def test_legacy_is_a_truth_value(tmp_path, legacy):
    (tmp_path / "tokenizer.model").write_bytes(SMALL_MODEL.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    with pytest.raises(ConfigError, match="legacy"):
        load_tokenizer(tmp_path)
