"""The file formats under attack: valid seed files, and the public call that reads each one.

A reader gets the path of the damaged file and returns what it read as a comparable value, after checking what a right result must be: declared
shapes, finite values, agreement with an independent reader where there is one. `python tests/hostile/formats.py FORMAT CASE` replays one case.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "python")]
import mutate
import published
import scans
import tiny
from pydicom.data import get_testdata_file

from stllava.checkpoint import atomic, gguf_container
from stllava.checkpoint.directory import Checkpoint
from stllava.checkpoint.gguf_file import write_gguf
from stllava.checkpoint.peft import LoraConfig
from stllava.data.archives import Archive
from stllava.data.benchmarks import load_benchmark
from stllava.data.dpo import DPODataset
from stllava.data.formats import describe, load
from stllava.data.image_store import ImageStore
from stllava.data.sft import SFTDataset
from stllava.demo.base import fresh_weights
from stllava.images import ImageError, ImageProcessor, image_size, load_image
from stllava.model import LlavaModel
from stllava.text import AnyTokenizer, load_tokenizer
from stllava.text.tokenizer import Tokenizer

RECORDED = Path(__file__).parents[1] / "python" / "recorded"
VISION = tiny.VISION | {"image_size": 14, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@dataclass
class Format:
    """kind: how `mutate` sees the file. files: path the variant is written to -> valid content. read: path -> value."""

    kind: str
    files: dict[Path, bytes]
    read: Callable[[Path], Any]


def small_model(**changes: Any) -> LlavaModel:
    config = tiny.config(24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
                         mm_hidden_size=8, num_latents=2, mm_vision_config=VISION, **changes)
    return LlavaModel(config, fresh_weights(config, 0), image_processor=ImageProcessor(size=14))


def small_tokenizer(n_pieces: int = 600) -> bytes:
    """The first pieces of the recorded tokenizer: control, bytes, and the shortest words."""
    pieces, single, settings = _recorded_tokenizer()
    return mutate.join_fields(pieces[:n_pieces] + single[:100] + settings)


@functools.cache
def _recorded_tokenizer() -> tuple[list[mutate.Field], list[mutate.Field], list[mutate.Field]]:
    """Pieces, those of one character, everything else."""
    fields = mutate.split_fields(tiny.TOKENIZER.read_bytes())
    pieces = [field for field in fields if field[0] == 1]
    single = [field for field in pieces[259:] if len(mutate.split_fields(field[2])[0][2].decode()) == 1]
    return pieces, single, [field for field in fields if field[0] != 1]


# ---- what is read, as a value ----------------------------------------------------------------------------------------------


def digest(*arrays: np.ndarray) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _model(directory: Path, **options: Any) -> str:
    """Reads a directory, and computes with it."""
    model = LlavaModel.from_pretrained(directory, **options)
    tensors = dict(model.named_parameters())
    for name, info in model.tensor_infos().items():
        if info.bound:
            assert tensors[name].shape == tuple(info.shape) and np.isfinite(tensors[name]).all(), name
    logits = model.logits([1, 2, 3])
    assert logits.shape == (3, model.config.vocab_size)
    return digest(*tensors.values(), logits)


def _safetensors(path: Path) -> str:
    import safetensors.numpy
    value = _model(path.parent)
    assert set(safetensors.numpy.load_file(path)) >= {"model.norm.weight"}  # the reference implementation accepts it too
    return value


def _tokenizer(path: Path) -> Any:
    return _encoded(load_tokenizer(path.parent))


def _encoded(tokenizer: AnyTokenizer) -> Any:
    texts = ["Is it large? Yes.", " a  b\n\tc", "<image></s><s>", "\N{SNOWMAN}\N{GRINNING FACE}", "x" * 50]
    ids = [tokenizer.encode(text, parse_special=special) for text in texts for special in (True, False)]
    assert all(0 <= i < tokenizer.vocab_size for row in ids for i in row)
    return ids, [tokenizer.decode(row, skip) for row in ids for skip in (True, False)]


def _gguf(path: Path) -> Any:
    """Reads a file, with the tower that lies beside it, and computes and encodes with it."""
    model = LlavaModel.from_pretrained(path, vision_tower=path.with_name("mmproj.gguf"))
    logits = model.logits([1, -200, 3], [np.zeros((3, 14, 14), np.float32)])
    return digest(*(array for _, array in model.named_parameters()), logits), _encoded(model.tokenizer) if model.has_tokenizer else None


def _picture(path: Path) -> str:
    loaded = load_image(path)
    rgb = loaded.rgb
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.size
    if not loaded.notes:  # nothing was done to it, so it is what Pillow alone reads
        try:
            with Image.open(path) as image:
                other = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # the two things the core is laxer in, see stllava.images
            assert path.suffix == ".png" and ("broken data stream" in str(error) or "Truncated" in str(error) or "identify" in str(error)), error
        else:
            np.testing.assert_array_equal(rgb, other)
    pixels = ImageProcessor(size=28)(path)
    assert pixels.shape == (3, 28, 28) and np.isfinite(pixels).all()
    return digest(rgb, pixels)


def _scan(path: Path) -> Any:
    """The default picture, the first one, and the size from the header, of which an oracle says what it must be."""
    size, loaded = image_size(path), load_image(path)
    assert loaded.rgb.dtype == np.uint8 and loaded.rgb.shape == (size[1], size[0], 3)
    first = load_image(f"{path}#{'frame' if path.suffix == '.dcm' else 'slice'}=0")
    assert first.rgb.shape[2] == 3 and first.rgb.size
    return digest(loaded.rgb, first.rgb), loaded.notes


def _archive(path: Path) -> Any:
    """Every member that is there. Through a store, so that what an archive says is an error of pictures."""
    store = ImageStore(path.parent)
    found = {}
    for member in (*Archive(path).names(), "no.png"):
        try:
            found[member] = hashlib.sha256(store.read(f"{path.name}/{member}")).hexdigest()
        except ImageError as error:
            found[member] = str(error)
    return found


def _scans(kind: str) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(-500, 500, (3, 20, 24)).astype(np.int16), rng.integers(0, 256, (1, 20, 24, 3), dtype=np.uint8)
    if kind == "dicom":
        real = {name: Path(str(get_testdata_file(name, download=False))).read_bytes() for name in ("MR_small_jp2klossless.dcm", "MR_small_RLE.dcm", "SC_rgb_jls_lossy_line.dcm",
                                                                                                "SC_rgb_small_odd_jpeg.dcm")}
        grey_file = scans.dicom(grey, WindowCenter=[0, 10], WindowWidth=[800, 20], RescaleSlope="1.5", RescaleIntercept=-3, PixelPaddingValue=-500, PatientName="A")
        return real | {"grey.dcm": grey_file, "colour.dcm": scans.dicom(colour), "deflated.dcm": scans.deflated(grey_file)}
    volume = grey.transpose(2, 1, 0)
    return {"v.nii": scans.nifti(volume, np.diag([1, 2, 3, 1]), slope=2.0), "two.nii": scans.nifti(volume, two=True), "v.nii.gz": scans.nifti(np.stack([volume, volume], -1), gzipped=True)}


def _archives(kind: str, folder: Path) -> dict[str, bytes]:
    members = {f"{i}/{name}": data for i, (name, data) in enumerate(_pictures()["png"].items())}
    if kind == "zip":
        return {"a.zip": scans.write_zip(folder / "a.zip", members, zipfile.ZIP_STORED).read_bytes(), "b.zip": scans.write_zip(folder / "b.zip", members).read_bytes()}
    return {f"a.{mode or 'tar'}": scans.write_tar(folder / "a", members, f"w:{mode}").read_bytes() for mode in ("", "gz", "xz", "bz2")}


# ---- the table -------------------------------------------------------------------------------------------------------------


def _pictures() -> dict[str, dict[str, bytes]]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (20, 23, 3), np.uint8)).resize((46, 40))
    grey, alpha = colour.convert("L"), colour.convert("RGBA")
    alpha.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6

    def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    return {
        "jpeg": {"rgb.jpg": encoded(colour, "JPEG"), "grey.jpg": encoded(grey, "JPEG"), "progressive.jpg": encoded(colour, "JPEG", progressive=True),
                 "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"), "turned.jpg": encoded(colour, "JPEG", exif=exif), "plain.jpg": encoded(colour, "JPEG", subsampling=0)},
        "png": {"rgb.png": encoded(colour, "PNG"), "grey.png": encoded(grey, "PNG"), "alpha.png": encoded(alpha, "PNG"), "bits.png": encoded(colour.convert("1"), "PNG"),
                "palette.png": encoded(colour.quantize(16), "PNG", transparency=3), "deep.png": encoded(grey.convert("I;16"), "PNG"), "turned.png": encoded(colour, "PNG", exif=exif)},
        "bmp": {"rgb.bmp": encoded(colour, "BMP"), "grey.bmp": encoded(grey, "BMP"), "bits.bmp": encoded(colour.convert("1"), "BMP"), "palette.bmp": encoded(colour.quantize(16), "BMP")}}


def build(name: str, folder: Path) -> Format:
    """The format's seed files, written to `folder` with everything around them."""
    if name in ("jpeg", "png", "bmp"):
        return Format(name, {folder / file: data for file, data in _pictures()[name].items()}, _picture)
    if name in ("dicom", "nifti"):
        return Format(name, {folder / file: data for file, data in _scans(name).items()}, _scan)
    if name in ("zip", "tar"):
        return Format(name, {folder / file: data for file, data in _archives(name, folder).items()}, _archive)
    if name in ("tokenizer.model", "tokenizer_config", "added_tokens"):
        (folder / "tokenizer.model").write_bytes(small_tokenizer())
        Tokenizer(folder / "tokenizer.model", added_tokens={"<pad>": 701, "<im_start>": 702}).save_pretrained(folder)
        path = folder / (name if name == "tokenizer.model" else name + ".json")
        return Format("proto" if name == "tokenizer.model" else "json", {path: path.read_bytes()}, _tokenizer)
    if name in ("sft", "dpo"):
        return _data(name, folder)
    if name == "tokenizer.json":
        files = {}
        for kind, case in json.loads((RECORDED / "fast_tokenizer.json").read_text())["cases"].items():
            (folder / kind).mkdir()
            (folder / kind / "tokenizer_config.json").write_text(json.dumps(case["config"]))
            files[folder / kind / name] = json.dumps({key: case["tokenizer"][key] for key in sorted(case["tokenizer"], reverse=True)}).encode()
        return Format("json", files, _tokenizer)
    if name in ("layouts", "pickle", "parquet"):
        return _tables(name, folder)
    if name in ("gguf", "mmproj"):
        return _gguf_files(folder, name)
    if name in ("hf_config", "hf_processor"):
        small_model(mm_projector_type="mlp2x_gelu").save_pretrained(folder / "m", layout="hf")
        settings = folder / "m" / "preprocessor_config.json"
        if name == "hf_processor":  # as transformers 5 writes it
            (folder / "m" / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(settings.read_text()), "patch_size": 7}))
            settings.unlink()
        path = folder / "m" / ("config.json" if name == "hf_config" else "processor_config.json")
        return Format("json", {path: path.read_bytes()}, lambda path: _model(path.parent))
    model = small_model()
    if name in ("adapter_config", "adapter_expressions"):
        model.save_pretrained(folder / "base")
        plain = LoraConfig(r=2, lora_alpha=4, target_modules=frozenset({"q_proj", "down_proj"}), rank_pattern={"down_proj": 1})
        expressions = LoraConfig(r=2, lora_alpha=4, target_modules=r"^(?!.*(?:vision|lm_head)).*\.(?:q_proj|down_proj)", exclude_modules=r".*[kv]_proj",
                                 rank_pattern={r"^model\.layers\.\d+\.mlp\.(up|down)_proj": 1}, alpha_pattern={"(q|k)_proj{1,2}": 3})
        model.add_lora(plain if name == "adapter_config" else expressions)
        model.save_pretrained(folder / "adapter")
        path = folder / "adapter" / "adapter_config.json"
        return Format("json", {path: path.read_bytes()}, lambda path: _model(path.parent, model_base=folder / "base"))
    file, form = {"safetensors": ("model.safetensors", "safetensors"), "index": ("model.safetensors.index.json", "safetensors"),
                  "torch": ("pytorch_model.bin", "bin"), "config": ("config.json", "safetensors"), "manifest": ("manifest.json", "safetensors"),
                  "preprocessor": ("preprocessor_config.json", "safetensors")}[name]
    model.save_pretrained(folder / "m", format=form, shard_size=4000 if name == "index" else 10**9)
    path = folder / "m" / file
    if name == "manifest":
        return Format("json", {path: path.read_bytes()}, lambda path: sorted(atomic.verify(path.parent)))
    if name == "preprocessor":
        return Format("json", {path: path.read_bytes()}, lambda path: digest(ImageProcessor.from_pretrained(path.parent)(np.full((20, 30, 3), 77, np.uint8))))
    return Format({"torch": "zip", "safetensors": "safetensors"}.get(name, "json"), {path: path.read_bytes()},
                  _safetensors if name == "safetensors" else lambda path: _model(path.parent))


def _data(name: str, folder: Path) -> Format:
    """Records as a list and as lines; every sample that is accepted is built."""
    names = tiny.write_pictures(folder, 2)
    records = tiny.sft_records(names) if name == "sft" else tiny.dpo_records(names)
    (folder / "tokenizer.model").write_bytes(small_tokenizer())
    tokenizer, processor = Tokenizer(folder / "tokenizer.model"), ImageProcessor(size=28)
    kind = SFTDataset if name == "sft" else DPODataset

    def read(path: Path) -> Any:
        data = kind(path, tokenizer, processor, image_folder=folder, tokens_per_image=16, on_bad_sample="skip")
        items = [data.sequences(i, 1) if isinstance(data, SFTDataset) else data.pair(i, 1) for i in range(len(data))]
        assert all(len(sequence.ids) == len(sequence.labels) for item in items for sequence in item)
        return items, [(problem.row, problem.kind) for problem in data.problems], [digest(data.pixels(key)) for item in items for s in item for key in s.images]

    lines = "\n".join(map(json.dumps, records)).encode()
    return Format("json", {folder / "data.json": json.dumps(records, indent=1).encode(), folder / "data.jsonl": lines}, read)


def _tables(name: str, folder: Path) -> Format:
    """Every published layout of questions and of preferences: as JSON, as PathVQA's pickles, as Parquet with images inside."""
    trl = [{"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}], "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}], "images": ["0.png"]}]
    sets = {"rad": published.vqa_rad_rows(), "slake": published.slake_rows(), "med": published.llava_med_rows(), "questions": published.question_rows(), "trl": trl}
    if name == "layouts":
        files = {folder / f"{key}.json": json.dumps(rows, indent=1).encode() for key, rows in sets.items()}
    elif name == "pickle":
        files = {folder / f"{layout}{protocol}.pkl": pickle.dumps(published.pathvqa_rows("test", layout), protocol) for layout in ("vqa", "qa") for protocol in (0, 2, 4)}
    else:
        tables = {"hub": published.hub_rows(folder / "pictures"), "trl": trl, "slake": sets["slake"]}
        files = {folder / f"{key}.parquet": published.write_parquet(folder / f"{key}.parquet", rows).read_bytes() for key, rows in tables.items()}

    def read(path: Path) -> Any:
        found = load(path)
        assert all(isinstance(record, dict) for record in found.records) and str(describe(path))
        if found.layout is not None and found.layout.kind != "pair":
            items = load_benchmark(path, split="all", language="all").items
            assert all(item["answer_type"] in ("OPEN", "CLOSED") and isinstance(turn["value"], str) for item in items for turn in item["conversations"])
        return repr(found.records), [(problem.row, problem.text) for problem in found.problems]

    return Format("json" if name == "layouts" else name, files, read)


def _gguf_files(folder: Path, name: str) -> Format:
    """Decoder and tower; the decoder also with a byte-level vocabulary and blocks of 8 bits."""
    import gguf
    small = tiny.config(560, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
                        mm_hidden_size=8, mm_projector_type="mlp2x_gelu", mm_vision_config=VISION)
    plain, mmproj, blocks = (folder / file_name for file_name in ("plain.gguf", "mmproj.gguf", "blocks.gguf"))
    write_gguf(plain, Checkpoint(small, fresh_weights(small, 0)), Tokenizer(RECORDED / "small_tokenizer.model"), mmproj=mmproj)
    file = gguf_container.read(plain)
    tokens = ["is", *(f"<{i}>" for i in range(303))] + [chr(0x100 + i) if i < 33 else chr(i) for i in range(256)]
    rewritten = file.metadata | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["i s"]}
    writer = gguf.GGUFWriter(blocks, "llama")
    for key, value in rewritten.items():
        if key not in ("general.architecture", "tokenizer.ggml.scores"):
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_array)
            add(key, value.tolist() if isinstance(value, np.ndarray) else value)
    for key in file.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if file.array(key).ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quantize(file.array(key).astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if name == "mmproj":
        return Format("gguf", {mmproj: mmproj.read_bytes()}, lambda _: _gguf(plain))
    return Format("gguf", {path: path.read_bytes() for path in (plain, blocks)}, _gguf)


FORMATS = ("safetensors", "index", "torch", "adapter_config", "adapter_expressions", "config", "hf_config", "hf_processor", "manifest", "tokenizer.model",
           "tokenizer_config", "added_tokens", "preprocessor", "sft", "dpo", "layouts", "pickle", "parquet", "jpeg", "png", "bmp", "dicom", "nifti", "zip", "tar",
           "gguf", "mmproj", "tokenizer.json")


def variant(name: str, format_: Format, case: int) -> tuple[Path, bytes]:
    """File `case` of a format: where it goes, and its bytes."""
    rng = random.Random(f"{name}/{case}")
    path = sorted(format_.files)[case % len(format_.files)]
    return path, mutate.mutate(format_.kind, format_.files[path], rng)


if __name__ == "__main__":
    chosen, number = sys.argv[1], int(sys.argv[2])
    work = Path(tempfile.mkdtemp())
    try:
        built = build(chosen, work)
        target, content = variant(chosen, built, number)
        target.write_bytes(content)
        print(f"{target.name}: {len(content)} bytes: {content[:300]!r}", file=sys.stderr)
        if os.environ.get("KEEP"):
            shutil.copy(target, os.environ["KEEP"])
        print(built.read(target))
    finally:
        shutil.rmtree(work)
