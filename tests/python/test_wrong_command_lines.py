"""Command lines and files that are wrong, over every verb: one clear line says what, where and what to do; exit code 2; no traceback."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from tiny import dpo_records, sft_records, tiny_model, write_pictures

from stllava.checkpoint.peft import LoraConfig
from stllava.cli import VERBS, main

SFT = "sft --model_name_or_path base --data_path sft.json --image_folder images --output_dir out"
DPO = "dpo --model_name_or_path base --data_path dpo.json --image_folder images --output_dir out"
GENERATE = "generate --model_name_or_path base --answers_file a.jsonl --question_file"
ANSWER = "answer --model_name_or_path base --image_folder images --out o --questions"
GIVEN = f"{SFT} --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --max_grad_norm 1 --learning_rate 1e-4 --warmup_ratio 0.1 --deepspeed"

DEEPSPEED = {
    "total": {"train_batch_size": 64}, "micro": {"train_micro_batch_size_per_gpu": 4}, "steps": {"gradient_accumulation_steps": 2},
    "both": {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True}}, "bf16": {"bf16": {"enabled": True}},
    "clip": {"gradient_clipping": 0.5}, "typo": {"gradient_cliping": 1.0}, "inner": {"zero_optimization": {"stagee": 3}},
    "text": {"gradient_clipping": "one"}, "stage": {"zero_optimization": {"stage": 4}}, "list": {"zero_optimization": []},
    "optimizer": {"optimizer": {"type": "Lamb"}}, "rate": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
    "scheduler": {"scheduler": {"type": "OneCycle"}}, "warmup": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}}

CONFIGS = {
    "typo.toml": "learning_rat = 1e-4\n", "cut.toml": "learning_rate = [\n", "list.yaml": "- a\n", "cut.yaml": "a: [\n", "word.json": '{"lora_r": "many"}',
    "kind.json": '{"lora_enable": 3}', "many.json": '{"learning_rate": [1, 2]}', "table.json": '{"training": {"seed": 1}}', "twice.json": '{"seed": 1, "seed": 2}',
    "value.yaml": "beta: 0.1\nlearning_rate: fast\n", "config.ini": ""}

CASES = [
    # the grammar
    ("", "required: VERB"), ("trian", "'trian' is not one of", "sft"), ("generat", "did you mean generate?"),
    ("sft", "required and not given: --model_name_or_path, --data_path, --output_dir"),
    (f"{SFT} --learning_rat 1", "unknown flag --learning_rat; did you mean --learning_rate?"), (f"{SFT} --lora-enabel", "did you mean --lora_enable?"),
    (f"{SFT} --learning_rate fast", "--learning_rate: 'fast' is not a number"), (f"{SFT} --lora_r 4.5", "--lora_r: '4.5' is not a whole number"),
    (f"{SFT} --lora_enable maybe", "--lora_enable: 'maybe' is not a truth value; use true or false"), (f"{SFT} --learning_rate", "--learning_rate: wants a value"),
    (f"{SFT} --config", "--config: wants a value or more"), (f"{SFT} extra", "unexpected 'extra': it belongs to no flag"),
    ("doctor --jsn", "did you mean --json?"), ("demo --seed x", "'x' is not a whole number"), ("inspect", "required: DIR|FILE"), ("convert base", "required: OUT"),
    ("convert --dtype f8 base new", "'f8' is not one of f32, f16, bf16, keep"), ("generate --model_name_or_path base --question_file x", "--answers_file"),
    ("chat base --temperature hot", "'hot' is not a number"), ("rerun", "required: MANIFEST|DIR"),
    # values
    (f"{SFT} --lora_r 0 --lora_enable", "lora_r is 0, want at least 1"), (f"{SFT} --lora_dropout 1.5", "lora_dropout is 1.5", "[0, 1)"),
    (f"{SFT} --bits 4", "bits is 4, supported: 16", "for less memory use a bf16 or f16 checkpoint"), (f"{SFT} --data_aug True", "data_aug is True", "leave it out"),
    (f"{SFT} --fp16", "fp16 is True: leave it out, or use bf16 True"), (f"{SFT} --optim adafactor", "optim is 'adafactor'", "use adamw_torch"),
    (f"{SFT} --adafactor", "only AdamW is here"), (f"{SFT} --lr_scheduler_type cosin", "lr_scheduler_type is 'cosin', supported: linear, cosine"),
    (f"{SFT} --report_to wandbb", "report_to has 'wandbb', supported: none, all, tensorboard, wandb"), (f"{SFT} --save_strategy sometimes", "no, steps, epoch"),
    (f"{SFT} --warmup_ratio 3", "warmup_ratio is 3.0", "[0, 1)"), (f"{SFT} --hf_compat 4.30", "hf_compat is '4.30', supported: latest, 4.31"),
    (f"{SFT} --sq_r 2", "sq_r is 2.0, want a probability"), (f"{SFT} --num_train_epochs 0", "num_train_epochs is 0.0, want a number > 0"),
    (f"{SFT} --per_device_train_batch_size 0", "per_device_train_batch_size is 0"), (f"{SFT} --lr_scheduler_kwargs {{", "lr_scheduler_kwargs", "not JSON"),
    (f"{SFT} --version vicuna_v9", "template 'vicuna_v9' is unknown, want one of", "v1_sq"), (f"{SFT} --image_aspect_ratio anyres", "supported: pad, square"),
    (f"{SFT} --mm_projector_type mlp", "mm_projector_type is 'mlp', supported: 'cluster'"), (f"{SFT} --mm_vision_select_layer -99", "mm_vision_select_layer -99"),
    (f"{SFT} --mm_use_im_start_end", "mm_use_im_start_end is True, supported: False"), (f"{SFT} --per_gpu_train_batch_size 8", "per_device_train_batch_size now"),
    (f"{SFT} --hub_token secret", "hub_token is given: leave it out; a command line is no place for a secret"),
    (f"{SFT} --lora_weight_path x", "lora_weight_path is 'x'", "pretrain_lora"),
    (f"{DPO} --loss_type dpo", "loss_type is 'dpo', supported: sigmoid"), (f"{DPO} --beta -1", "beta is -1.0, want a number > 0"),
    ("pairs --judged judged.jsonl --out p --margin x", "'x' is not a number"), ("pairs --judged judged.jsonl --out p --ties first", "supported: drop, last"),
    ("check-data sft.json --sq_r 7", "--sq_r is 7.0"), (f"{GENERATE} sft.json --num_beams 4", "there is no beam search, want 1"),
    ("eval base --question_file sft.json --baselines majorty", "did you mean majority?"), ("chat base --conv_mode x", "template 'x' is unknown"),
    # settings against each other
    (f"{SFT} --tune_mm_mlp_adapter --freeze_mm_mlp_adapter", "tune_mm_mlp_adapter trains the projector alone", "set one"),
    (f"{SFT} --eval_strategy steps", "there is nothing to evaluate on: give eval_data_path"), (f"{SFT} --eval_data_path sft.json", "set it to steps or epoch"),
    (f"{SFT} --load_best_model_at_end", "set eval_strategy"), (f"{SFT} --vit_lora_enable", "set lora_enable, or freeze_backbone"),
    (f"{SFT} --pretrain_lora x", "set vit_lora_enable too"), (f"{SFT} --freeze_backbone --freeze_mm_mlp_adapter", "nothing is left to train"),
    (f"{SFT} --group_by_length --group_by_modality_length", "set one"),
    (f"{DPO} --loss_type sigmoid sft --loss_weights 1", "loss_weights has 1 numbers for 2 loss types"), (f"{DPO} --loss_reduction token_mean", "for SFT only"),
    (f"{DPO} --precompute_ref_log_probs --ref_image_features policy", "needs a reference that does not move"),
    ("eval", "give a checkpoint directory, or --predictions FILE"), ("eval base", "give one test set"), ("eval base --benchmark slake", "give --data PATH"),
    ("eval base --predictions x --question_file sft.json", "a model and --predictions: give one"),
    # DeepSpeed's file
    (f"{GIVEN} gone.json", "gone.json: no such file; leave the flag out, or give the file"), (f"{GIVEN} broken.json", "broken.json", "not valid", "line 1"),
    (f"{GIVEN} images", "images: not a regular file"), (f"{GIVEN} numbers.json", "holds a list, want an object"),
    (f"{GIVEN} total.json", "train_batch_size is 64, but one process makes", "8 x gradient_accumulation_steps 4 = 32", "change one of them"),
    (f"{GIVEN} micro.json", "train_micro_batch_size_per_gpu is 4, but per_device_train_batch_size is given as 8; make them the same"),
    (f"{GIVEN} steps.json", "gradient_accumulation_steps is 2", "given as 4"), (f"{GIVEN} both.json", "fp16.enabled and bf16.enabled are both true; switch one off"),
    (f"{GIVEN} fp16.json", "fp16.enabled is true", "set it to false"), (f"{GIVEN} bf16.json --bf16 False", "bf16.enabled is True, but bf16 is given as False"),
    (f"{GIVEN} clip.json", "gradient_clipping is 0.5, but max_grad_norm is given as 1.0"), (f"{GIVEN} typo.json", "did you mean gradient_clipping?"),
    (f"{GIVEN} inner.json", "did you mean zero_optimization.stage?"), (f"{GIVEN} text.json", "gradient_clipping is 'one', want a number >= 0"),
    (f"{GIVEN} stage.json", "zero_optimization.stage is 4, want 0, 1, 2 or 3"), (f"{GIVEN} list.json", "zero_optimization is [], want an object"),
    (f"{GIVEN} optimizer.json", "optimizer.type is 'Lamb', supported: AdamW"), (f"{GIVEN} rate.json", "optimizer.params.lr is 0.001, but learning_rate"),
    (f"{GIVEN} scheduler.json", "scheduler.type is 'OneCycle', supported: WarmupLR"), (f"{GIVEN} warmup.json", "warmup_ratio is given as 0.1"),
    # configuration files
    (f"{SFT} --config gone.toml", "gone.toml: no such file"), (f"{SFT} --config typo.toml", "typo.toml: unknown key 'learning_rat'; did you mean learning_rate?"),
    (f"{SFT} --config cut.toml", "cut.toml: not TOML"), (f"{SFT} --config list.yaml", "list.yaml: want a mapping of settings, found list"),
    (f"{SFT} --config cut.yaml", "cut.yaml: not YAML", "line 2"), (f"{SFT} --config word.json", "word.json: lora_r is 'many', want a whole number"),
    (f"{SFT} --config kind.json", "kind.json: lora_enable is 3, want true or false"), (f"{SFT} --config many.json", "learning_rate is a list, want a number"),
    (f"{SFT} --config table.json", "table.json: training is a table; write its settings at the top level"),
    (f"{SFT} --config twice.json", "twice.json", "duplicate key 'seed'"), (f"{SFT} --config config.ini", "config.ini: a configuration is named .toml, .json or .yaml"),
    (f"{SFT} --config value.yaml", "value.yaml: unknown key 'beta'"), (f"{DPO} --config value.yaml", "value.yaml: learning_rate is 'fast', want a number"),
    (f"{SFT} --config latin.toml", "latin.toml: not UTF-8"), (f"{SFT} --config images", "images: a configuration is named"),
    # checkpoints
    (f"{SFT} --model_path gone", "gone: no such directory, and nothing is downloaded; give the directory of a checkpoint"),
    (f"{SFT} --model_path hollow", "hollow: not a checkpoint", "neither weights"), (f"{SFT} --model_path no_config", "no_config/config.json: no such file"),
    (f"{SFT} --model_path sft.json", "sft.json: is a file, want the directory"), (f"{SFT} --model_path damaged", "damaged/model.safetensors", "truncated file"),
    (f"{SFT} --model_path bad_config", "bad_config/config.json", "not valid"), (f"{SFT} --model_path adapter", "which it does not name", "pass model_base=DIR"),
    (f"{SFT} --model_path adapter --model_base base", "set lora_enable to train it on, or merge it first"),
    (f"{SFT} --model_path no_tokenizer", "no_tokenizer: has no tokenizer", "put tokenizer.model or tokenizer.json there"),
    (f"{SFT} --vision_tower openai/clip", "vision_tower 'openai/clip' is not a directory here, and nothing is downloaded", "hf download"),
    (f"{SFT} --pretrain_mm_mlp_adapter gone.bin", "gone.bin: no such file; want mm_projector.bin or non_lora_trainables.bin"),
    (f"{SFT} --resume_from_checkpoint gone", "resume_from_checkpoint gone: no such directory; want a checkpoint-* directory"),
    (f"{SFT} --resume_from_checkpoint true", "no complete checkpoint-* here", '"auto" begins anew'), (f"{SFT} --output_dir sft.json", "sft.json", "choose another"),
    ("chat gone", "gone: no such directory"), ("inspect gone", "gone: no such file or directory"), ("inspect sft.json", "not a safetensors file?"),
    ("merge --model_path base --out new", "base"), ("rerun gone.json", "gone.json: no such file; want the manifest.json"), ("rerun base", "base/manifest.json: has no record of a run"),
    ("rerun run.json", "run.stage is None, want str"), ("rerun broken.json", "broken.json"),
    # data and pictures
    (f"{SFT} --data_path gone.json", "gone.json: no such file"), (f"{SFT} --data_path images", "images: no data file of a known layout"),
    (f"{SFT} --data_path broken.json", "broken.json: line 1 is not JSON"), (f"{SFT} --data_path empty.json", "empty.json", "is not JSON"),
    (f"{SFT} --data_path nothing.json", "nothing.json: no usable record"), (f"{SFT} --data_path numbers.json", "numbers.json: row 0 is a int, want an object"),
    (f"{SFT} --data_path latin.json", "latin.json: not JSON", "utf-8"), (f"{SFT} --data_path roles.json", "row 0 (id a)", "'nurse', want 'human'"),
    (f"{SFT} --data_path no_image.json", "row 0 (id a): images/gone.png: cannot be read"), (f"{SFT} --data_path keys.json", "key 'conversations' is missing"),
    (f"{SFT} --data_path dpo.json", "4 of 4 records cannot be used", "is no instruction record"), (f"{DPO} --data_path sft.json", "is no pair record"),
    (f"{DPO} --data_path same.json", "row 0 (id p0): chosen and rejected are the same answer"), (f"{SFT} --model_max_length 5", "no target is left within max_length 5"),
    (f"{SFT} --image_folder gone", "image_folder gone: no such folder or archive; give the one"), (f"{SFT} --image_folder sft.json", "not a readable zip or tar"),
    ("sft --model_path base --data_path sft.json --output_dir out", "no --image_folder, so image names begin here", "row 0 (id r0): 0.png: cannot be read"),
    ("chat base --image gone.png", "gone.png: cannot be read"), (f"{GENERATE} cut.jsonl", "cut.jsonl: line 2 is not JSON"),
    (f"{GENERATE} gone.jsonl", "gone.jsonl: no such file"), (f"{GENERATE} sft.json", "the first '0.png'; give --image_folder"),
    ("eval base --question_file broken.json", "broken.json: line 1 is not JSON"), ("eval base --question_file gone.json", "gone.json: no such file"),
    ("eval base --benchmark vqa-rat", "did you mean vqa-rad?"), ("check-data gone.json", "gone.json: no such file"),
    ("ask --model_path base --image_folder hollow --out o", "hollow: no pictures"), ("ask --model_path base --image_folder gone --out o", "image_folder gone: no such"),
    (f"{ANSWER} gone.jsonl", "gone.jsonl: no such file"), (f"{ANSWER} cut.jsonl", "cut.jsonl: line 2"), (f"{ANSWER} sft.json", "sft.json: line 1 is a list; want the output of stllava ask"),
    (f"{ANSWER} judged.jsonl", "judged.jsonl: line 1: questions is missing; want the output of stllava ask"), (f"{ANSWER} empty.json", "empty.json: is empty; want the output"),
    ("judge --answers judged.jsonl --replies judged.jsonl --out o", "judged.jsonl: line 1: image is missing; want the output of stllava answer"),
    ("judge --answers gone --replies x --out o", "gone: no such file"), ("pairs --judged judged.jsonl --out p", "line 1: image is missing"),
    ("demo --out sft.json", "sft.json", "choose another"),
    ("data", "required"), ("data convrt", "did you mean convert?"), ("data convert gone.json new.json --to llava", "gone.json"),
    ("data convert broken.json new.json --to llava", "broken.json: line 1 is not JSON"), ("data merge sft.json dpo.json --out new.json", "records of different kinds"),
    ("data split sft.json --out_dir parts --by patient --fractions train=1", "--by patient needs --patient_field or --patient_regex"),
    ("data split sft.json --out_dir parts --fractions train", "want PART=NUMBER"), ("data sample sft.json sft.json -n 2", "would take the place of what is read")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    model = tiny_model()
    model.save_pretrained(root / "base")
    (root / "images").mkdir()
    names = write_pictures(root / "images")
    turn = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    pair = dpo_records(names)[0]
    records = {
        "sft": sft_records(names), "dpo": dpo_records(names), "nothing": [], "numbers": [1, 2], "keys": [{"id": "a", "dialogue": []}],
        "roles": [{"id": "a", "conversations": [{"from": "nurse", "value": "?"}, turn[1]]}], "no_image": [{"id": "a", "image": "gone.png", "conversations": turn}],
        "same": [{**pair, "reject_conversations": pair["chosen_conversations"]}], "run": {"run": {"schema": 1}}, **DEEPSPEED}
    for name, content in records.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    for name, text in {**CONFIGS, "broken.json": '[{"id": 1,', "empty.json": "", "judged.jsonl": '{"id": "a"}\n',
                       "cut.jsonl": '{"question_id": 1, "text": "a"}\n{"question_'}.items():
        (root / name).write_text(text)
    (root / "latin.json").write_bytes(b'["\xe9"]')
    (root / "latin.toml").write_bytes(b'run_name = "\xe9"')
    for folder in ("hollow", "no_config"):
        (root / folder).mkdir()
    (root / "no_config" / "model.safetensors").write_bytes(b"")
    for copy in ("damaged", "bad_config", "no_tokenizer"):
        shutil.copytree(root / "base", root / copy)
    (root / "damaged" / "model.safetensors").write_bytes((root / "base" / "model.safetensors").read_bytes()[:1000])
    (root / "bad_config" / "config.json").write_text("{")
    (root / "no_tokenizer" / "tokenizer.model").unlink()
    model.add_lora(LoraConfig(r=2), "llm")
    model.save_pretrained(root / "adapter")
    return root


def test_there_are_enough_and_every_verb_is_among_them():
    assert len({words for words, *_ in CASES}) == len(CASES) >= 60
    assert {words.split()[0] for words, *_ in CASES if words} >= VERBS.keys() - {"demo-base"}


@pytest.mark.parametrize("words, fragments", [(words, fragments) for words, *fragments in CASES], ids=[words[:100] for words, *_ in CASES])
def test_wrong(words, fragments, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    try:
        code = main(shlex.split(words))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    first, *rows = said.err.splitlines()
    assert code == 2 and said.out == ""
    assert first.startswith(f"stllava {words.split()[0]}: " if words and words.split()[0] in VERBS else "stllava: ")
    assert all(row.startswith("  ") for row in rows)  # a list of records
    assert [fragment for fragment in fragments if fragment not in said.err] == [], said.err
    assert "secret" not in said.err.replace("place for a secret", "") and not list(Path("out").glob("*.bin") if Path("out").is_dir() else ())


def test_a_missing_extra_says_what_for_and_how_to_get_it(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    assert main([*shlex.split(SFT), "--config", "list.yaml"]) == 2
    assert capsys.readouterr().err == "stllava sft: list.yaml: YAML needs PyYAML: pip install 'stllava[yaml]', or write it as .toml or .json\n"
