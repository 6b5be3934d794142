"""lmms-eval finds stllava through its entry point and runs it on a task of our own. Where it is not installed (it needs torch), the model is tried on
requests as lmms-eval makes them, and three tests are skipped."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageFile
from talking import picture, talking_model

from stllava.chat import chat_prompt
from stllava.model import LlavaModel

ROOT = Path(__file__).parents[2]


def entry_points() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]


def test_the_entry_point_names_what_exists():
    module, _, name = entry_points()["lmms_eval.models"]["stllava"].partition(":")
    source = (ROOT / "python" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert f"\n{name} = ModelManifest(" in source


INSTALLED = find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed (it needs torch)")
WORDS = ["lung", "heart", "film"]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Four questions on two pictures as a generation task, and the same as a choice of words."""
    folder = tmp_path_factory.mktemp("task")
    docs = []
    for i in range(4):
        picture(i % 2).save(folder / f"{i}.png")
        docs.append({"file": str(folder / f"{i}.png"), "question": f"What is number {i // 2}?", "answer": WORDS[i % 3], "gold": i % 3})
    (folder / "docs.json").write_text(json.dumps(docs))
    (folder / "functions.py").write_text("""
from PIL import Image, ImageFile

def pictures(doc):
    return [Image.open(doc["file"]).convert("RGB")]

def score(doc, results):
    return {"hit": float(doc["answer"] in results[0])}
""")
    head = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / 'docs.json'}
  cache_dir: {folder / 'cache'}
test_split: test
doc_to_visual: !function functions.pictures
doc_to_text: question
"""
    (folder / "words.yaml").write_text(f"""{head}
task: stllava_words
output_type: generate_until
doc_to_target: answer
process_results: !function functions.score
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
metric_list:
  - metric: hit
    aggregation: mean
    higher_is_better: true
""")
    (folder / "choice.yaml").write_text(f"""{head}
task: stllava_choice
output_type: multiple_choice
doc_to_choice: {json.dumps(WORDS)}
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
    talking_model().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """As after an installation: a distribution with our entry points is on the path, and lmms-eval looks for such."""
    folder = tmp_path_factory.mktemp("installed") / "stllava_entry_points-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: stllava-entry-points\nVersion: 1\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in names.items()) for group, names in entry_points().items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    sys.path.insert(0, str(folder.parent))
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model
    MODEL_REGISTRY_V2.load_entrypoint_manifests(overwrite=True)
    yield get_model
    sys.path.remove(str(folder.parent))


def evaluated(task_folder, task, **options):
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluator.simple_evaluate(model="stllava", model_args=f"pretrained={task_folder / 'model'},template=v1", tasks=[task], batch_size=8,
                                         task_manager=TaskManager(include_path=str(task_folder), include_defaults=False), log_samples=True,
                                         bootstrap_iters=0, device="cpu", **options)


def prompts(model, docs):
    messages = [[{"role": "user", "content": doc["question"]}] for doc in docs]
    return [chat_prompt(model, message, [doc.get("image", doc["file"])], template="v1") for message, doc in zip(messages, docs, strict=True)]


@needs_lmms_eval
def test_both_kinds_are_found(registered):
    from stllava.lmms_eval_model import StllavaChat, StllavaSimple
    assert registered("stllava") is StllavaChat
    assert registered("stllava", force_simple=True) is StllavaSimple


@needs_lmms_eval
@pytest.mark.parametrize("force_simple", [False, True])
def test_answers_are_those_of_generate(registered, task_folder, force_simple):
    results = evaluated(task_folder, "stllava_words", force_simple=force_simple)
    model, docs = LlavaModel.from_pretrained(task_folder / "model"), json.loads((task_folder / "docs.json").read_text())
    want = []
    for prompt in prompts(model, docs):
        [[answer]] = model.generate([prompt.ids], [prompt.images], max_new_tokens=4, stop=prompt.stop)
        want.append(answer.text)
    samples = sorted(results["samples"]["stllava_words"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == want and len(set(want)) > 1
    hits = sum(doc["answer"] in text for doc, text in zip(docs, want, strict=True))
    assert results["results"]["stllava_words"]["hit,none"] == hits / 4


@needs_lmms_eval
def test_choices_are_by_mean_loss(registered, task_folder, monkeypatch):
    """lmms-eval 0.7.3 itself makes a text of any model's (loss, is_greedy), and then fails; here it does not."""
    from lmms_eval import evaluator
    unwrap = evaluator.unwrap_generation_output
    monkeypatch.setattr(evaluator, "unwrap_generation_output", lambda x: (x, None) if isinstance(x, tuple) and isinstance(x[1], bool) else unwrap(x))
    results = evaluated(task_folder, "stllava_choice", force_simple=True)
    model, docs = LlavaModel.from_pretrained(task_folder / "model"), json.loads((task_folder / "docs.json").read_text())
    right = 0
    for doc, prompt in zip(docs, prompts(model, docs), strict=True):
        n_tokens = [len(model.tokenizer.encode(word, add_bos=False)) + 1 for word in WORDS]
        losses = [-value / n for value, n in zip(model.score(prompt.ids, WORDS, prompt.images), n_tokens, strict=True)]
        right += losses.index(min(losses)) == doc["gold"]
    assert results["results"]["stllava_choice"]["acc,none"] == right / 4


# ---- without its evaluator, and where it is not installed with classes like its own ----------------------------------------------


@dataclass
class _Counts:
    input_tokens: int
    output_tokens: int


@dataclass
class _Result:
    text: str
    token_counts: _Counts


@dataclass(frozen=True)
class _Manifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


class _Base:
    def __init__(self):
        self.task_dict = {}


@pytest.fixture
def ours(monkeypatch):
    """The module stllava.lmms_eval_model."""
    if not INSTALLED:
        parts = {"api.instance": {"GenerationResult": _Result, "Instance": object, "TokenCounts": _Counts}, "api.model": {"lmms": _Base},
                 "models.registry_v2": {"ModelManifest": _Manifest}, "api": {}, "models": {}}
        for name, content in {**{f"lmms_eval.{part}": content for part, content in parts.items()}, "lmms_eval": {}}.items():
            module = ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "stllava.lmms_eval_model", raising=False)
    module = importlib.import_module("stllava.lmms_eval_model")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # as it was before lmms-eval
    return module


class Request(NamedTuple):
    args: tuple


def documents(task_folder):
    return [{**doc, "image": Image.open(doc["file"]).convert("RGB")} for doc in json.loads((task_folder / "docs.json").read_text())]


def test_requests_with_equal_pictures_share_an_object(ours, task_folder):
    model, docs = ours.StllavaChat(str(task_folder / "model"), template="v1", batch_size="4"), documents(task_folder)
    model.task_dict = {"t": {"test": docs}}

    def messages(doc):
        return [{"role": "user", "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]}]

    shown = []
    real = model.model.pixels
    model.model.pixels = lambda images: shown.append(len(images)) or real(images)
    requests = [Request(("", messages, {"max_new_tokens": 3 + row % 2}, row, "t", "test")) for row in range(4)]
    found = model.generate_until(requests)
    assert shown == [1, 1], "two settings; questions 0 and 2 show one picture, as 1 and 3 do"
    for row, (prompt, result) in enumerate(zip(prompts(model.model, docs), found, strict=True)):
        [[answer]] = model.model.generate([prompt.ids], [prompt.images], max_new_tokens=3 + row % 2, stop=prompt.stop)
        assert result.text == answer.text
        assert (result.token_counts.input_tokens, result.token_counts.output_tokens) == (len(prompt.ids) + 15, 3 + row % 2)
    with pytest.raises(ValueError, match="task t: a message has video; this model reads text and images"):
        model.generate_until([Request(("", lambda doc: [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], {}, 0, "t", "test"))])


def test_a_greedy_continuation_is_told(ours, task_folder, tmp_path):
    """Of a model that says one word and ends."""
    [prompt, *_], doc = prompts(talking_model(), documents(task_folder)), documents(task_folder)[0]
    plain = talking_model()
    [[said]] = plain.generate([prompt.ids], [prompt.images], max_new_tokens=2)
    weights = {name: np.array(array) for name, array in plain.tensors().items()}
    weights["lm_head.weight"][plain.tokenizer.eos_token_id] = 1.01 * weights["lm_head.weight"][said.ids[1]]
    LlavaModel(plain.config, weights, tokenizer=plain.tokenizer, image_processor=plain.image_processor).save_pretrained(tmp_path)
    model = ours.StllavaSimple(str(tmp_path), template="v1")
    model.task_dict = {"t": {"test": [doc]}}
    first = plain.tokenizer.decode(said.ids[:1])
    words = [word for word in WORDS if word != first]
    found = model.loglikelihood([Request((doc["question"], f" {word}", lambda doc: [doc["image"]], 0, "t", "test")) for word in [*words, first]])
    assert [is_greedy for _, is_greedy in found] == [False] * len(words) + [True]
    for word, (loss, _) in zip([*words, first], found, strict=True):
        n_tokens = len(plain.tokenizer.encode(word, add_bos=False)) + 1
        assert loss == -model.model.score(prompt.ids, [word], prompt.images)[0] / n_tokens > 0
    [(alone, _)] = model.loglikelihood([Request(("", "lung"))])
    assert alone > 0


def test_settings_of_tasks(ours):
    decoding = ours.decoding
    assert decoding({"until": "\n", "max_new_tokens": 7, "temperature": 0.5, "do_sample": False, "num_beams": 1, "top_p": None}).temperature == 0
    assert decoding({"do_sample": True}).temperature == 1
    assert decoding({"until": ["a", ""], "top_p": 0.9, "do_sample": True, "temperature": 0.2}).stops == ("a",)
    with pytest.warns(UserWarning, match="not used: length_penalty"):
        decoding({"length_penalty": 1})
    with pytest.raises(ValueError, match="num_beams is 4"):
        decoding({"num_beams": 4})
