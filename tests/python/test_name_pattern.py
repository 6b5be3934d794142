"""name_pattern: the same answers as `re` over what it supports, in bounded time, and a message for the rest."""

from __future__ import annotations

import random
import re

import pytest

from stllava.checkpoint.name_pattern import MAX_CHARS, MAX_DEPTH, matches
from stllava.errors import ConfigError

ATOMS = ["a", "b", "1", ".", r"\.", "[ab]", "[^a]", "[a-c.]", "[]x]", r"\d", r"\w", r"\S", "(a|b)", "(?:ab|b)", "(?P<x>a)", "(a*)", "(b+)?", "(?=a)", "(?!b)",
         "(?<=a)", "(?<!b)", "^", "$", r"\b", r"\B", r"[\d_-]"]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,}", "{,2}", "*?"]


def expression(rng: random.Random, depth: int = 0) -> str:
    text = "".join(rng.choice(ATOMS) + rng.choice(REPEATS) for _ in range(rng.randint(1, 4)))
    return f"({text}|{expression(rng, depth + 1)}){rng.choice(REPEATS)}" if depth < 2 and rng.random() < 0.5 else text


def test_the_same_as_re(amount) -> None:
    rng = random.Random(0)
    n_true = n_compared = 0
    while n_compared < amount(2000, 100_000):
        text = expression(rng)
        try:
            other = re.compile(text)
            name = "".join(rng.choice("aab.1_") for _ in range(rng.randint(1, 7)))  # re before 3.14 has no \\B in ""
            found = matches(text, name)
        except (re.error, ConfigError) as error:  # "a?+" is possessive to `re`, and refused here
            assert not isinstance(error, ConfigError) or "repetition of a repetition" in str(error), text
            continue
        assert found == (other.fullmatch(name) is not None), (text, name)
        n_true, n_compared = n_true + found, n_compared + 1
    assert n_true > n_compared / 20


@pytest.mark.parametrize("text, wanted", [
    (r"^(?!.*(?:vision_tower|multi_modal_projector)).*(?:q_proj|v_proj).*", True),  # as LLaMA-Factory writes it
    (r"^(language_model|model)(?=\.).*\.(q_proj|o_proj)$", True),  # as ms-swift writes it
    (r".*vision_tower.*q_proj", False), ("q_proj", False), (r".*\.layers\.(?:[0-9]|1[0-5])\.self_attn\.[qkv]_proj", True)])
def test_expressions_that_tools_write(text: str, wanted: bool) -> None:
    assert matches(text, "model.layers.12.self_attn.q_proj") == wanted


@pytest.mark.parametrize("text, message", [
    ("(a", "without its"), ("a)", "without its"), ("*a", "without what it repeats"), ("a{2", "no repetition"), ("a{3,2}", "no repetition"), ("a{x}", "no repetition"),
    ("a{1001}", "no repetition"), ("a{,}", "no repetition"), ("a**", "repetition of a repetition"), (r"(a)\1", r"\\1 is not supported"), ("(?i)a", r"\(\?i is not supported"),
    (r"\pL", "not supported"), ("[a", "ends too early"), ("a\\", "ends too early"), ("(?P=x)", "not supported"),
    ("a" * (MAX_CHARS + 1), "limit"), ("(" * (MAX_DEPTH + 1) + ")" * (MAX_DEPTH + 1), "inside each other")])
def test_what_is_not_supported_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        matches(text, "a")
    assert "the expression" in str(caught.value)


@pytest.mark.parametrize("text", ["(a+)+b", "((((a*)*)*)*)*b", "(a?){1000}a{1000}", "(.*.*.*.*.*.*)*x", "(((a|b?)*c?)*d?)*e", "(" * 30 + "a*" + ")*" * 30 + "b"])
def test_expressions_that_keep_other_engines_busy(text: str) -> None:
    assert not matches(text, "a" * 200)


def test_too_many_steps() -> None:
    with pytest.raises(ConfigError, match="takes more than"):
        matches("((?!.*x).)*", "ab" * 400)
