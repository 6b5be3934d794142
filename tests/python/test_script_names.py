"""Scripts written for LLaVA, import lines changed: an evaluation loop over questions and a single question, on the tiny model in a directory."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model, write_pictures

from stllava.checkpoint.peft import LoraConfig
from stllava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from stllava.conversation import SeparatorStyle, conv_templates, default_conversation
from stllava.errors import ConfigError, FormatError
from stllava.images import ImageError, ImageProcessor
from stllava.mm_utils import (
    KeywordsStoppingCriteria,
    expand2square,
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    tokenizer_image_token,
)
from stllava.model import LlavaModel
from stllava.model.builder import load_pretrained_model
from stllava.utils import disable_torch_init

HAS_TORCH = False
try:
    import torch  # noqa: F401
    HAS_TORCH = True
except ImportError:
    pass


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava-v1.5-tiny")
    tiny_model().save_pretrained(folder / "llava-v1.5-tiny")
    return folder / "llava-v1.5-tiny"


@pytest.fixture(scope="module")
def loaded(directory):
    return load_pretrained_model(str(directory), None, get_model_name_from_path(str(directory)), return_tensors="np")


@pytest.fixture
def pictures(tmp_path):
    return [tmp_path / name for name in write_pictures(tmp_path)]


def asked(question: str, mode: str = "v1") -> str:
    conv = conv_templates[mode].copy()
    conv.append_message(conv.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conv.append_message(conv.roles[1], None)
    return conv.get_prompt()


def test_a_loop_over_questions(directory, pictures, tmp_path):
    questions = [{"question_id": i, "image": path.name, "text": f"What is in picture {i}?"} for i, path in enumerate(pictures)]
    # the script
    disable_torch_init()
    name = get_model_name_from_path(str(directory))
    tokenizer, model, image_processor, context_len = load_pretrained_model(str(directory), None, name, return_tensors="np")
    model.eval()
    ids = []
    with open(tmp_path / "answers.jsonl", "w", encoding="utf-8") as answers:
        for question in questions:
            text = question["text"]
            if model.config.mm_use_im_start_end:
                text = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN + "\n" + text
            else:
                text = DEFAULT_IMAGE_TOKEN + "\n" + text
            conv = conv_templates["vicuna_v1"].copy()
            conv.append_message(conv.roles[0], text)
            conv.append_message(conv.roles[1], None)
            input_ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="np")[None]
            image = Image.open(tmp_path / question["image"]).convert("RGB")
            pixels = process_images([image], image_processor, model.config)[0]
            output_ids = model.generate(input_ids, images=pixels[None], image_sizes=[image.size], do_sample=False, temperature=0, top_p=None, num_beams=1,
                                        max_new_tokens=12, use_cache=True)
            answer = tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()
            answers.write(json.dumps({"question_id": question["question_id"], "prompt": question["text"], "text": answer, "model_id": name}) + "\n")
            ids.append(output_ids[0].tolist())
    # the same in our words
    ours = LlavaModel.from_pretrained(directory)
    wanted = ours.generate([asked(q["text"]) for q in questions], list(map(str, pictures)), max_new_tokens=12)
    assert ids == [answer.ids for [answer] in wanted] and len({tuple(row) for row in ids}) > 1
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [answer.text.strip() for [answer] in wanted]
    assert (name, context_len, rows[0]["model_id"]) == ("llava-v1.5-tiny", 2048, name)


def test_a_question_about_two_images_with_stop_words(loaded, pictures):
    """As `run_llava` asks: placeholder, several images, a word that ends the answer."""
    tokenizer, model, image_processor, _ = loaded
    query = f"{IMAGE_PLACEHOLDER} and {IMAGE_PLACEHOLDER}: which is larger?".replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    conv = conv_templates["llava_v0"].copy()
    conv.append_message(conv.roles[0], query)
    conv.append_message(conv.roles[1], None)
    images = [Image.open(path).convert("RGB") for path in pictures[:2]]
    pixels = process_images(images, image_processor, model.config).astype(model.dtype)
    input_ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="np")[None]
    free = model.generate(input_ids, images=pixels, max_new_tokens=16)
    word = tokenizer.decode(free[0, 5:7]).strip()
    stop = conv.sep if conv.sep_style not in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2) else conv.sep2
    stopping = KeywordsStoppingCriteria([stop, word, "</s>"], tokenizer, input_ids)
    stopped = model.generate(input_ids, images=pixels, max_new_tokens=16, stopping_criteria=[stopping])
    [[wanted]] = model.ours.generate([input_ids[0].tolist()], [tuple(pixels)], max_new_tokens=16, stop=[stop, word])
    assert stopped[0].tolist() == wanted.ids == free[0, :len(wanted.ids)].tolist() and len(wanted.ids) < free.shape[1]
    seen = np.concatenate([input_ids, stopped], axis=1)
    assert stopping(seen) and not stopping(seen[:, :-1]) and stopping(np.append(input_ids, [[tokenizer.eos_token_id]], axis=1))


def test_a_batch_with_padding_and_prompts_before_the_answers(directory, loaded, pictures):
    tokenizer, model, image_processor, _ = loaded
    texts = [asked("Short?"), asked("A much longer question, is it not?"), "Hello"]
    ids = [tokenizer_image_token(text, tokenizer) for text in texts]
    longest = max(map(len, ids))
    padded = np.array([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    pixels = process_images([Image.open(path) for path in pictures[:3]], image_processor, model.config)
    wanted = model.ours.generate(ids, [pixels[0], pixels[1], None], max_new_tokens=6, num_return_sequences=2)
    out = model.generate(padded, attention_mask=mask, images=list(pixels), max_new_tokens=6, num_return_sequences=2)
    assert out.tolist() == [answer.ids for answers in wanted for answer in answers]
    assert np.array_equal(model.generate(padded, attention_mask=mask, images=pixels[:2], max_new_tokens=6), out[::2])  # one per marker
    old_style = load_pretrained_model(directory, return_tensors="np", output_has_prompt=True)[1]
    with_prompt = old_style.generate(padded, attention_mask=mask, images=pixels, max_new_tokens=6)
    assert np.array_equal(with_prompt, np.concatenate([padded, out[::2]], axis=1))


def test_a_shorter_answer_is_padded(loaded):
    tokenizer, model, _, _ = loaded
    ids = [tokenizer(text).input_ids for text in ("One", "Two")]
    first, second = (model.generate([row], max_new_tokens=8)[0].tolist() for row in ids)
    end = next(token for token in first if token not in second)
    out = model.generate(np.array(ids), max_new_tokens=8, eos_token_id=end)
    n = first.index(end) + 1
    assert out.tolist() == [first[:n] + [tokenizer.pad_token_id] * (8 - n), second] and n < 8


def test_sampling_follows_the_global_seed(loaded):
    tokenizer, model, _, _ = loaded
    ids = [tokenizer("Hello").input_ids]

    def drawn():
        return model.generate(ids, do_sample=True, temperature=1.0, max_new_tokens=8).tolist()

    np.random.seed(3)
    a, b = drawn(), drawn()
    np.random.seed(3)
    assert a == drawn() and a != b
    [[wanted]] = model.ours.generate(ids, temperature=0.7, top_k=50, top_p=0.9, seed=11, max_new_tokens=8)
    assert model.generate(ids, do_sample=True, temperature=0.7, top_p=0.9, seed=11, max_new_tokens=8)[0].tolist() == wanted.ids


def test_a_streamer_gets_the_prompt_then_every_token(loaded):
    tokenizer, model, _, _ = loaded
    got = []

    class Streamer:
        def put(self, values):
            got.append(values.tolist())

        def end(self):
            got.append("end")

    ids = np.array([tokenizer("Hello").input_ids])
    out = model.generate(input_ids=ids, max_new_tokens=4, streamer=Streamer())
    assert got == [ids.tolist(), *([token] for token in out[0].tolist()), "end"]


def test_an_adapter_directory_loads_with_its_base(directory, tmp_path):
    model = LlavaModel.from_pretrained(directory)
    model.add_lora(LoraConfig(r=2, lora_alpha=4), "llm")
    for i, (name, array) in enumerate(model.lora_tensors().items()):
        if ".lora_B." in name:
            array[:] = np.random.default_rng(i).normal(0, 0.5, array.shape)
    model.save_pretrained(tmp_path / "llava-lora")
    tokenizer, loaded, _, _ = load_pretrained_model(tmp_path / "llava-lora", directory, "llava-lora", return_tensors="np")
    ids = [tokenizer("Hello").input_ids]
    assert loaded.generate(ids, max_new_tokens=6)[0].tolist() == model.generate(ids, max_new_tokens=6)[0][0].ids


def test_what_scripts_ask_of_the_model(loaded):
    tokenizer, model, image_processor, _ = loaded
    assert model.half().cuda().to("cuda", dtype=np.float16).eval() is model and model.device == "cpu" and model.dtype == np.float32
    assert model.config.hidden_size == 64 and model.config.image_aspect_ratio == "pad" and not hasattr(model.config, "max_sequence_length")
    tower = model.get_vision_tower()
    assert tower.is_loaded and tower.image_processor.size == image_processor.size == {"shortest_edge": 28}
    assert (tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (1, "</s>", "<unk>", 32000)
    assert tokenizer("Hello").input_ids == tokenizer.encode("Hello") == [1, *tokenizer("Hello", add_special_tokens=False)["input_ids"]]
    both = tokenizer(["Hello", "Hello there, you"], padding=True, return_tensors="np")
    assert both.input_ids.shape == both.attention_mask.shape and both.attention_mask.sum(axis=1).tolist() == [len(tokenizer(t).input_ids) for t in
                                                                                                           ("Hello", "Hello there, you")]
    assert tokenizer.decode([1, *tokenizer("Hi", add_special_tokens=False).input_ids, 2]) == "<s> Hi</s>"  # as transformers' slow tokenizer
    with pytest.raises(AttributeError):
        model.no_such_name  # noqa: B018
    with pytest.raises(ConfigError, match="padding=True"):
        tokenizer(["a", "a longer one"], return_tensors="np")


def test_pixels(loaded, pictures):
    _, model, image_processor, _ = loaded
    images = [Image.open(path).convert("RGB") for path in pictures]
    padded = process_images(images, image_processor, model.config)
    ours = ImageProcessor(size=28, aspect="pad")
    assert np.array_equal(padded, ours.preprocess_many(images)) and np.array_equal(padded, process_images(images, ours, {"image_aspect_ratio": "pad"}))
    by_hand = [image_processor.preprocess(expand2square(image, tuple(int(x * 255) for x in image_processor.image_mean)), return_tensors="np")
               ["pixel_values"][0] for image in images]
    assert np.array_equal(padded, np.stack(by_hand))
    cropped = image_processor(images).pixel_values
    assert isinstance(cropped, list) and np.array_equal(np.stack(cropped), process_images(images, image_processor, {}))
    assert not np.array_equal(cropped[0], padded[0])
    with pytest.raises(ConfigError, match="anyres"):
        process_images(images, image_processor, {"image_aspect_ratio": "anyres"})


def test_base64(pictures):
    data = pictures[0].read_bytes()
    assert np.array_equal(np.asarray(load_image_from_base64(base64.b64encode(data).decode())), np.asarray(Image.open(pictures[0]).convert("RGB")))
    with pytest.raises(FormatError, match="not base64"):
        load_image_from_base64("*")
    with pytest.raises(ImageError):
        load_image_from_base64(base64.b64encode(b"no picture"))


@pytest.mark.parametrize("options, message", [
    ({"num_beams": 4}, "num_beams is 4, which is not implemented; supported: None, 1"), ({"length_of_answer": 3}, "unknown option length_of_answer"),
    ({"stopping_criteria": [len]}, "KeywordsStoppingCriteria"), ({"images": np.zeros((2, 3, 28, 28))}, "0 image markers .* but 2 images"),
    ({"images": np.zeros((28, 28))}, r"want \(3, S, S\)")])
def test_what_generate_refuses(loaded, options, message):
    with pytest.raises(ConfigError, match=message):
        loaded[1].generate(np.array([[1, 15043]]), max_new_tokens=2, **options)


def test_what_loading_refuses(directory):
    with pytest.raises(TypeError, match="unknown argument 'quantise'"):
        load_pretrained_model(directory, quantise=True)
    with pytest.raises(ConfigError, match="return_tensors is 'tf'"):
        load_pretrained_model(directory, return_tensors="tf")
    with pytest.warns(UserWarning, match="load_4bit: weights are not quantised here"):
        load_pretrained_model(directory, load_4bit=True, torch_dtype="float16")


@pytest.mark.skipif(HAS_TORCH, reason="torch is here: tests/torch has what it does")
def test_without_torch_one_line_says_so(directory, loaded):
    for call in (lambda: tokenizer_image_token("a", loaded[0], return_tensors="pt"), lambda: load_pretrained_model(directory, return_tensors="pt"),
                 lambda: loaded[2].preprocess(np.zeros((4, 4, 3), np.uint8), return_tensors="pt")):
        with pytest.raises(ConfigError, match=r"needs torch: pip install 'stllava\[torch\]'$"):
            call()


def test_names_that_scripts_import():
    assert default_conversation.name == "v1" and default_conversation is conv_templates["v1"]
    assert get_model_name_from_path("a/llava-run/checkpoint-20/") == "llava-run_checkpoint-20"
    with pytest.raises(TypeError, match="want a list"):
        KeywordsStoppingCriteria("###", None, np.zeros((1, 2)))
