"""Runs that are killed and go on: `python kill_worker.py KIND FOLDER N SEED`, KIND sft, dpo, selftrain or eval; prints one JSON object per line.

Each run is a process of its own, forked from this one, which has imported everything and computed nothing. A run does what a supervised script
does: goes on from the newest complete checkpoint, or begins. It counts events, the calls hooked below, by the phase they happen in, and kills
itself with SIGKILL before or after the event it was told; or its parent kills it at any time. Then it is run again, unharmed, to its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from tiny import TOKENIZER, config, dpo_records, sft_records, write_pictures

import stllava_c
from stllava.checkpoint import atomic
from stllava.checkpoint.peft import LoraConfig
from stllava.data import steps
from stllava.data.dpo import DPODataset
from stllava.data.records import read_jsonl
from stllava.data.sft import SFTDataset
from stllava.demo.base import fresh_weights
from stllava.evaluate import answers, runs
from stllava.evaluate.evaluation import Answers, evaluate
from stllava.evaluate.pictures import ItemPictures
from stllava.evaluate.scoring import Scoring
from stllava.images import ImageProcessor
from stllava.model import LlavaModel
from stllava.selftrain import answer as answering, ask as asking
from stllava.selftrain.judge import judge
from stllava.selftrain.pairs import build_pairs
from stllava.text.tokenizer import Tokenizer
from stllava.train import loop, update
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOObjective, DPOTrainer
from stllava.train.sft import SFTObjective, SFTTrainer

PHASES = {"sft": ("step", "save", "resume", "between", "export"), "dpo": ("step", "save", "resume", "between", "export"),
          "selftrain": ("step", "write", "resume"), "eval": ("step", "write", "resume")}
WEIGHTS = fresh_weights(config(), 0)
PIECES = Tokenizer(str(TOKENIZER))

# ---- events ------------------------------------------------------------------------------------------------------------------

phases = ["between"]
events: Counter[str] = Counter()
target: tuple[str, int] | None = None


def event() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    events[phases[-1]] += 1
    if target == (phases[-1], events[phases[-1]]):
        os.kill(os.getpid(), signal.SIGKILL)


def hook(owner: object, name: str, phase: str | None = None) -> None:
    """The call is two events, before and after; with `phase`, what happens inside it belongs to that."""
    real = getattr(owner, name)

    def hooked(*args, **kwargs):
        phases.append(phase or phases[-1])
        try:
            event()
            result = real(*args, **kwargs)
            event()
            return result
        finally:
            phases.pop()

    setattr(owner, name, hooked)


def hook_all(kind: str) -> None:
    os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has
    if kind == "selftrain":
        hook(asking, "generate", "step")
        hook(answering, "generate", "step")
        hook(LongerIsBetter, "score", "step")
        hook(steps, "read_jsonl", "resume")
        hook(atomic, "system_call", "write")
        return
    if kind == "eval":
        hook(answers, "generate", "step")
        hook(steps, "read_jsonl", "resume")
        hook(runs, "read_jsonl", "resume")
        hook(atomic, "system_call", "write")
        return
    hook(loop, "find_checkpoint", "resume")
    hook(loop, "resume_checkpoint", "resume")
    hook(loop, "save_checkpoint", "save")
    hook(loop, "rotate", "save")
    hook(update.Updater, "gradients", "step")
    hook(update.Updater, "apply", "step")
    hook(SFTObjective if kind == "sft" else DPOObjective, "step")
    hook(update.stllava_c, "adamw_step")
    hook(loop.Trainer, "save_model", "export")
    hook(atomic, "system_call")


# ---- runs --------------------------------------------------------------------------------------------------------------------


def model_for(dropout: float) -> LlavaModel:
    model = LlavaModel(config(), dict(WEIGHTS), tokenizer=PIECES, image_processor=ImageProcessor(size=28, aspect="pad"))
    if dropout:
        model.add_lora(LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout), "llm")
        model.add_lora(LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout), "vit")
    return model


def train(kind: str, images: Path, out: Path) -> None:
    model = model_for(dropout=0.2)
    names = sorted(path.name for path in images.iterdir())
    settings = {"max_steps": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "warmup_steps": 1,
                "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 3, "disable_tqdm": True,
                "resume_from_checkpoint": "auto"}
    common = {"image_folder": images, "tokens_per_image": model.core.tokens_per_image}
    if kind == "sft":
        data = SFTDataset(sft_records(names), model.tokenizer, model.image_processor, sq_r=0.5, **common)
        trainer = SFTTrainer(model, SFTConfig(str(out), eval_strategy="steps", eval_steps=3, **settings), data, data)
    else:
        data = DPODataset(dpo_records(names), model.tokenizer, model.image_processor, **common)
        trainer = DPOTrainer(model, DPOConfig(str(out), disable_dropout=False, **settings), data)
    trainer.train()
    trainer.save_model()


class LongerIsBetter:
    def score(self, image_id: str, question: str, answer_1: str, answer_2: str) -> tuple[float, float, str]:
        scores = [1.0 + len(text) % 9 for text in (answer_1, answer_2)]
        return *scores, f"{scores[0]} {scores[1]}"


def selftrain(images: Path, out: Path) -> None:
    atomic.make_directory(out)
    model = model_for(dropout=0)
    pictures = [(path.name, str(path)) for path in sorted(images.iterdir())]
    asked = asking.ask(model, pictures, asking.AskSettings(n_questions=2, max_new_tokens=4, description_max_new_tokens=3, batch_size=2),
                       out=out / "asked.jsonl", progress=False)
    answering.answer(model, asked, lambda name: str(images / name), answering.AnswerSettings(max_new_tokens=3, batch_size=3),
                     out=out / "answered.jsonl", progress=False)
    judge(read_jsonl(out / "answered.jsonl"), LongerIsBetter(), out=out / "judged.jsonl", progress=False)
    pairs, dropped = build_pairs(read_jsonl(out / "judged.jsonl"), str)
    atomic.write_bytes(out / "pairs.json", json.dumps([pairs, dropped]).encode())


def evaluation(images: Path, out: Path) -> None:
    """Two parts, the whole, baselines, every report."""
    items = [{"id": f"{path.stem}-{i}", "image": path.name, "answer_type": kind, "modality": path.stem,
              "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
             for i, (kind, question, answer) in enumerate((("OPEN", "What is it?\n<image>", "a thing"), ("CLOSED", "Is it large?\n<image>", "no")))
             for path in sorted(images.iterdir())]
    pictures = ItemPictures(items, images)
    common = {"model": model_for(dropout=0), "model_id": "tiny", "template": "v1", "questions": answers.read_questions(items), "image_of": pictures,
              "identity": {"pictures": pictures.digest()}, "settings": {"max_new_tokens": 3}, "folder": out, "batch_size": 2, "progress": False}
    for chunk in range(2):
        runs.AnswerRun(n_chunks=3, chunk=chunk, **common).answers()
    whole = runs.AnswerRun(**common)
    rows = {baseline: whole.answers(baseline) for baseline in (None, "no_image", "shuffled_image")}
    found = evaluate(items, Answers("tiny", rows.pop(None)), Scoring(n_resamples=50), baselines=[Answers(name, some) for name, some in rows.items()])
    runs.write_evaluation(found, out, {}, [path for name in (None, *rows) if (path := whole.path(name)) is not None], pictures)


def run(kind: str, images: Path, out: Path) -> None:
    hook_all(kind)
    if kind in ("sft", "dpo"):
        train(kind, images, out)
    else:
        {"selftrain": selftrain, "eval": evaluation}[kind](images, out)


def start(kind: str, images: Path, out: Path, point: tuple[str, int] | None = None) -> int:
    """Process number of a new run; at its end it leaves its event counts beside `out`."""
    pid = os.fork()
    if pid:
        return pid
    global target
    target = point
    try:
        run(kind, images, out)
        out.with_suffix(".events").write_text(json.dumps(events))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(pid: int) -> bool:
    """True: it came to its end; False: it was killed. Anything else ends us."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"a run ended with code {code}")
    return code == 0


def files_of(root: Path) -> dict[str, str]:
    """Everything there, hidden files too: path -> sha256."""
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix != ".events"}


def main() -> None:
    kind, folder, n, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    images = folder / "images"
    images.mkdir(parents=True)
    write_pictures(images, 5)
    stllava_c.set_num_threads(1)

    def counted(root: Path) -> Counter[str]:
        assert finish(start(kind, images, root / "out"))
        return Counter(json.loads((root / "out.events").read_text()))

    started = time.monotonic()
    whole = counted(folder / "whole")
    seconds = time.monotonic() - started
    want = files_of(folder / "whole")
    late = ("step", whole["step"] * 3 // 4)  # after the first checkpoint, before the last
    finish(start(kind, images, folder / "probe" / "out", late))
    resumed = counted(folder / "probe")
    draw = random.Random(seed)
    for i in range(n):
        root = folder / "broken"
        shutil.rmtree(root, ignore_errors=True)
        phase = (*PHASES[kind], "time")[i % (len(PHASES[kind]) + 1)]
        if phase == "time":
            chain = [("time", draw.uniform(0, seconds)) for _ in range(2)]
        elif phase == "resume":
            chain = [late, (phase, draw.randint(1, resumed[phase]))]
        else:
            chain = [(phase, draw.randint(1, whole[phase]))]
        killed = 0
        for what, where in chain:
            pid = start(kind, images, root / "out", None if what == "time" else (what, where))
            if what == "time":
                time.sleep(where)
                os.kill(pid, signal.SIGKILL)
            killed += not finish(pid)
        assert finish(start(kind, images, root / "out"))
        found = files_of(root)
        different = sorted(name for name in want.keys() | found.keys() if want.get(name) != found.get(name))
        print(json.dumps({"chain": chain, "killed": killed, "different": different}), flush=True)


if __name__ == "__main__":
    main()
