"""The original's label builder against every recorded sample."""

import json
import shutil

import pytest
from cases_templates import replay_templates
from text_data import TEMPLATES, dialogues, label_files, load, tokenizer

from stllava.conversation import ConversationError
from stllava.text import preprocess_compat

REPLAYED = replay_templates(TEMPLATES)
NOT_RECOMPUTED = {"draws", "error_text"}  # inputs, and the text of the original's AssertionError


@pytest.mark.parametrize("path", label_files(), ids=lambda path: path.name)
def test_recorded_samples(path):
    recorded, replayed = load(path)["samples"], REPLAYED[path.name]["samples"]
    assert len(recorded) == len(replayed)
    for want, got in zip(recorded, replayed, strict=True):
        for key in want.keys() - NOT_RECOMPUTED:
            assert got[key] == want[key], (path.name, want["id"], key)


def test_replay_needs_only_inputs(tmp_path):
    """The recorded values can be deleted: nothing of them is read."""
    case = tmp_path / "templates"
    shutil.copytree(TEMPLATES, case)
    inputs = {"id", "draws"}
    for path in label_files():
        samples = [{key: value for key, value in sample.items() if key in inputs} for sample in load(path)["samples"]]
        (case / path.name).write_text(json.dumps({"samples": samples}))
    assert replay_templates(case) == REPLAYED


def test_errors():
    turns = dialogues()["multi_turn"]["conversations"]
    with pytest.raises(ConversationError, match="no turns"):
        preprocess_compat([], "v1", tokenizer(), False)
    with pytest.raises(ConversationError, match="'bot'"):
        preprocess_compat([{"from": "bot", "value": "x"}], "v1", tokenizer(), False)
    with pytest.raises(ConversationError, match="alternate"):
        preprocess_compat([turns[0], turns[0]], "v1", tokenizer(), True)
    with pytest.raises(ConversationError, match=r"no draw for turns \[4\]"):
        preprocess_compat(turns, "v1_sq", tokenizer(), True, draws={2: 0.1})
    with pytest.raises(ConversationError, match="two turns"):
        preprocess_compat(turns, "plain", tokenizer(), True)
    with pytest.raises(ValueError, match="prompts only"):
        preprocess_compat(turns, "mpt", tokenizer(), True)
