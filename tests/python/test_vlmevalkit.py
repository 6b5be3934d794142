"""The recipe for VLMEvalKit, with a base class like its own: it cannot be installed by name."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from talking import picture, talking_model

RECIPE = Path(__file__).parents[2] / "examples" / "vlmevalkit_model.py"


class BaseModel:
    """As in vlmeval/vlm/base.py: `generate` calls the `generate_inner` of the model."""

    INTERLEAVE = False

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)


def test_the_recipe_answers_a_message(tmp_path, monkeypatch):
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = BaseModel
    model = talking_model()
    model.save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "picture.png")
    found = runpy.run_path(str(RECIPE))["StllavaModel"](str(tmp_path / "model"), max_new_tokens=5)
    assert found.dump_image_func is None
    message = [{"type": "image", "value": str(tmp_path / "picture.png")}, {"type": "text", "value": "What is it?"}]
    want = model.chat([{"role": "user", "content": "What is it?"}], [picture()], max_new_tokens=5)
    assert found.generate(message, "PathVQA_TEST") == want and want
    with pytest.raises(ValueError, match="'video'"):
        found.generate([{"type": "video", "value": "a.mp4"}])


def test_it_is_a_short_recipe():
    assert len([line for line in RECIPE.read_text(encoding="utf-8").split('"""')[2].splitlines() if line.strip()]) <= 20
