"""The original's two scripts run here, flag for flag, and their files load again; a run is repeated from its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from original_scripts import DPO, SFT, ZERO3, replaced, write_workspace

from stllava.cli import main
from stllava.model import LlavaModel
from stllava.train.plan import Plan

SFT_OUT, DPO_OUT = (Path(words[words.index("--output_dir") + 1]) for words in (SFT, DPO))
BASE, TOWER = "checkpoints/sqllava-7B-v1.5-1200k", "checkpoints/vit-L-336-1200k"
FILES = {"adapter_config.json", "adapter_model.bin", "config.json", "non_lora_trainables.bin"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """After `sqllava_med.sh` has run, without a line changed but the launcher's."""
    root, before = tmp_path_factory.mktemp("scripts"), Path.cwd()
    write_workspace(root)
    os.chdir(root)
    try:
        assert main(["sft", *replaced(SFT, report_to="tensorboard")]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture(autouse=True)
def there(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def run(verb: str, words: list[str]) -> int:
    return main([verb, *replaced(words, report_to="none"), "--disable_tqdm"])


SMALL = {"lora_r": "2", "lora_r_vit": "2"}


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def rates(out: Path) -> list[float]:
    return [row["learning_rate"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "learning_rate" in row]


def test_sft_script_writes_what_the_original_writes():
    assert {path.name for path in SFT_OUT.iterdir()} >= FILES
    assert {path.name for path in (SFT_OUT / "Vit-lora").iterdir()} >= {"adapter_config.json", "adapter_model.bin"}
    adapter, tower = (json.loads((SFT_OUT / part / "adapter_config.json").read_text()) for part in (".", "Vit-lora"))
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (128, 256, 0.05) and (tower["r"], tower["lora_alpha"]) == (32, 64)
    fields = json.loads((SFT_OUT / "config.json").read_text())
    assert (fields["mm_projector_lr"], fields["vision_tower_lr"], fields["mm_projector_type"]) == (2e-5, 5e-5, "cluster")
    assert list((SFT_OUT / "runs").rglob("events*"))


def test_dpo_script_begins_from_the_sft_script(capsys):
    assert run("dpo", DPO) == 0
    assert {path.name for path in DPO_OUT.iterdir()} >= FILES
    said = capsys.readouterr().err.splitlines()
    assert {line.split()[2] for line in said if "no effect" in line} == {"bf16", "tf32", "lazy_preprocess", "data_aug"}
    assert len([line for line in said if "scripts/zero3.json: no such file, and the original does not ship it" in line]) == 1
    trained = LlavaModel.from_pretrained(DPO_OUT, BASE, vision_tower=TOWER)
    before = dict(LlavaModel.from_pretrained(BASE, vision_tower=TOWER).named_parameters())
    assert trained.lora["llm"].r == 128 and trained.lora["vit"].r == 32
    assert all(np.isfinite(array).all() for _, array in trained.named_parameters())
    assert {name for name, _ in trained.named_parameters()} > before.keys()


@pytest.mark.parametrize("extra, steps, clipping, reduction", [
    ([], 6, 1.0, "token_mean"), (["--hf_compat", "4.31"], 3, 0.0, "micro_mean"), (["--original_compat"], 3, 0.0, "micro_mean"),
    (["--original_compat", "--hf_compat", "latest", "--max_grad_norm", "0.5"], 6, 0.5, "token_mean")])
def test_versions_of_the_recipe(extra, steps, clipping, reduction, tmp_path, capsys):
    """41 records are 6 micro-batches of 8: 3 updates of the original's transformers in 3 epochs, 6 of today's."""
    out = tmp_path / "out"
    Path("scripts").mkdir(exist_ok=True)
    Path("scripts/zero3.json").write_text(json.dumps(ZERO3))
    assert run("sft", [*replaced(SFT, output_dir=str(out), **SMALL), *extra]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["global_step"] == steps
    training = manifest(out)["run"]["configuration"]["training"]
    assert (training["max_grad_norm"], training["loss_reduction"]) == (clipping, reduction)
    assert f"no gradient_clipping -> max_grad_norm {clipping:g}" in said.err.replace("1.0", "1").replace("0.0", "0")
    assert training["vit_grad"] is ("--original_compat" not in extra)
    warmup, total = 1, steps  # ceil(0.03 * steps)
    used = [2e-4 * 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / (total - warmup))) if step else 0.0 for step in range(total + 1)]
    compat = "4.31" in (extra[1:2] or []) or extra == ["--original_compat"]
    assert rates(out) == pytest.approx(used[1:] if compat else used[:-1], rel=1e-9, abs=1e-12)  # 4.31 logs the rate of the next update


# (records, batch, accumulation, epochs) -> updates: the published recipes on one device, and the formulas' corners
@pytest.mark.parametrize("settings, old, new", [
    ((60_000, 8, 4, 3), 5625, 5625), ((10_000, 4, 16, 1), 156, 157), ((10_001, 4, 16, 1), 156, 157), ((41, 8, 4, 3), 3, 6), ((3, 8, 4, 3), 3, 3),
    ((100, 1, 16, 2), 12, 14), ((100, 1, 16, 1.5), 9, 11), ((1, 8, 4, 1), 1, 1)])
def test_step_counts(settings, old, new):
    n, batch, accumulation, epochs = settings
    assert [Plan(n, batch, accumulation, epochs, -1, 0, hf_compat=version).total_steps for version in ("4.31", "latest")] == [old, new]


def test_a_run_is_repeated_from_its_record(capsys, tmp_path):
    assert main(["rerun", str(SFT_OUT / "manifest.json"), "--out", str(tmp_path / "again")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    recorded = manifest(SFT_OUT)["run"]
    assert result["same_weights"] and result["weights_sha256"] == recorded["weights_sha256"] == manifest(tmp_path / "again")["run"]["weights_sha256"]
    assert recorded["counts"]["records"] == recorded["counts"]["used"] == 41 and recorded["command"][:2] == ["stllava", "sft"]
    assert recorded["inputs"]["images"]["files"] == 4 and set(recorded["inputs"]["data_path"]["files"]) == {"instruct.json"}
    text = json.dumps(recorded)
    assert os.uname().nodename not in text and str(Path.home()) + "/" not in text and str(Path.cwd()) not in text
    for name in ("adapter_model.bin", "non_lora_trainables.bin", "Vit-lora/adapter_model.bin"):
        assert (SFT_OUT / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_rerun_says_when_the_weights_differ_or_the_inputs_changed(capsys, tmp_path):
    content = manifest(SFT_OUT)
    content["run"]["settings"]["learning_rate"] = 3e-4
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert main(["rerun", str(tmp_path), "--out", str(tmp_path / "a")]) == 1
    assert "the weights differ from the recorded run's" in capsys.readouterr().err
    data = Path("data/instruct.json")
    before = data.read_text()
    data.write_text(before.replace("Thing number", "Item number"))
    try:
        assert main(["rerun", str(SFT_OUT), "--out", str(tmp_path / "b")]) == 2
    finally:
        data.write_text(before)
    assert "data_path data/instruct.json: not what the recorded run read: instruct.json is missing, new or changed" in capsys.readouterr().err
    assert not (tmp_path / "b" / "adapter_model.bin").exists()


@pytest.mark.parametrize("module, words", [("train_mem", SFT), ("train_mem_dpo", DPO)])
def test_modules_of_the_original(module, words, tmp_path):
    """As a launcher calls them."""
    words = [*replaced(words, report_to="none", output_dir=str(tmp_path / "out"), pretrain_mm_mlp_adapter=f"{BASE}/mm_projector.bin", **SMALL), "--max_steps", "1",
             "--local_rank=0"]
    done = subprocess.run([sys.executable, "-m", f"stllava.train.{module}", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["global_step"] == 1 and (tmp_path / "out" / "adapter_model.bin").exists()


def test_a_configuration_file_stands_behind_the_command_line(tmp_path, capsys):
    """The whole script as a file, in three forms; the command line wins."""
    pairs = [(word[2:], value) for word, value in zip(SFT, [*SFT[1:], "--"], strict=True) if word.startswith("--")]
    values = {name: True if value.startswith("--") else value for name, value in pairs} | {"report_to": "none", "lora_r": 4, "learning-rate": 1}
    values["save-total-limit"] = values.pop("save_total_limit")
    del values["learning_rate"], values["deepspeed"]
    typed = {**values, "lora_enable": True, "learning-rate": 1, "loss_reduction": None}
    (tmp_path / "a.json").write_text(json.dumps(typed))
    (tmp_path / "a.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in typed.items()))
    (tmp_path / "a.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in typed.items() if value is not None))
    found = {}
    for kind in ("json", "yaml", "toml"):
        out = tmp_path / kind
        assert main(["sft", "--config", str(tmp_path / f"a.{kind}"), "--output_dir", str(out), "--max_steps", "1", "--learning-rate", "1e-5",
                     "--disable_tqdm"]) == 0
        found[kind] = manifest(out)["run"]
        assert found[kind]["settings"]["learning_rate"] == 1e-5 and found[kind]["configuration"]["model"]["lora_r"] == 4
        assert found[kind]["configuration"]["training"]["save_total_limit"] == 2
    assert len({run["weights_sha256"] for run in found.values()}) == 1
