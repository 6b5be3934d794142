"""`stllava check-data` on 100,000 instruction rows over 15,000 image files. `bench_check_data.py`

There is no peer: no trainer looks at its data before it trains. The bars are 120 s and 1 GiB on two cores; the memory is that of all processes together.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from cases import BUILD
from harness import HERE, OURS, Row, main, make_row
from PIL import Image

N_ROWS, N_IMAGES, THREADS = 100_000, 15_000, 2
FOLDER = BUILD / "check_data"
TOKENIZER = HERE.parent / "tests" / "parity" / "goldens" / "templates" / "tokenizer.model"
TEXT = """the image shows a chest radiograph with an opacity in the left lower lobe consistent with pneumonia no pleural effusion is seen heart size normal
and there are mild degenerative changes of thoracic spine what where is this which side patient lesion boundary contrast"""
PER_ROW = (12, 40, 12, 40)  # words of the turns: LLaVA-Med's instruction data has about as many


def make_data() -> None:
    """Files that differ in every row and every image; written once."""
    if (FOLDER / "done").exists():
        return
    rng = np.random.default_rng(0)
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    for i in range(N_IMAGES):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((224, 224)).save(FOLDER / "images" / f"{i}.jpg", quality=80)
    rows, known = [], TEXT.split()
    for i in range(N_ROWS):
        words = [known[k] for k in rng.integers(0, len(known), sum(PER_ROW))]
        texts = [" ".join(words[a:b]) for a, b in pairwise(np.cumsum((0, *PER_ROW)))]
        turns = [{"from": ("human", "gpt")[k % 2], "value": f"<image>\n{text} {i}" if k == 0 else text} for k, text in enumerate(texts)]
        rows.append({"id": f"row {i}", "image": f"{i % N_IMAGES}.jpg", "conversations": turns})
    (FOLDER / "data.json").write_text(json.dumps(rows))
    (FOLDER / "done").touch()


def make_model() -> Path:
    """A small model with LLaVA's tokenizer, whose image stands on 576 rows."""
    from stllava.config import LlavaConfig
    from stllava.demo.base import fresh_weights
    from stllava.images import ImageProcessor
    from stllava.model import LlavaModel
    from stllava.text.tokenizer import Tokenizer
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 64}
    config = LlavaConfig.from_dict({"model_type": "llava", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                                    "num_attention_heads": 4, "mm_vision_tower": "small", "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu",
                                    "mm_vision_config": vision})
    folder = FOLDER / "model"
    LlavaModel(config, fresh_weights(config, 0), tokenizer=Tokenizer(TOKENIZER), image_processor=ImageProcessor(size=336)).save_pretrained(folder)
    return folder


def tree_bytes(pid: int) -> int:
    """Memory of a process and all below it, shared pages counted once (PSS)."""
    total, stack = 0, [pid]
    while stack:
        process = Path("/proc", str(stack.pop()))
        try:
            stack += [int(child) for task in (process / "task").iterdir() for child in (task / "children").read_text().split()]
            total += next(int(line.split()[1]) * 1024 for line in (process / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue  # it has ended meanwhile
    return total


def check_data() -> Iterator[Row]:
    make_data()
    command = [*OURS, "-m", "stllava", "check-data", str(FOLDER / "data.json"), "--image_folder", str(FOLDER / "images"), "--model_name_or_path",
               str(make_model()), "--lora_enable", "--html", str(FOLDER / "page.html"), "--jsonl", str(FOLDER / "findings.jsonl")]
    cores = sorted(os.sched_getaffinity(0))[-THREADS:]
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores)) as process:  # noqa: PLW1509 - before there are threads
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(0.2)
    if process.returncode != 0:
        raise SystemExit(f"check-data ended with {process.returncode}, but there is nothing wrong with the data")
    seconds, used, case = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN), f"{N_ROWS} rows, {N_IMAGES} images, headers only"
    yield make_row("check_data", case, seconds, None, None, "s", dtype="", threads=THREADS)
    yield make_row("check_data_cpu", "of it CPU time, all processes together", used.ru_utime + used.ru_stime, None, None, "s", dtype="", threads=THREADS)
    yield make_row("check_data_memory", case, peak / 1e9, None, None, "GB", dtype="", threads=THREADS)


if __name__ == "__main__":
    main("check_data", {"check_data": check_data})
