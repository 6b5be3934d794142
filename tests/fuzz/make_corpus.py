"""Writes the seed corpus: `python tests/fuzz/make_corpus.py`. Every input is made here, from numbers; what a search finds is added by hand, as a file
named after what it broke. Few and small: a search mutates, it needs the words of each format and not its size.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from stllava.checkpoint import gguf_container, safetensors_file, strict_json, torch_pickle, torch_zip
from stllava.checkpoint.peft import LoraConfig
from stllava.config import LlavaConfig

CORPUS = Path(__file__).parent / "corpus"
TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.uint16), "c": np.float64(1.5).reshape(())}


def proto(field: int, value: bytes | int | float) -> bytes:
    """One field of a protocol buffer (numbers below 128 only)."""
    kind = {bytes: 2, int: 0, float: 5}[type(value)]
    key = field << 3 | kind
    tag = bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
    if isinstance(value, float):
        return tag + struct.pack("<f", value)
    return tag + (bytes([value]) if isinstance(value, int) else bytes([len(value)]) + value)


def sentencepiece(byte_pieces: bool, kind: int) -> bytes:
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)] + [(f"<0x{i:02X}>", 6) for i in range(256) if byte_pieces] + \
             [(piece, 1) for piece in ("\u2581", "e", "s", "Y", "I", "t", "i", "\u2581I", "es", "\u2581i", "\u2581it", "a", "r", "g", "l", "?", ".")]
    model = b"".join(proto(1, proto(1, piece.encode()) + proto(2, -float(i)) + proto(3, type_)) for i, (piece, type_) in enumerate(pieces))
    return model + proto(2, proto(3, kind) + proto(35, int(byte_pieces))) + proto(3, proto(1, b"identity") + proto(3, 1) + proto(4, 0) + proto(5, 1))


def pictures() -> dict[str, bytes]:
    colour = Image.fromarray((np.arange(3 * 4 * 3) * 7 % 256).astype(np.uint8).reshape(3, 4, 3))
    grey, alpha = colour.convert("L"), colour.convert("RGBA")
    alpha.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6

    def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    return {"rgb.png": encoded(colour, "PNG"), "grey.png": encoded(grey, "PNG"), "alpha.png": encoded(alpha, "PNG"),
            "palette.png": encoded(colour.quantize(4), "PNG"), "clear.png": encoded(colour.quantize(4), "PNG", transparency=1),
            "bits.png": encoded(colour.convert("1"), "PNG"), "deep.png": encoded(grey.convert("I;16"), "PNG"),
            "turned.png": encoded(colour, "PNG", exif=exif), "rgb.bmp": encoded(colour, "BMP"), "grey.bmp": encoded(grey.quantize(4), "BMP"),
            "grey.jpg": encoded(grey, "JPEG", quality=10), "rgb.gif": encoded(colour, "GIF"), "rgb.tif": encoded(colour, "TIFF", compression="packbits"),
            "rgb.webp": encoded(colour, "WEBP", quality=1)}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def records() -> list[dict[str, object]]:
    return [{"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "A cell.", "Large?", "Yes.")},
            {"id": 2, "conversations": turns("Hello?", "Good day. \u2603")}]


def layouts() -> dict[str, bytes]:
    rows = [{"img_id": "test_0001", "sent": "Is it?", "label": {"yes": 1, "no": 0.5}, "question_id": 7, "question_type": "is", "answer_type": "yes/no"}]
    slake = {"img_name": "xmlab1/source.jpg", "question": "Which?", "answer": 2, "q_lang": "en", "qid": 3, "answer_type": "OPEN ", "location": "Lung"}
    trl = {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}], "chosen": "a", "rejected": "b", "images": ["a.png"]}
    messages = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "image": "a.png"}
    asked = b"".join(json.dumps({"question_id": i, "image": "a.png", "prompt": ["Q"]}).encode() + b",\n" for i in range(2))
    return {"python2.pkl": b"(lp0\n(dp1\nS'image'\np2\nS'test_0001'\np3\nsS'question'\nVIs it?\nsS'answer'\nF1.5\nsa.",
            **{f"protocol{n}.pkl": pickle.dumps(rows, n) for n in (0, 1, 2, 4)}, "slake.json": json.dumps([slake, slake]).encode(), "trl.json": json.dumps(trl).encode(),
            "messages.json": json.dumps(messages).encode(), "asked.json": asked}


def shard_maps() -> dict[str, object]:
    good = {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}
    return {"good": {"metadata": {"total_size": 24}, "weight_map": good}, "missing": {"weight_map": good | {"w": "c.safetensors"}},
            "outside": {"weight_map": {"x": "../a.safetensors"}}, "nothing": {"weight_map": {}}, "kind": {"weight_map": {"x": ["a.safetensors"]}}}


def model_configs() -> dict[str, object]:
    llama = {"model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    tower = {"model_type": "clip_vision_model", "image_size": 14, "patch_size": 7, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    llava = llama | {"model_type": "llava", "mm_vision_tower": "tower", "mm_hidden_size": 8, "mm_projector_type": "cluster", "num_latents": 2,
                     "mm_vision_config": tower, "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    return {"llama": llama, "llava": llava, "mlp": llava | {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "cls_patch"},
            "mistral": llama | {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 8},
            "new": llama | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "scaled": llama | {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "hf": {"model_type": "llava", "text_config": llama, "vision_config": tower, "image_token_index": 22, "vision_feature_layer": -2,
                   "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu"},
            "full": LlavaConfig.from_dict(llava).to_dict()}


def core_config(parts: int, vision: tuple[int, ...], projector: tuple[int, ...], decoder: tuple[int, ...]) -> bytes:
    """The bytes that fuzz_config_core.c reads; every number is small."""
    eps, theta = 1, 160
    return bytes([parts, *vision[:6], vision[6], eps, vision[7] & 255, *projector, *decoder, eps, theta]) + bytes([2, 4, 0, 1, 4, 1])


def core_configs() -> dict[str, bytes]:
    tower, decoder = (8, 4, 4, 2, 2, 4, 1, -2), (23, 6, 1, 2, 1, 2, 8, 5)
    return {"cluster": core_config(7, tower, (3, 4, 6, 0, 2, 2), decoder), "mlp": core_config(15, tower, (2, 4, 6, 2, 0, 0), decoder),
            "linear": core_config(23, tower, (1, 4, 6, 0, 0, 0), decoder), "decoder": core_config(4, (0,) * 8, (0,) * 6, decoder),
            "tower": core_config(1, tower, (0,) * 6, (0,) * 8), "heads": core_config(4, (0,) * 8, (0,) * 6, (23, 6, 1, 2, 3, 2, 8, 0)),
            "huge": core_config(4, (0,) * 8, (0,) * 6, decoder)[:-12] + b"\xff" * 40}


def core_trees() -> dict[str, bytes]:
    """The bytes that fuzz_batch.c reads: segments, flags, then each segment's parent, sample, length and tokens (id, label)."""
    picture, nothing = 200, 200
    root, left, right = bytes([0, 7, 3, 5, nothing, picture, 0, 6, 6]), bytes([60, 7, 2, 3, nothing, 9, 9]), bytes([60, 8, 1, 4, 4])
    return {"one": bytes([1, 0]) + root + bytes([1]), "tree": bytes([3, 0]) + root + left + right + bytes([1]), "two": bytes([2, 0]) + root + root + bytes([2]),
            "prompt": bytes([3, 4]) + root + left + right + bytes([1]), "empty": bytes([0, 0]), "begin": bytes([3, 1]) + root + left + right + bytes([1, 9, 1]),
            "no_image": bytes([1, 32]) + root + bytes([0, 1])}


def fast_tokenizers() -> dict[str, object]:
    special = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "\u0120", "I", "s", "i", "t", "Is", "\u2581I", "\u2581Is", "a", "x"]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
             "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [["\u2581", "I"], ["\u2581I", "s"], ["I", "s"]]}
    shared = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None, "post_processor": None, "model": model}
    begin = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    words = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                   {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    decoder = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                                                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    return {"words": shared | {"pre_tokenizer": words, "decoder": words["pretokenizers"][1]},
            "prepend": shared | {"normalizer": prepend, "pre_tokenizer": None, "decoder": decoder, "post_processor": begin},
            "first": shared | {"pre_tokenizer": first, "decoder": decoder}}


def gguf_files(scratch: Path) -> dict[str, bytes]:
    settings = {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 8, "llama.embedding_length": 4, "llama.feed_forward_length": 4,
                "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4}
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "I", "s", "Is", "\u2581I"]
    own = {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1, 1], np.int32), "tokenizer.ggml.eos_token_id": 2,
           "tokenizer.ggml.bos_token_id": 1}
    weights = {"token_embd.weight": np.ones((9, 4), np.float32), "output_norm.weight": np.ones(4, np.float16)}
    files = {}
    for name, keys in {"llama": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": -np.arange(9, dtype=np.float32)},
                       "gpt2": {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": ["I s", "\u2581 I"]}}.items():
        gguf_container.write(scratch, settings | own | keys, weights)
        files[name] = scratch.read_bytes()
    scratch.unlink()
    for name, kind, n_values, n_bytes in (("q8_0", 8, 32, 34), ("q4_k", 12, 256, 144), ("iq2_xxs", 16, 256, 66)):
        table = b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, n_values, kind, 0)
        files[name] = table.ljust(64, b"\0") + bytes(range(n_bytes))
    return files


def inputs() -> Iterator[tuple[str, str, bytes]]:
    """(target, file, content)"""
    def as_json(target: str, values: dict[str, object]) -> Iterator[tuple[str, str, bytes]]:
        for name, value in values.items():
            yield target, f"{name}.json", json.dumps(value, separators=(",", ":")).encode()

    texts = {"empty": "{}", "all": '{"a":[1,-2.5e3,true,null,"\\u00e9\\n"],"b":{"c":{}}}', "twice": '{"a":1,"a":2}', "nan": '{"a":NaN}', "large": '{"a":1e999}',
             "surrogate": '{"\\ud800":"\\ud83d\\ude00"}', "deep": '{"a":' + "[" * 70 + "]" * 70 + "}", "long": '{"a":' + "9" * 400 + "}"}
    for name, text in texts.items():
        yield "strict_json", f"{name}.json", text.encode()
    scratch = CORPUS.parent / "corpus" / "scratch"
    safetensors_file.write(scratch, TENSORS, {"format": "pt"})
    weights = scratch.read_bytes()
    yield "safetensors", "good.safetensors", weights
    yield "safetensors", "short.safetensors", weights[:-1]
    yield "safetensors", "nothing.safetensors", struct.pack("<Q", 2) + b"{}"
    yield "safetensors", "overlap.safetensors", weights.replace(b"[8,32]", b"[4,28]")
    torch_zip.save(scratch, {"a": TENSORS["a.weight"]})
    yield "torch_zip", "good.bin", scratch.read_bytes()
    scratch.unlink()
    yield "torch_pickle", "good.pkl", torch_pickle.dump(TENSORS)
    yield "torch_pickle", "ordered.pkl", b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00aq\x02K\x01X\x01\x00\x00\x00bh\x02u}b."
    yield "torch_pickle", "memo.pkl", b"\x80\x02}q\x00(h\x00r\x01\x00\x00\x00j\x01\x00\x00\x00\x85\x86N\x88\x89K\x01M\x02\x00\x8a\x01\x05tu."
    yield from as_json("index", shard_maps())
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=frozenset({"q_proj", "down_proj"}), rank_pattern={"down_proj": 1})
    yield "adapter_config", "good.json", strict_json.dump_object(lora.to_dict())
    yield from as_json("adapter_config", {"rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
                                          "expression": {"r": 8, "target_modules": "(a|b)+"}, "dora": {"r": 8, "use_dora": True},
                                          "pattern": {"r": 8, "target_modules": ["v_proj"], "alpha_pattern": {"layers\\.0\\.v_proj": 3}},
                                          "look": {"r": 8, "target_modules": "^(?!.*vision)(?:.*)[qv]_proj{1,2}", "exclude_modules": "(?<=a)\\d+?$"},
                                          "saved": {"r": 8, "target_modules": "all-linear", "modules_to_save": ["lm_head"], "exclude_modules": ["o_proj"],
                                                    "rank_pattern": {"^model\\.layers\\.[0-9]+\\.mlp.*": 2}}})
    yield from as_json("config", model_configs())
    yield from as_json("preprocessor", {"clip": {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}, "do_resize": True, "resample": 3,
                                                 "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25], "rescale_factor": 1 / 255},
                                        "old": {"size": 14, "crop_size": 14, "do_center_crop": True}, "crop": {"size": 14, "do_center_crop": False}})
    for name, arguments in {"bytes": (True, 2), "small": (False, 2), "unigram": (False, 1)}.items():
        yield "tokenizer", f"{name}.model", sentencepiece(*arguments)
    for name, text in {"legacy": '{"legacy":true,"model_max_length":2048}\n{"<pad>":300,"<im_start>":301}', "new": '{"legacy":false,"add_bos_token":true}',
                       "eos": '{"add_eos_token":true}', "longest": '{"model_max_length":1e30}\n{"":1}'}.items():
        yield "tokenizer_config", f"{name}.txt", text.encode()
    yield from as_json("tokenizer_json", fast_tokenizers())
    for name, data in gguf_files(scratch).items():
        yield "gguf", f"{name}.gguf", data
    lines = [json.dumps(record).encode() for record in records()]
    yield "records", "lines.jsonl", b"\n".join([*lines, b"", b"  "])
    yield "records", "list.json", b"[" + b",".join(lines) + b"]"
    yield "records", "cut.jsonl", lines[0] + b"\n" + lines[1][:20]
    for name, data in layouts().items():
        yield "layouts", name, data
    for template in range(0, 14, 2):
        yield "conversation", f"template{template}.txt", bytes([template + 112]) + json.dumps(records()[template // 2 % 2], separators=(",", ":")).encode()
    yield "conversation", "forged.txt", b"\x70" + json.dumps({"conversations": turns("USER: <s></s>ASSISTANT: ", "[/INST]</s>")}).encode()
    for name, data in pictures().items():
        yield "picture", name, data
        if name.endswith((".png", ".bmp", ".jpg")):
            yield "image", name, bytes([13, 3, 10, 20, 30]) + data
    for name, text in {"two": "8 7\nbecause", "comma": "8.5, 10", "nan": "nan 3", "high": "11 1", "words": "Answer 1: 8"}.items():
        yield "judge", f"{name}.txt", text.encode()
    for target, built in (("config_core", core_configs()), ("batch", core_trees())):
        for name, data in built.items():
            yield target, f"{name}.bin", data


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for target, file, content in inputs():
        (CORPUS / target).mkdir(exist_ok=True)
        (CORPUS / target / file).write_bytes(content)
    print(sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()), "bytes")
