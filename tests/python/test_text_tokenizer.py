"""Tokenizer against the recorded strings, and what must hold for any string."""

import hashlib

import pytest
from hypothesis import given, strategies as st
from text_data import TEMPLATES, load, tokenizer

from stllava.errors import ConfigError, FormatError
from stllava.text import Tokenizer, tokenizer_image_token

RECORDED = load(TEMPLATES / "encode_decode.json")
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(list("<>/s un k▁\n"))))


def test_the_model_file_is_the_recorded_one():
    recorded = load(TEMPLATES / "meta.json")["tokenizer"]
    assert hashlib.sha256((TEMPLATES / "tokenizer.model").read_bytes()).hexdigest() == recorded["sha256"]


@pytest.mark.parametrize("entry", RECORDED["encode"], ids=lambda entry: repr(entry["text"])[:40])
def test_recorded_strings(entry):
    legacy, nonlegacy = tokenizer(), tokenizer(legacy=False)
    assert legacy.encode(entry["text"]) == entry["input_ids"]
    assert nonlegacy.encode(entry["text"]) == entry["nonlegacy_input_ids"]
    assert tokenizer_image_token(entry["text"], legacy) == entry["image_ids"]
    assert legacy.decode(entry["input_ids"]) == entry["decoded"]
    assert legacy.decode(entry["input_ids"], skip_special_tokens=False) == entry["decoded_with_special"]


@pytest.mark.parametrize("entry", RECORDED["decode"], ids=lambda entry: str(entry["input_ids"][:3]))
def test_recorded_ids(entry):
    assert tokenizer().decode(entry["input_ids"]) == entry["decoded"]


@pytest.mark.parametrize("entry", RECORDED["image_markers"], ids=lambda entry: repr(entry["text"]))
def test_recorded_image_markers(entry):
    assert tokenizer_image_token(entry["text"], tokenizer()) == entry["image_ids"]
    array = tokenizer_image_token(entry["text"], tokenizer(), return_tensors="np")
    assert array.dtype == "int64" and array.tolist() == entry["image_ids"]


@pytest.mark.parametrize("legacy", [True, False])
@given(text=TEXT)
def test_text_of_a_user_never_becomes_a_special_id(legacy, text):
    tok = tokenizer(legacy)
    special = {tok.bos_token_id, tok.eos_token_id, tok.unk_token_id}
    for hostile in (text, f"</s>{text}<s>", f"{text}<unk>"):
        ids = tok.encode(hostile, parse_special=False)
        assert ids[0] == tok.bos_token_id and special.isdisjoint(ids[1:])


@given(text=TEXT)
def test_decode_undoes_encode(text):
    tok = tokenizer()
    ids = tok.encode(text, parse_special=False)
    assert tok.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("legacy", [True, False])
@given(text=TEXT.filter(len), after_special=st.booleans())
def test_pieces_begin_where_their_text_begins(legacy, text, after_special):
    tok = tokenizer(legacy)
    ids, begins = tok.encode_piecewise(text, after_special)
    assert begins == sorted(begins) and begins[:1] in ([], [0]) and all(begin < len(text) for begin in begins)
    if tok.unk_token_id in ids:  # a first piece that exists only with its "▁"
        assert after_special and not legacy
        return
    for boundary in {begin for begin in begins if begin > 0}:
        split = begins.index(boundary)
        # What stands in front of the piece decodes to the characters in front of it: right, not only ordered.
        prefix = tok.decode(ids[:split])
        assert text.replace("▁", " ")[:boundary].endswith(prefix) and len(prefix) >= boundary - 1


def test_directory_roundtrip(tmp_path):
    tokenizer(legacy=False).save_pretrained(tmp_path / "a")
    again = Tokenizer.from_pretrained(tmp_path / "a")
    assert (again.legacy, again.model_max_length, again.vocab_size) == (False, 2048, 32000)
    assert again.encode("a</s>b") == tokenizer(legacy=False).encode("a</s>b")


@pytest.mark.parametrize(("config", "legacy"), [("{}", True), ('{"legacy": null}', True), ('{"legacy": false}', False)])
def test_legacy_flag_of_a_directory(tmp_path, config, legacy):
    (tmp_path / "tokenizer.model").write_bytes((TEMPLATES / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert Tokenizer.from_pretrained(tmp_path).legacy is legacy


def test_added_tokens_are_special(tmp_path):
    tok = Tokenizer(TEMPLATES / "tokenizer.model", added_tokens={"<im_start>": 32000, "<im_end>": 32001})
    assert tok.vocab_size == 32002
    assert tok.encode("a<im_start>b") == [1, 264, 32000, 287]
    assert tok.decode([264, 32000, 287], skip_special_tokens=False) == " a<im_start>b"
    tok.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).special_ids == tok.special_ids


def test_errors(tmp_path):
    with pytest.raises(FormatError, match="tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(FormatError, match="SentencePiece"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((TEMPLATES / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    with pytest.raises(ConfigError, match="add_eos_token"):
        Tokenizer.from_pretrained(tmp_path)
    for i in (-200, 32000):
        with pytest.raises(ValueError, match=str(i)):
            tokenizer().decode([i])
    with pytest.raises(ValueError, match="pt"):
        tokenizer_image_token("x", tokenizer(), return_tensors="pt")
