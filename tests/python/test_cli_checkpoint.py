"""`stllava inspect`, `merge` and `convert` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stllava.checkpoint import index
from stllava.checkpoint.directory import read_checkpoint
from stllava.cli import main
from stllava.model import LlavaModel

RECORDED = Path(__file__).parents[1] / "recorded"
HF, ADAPTER = str(RECORDED / "hf_llama"), str(RECORDED / "peft_llava")


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", ADAPTER, "--model_base", HF]) == 0
    text = capsys.readouterr().out
    assert "adapters on a base" in text and "adapter on the decoder, 4 modules: r 2" in text and "memory of the weights" in text
    assert main(["inspect", ADAPTER, "--model-base", HF, "--tensors"]) == 0
    assert "language_model" not in capsys.readouterr().out  # names are canonical
    assert main(["inspect", ADAPTER, "--model_base", HF, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["problem"] is None and values["adapters"][0]["r"] == 2 and len(values["ignored"]) == 4 and "tensors" not in values
    assert main(["inspect", f"{ADAPTER}/adapter_model.safetensors", "--json", "--tensors"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 24


def test_inspect_says_why_it_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # away from anything that is called hf_llama
    assert main(["inspect", ADAPTER]) == 1
    assert "cannot be loaded" in capsys.readouterr().out
    assert main(["inspect", "nowhere"]) == 2
    assert capsys.readouterr().err == "stllava inspect: nowhere: no such file or directory\n"


@pytest.mark.parametrize("flags", [["--model_name_or_path", ADAPTER, "--model_base", HF, "--out"], ["--model-path", ADAPTER, "--model-base", HF, "--save-model-path"]])
def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["merge", *flags, str(tmp_path / "m"), "--layout", "hf"]) == 0
    assert "wrote" in capsys.readouterr().out
    file = index.read_file(RECORDED / "peft_llava" / "expected.safetensors")
    found = LlavaModel.from_pretrained(tmp_path / "m").logits(file["ids"].tolist(), list(file["pixels"]))
    np.testing.assert_allclose(found, file["logits"], rtol=0, atol=2e-5)  # measured 4.0e-6


def test_convert_prints_what_rounding_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", HF, str(tmp_path / "half"), "--dtype", "f16", "--format", "bin", "--shard_size", "20000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["decoder", "projector", "vision tower"] and "largest rounding error" in lines[0]
    assert len(list((tmp_path / "half").glob("pytorch_model-*.bin"))) == 2
    assert main(["convert", str(tmp_path / "half"), str(tmp_path / "wide"), "--dtype", "f32"]) == 0
    assert "largest rounding error 0 absolute, 0 relative" in capsys.readouterr().out
    one, half, wide = (read_checkpoint(path).tensors for path in (HF, tmp_path / "half", tmp_path / "wide"))
    for name, array in one.items():
        np.testing.assert_array_equal(half[name], array.astype(np.float16))
        np.testing.assert_array_equal(wide[name], half[name].astype(np.float32))


@pytest.mark.parametrize("words, message", [
    (["merge", "--model_name_or_path", HF, "--out", "out"], "nothing to merge; `stllava convert`"),
    (["merge", "--model_name_or_path", ADAPTER, "--model_base", ADAPTER, "--out", "out"], "the base must hold full weights"),
    (["convert", ADAPTER, "out"], "`stllava merge` makes them"), (["convert", "nowhere", "out"], "no such directory"),
    (["convert", HF, HF], "is where the checkpoint is read from")])
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"stllava {words[0]}: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
