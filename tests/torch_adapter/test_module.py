"""LlavaModule: the core's numbers under torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="no torch: make test-torch")

from trained import dpo_data, sft_data, with_adapters  # noqa: E402

from stllava.errors import ConfigError  # noqa: E402
from stllava.torch_adapter import LlavaModule, TorchDataset, collate, collate_pairs  # noqa: E402
from stllava.train.sft import collate_sequences  # noqa: E402


@pytest.fixture(params=["f32", "f64"])
def model(request):
    return with_adapters(request.param)


def gradients(module):
    """In the order of the core's buffer."""
    by_name = dict(module.named_parameters())
    return np.concatenate([by_name[name].grad.numpy().reshape(-1) for name in module.llava.trainable])


def test_parameters_are_views_of_the_model(model):
    module = LlavaModule(model)
    names = [name for name, _ in module.named_parameters()]
    assert sorted(names) == sorted(model.trainable) and len(names) == sum(".lora_" in name or "mm_projector" in name for name in names)
    before = np.array(model.theta)
    with torch.no_grad():
        for p in module.parameters():
            p += 1
    assert np.array_equal(model.theta, before + 1)
    model.theta[:] = before
    assert all(np.array_equal(p.detach().numpy(), model.core.tensor(name).numpy()) for name, p in module.named_parameters())


def test_gradients_are_the_cores_bit_for_bit(model, tmp_path):
    data = sft_data(model, tmp_path)
    module = LlavaModule(model)
    batch = collate([TorchDataset(data)[i] for i in range(3)])
    out = module(**batch)
    out.loss.backward()
    micro = collate_sequences(model, [s for i in range(3) for s in data.sequences(i, 0)], data, [], share=True)
    logp = model.run.forward(micro.batch, pixels=micro.pixels, train=True)
    model.core.zero_grad()
    model.run.backward(np.full(len(logp), -1 / len(logp)))
    assert np.abs(model.grad).max() > 0 and np.array_equal(gradients(module), model.grad)
    assert abs(float(out.loss.detach()) + logp.sum() / len(logp)) <= 1e-14 * len(logp)
    assert np.array_equal(np.sort(out.log_probs.detach().numpy()[batch["labels"].numpy()[:, 1:] != -100]), np.sort(logp))


def test_log_probs_lie_where_their_labels_do(model, tmp_path):
    """Against softmax of the logits, with padding on the left and on the right, a picture, and a picture that comes twice."""
    module = LlavaModule(model)
    batch = collate_pairs([TorchDataset(dpo_data(model, tmp_path))[i] for i in range(2)])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    logits = module(**batch).logits.double()
    wanted = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0].masked_fill(labels[:, 1:] == -100, 0)
    out = module(**batch, labels=labels, fused_lm_head=True)
    tolerance = 2e-7 if model.dtype == "f32" else 1e-13  # measured 3e-9, 2e-15: the logits are rounded to the model's dtype
    assert torch.abs(out.log_probs - wanted).max() <= tolerance and (out.log_probs != 0).sum() == (labels[:, 1:] != -100).sum()
    probabilities = torch.softmax(logits[:, :-1], -1)
    entropy = -(probabilities * torch.log_softmax(logits[:, :-1], -1)).sum(-1).masked_fill(labels[:, 1:] == -100, 0)
    assert torch.abs(out.entropy - entropy).max() <= tolerance
    assert torch.abs(out.mean_logits - logits[:, :-1].mean(-1).masked_fill(labels[:, 1:] == -100, 0)).max() <= tolerance
    assert torch.equal(out.is_top1, (logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != -100))
    shift = 5
    left = {name: torch.cat([torch.full((4, shift), 0), batch[name]], dim=1) for name in ("input_ids", "attention_mask")}
    moved = module(**left, images=batch["images"], labels=torch.cat([torch.full((4, shift), -100), labels], dim=1))
    assert torch.equal(moved.log_probs[:, shift:], out.log_probs) and not moved.log_probs[:, :shift].any()


def test_any_loss_of_log_probs(model, tmp_path):
    """A weighted loss of one's own, against differences of the loss along its gradient."""
    module = LlavaModule(model).eval()
    batch = collate([TorchDataset(sft_data(model, tmp_path))[i] for i in range(2)])
    weights = torch.linspace(0.5, 2, batch["labels"].shape[1] - 1, dtype=torch.float64)

    def loss():
        return (torch.exp(module(**batch).log_probs) * weights).sum()

    loss().backward()
    direction = gradients(module) / np.linalg.norm(gradients(module))
    slope = np.dot(gradients(module).astype(np.float64), direction)
    theta, step = np.array(model.theta), 1e-2 if model.dtype == "f32" else 1e-4
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            model.theta[:] = theta + sign * step * direction
            values.append(float(loss()))
    tolerance = 1e-2 if model.dtype == "f32" else 1e-6
    assert abs((values[0] - values[1]) / (2 * step) - slope) <= tolerance * abs(slope)


def test_gradients_accumulate_and_clip(model, tmp_path):
    data = TorchDataset(sft_data(model, tmp_path))
    module = LlavaModule(model)
    alone = []
    for i in (0, 1, 4):
        module.zero_grad(set_to_none=i == 1)
        module(**collate([data[i]])).loss.backward()
        alone.append(gradients(module))
    module.zero_grad()
    outs = [module(**collate([data[i]])) for i in (0, 1, 4)]  # three passes wait for their backward
    for out in outs:
        out.loss.backward()
    assert np.array_equal(gradients(module), alone[0] + alone[1] + alone[2])
    n_runs = len(module._free_runs)
    module(**collate([data[0]])).loss.backward()
    assert len(module._free_runs) == n_runs == 3
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    assert float(norm) > 1e-3 and abs(np.linalg.norm(gradients(module)) - 1e-3) < 1e-8


def test_backward_too_late_or_twice_is_an_error(model, tmp_path):
    module = LlavaModule(model)
    batch = collate([TorchDataset(sft_data(model, tmp_path))[0]])
    loss = module(**batch).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = module(**batch).loss
    torch.optim.SGD(module.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        module(input_ids=batch["input_ids"], images=batch["images"]).logits.sum().backward()


def test_dropout_is_of_training_mode(tmp_path):
    model = with_adapters(dropout=0.3)
    module = LlavaModule(model, seed=5)
    batch = collate([TorchDataset(sft_data(model, tmp_path))[0]])
    a, b = module(**batch).loss.item(), module(**batch).loss.item()
    assert a != b
    again = LlavaModule(model, seed=5)
    assert again(**batch).loss.item() == a
    module.eval()
    with torch.no_grad():
        still = module(**batch).loss.item()
    assert module(**batch).loss.item() == still != a


def test_recomputing_gives_the_same_bits(model, tmp_path):
    module = LlavaModule(model)
    batch = collate([TorchDataset(sft_data(model, tmp_path))[i] for i in range(2)])
    module(**batch).loss.backward()
    kept = gradients(module)
    module.zero_grad()
    module.gradient_checkpointing_enable()
    module(**batch).loss.backward()
    assert np.array_equal(gradients(module), kept)


def test_the_reference_stays(model, tmp_path):
    module = LlavaModule(model)
    reference = module.reference()
    batch = collate([TorchDataset(sft_data(model, tmp_path))[0]])
    assert not list(reference.parameters())
    before = module(**batch).loss.item()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.05
    assert reference(**batch).loss.item() == before != module(**batch).loss.item()


def test_a_batch_without_targets_gives_zeros(model):
    module = LlavaModule(model)
    ids = torch.tensor([[1, 15043, 2]])
    module(ids, labels=torch.full_like(ids, -100)).loss.backward()
    assert not gradients(module).any()


def test_what_is_refused(model, tmp_path):
    module = LlavaModule(model)
    batch = collate([TorchDataset(sft_data(model, tmp_path))[0]])
    with pytest.raises(ConfigError, match="1 image markers .* but 0 images"):
        module(batch["input_ids"])
    with pytest.raises(ConfigError, match=r"want \(batch, tokens\)"):
        module(batch["input_ids"][0], images=batch["images"])
    with pytest.raises(ConfigError, match="they stay torch.float.* on the CPU"):
        module.half()
    assert module.to("cpu") is module
    with pytest.raises(ConfigError, match=r"want \(3, S, S\)"):
        module(batch["input_ids"], images=batch["images"][:, 0])


def test_names_nest_as_in_transformers(model):
    module = LlavaModule(model)
    state = copy.deepcopy(module.state_dict())
    assert sorted(state) == sorted(model.trainable)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    module.load_state_dict(state)
    assert np.array_equal(model.theta, np.concatenate([state[name].numpy().reshape(-1) for name in model.trainable]))
