"""Builds the "atlas VQA" data set of the demo: real pictures, true answers, LLaVA and VQA files.

    out_dir/images/SPLIT/00000.png   RGB, size x size
    out_dir/base.json                training of the demo base model (only with include_base): see `base_items`
    out_dir/sft.json                 stage 1, LLaVA instruction format (spec 4.1)
    out_dir/unlabelled.json          [{"id", "image"}], no answers
    out_dir/val.json, test.json      VQA format with answer_type and question_type (spec 4.1)
    out_dir/truth.json               {id: facts} of all but the base images, for the judge; the model never sees it

An image id is "SPLIT/00000"; `image` is the path of the file under images/. The same seed gives the same bytes, and the images
of a split do not depend on how many are built. Truth comes from slice positions, tissue maps, the pinned files' own tags and
the drawn marker; how the splits are cut, and what they can and cannot show, is said in splits.py.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava.checkpoint.atomic import make_directory, write_bytes
from stllava.progress import progress_bar

from . import sources, volumes
from .questions import CLOSED, DESCRIBE, OPEN, STRUCTURES, Facts, Question, ask, ask_all, caption
from .render import Renderer, stream

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["AtlasPaths", "BaseItem", "base_items", "build"]

BASE_TYPES = tuple(t for t in (*OPEN, *CLOSED) if t not in STRUCTURES)
# Every evaluation holds at most this share of its images as items of one closed type, which keeps the types near equal.
CLOSED_ITEMS_PER_IMAGE = 0.5
MULTI_TURN_SHARE = 0.7
LATER_TURNS = (2, 4)


@dataclass(frozen=True, slots=True)
class AtlasPaths:
    """Files of a built data set; `base` is None without base images."""

    root: Path
    images: Path
    base: Path | None
    sft: Path
    unlabelled: Path
    val: Path
    test: Path
    truth: Path


@dataclass(frozen=True, slots=True)
class BaseItem:
    """One base image: `questions` are independent short branches; `later_turns` follow "describe", which `caption` answers."""

    id: str
    image: str
    caption: str
    questions: tuple[Question, ...]
    later_turns: tuple[Question, ...]


def build(
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    cache_dir: str | os.PathLike[str],
    n_base: int = 6000,
    n_sft: int = 600,
    n_unlabelled: int = 800,
    n_val: int = 150,
    n_test: int = 300,
    size: int = 64,
    include_base: bool = True,
    progress: bool = True,
) -> AtlasPaths:
    """Writes images and files under `out_dir`; `cache_dir` keeps the downloaded wheels.

    `seed` is 0 .. 2^64 - 1. Raises SourceError when the pictures cannot be fetched, ValueError for a bad argument, OSError when
    a file cannot be written.
    """
    counts = {"base": n_base if include_base else 0, "sft": n_sft, "unlabelled": n_unlabelled, "val": n_val, "test": n_test}
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"n_{name} is {count}, expected 0 or more")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 to 2**64 - 1")
    if size < 16:
        raise ValueError(f"size is {size}, expected at least 16 pixels")
    root = Path(out_dir)
    renderer = Renderer(volumes.load(sources.fetch(cache_dir, progress=progress)), seed=seed, size=size)
    facts: dict[str, list[Facts]] = {}
    with progress_bar(sum(counts.values()), label="drawing images", unit="image", show=progress) as bar:
        for split, count in counts.items():
            facts[split] = _draw_split(renderer, root / "images" / split, split, count, bar)
    paths = AtlasPaths(
        root=root,
        images=root / "images",
        base=root / "base.json" if include_base else None,
        sft=root / "sft.json",
        unlabelled=root / "unlabelled.json",
        val=root / "val.json",
        test=root / "test.json",
        truth=root / "truth.json",
    )
    if paths.base is not None:
        _write(paths.base, [_base_record(seed, i, f) for i, f in enumerate(facts["base"])])
    _write(paths.sft, [_sft_record(seed, i, f) for i, f in enumerate(facts["sft"])])
    _write(paths.unlabelled, [_head("unlabelled", i) for i in range(n_unlabelled)])
    for split, path in (("val", paths.val), ("test", paths.test)):
        _write(path, _evaluation_records(seed, split, facts[split]))
    labelled = (split for split in counts if split != "base")
    _write(paths.truth, {_head(split, i)["id"]: f.to_json() for split in labelled for i, f in enumerate(facts[split])})
    return paths


def base_items(path: str | os.PathLike[str]) -> Iterator[BaseItem]:
    """Reads base.json, one item per image, in order."""
    for record in json.loads(Path(path).read_text(encoding="utf-8")):
        questions, later = (tuple(Question(**q) for q in record[key]) for key in ("questions", "later_turns"))
        yield BaseItem(record["id"], record["image"], record["caption"], questions, later)


def _draw_split(renderer: Renderer, folder: Path, split: str, count: int, bar: tqdm[Any]) -> list[Facts]:
    make_directory(folder)
    facts = []
    for index in range(count):
        image, truth = renderer.draw(split, index)
        # Level 1 is faster than the default, and the file is no larger.
        png = io.BytesIO()
        image.save(png, format="PNG", compress_level=1)
        write_bytes(folder / f"{index:05d}.png", png.getvalue(), durable=False)
        facts.append(truth)
        bar.update()
    return facts


def _head(split: str, index: int) -> dict[str, Any]:
    name = f"{split}/{index:05d}"
    return {"id": name, "image": f"{name}.png"}


def _base_record(seed: int, index: int, facts: Facts) -> dict[str, Any]:
    """All short questions but those about structures, and two later turns of a conversation, drawn from them."""
    rng = stream(seed, "questions", "base", index)
    questions = ask_all(BASE_TYPES, facts, rng)
    short = [q for q in ask_all(BASE_TYPES, facts, rng) if q.type != "caption"]
    later = [short[i] for i in rng.permutation(len(short))[:2]]
    return _head("base", index) | {
        "caption": caption(facts),
        "questions": [asdict(q) for q in questions],
        "later_turns": [asdict(q) for q in later],
    }


def _sft_record(seed: int, index: int, facts: Facts) -> dict[str, Any]:
    """A conversation that opens with the description, or, in 30 % of the samples, one question alone.

    Where the answers about structures are known they are always asked in a conversation, and half of such images give a single
    question about one of them, since in a conversation the description has already named what is visible.
    """
    rng = stream(seed, "questions", "sft", index)
    structures = ask_all(STRUCTURES, facts, rng)
    others = ask_all(BASE_TYPES, facts, rng)
    single_share = 0.45 if structures else 0.15
    if rng.random() < single_share:
        pool = structures or others
        turns = [pool[int(rng.integers(len(pool)))]]
    else:
        short = [q for q in others if q.type != "caption"]
        n_later = int(rng.integers(LATER_TURNS[0], LATER_TURNS[1] + 1))
        later = structures + [short[i] for i in rng.permutation(len(short))[: max(1, n_later - len(structures))]]
        turns = [Question("describe", DESCRIBE, caption(facts)), *(later[i] for i in rng.permutation(len(later)))]
    conversations = []
    for i, turn in enumerate(turns):
        conversations.append({"from": "human", "value": turn.question if i else f"<image>\n{turn.question}"})
        conversations.append({"from": "gpt", "value": turn.answer})
    return _head("sft", index) | {"conversations": conversations}


def _evaluation_records(seed: int, split: str, facts: list[Facts]) -> list[dict[str, Any]]:
    """All open questions, and closed ones so chosen that yes and no are balanced within each type."""
    items: list[tuple[int, Question]] = []
    closed: dict[str, list[tuple[int, Question]]] = {type_: [] for type_ in CLOSED}
    for index, fact in enumerate(facts):
        rng = stream(seed, "questions", split, index)
        items += ((index, question) for question in ask_all(OPEN, fact, rng))
        for type_ in CLOSED:
            question = ask(type_, fact, rng)
            if question is not None:
                closed[type_].append((index, question))
    most = int(CLOSED_ITEMS_PER_IMAGE * len(facts))
    for candidates in closed.values():
        items += _balanced(candidates, most)
    items.sort(key=lambda item: item[0])  # stable: the questions of an image stay together and in order
    return [_vqa_record(split, index, question) for index, question in items]


def _balanced(candidates: list[tuple[int, Question]], most: int) -> list[tuple[int, Question]]:
    """The first items of each answer: as many yes as no, at most `most` in all."""
    counts = Counter(question.answer for _, question in candidates)
    left = dict.fromkeys(("yes", "no"), min(counts["yes"], counts["no"], most // 2))
    kept = []
    for item in candidates:
        if left[item[1].answer]:
            left[item[1].answer] -= 1
            kept.append(item)
    return kept


def _vqa_record(split: str, index: int, question: Question) -> dict[str, Any]:
    head = _head(split, index)
    return {
        "id": f"{head['id']}#{question.type}",
        "image": head["image"],
        "answer_type": "CLOSED" if question.type in CLOSED else "OPEN",
        "question_type": question.type,
        "conversations": [
            {"from": "human", "value": f"{question.question}\n<image>"},
            {"from": "gpt", "value": question.answer},
        ],
    }


def _write(path: Path, records: list[Any] | dict[str, Any]) -> None:
    """Writes JSON, one record a line."""
    if isinstance(records, dict):
        lines, brackets = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records.items()], "{}"
    else:
        lines, brackets = [json.dumps(record) for record in records], "[]"
    write_bytes(path, (f"{brackets[0]}\n" + ",\n".join(lines) + f"\n{brackets[1]}\n").encode())
