"""Scripts written for LLaVA that hold torch tensors, import lines changed; and what torch sees of the core's memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="no torch: make test-torch")

from PIL import Image  # noqa: E402
from tiny import tiny_model, write_pictures  # noqa: E402

import stllava_c  # noqa: E402
from stllava import DPOConfig, DPOTrainer, LoraConfig  # noqa: E402
from stllava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX  # noqa: E402
from stllava.conversation import conv_templates  # noqa: E402
from stllava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token  # noqa: E402
from stllava.model.builder import load_pretrained_model  # noqa: E402
from stllava.train import arguments, from_script  # noqa: E402
from stllava.train.no_effect import NO_EFFECT  # noqa: E402
from stllava.utils import disable_torch_init  # noqa: E402


class Questions(torch.utils.data.Dataset):
    """As evaluation scripts load questions: ids and pixels of one at a time."""

    def __init__(self, folder, names, tokenizer, image_processor, config):
        self.folder, self.names, self.tokenizer, self.image_processor, self.config = folder, names, tokenizer, image_processor, config

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        conv = conv_templates["vicuna_v1"].copy()
        conv.append_message(conv.roles[0], f"{DEFAULT_IMAGE_TOKEN}\nWhat is in picture {i}?")
        conv.append_message(conv.roles[1], None)
        image = Image.open(self.folder / self.names[i]).convert("RGB")
        pixels = process_images([image], self.image_processor, self.config)[0]
        return tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"), pixels, image.size


def together(batch):
    ids, pixels, sizes = zip(*batch, strict=True)
    return torch.stack(ids), torch.stack(pixels), sizes


def test_a_loop_with_a_data_loader(tmp_path):
    names = write_pictures(tmp_path)
    tiny_model().save_pretrained(tmp_path / "llava-tiny")
    # the script
    disable_torch_init()
    tokenizer, model, image_processor, _ = load_pretrained_model(tmp_path / "llava-tiny", None, get_model_name_from_path(tmp_path / "llava-tiny"))
    loader = torch.utils.data.DataLoader(Questions(tmp_path, names, tokenizer, image_processor, model.config), batch_size=1, collate_fn=together)
    found, texts = [], []
    for input_ids, pixels, sizes in loader:
        input_ids = input_ids.to(device=model.device, non_blocking=True)
        with torch.inference_mode():
            output_ids = model.generate(input_ids, images=pixels.to(dtype=torch.float16, device=model.device), image_sizes=sizes, do_sample=False,
                                        temperature=0, top_p=None, num_beams=1, max_new_tokens=10, use_cache=True)
        assert output_ids.dtype == torch.int64 and not KeywordsStoppingCriteria(["</s>"], tokenizer, input_ids)(torch.cat([input_ids, output_ids], 1))
        found.append(output_ids[0].tolist())
        texts.append(tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip())
    assert model.dtype == torch.float32 and pixels.dtype == torch.float32
    ours = model.ours
    prompts = [ids[0].tolist() for ids, _, _ in loader]
    shown = [pixels[0].half().numpy() for _, pixels, _ in loader]
    wanted = [answer for [answer] in ours.generate(prompts, shown, max_new_tokens=10)]
    assert found == [answer.ids for answer in wanted] and texts == [answer.text.strip() for answer in wanted]


def test_a_streamer_of_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="no transformers: make test-torch")
    tiny_model().save_pretrained(tmp_path / "llava-tiny")
    tokenizer, model, _, _ = load_pretrained_model(tmp_path / "llava-tiny")
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output_ids = model.generate(ids, do_sample=False, max_new_tokens=8, streamer=streamer)
    assert capsys.readouterr().out.strip() == tokenizer.decode(output_ids[0], skip_special_tokens=True).strip() != ""


def test_sampling_follows_torchs_seed(tmp_path):
    tiny_model().save_pretrained(tmp_path / "llava-tiny")
    tokenizer, model, _, _ = load_pretrained_model(tmp_path / "llava-tiny")
    ids = tokenizer("Hello", return_tensors="pt").input_ids

    def drawn():
        return model.generate(ids, do_sample=True, temperature=1.0, max_new_tokens=8).tolist()

    torch.manual_seed(3)
    a, b = drawn(), drawn()
    torch.manual_seed(3)
    assert a == drawn() and a != b


def test_torch_sees_the_cores_memory():
    model = tiny_model()
    model.set_trainable(["model.norm.weight"])
    for tensor in (torch.from_dlpack(model.core.theta.numpy()), torch.frombuffer(model.core.theta, dtype=torch.float32)):
        tensor[3] += 1
    assert model.theta[3] == 3 and np.from_dlpack(model.core.theta.numpy())[3] == 3
    mine = torch.zeros(4, 2)
    stllava_c.Tensor.from_buffer(mine.numpy()).numpy()[1, 1] = 5
    assert mine[1, 1] == 5


def test_a_script_of_trl_on_datasets_with_pictures(tmp_path):
    """Rows of `datasets` whose images are decoded, and peft's own LoraConfig: as with file names and ours."""
    datasets, peft = (pytest.importorskip(name, reason=f"no {name}: make test-torch") for name in ("datasets", "peft"))
    names = write_pictures(tmp_path)
    rows = [{"prompt": "What is it?", "chosen": f"It is thing {i}.", "rejected": "I do not know.", "images": [name]} for i, name in enumerate(names)]
    with_pictures = [{**row, "images": [Image.open(tmp_path / name) for name in row["images"]]} for row in rows]
    settings = dict(max_steps=2, per_device_train_batch_size=2, disable_tqdm=True)
    runs = []
    for data, config in ((datasets.Dataset.from_list(with_pictures), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])),
                         (rows, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))):
        trainer = DPOTrainer(tiny_model(), args=DPOConfig(str(tmp_path / f"out{len(runs)}"), **settings), train_dataset=data, peft_config=config,
                             image_folder=tmp_path)
        trainer.train()
        runs.append(trainer)
    assert np.array_equal(runs[0].model.theta, runs[1].model.theta) and runs[0].state.log_history[0]["loss"] == pytest.approx(np.log(2))


def test_every_setting_of_trl_is_known():
    trl = pytest.importorskip("trl", reason="no trl: make test-torch")
    for theirs, ours in ((trl.DPOConfig, arguments.DPOConfig), (trl.SFTConfig, arguments.SFTConfig)):
        own = {field.name for field in dataclasses.fields(ours)} | {"max_length"}
        unknown = {field.name for field in dataclasses.fields(theirs) if field.init} - own - from_script._TRL.keys() - NO_EFFECT.keys()
        assert not unknown
