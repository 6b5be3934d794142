"""The whole method in one call: data, stage 1, self-training, stage 2, and an evaluation before, between and after.

    out/data/            atlas VQA (atlas.py)                    out/sft/, out/dpo/    training logs
    out/self_training/   questions, answers, judged, pairs       out/model/            the final model, adapters merged
    out/results.json     every number                            out/report.html      one page, needs nothing else

Rates and update counts were chosen on the validation split (`split="val"`), never on the test images. Every number is computed in the run; the
same seed gives the same `table_sha256`, whatever the number of threads.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import stllava_c
from stllava import __version__
from stllava.checkpoint.atomic import make_directory, remove_directory, write_bytes
from stllava.checkpoint.lock import run_lock
from stllava.checkpoint.peft import LoraConfig
from stllava.data.dpo import DPODataset
from stllava.data.pictures import Pictures
from stllava.data.sft import SFTDataset, summary as count_problems
from stllava.data.steps import item_seed
from stllava.errors import StllavaError
from stllava.evaluate import paired_bootstrap
from stllava.model import LlavaModel
from stllava.selftrain.answer import AnswerSettings, answer
from stllava.selftrain.ask import AskSettings, ask
from stllava.selftrain.judge import judge
from stllava.selftrain.pairs import PairSettings, build_pairs
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOTrainer
from stllava.train.sft import SFTTrainer

from . import atlas
from .base import base_model_path
from .baselines import MAX_NEW_TOKENS, Scores, answer_greedily, majority_answers, no_image_answers, other_images, score
from .judge_rules import RuleJudge, classify
from .report import Samples, write_report
from .summary import bars, print_summary, table_sha256

__all__ = ["FULL", "QUICK", "Settings", "run"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and rates of a run; written into results.json."""

    n_sft: int = 600
    n_unlabelled: int = 1000
    n_val: int = 150
    n_test: int = 300
    lora_r: int = 32
    lora_alpha: int = 64
    sft_steps: int = 240
    sft_batch: int = 16
    sft_lr: float = 1e-3
    sq_r: float = 0.5
    n_questions: int = 8
    n_answers: int = 8
    heldout_share: float = 0.15
    dpo_steps: int = 72
    dpo_batch: int = 32
    dpo_lr: float = 1e-4
    beta: float = 0.1


FULL = Settings()
QUICK = Settings(n_sft=60, n_unlabelled=100, n_val=15, n_test=30, sft_steps=24, dpo_steps=7)


class Clock:
    """Seconds of every stage, by name, in the order they ran."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        self.console.print(f"[bold]{title}")
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


@dataclass(slots=True)
class SelfTraining:
    """`row`: the numbers of results.json. `judged`: every question with its answers and scores; `descriptions`: by image."""

    row: dict[str, Any]
    n_distinct: int
    descriptions: dict[str, str]
    judged: list[dict[str, Any]]
    train: DPODataset
    heldout: DPODataset


def run(out: Path, *, seed: int = 0, num_threads: int = 0, quick: bool = False, base: Path | None = None, split: str = "test",
        settings: Settings | None = None) -> dict[str, Any]:
    """Runs the demo and returns what it writes to out/results.json (schema: README).

    Args:
        out: directory, made if missing; the pictures' wheels are kept beside it. num_threads: 0 = one per core.
        quick: the same path on a tenth of the data. base: model to start from; default the committed one.
        split: "test", or "val" to choose settings on. settings: default FULL or QUICK.

    Raises:
        StllavaError: the demo extra is not installed. SourceError, OSError: pictures cannot be fetched, files cannot be written.
        LockedError: another demo writes into `out`.
    """
    _require_extra("matplotlib", "jinja2")
    if split not in ("test", "val"):
        raise ValueError(f"split is {split!r}, want 'test' or 'val'")
    if num_threads > 0:
        stllava_c.set_num_threads(num_threads)
    settings = settings or (QUICK if quick else FULL)
    with run_lock(make_directory(out)):
        return _run(out, seed, quick, base, split, settings)


def _run(out: Path, seed: int, quick: bool, base: Path | None, split: str, settings: Settings) -> dict[str, Any]:
    console = Console()
    clock = Clock(console)
    with clock.stage("data", "data: pictures with known answers"):
        paths = atlas.build(out / "data", seed=seed, cache_dir=out.parent / "wheels", n_sft=settings.n_sft, n_unlabelled=settings.n_unlabelled,
                            n_val=settings.n_val, n_test=settings.n_test, include_base=False)
        items = json.loads((paths.test if split == "test" else paths.val).read_text(encoding="utf-8"))
        first = LlavaModel.from_pretrained(base or base_model_path())
        pictures = Pictures(paths.images, first.image_processor)

    texts: dict[str, dict[str, str]] = {}
    scores: dict[str, Scores] = {}

    def evaluate(name: str, title: str, answers: Callable[[], dict[str, str]]) -> None:
        with clock.stage(f"evaluate {name}", f"evaluation: {title}"):
            texts[name] = answers()
            scores[name] = score(items, texts[name])

    evaluate("base", "base model", lambda: answer_greedily(first, items, pictures, "base"))
    with clock.stage("sft", "stage 1: visual self-questioning"):
        sft_model, sft_log = train_sft(first, paths, out / "sft", seed, settings)
    evaluate("sft", "after stage 1", lambda: answer_greedily(sft_model, items, pictures, "after SFT"))
    other = other_images([item["image"] for item in items], seed)
    evaluate("majority", "most frequent answers", lambda: majority_answers(items, paths.sft))
    evaluate("no_image", "a grey image", lambda: no_image_answers(sft_model, items))
    evaluate("shuffled_image", "other images", lambda: answer_greedily(sft_model, items, lambda name: pictures(other[name]), "shuffled"))
    with clock.stage("self_training", "self-training: describe, ask, answer, judge"):
        found = self_train(sft_model, paths, pictures, out / "self_training", seed, settings)
    with clock.stage("dpo", f"stage 2: DPO on {len(found.train)} pairs, {len(found.heldout)} held out"):
        dpo_model, dpo_log, heldout = train_dpo(sft_model, found, out / "dpo", seed, settings)
        dpo_model.save_pretrained(out / "model")
    evaluate("dpo", "after stage 2", lambda: answer_greedily(dpo_model, items, pictures, "after DPO"))

    quarter = max(1, len(dpo_log) // 4)
    at_first, at_last = ({key: float(np.mean([row[f"rewards/{key}"] for row in rows])) for key in ("accuracies", "margins")}
                         for rows in (dpo_log[:quarter], dpo_log[-quarter:]))
    results: dict[str, Any] = {
        "seed": seed, "threads": stllava_c.get_num_threads(), "seconds": clock.seconds,
        "evaluation": {name: scores[name].row for name in ("base", "sft", "dpo")},
        "baselines": {name: scores[name].row for name in ("majority", "no_image", "shuffled_image")},
        "self_training": found.row,
        "dpo": {"reward_accuracy": at_last["accuracies"], "margin": at_last["margins"],
                "heldout_reward_accuracy": heldout["eval_rewards/accuracies"],
                "delta_open": _delta(scores["dpo"].open, scores["sft"].open), "delta_closed": _delta(scores["dpo"].closed, scores["sft"].closed)}}
    results["table_sha256"] = table_sha256(results)
    results["details"] = {
        "stllava": __version__, "quick": quick, "split": split, "settings": dataclasses.asdict(settings),
        "metrics": "strict: whole words; the first yes or no decides a closed item; token_f1 is the mean over open items",
        "reward_accuracy": "mean over the last quarter of the updates; margin likewise",
        "distinct_questions": found.n_distinct, "pairs_training": len(found.train), "pairs_heldout": len(found.heldout),
        "heldout_margin": heldout["eval_rewards/margins"],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bars": [dataclasses.asdict(bar) for bar in bars(results, at_last["margins"] - at_first["margins"])]}

    with clock.stage("report", "report"):
        samples = Samples.draw(seed, items, texts, scores, found.judged, found.descriptions, sft_model, dpo_model, pictures)
        write_report(out / "report.html", results, sft_log, dpo_log, samples)
    write_bytes(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    print_summary(results, console)
    console.print(f"report: {out / 'report.html'}   numbers: {out / 'results.json'}")
    return results


def train_sft(model: LlavaModel, paths: atlas.AtlasPaths, folder: Path, seed: int, settings: Settings) -> tuple[LlavaModel, list[dict[str, Any]]]:
    """Adapters on decoder and tower, the projector in full. Returns the merged model and the log of the updates."""
    data = SFTDataset(paths.sft, model.tokenizer, model.image_processor, image_folder=paths.images, template="v1_sq", sq_r=settings.sq_r,
                      seed=seed, tokens_per_image=model.core.tokens_per_image)
    lora = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=0.0)
    model.add_lora(lora, "llm", seed=seed)
    model.add_lora(lora, "vit", seed=seed)
    args = SFTConfig(output_dir=str(folder), max_steps=settings.sft_steps, per_device_train_batch_size=settings.sft_batch,
                     learning_rate=settings.sft_lr, warmup_ratio=0.03, seed=seed)
    trainer = SFTTrainer(model, args, data)
    trainer.train()
    return model.merge_and_unload(), trainer.state.log_history


def self_train(model: LlavaModel, paths: atlas.AtlasPaths, pictures: Pictures, folder: Path, seed: int, settings: Settings) -> SelfTraining:
    """Questions, answers and pairs about images without labels. Only the judge sees the truth."""
    if folder.exists():  # the steps would continue the files of an earlier run
        remove_directory(folder)
    make_directory(folder)
    names = {record["id"]: record["image"] for record in json.loads(paths.unlabelled.read_text(encoding="utf-8"))}
    by = RuleJudge.from_file(paths.truth)
    asked = ask(model, [(name, pictures(file)) for name, file in names.items()],
                AskSettings(n_questions=settings.n_questions, max_new_tokens=MAX_NEW_TOKENS, description_max_new_tokens=MAX_NEW_TOKENS, seed=seed,
                            batch_size=64), out=folder / "questions.jsonl")
    answered = answer(model, asked, lambda name: pictures(names[name]),
                      AnswerSettings(n_answers=settings.n_answers, max_new_tokens=MAX_NEW_TOKENS, seed=seed, batch_size=128),
                      out=folder / "answers.jsonl")
    judged = judge(answered, by, out=folder / "judged.jsonl")
    pairs, dropped = build_pairs(judged, lambda name: names[name], PairSettings(seed=seed), type_of=classify)

    sides = {heldout: [pair for pair in pairs if _is_heldout(pair["image"], seed, settings.heldout_share) == heldout] for heldout in (False, True)}
    data = {heldout: DPODataset(some, model.tokenizer, model.image_processor, image_folder=paths.images, template="v1",
                                tokens_per_image=model.core.tokens_per_image, on_bad_sample="skip") for heldout, some in sides.items()}
    reasons = Counter(dropped)
    for row in asked:
        reasons.update(row["dropped"])
    for some in data.values():
        reasons.update({f"pair: {kind}": n for kind, n in count_problems(some.problems).items()})
    write_bytes(folder / "pairs.json", (json.dumps(pairs, indent=1) + "\n").encode())

    # A repeated question is the same question; an empty one is not well-formed.
    n_distinct = len(judged) + reasons["empty"]
    return SelfTraining(
        {"questions": len(names) * settings.n_questions,
         "well_formed_share": sum(classify(row["question"]) is not None for row in judged) / n_distinct,
         "judgeable_share": sum(by.judgeable(row["image"], row["question"]) for row in judged) / n_distinct,
         "pairs": sum(len(some) for some in data.values()), "dropped": dict(reasons)},
        n_distinct, {row["id"]: row["description"] for row in asked}, judged, data[False], data[True])


def train_dpo(model: LlavaModel, found: SelfTraining, folder: Path, seed: int,
              settings: Settings) -> tuple[LlavaModel, list[dict[str, Any]], dict[str, float]]:
    """New adapters on the decoder. Returns the merged model, the log of the updates, and the metrics on the held-out pairs."""
    policy = model.merge_and_unload()  # a copy: the model after stage 1 stays as it is
    adapters = policy.add_lora(LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=0.0), "llm", seed=seed + 1)
    args = DPOConfig(output_dir=str(folder), max_steps=settings.dpo_steps, per_device_train_batch_size=settings.dpo_batch,
                     per_device_eval_batch_size=settings.dpo_batch, learning_rate=settings.dpo_lr, beta=settings.beta, vit_grad=False,
                     precompute_ref_log_probs=True, seed=seed)
    trainer = DPOTrainer(policy, args, found.train, found.heldout, trainable=adapters)
    trainer.train()
    return policy.merge_and_unload(), trainer.state.log_history, trainer.evaluate()


def _is_heldout(image: str, seed: int, share: float) -> bool:
    return item_seed(seed, "held out", image) < share * 2**64


def _delta(after: list[float], before: list[float]) -> dict[str, float]:
    mean, low, high = paired_bootstrap(after, before)
    return {"mean": mean, "low": low, "high": high}


def _require_extra(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise StllavaError(f"the demo's report needs {' and '.join(missing)}: pip install 'stllava[demo]'")
