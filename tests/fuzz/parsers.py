"""The Python targets: one function for each parser, from a file's bytes to what a user does with the result.

A target returns, or raises one of the errors its parser documents (`ALLOWED`); anything else is a finding, a broken assertion too. Each is small and
fast on purpose: a search needs thousands of tries a second. What needs a whole model around the file is in tests/hostile.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from stllava.checkpoint import gguf_container, index, peft, safetensors_file, strict_json, torch_pickle, torch_zip
from stllava.checkpoint.gguf_file import read_config
from stllava.checkpoint.tensor_file import FLOAT_DTYPES, TensorFile, count_nonfinite, dtype_name, to_float32
from stllava.config import LlavaConfig
from stllava.constants import IGNORE_INDEX
from stllava.conversation import conv_templates
from stllava.data.benchmarks import load_benchmark
from stllava.data.formats import describe
from stllava.data.records import read_jsonl, read_records
from stllava.errors import StllavaError
from stllava.images import ImageProcessor, load_image
from stllava.selftrain.judge_parse import NO_SCORES, parse_scores
from stllava.text import AnyTokenizer, gguf_tokenizer, load_tokenizer
from stllava.text.labels import build_sample, draw_switches
from stllava.text.tokenizer import Tokenizer

ALLOWED = (StllavaError,)
TEXTS = ("Is it large? Yes.", " a  b\n\tc", "<image></s><s>", "\N{SNOWMAN}\N{GRINNING FACE}", "x" * 50)
TOKENIZER = Path(__file__).parent / "corpus" / "tokenizer" / "bytes.model"


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="stllava-fuzz-")


def folder() -> Path:
    """A folder of this process alone."""
    return Path(_scratch().name)


def _write(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _touch(tensors: dict[str, np.ndarray] | TensorFile) -> None:
    """Every value of every tensor is read, as loading a model does."""
    for name, array in tensors.items():
        assert array.size <= 2**20, f"{name}: {array.size} values, more than the file can hold"
        count_nonfinite(array)
        if dtype_name(array) in FLOAT_DTYPES:
            with np.errstate(over="ignore", invalid="ignore"):
                to_float32(array)


# ---- the parsers -----------------------------------------------------------------------------------------------------------


def strict(data: bytes) -> None:
    value = strict_json.parse_object(data, "fuzz.json")
    assert value == json.loads(data)
    assert strict_json.parse_object(strict_json.dump_object(value), "again.json") == value


def safetensors(data: bytes) -> None:
    file = safetensors_file.read(_write("model.safetensors", data))
    assert sum(array.nbytes for array in file.values()) <= len(data)
    _touch(file)


def torch_file(data: bytes) -> None:
    _touch(torch_zip.load(_write("pytorch_model.bin", data)))


def torch_program(data: bytes) -> None:
    """The pickle alone; storages "0" to "3" have as many values as the pickle says, up to 64."""
    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in {"0", "1", "2", "3"} or count > 64:
            raise StllavaError("no such storage")
        return np.zeros(count, dtype)

    value = torch_pickle.parse(data, Path("data.pkl"), storage)
    if isinstance(value, dict):
        _touch({name: array for name, array in value.items() if isinstance(array, np.ndarray)})


def shard_index(data: bytes) -> None:
    """Beside two shards, "a" with tensor x and "b" with y and z."""
    if not (folder() / "shards" / "a.safetensors").exists():
        (folder() / "shards").mkdir(exist_ok=True)
        for name, tensors in (("a", "x"), ("b", "yz")):
            safetensors_file.write(folder() / "shards" / f"{name}.safetensors", {tensor: np.ones(2, np.float32) for tensor in tensors})
    _write("shards/model.safetensors.index.json", data)
    shards = index.read_weights(folder() / "shards")
    assert {name for shard in shards for name in shard} <= set("xyz")


def adapter_config(data: bytes) -> None:
    _write("adapter/adapter_config.json", data)
    config = peft.read_config(folder() / "adapter")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj", "model.mm_projector.0"):
        assert config.rank(module) >= 1 and math.isfinite(config.scaling(module))
        config.targets(module)
    written = strict_json.parse_object(strict_json.dump_object(config.to_dict()), "again.json")
    assert peft.LoraConfig.from_dict(written).to_dict() == config.to_dict()


def config(data: bytes) -> None:
    parsed = LlavaConfig.from_pretrained(_write("config.json", data))
    assert LlavaConfig.from_dict(parsed.to_dict()).to_dict() == parsed.to_dict()
    parsed.core_config()


def preprocessor(data: bytes) -> None:
    _write("processor/preprocessor_config.json", data)
    processor = ImageProcessor.from_pretrained(folder() / "processor")
    if processor.size <= 64:
        assert np.isfinite(processor(np.full((5, 7, 3), 77, np.uint8))).all()


def tokenizer(data: bytes) -> None:
    _use(Tokenizer(_write("tokenizer.model", data)))


def tokenizer_json(data: bytes) -> None:
    if not (folder() / "fast" / "tokenizer_config.json").exists():
        _write("fast/tokenizer_config.json", b'{"eos_token":"</s>","bos_token":"<s>"}')
    _write("fast/tokenizer.json", data)
    _use(load_tokenizer(folder() / "fast"))


def gguf(data: bytes) -> None:
    """Every tensor, the vocabulary, and the settings."""
    file = gguf_container.read(_write("model.gguf", data))
    for name, entry in file.tensors.items():
        assert math.prod(entry.shape) <= 64 * len(data), f"{name}: more values than the file can hold"
        array = file.array(name)
        assert array.shape == entry.shape
        count_nonfinite(array)
    read = gguf_tokenizer.from_gguf(file)
    if read is not None:
        _use(read)
    if "general.architecture" in file.metadata:
        read_config(file)


def tokenizer_config(data: bytes) -> None:
    """The two JSON files beside the model: the first line, and the rest."""
    if not (folder() / "tokenizer" / "tokenizer.model").exists():
        _write("tokenizer/tokenizer.model", TOKENIZER.read_bytes())
    first, _, rest = data.partition(b"\n")
    _write("tokenizer/tokenizer_config.json", first)
    _write("tokenizer/added_tokens.json", rest or b"{}")
    _use(Tokenizer.from_pretrained(folder() / "tokenizer"))


def _use(tokenizer: AnyTokenizer) -> None:
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, parse_special=special)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids, skip_special_tokens=special)


def records(data: bytes) -> None:
    """A list in one file, or lines."""
    path = _write("data.json" if data.startswith(b"[") else "data.jsonl", data)
    if path.suffix == ".jsonl":
        read_jsonl(path, cut_off=True)
    assert all(isinstance(record, dict) for record in read_records(path))


def layouts(data: bytes) -> None:
    """A file of any container and layout, as records and as a benchmark."""
    path = _write("layouts.dat", data)
    assert str(describe(path))
    items = load_benchmark(path, split="all", language="all").items
    assert len({str(item["id"]) for item in items}) == len(items)


def conversation(data: bytes) -> None:
    """A record through a template (first byte) to ids and labels."""
    parsed = strict_json.parse_object(data[1:], "record.json")
    turns = parsed.get("conversations")
    if not isinstance(turns, list):
        return
    names = sorted(conv_templates)
    has_image = parsed.get("image") is not None
    template = conv_templates[names[data[0] % len(names)]]
    switched = draw_switches(len(turns), 0.5, 42, 0, str(parsed.get("id"))) if has_image and len(template.roles) > 2 else set()
    sample = build_sample(turns, template, _tokenizer(), has_image=has_image, switched=switched, max_length=data[0] or None)
    assert len(sample.input_ids) == len(sample.labels) <= (data[0] or len(sample.labels))
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(sample.input_ids, sample.labels, strict=True))
    targets = {i for span in sample.spans for i in range(span.begin, span.end)}
    assert targets == {i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX}


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


def picture(data: bytes) -> None:
    rgb = load_image(data).rgb
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.size
    if rgb.size < 2**20:
        assert np.isfinite(ImageProcessor(size=14)(rgb)).all()


def judge(data: bytes) -> None:
    reply = data.decode("utf-8", "replace")
    scores = parse_scores(reply)
    assert scores == NO_SCORES or all(1 <= score <= 10 for score in scores)
    parse_scores(reply, strict=False)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "strict_json": strict, "safetensors": safetensors, "torch_zip": torch_file, "torch_pickle": torch_program, "index": shard_index,
    "adapter_config": adapter_config, "config": config, "preprocessor": preprocessor, "tokenizer": tokenizer, "tokenizer_config": tokenizer_config,
    "tokenizer_json": tokenizer_json, "gguf": gguf,
    "records": records, "layouts": layouts, "conversation": conversation, "picture": picture, "judge": judge}


def run(name: str, data: bytes) -> str:
    """One input: the name of the documented error it was refused with, or "read"."""
    try:
        TARGETS[name](data)
    except ALLOWED as error:
        assert str(error)
        return type(error).__name__
    return "read"


if __name__ == "__main__":  # python tests/fuzz/parsers.py TARGET FILE...
    for file in sys.argv[2:]:
        print(f"{file}: {run(sys.argv[1], Path(file).read_bytes())}")
