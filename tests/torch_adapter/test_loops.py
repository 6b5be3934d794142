"""Ten steps of a plain torch loop, transformers' Trainer and TRL's DPOTrainer against ours: the same losses."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="no torch: make test-torch")
transformers = pytest.importorskip("transformers", reason="no transformers: make test-torch")
trl = pytest.importorskip("trl", reason="no trl: make test-torch")

import datasets  # noqa: E402
import safetensors.torch  # noqa: E402
from trained import dpo_data, sft_data, with_adapters  # noqa: E402

from stllava import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from stllava.errors import ConfigError  # noqa: E402
from stllava.torch_adapter import LlavaModule, TorchDataset, collate  # noqa: E402
from stllava.torch_adapter.dpo import StllavaDPOTrainer  # noqa: E402

STEPS = 10
SETTINGS = dict(max_steps=STEPS, per_device_train_batch_size=2, per_device_eval_batch_size=4, learning_rate=3e-3, lr_scheduler_type="linear", weight_decay=0.01)
OURS = dict(shuffle=False, disable_tqdm=True, **SETTINGS)
THEIRS = dict(train_sampling_strategy="sequential", use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False,
              max_grad_norm=1.0, **SETTINGS)
# Measured in f64: losses (about 10) equal to 4e-15, weights to 1e-15. In f32 4e-6 and 2e-6: torch's AdamW takes 1 - beta2 in double, the core in f32.
# transformers adds losses up in float32, so that what it logs is off by 5e-7.
LOSS = {"f32": 1e-5, "f64": 1e-13}
LOGGED = {"f32": 1e-5, "f64": 1e-6}
WEIGHTS = {"f32": 1e-5, "f64": 1e-14}


@pytest.fixture(params=["f32", "f64"])
def dtype(request):
    return request.param


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def compare(theirs, ours, tolerance):
    assert len(theirs) == len(ours) == STEPS and ours[-1] < ours[0] - 0.1
    assert np.abs(np.subtract(theirs, ours)).max() <= tolerance


def compare_weights(module, model):
    difference = max(np.abs(p.detach().numpy() - model.core.tensor(name).numpy()).max() for name, p in module.named_parameters())
    assert difference <= WEIGHTS[model.dtype]


@pytest.fixture
def sft(tmp_path, dtype):
    """Losses of our trainer, and what another one starts with."""
    model = with_adapters(dtype)
    trainer = SFTTrainer(model, SFTConfig(str(tmp_path / "ours"), **OURS), sft_data(model, tmp_path))
    trainer.train()
    other = with_adapters(dtype)
    return trainer, LlavaModule(other), TorchDataset(sft_data(other, tmp_path))


def test_a_plain_loop(sft, dtype):
    ours, module, data = sft
    decays = {name: "bias" not in name for name, _ in module.named_parameters()}
    optimizer = torch.optim.AdamW([{"params": [p for name, p in module.named_parameters() if decays[name] is kind], "weight_decay": 0.01 if kind else 0.0}
                                   for kind in (True, False)], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    found = []
    for step in range(STEPS):
        [items] = ours.plan.update(step)
        loss = module(**collate([data[item] for item, _ in items])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    compare(found, losses(ours), LOSS[dtype])
    compare_weights(module, ours.model)


def test_transformers_trainer(sft, dtype, tmp_path):
    ours, module, data = sft
    trainer = transformers.Trainer(module, transformers.TrainingArguments(str(tmp_path / "theirs"), remove_unused_columns=False, **THEIRS),
                                   train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    compare(losses(trainer), losses(ours), LOGGED[dtype])
    compare_weights(module, ours.model)
    batches = [collate([data[i] for i in items]) for items in ((0, 1, 2, 3), (4,))]
    with torch.no_grad():
        means = [module.eval()(**batch).loss.item() for batch in batches]
    assert abs(trainer.evaluate()["eval_loss"] - (4 * means[0] + means[1]) / 5) <= 2e-6  # transformers: a mean over batches, by their size
    trainer.save_model(str(tmp_path / "saved"))
    saved = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == module.state_dict().keys() and all(torch.equal(saved[name], p) for name, p in module.state_dict().items())
    module.save_pretrained(tmp_path / "ours-saved")
    assert (tmp_path / "ours-saved" / "adapter_config.json").exists()


def test_trl_dpo_trainer(dtype, tmp_path):
    model = with_adapters(dtype)
    ours = DPOTrainer(model, DPOConfig(str(tmp_path / "ours"), beta=0.5, **OURS), dpo_data(model, tmp_path))
    ours.train()
    other = with_adapters(dtype)
    theirs = StllavaDPOTrainer(other, args=trl.DPOConfig(str(tmp_path / "theirs"), beta=0.5, **THEIRS), train_dataset=dpo_data(other, tmp_path),
                               eval_dataset=dpo_data(other, tmp_path))
    theirs.train()
    compare(losses(theirs), losses(ours), LOGGED[dtype])
    compare_weights(theirs.model, model)
    for name in ("rewards/chosen", "rewards/margins", "logps/chosen"):
        rows = [[row[name] for row in trainer.state.log_history if name in row] for trainer in (theirs, ours)]
        assert len(rows[0]) == STEPS and np.abs(np.subtract(*rows)).max() <= (5e-5 if dtype == "f32" else 1e-13), name  # measured 1.3e-5, 1.4e-14
    assert theirs.evaluate()["eval_rewards/accuracies"] == 1.0
    theirs.save_model(str(tmp_path / "saved"))
    assert {"model.safetensors", "adapter_config.json", "tokenizer.model"} <= {path.name for path in (tmp_path / "saved").iterdir()}


@pytest.mark.parametrize("settings", [dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5), dict(loss_type=["ipo", "sft"]),
                                      dict(use_weighting=True)], ids=["alpha", "ipo and sft", "weighted"])
def test_other_losses_of_trl(tmp_path, settings):
    model = with_adapters()
    data = dpo_data(model, tmp_path)
    trainer = StllavaDPOTrainer(model, args=trl.DPOConfig(str(tmp_path / "theirs"), **{**THEIRS, **settings, "max_steps": 3}), train_dataset=data)
    trainer.train()
    assert np.isfinite(losses(trainer)).all() and losses(trainer)[-1] < losses(trainer)[0]


def test_text_rows_of_trl(tmp_path):
    """Rows that TRL itself tokenises, with the model's tokenizer."""
    model = with_adapters()
    rows = datasets.Dataset.from_list([{"prompt": f"What is {i}?", "chosen": " A number.", "rejected": " I do not know."} for i in range(4)])
    trainer = StllavaDPOTrainer(LlavaModule(model), args=trl.DPOConfig(str(tmp_path / "theirs"), **{**THEIRS, "max_steps": 3}), train_dataset=rows)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] == pytest.approx(np.log(2), abs=1e-6)


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="add_lora"):
        StllavaDPOTrainer(with_adapters(), peft_config=object())
    for name in ("sync_ref_model", "precompute_ref_log_probs"):
        with pytest.raises(ConfigError, match=f"{name}: not over the core's reference"):
            StllavaDPOTrainer(with_adapters(), args=trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True, **{name: True}))
