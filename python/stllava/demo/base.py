"""The demo's base model: about a million parameters of the project's own architecture, trained from nothing by the project's own trainer.

Real self-training starts from a pretrained model, so the demo does too. This one has learnt the demo's language (questions.py) and what the atlas
pictures show, but was never asked whether the cerebellum or the ventricles are visible: stage 1 teaches that. Recipe after the trials recorded in the
project's notes: the learning rate decides whether the marker is ever seen (1.2e-3 leaves the plateau, 2e-3 mostly never), and several short
questions as branches of one image make it cheap.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import stllava_c
from stllava import __version__
from stllava.checkpoint import names
from stllava.checkpoint.atomic import make_directory, write_bytes
from stllava.checkpoint.lock import run_lock
from stllava.config import LlavaConfig, VisionConfig
from stllava.conversation import conv_templates
from stllava.data.pictures import Pictures
from stllava.images import ImageProcessor
from stllava.model import Dtype, LlavaModel
from stllava.text.labels import build_sample, draw_uniform
from stllava.text.tokenizer import Tokenizer
from stllava.train.arguments import SFTConfig
from stllava.train.sft import SFTTrainer
from stllava.tree import Sequence

from . import atlas
from .questions import DESCRIBE, corpus_lines

__all__ = ["BaseDataset", "base_model_path", "load_base", "train_base"]

IMAGE_SIZE = 64
VOCABULARY = 512
LENGTH = 512
STEPS, BATCH, LEARNING_RATE, WARMUP = 4500, 16, 1.2e-3, 60
VIRTUAL_USER_SHARE = 0.7  # of later turns, in the self-questioning template


def vision_config() -> VisionConfig:
    """Three layers, of which the last lies behind the feature layer (-2) and never runs, as in the real tower."""
    return VisionConfig(image_size=IMAGE_SIZE, patch_size=8, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384)


def model_config(vocab_size: int) -> LlavaConfig:
    vision = vision_config()
    return LlavaConfig.from_dict({
        "model_type": "llava", "vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
        "num_attention_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": LENGTH,
        "mm_vision_tower": "atlas-vision-tower", "mm_hidden_size": vision.hidden_size, "mm_projector_type": "cluster", "num_latents": 16,
        "mm_vision_config": vision.to_dict(), "image_aspect_ratio": "pad", "conversation_template": "v1", "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0})


def train_tokenizer(path: Path, seed: int) -> Tokenizer:
    """A BPE vocabulary of the demo's language and the templates' own words."""
    import sentencepiece
    lines = list(corpus_lines(seed=seed))
    for name in ("v1", "v1_sq"):
        lines += [conv_templates[name].system] * 50
    lines += ["USER: ", "ASSISTANT: ", "VUSER: "] * 300
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["\n"], num_threads=1, max_sentence_length=8192,
        minloglevel=2)
    write_bytes(path, model.getvalue())
    return Tokenizer(str(path), model_max_length=LENGTH)


def fresh_weights(config: LlavaConfig, seed: int) -> dict[str, np.ndarray]:
    """Norms one, biases zero, matrices uniform with bound 1/sqrt(in), embeddings uniform with standard deviation 0.05, positions with 0.4: with small
    positions beside patches of about 0.6 the model learnt the marker's colour and never where it is."""
    weights = {}
    for name, shape in names.expected_shapes(config).items():
        array = np.zeros(shape, np.float32)
        if name.endswith(("bias", "sim_beta")):
            pass
        elif "norm" in name or "ln_1" in name or name.endswith("sim_alpha"):
            array[...] = 1.0
        else:
            spread = 0.4 if "position_embedding" in name else 0.05 if "embed" in name and "patch" not in name else None
            bound = spread * math.sqrt(3.0) if spread else 1 / math.sqrt(array[0].size)
            stllava_c.fill_uniform(array, -bound, bound, seed=seed, stream=zlib.crc32(name.encode()))
        weights[name] = array
    return weights


class BaseDataset:
    """Per image and epoch, as independent branches: five short questions, or two and a conversation (describe, caption, two later turns).

    Half of the images of an epoch come in template v1, half in v1_sq, where later turns are mostly asked by the virtual user.
    """

    def __init__(self, paths: atlas.AtlasPaths, tokenizer: Tokenizer, processor: ImageProcessor, seed: int) -> None:
        if paths.base is None:
            raise ValueError(f"{paths.root} was built without base images")
        self.items = list(atlas.base_items(paths.base))
        self.tokenizer, self.seed = tokenizer, seed
        self.pictures = Pictures(paths.images, processor)

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, key: object) -> np.ndarray:
        return self.pictures(key)

    def sequences(self, item: int, epoch: int) -> list[Sequence]:
        record = self.items[item]

        def u(what: int) -> float:
            return draw_uniform(self.seed, epoch, record.id, 1000 + what)

        template = "v1_sq" if u(0) < 0.5 else "v1"
        talk = u(1) < 0.5
        order = sorted(range(len(record.questions)), key=lambda i: u(10 + i))
        dialogues: list[tuple[list[tuple[str, str]], set[int]]] = [
            ([(record.questions[i].question, record.questions[i].answer)], set()) for i in order[:2 if talk else 5]]
        if talk:
            turns = [(DESCRIBE, record.caption), *((q.question, q.answer) for q in record.later_turns)]
            later = range(2, 2 * len(turns), 2)
            asks = {j for j in later if template == "v1_sq" and u(100 + j) < VIRTUAL_USER_SHARE}
            dialogues.append((turns, asks))
        return [self._sequence(record.image, item, template, turns, switched) for turns, switched in dialogues]

    def _sequence(self, image: str, item: int, template: str, turns: list[tuple[str, str]], switched: set[int]) -> Sequence:
        conversation: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            conversation += [{"from": "human", "value": question if number else f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        sample = build_sample(conversation, template, self.tokenizer, has_image=True, switched=switched)
        return Sequence(sample.input_ids, sample.labels, (image,), sample=item)


def train_base(out: Path, *, seed: int = 0, num_threads: int = 0, steps: int = STEPS, n_images: int = 6000) -> Path:
    """Builds the data, trains, and writes the model with its provenance into `out`/model. Returns that directory."""
    if num_threads > 0:
        stllava_c.set_num_threads(num_threads)
    started = time.monotonic()
    target = out / "model"
    make_directory(target)
    with run_lock(make_directory(out / "data")):
        paths = atlas.build(out / "data", seed=seed, cache_dir=out.parent / "wheels", n_base=n_images, n_sft=0, n_unlabelled=0, n_val=150, n_test=0)
    tokenizer = train_tokenizer(out / "tokenizer.model", seed)
    processor = ImageProcessor(size=IMAGE_SIZE, aspect="pad")
    config = model_config(tokenizer.vocab_size)
    model = LlavaModel(config, fresh_weights(config, seed), tokenizer=tokenizer, image_processor=processor)
    args = SFTConfig(output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE, warmup_steps=WARMUP,
                     adam_beta2=0.98, weight_decay=0.01, min_lr_ratio=0.02, logging_steps=10, seed=seed)
    result = SFTTrainer(model, args, BaseDataset(paths, tokenizer, processor, seed)).train()
    model.save_pretrained(target)
    write_bytes(target / "provenance.json", (json.dumps({
        "what": "base model of the stllava demo, random start", "command": "make demo-base", "stllava": __version__, "seed": seed, "steps": steps,
        "images": n_images, "training_loss_mean": result.training_loss, "seconds": round(time.monotonic() - started, 1),
        "data": "atlas VQA, built from pictures inside pip packages; see python/stllava/demo/sources.py for files, digests and terms",
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                   for path in sorted(target.iterdir()) if path.suffix in (".safetensors", ".model")},
    }, indent=2) + "\n").encode())
    return target


def base_model_path() -> Path:
    """The committed base model, inside the package."""
    return Path(str(resources.files("stllava.demo"))) / "base_model"


def load_base(dtype: Dtype = "f32") -> LlavaModel:
    return LlavaModel.from_pretrained(base_model_path(), dtype=dtype)
