"""`stllava eval`: a checkpoint, or anybody's answers, on a test set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from stllava.errors import did_you_mean

from .flags import Verbs, load_model, loading_flags, template_for

if TYPE_CHECKING:
    from stllava.evaluate.evaluation import Answers
    from stllava.evaluate.pictures import ItemPictures
    from stllava.evaluate.scoring import Scoring

__all__ = ["VERBS"]


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Answer a VQA test set greedily and score it, or score the answers of any system (--predictions)."""
    from stllava.data.benchmarks import BENCHMARKS
    parser.add_argument("model", nargs="?", help="checkpoint directory, or a .gguf file")
    parser.add_argument("--model_name_or_path", "--model_path", help="the same")
    loading_flags(parser)
    data = parser.add_argument_group("test set")
    data.add_argument("--benchmark", metavar="NAME|FILE", help=f"{', '.join(BENCHMARKS)} (with --data), or a file or folder that holds one")
    data.add_argument("--data", metavar="PATH", help="where the benchmark's published files lie")
    data.add_argument("--split", default="test", help="default test")
    data.add_argument("--language", default="en", choices=("en", "zh", "all"), help="of SLAKE; default en")
    data.add_argument("--question_file", metavar="FILE", help="LLaVA-Med test items (JSON, JSON lines); items of an unknown answer_type are skipped")
    data.add_argument("--image_folder", metavar="DIR", help="default: the folder of the benchmark")
    answering = parser.add_argument_group("answering")
    answering.add_argument("--conv_mode", help="conversation template; default: what the checkpoint seems to be made with")
    answering.add_argument("--max_new_tokens", type=int, default=1024)
    answering.add_argument("--batch_size", type=int, default=32, help="questions answered together; those of one picture stay together")
    answering.add_argument("--feature_cache", metavar="DIR", help="keep the pictures' features there, and do not compute those it has")
    answering.add_argument("--num_chunks", type=int, default=1, help="answer one of so many parts; then score without it")
    answering.add_argument("--chunk_idx", type=int, default=0)
    answering.add_argument("--baselines", type=_baselines, default=[], metavar="LIST",
                           help="majority, majority_by_type, no_image, grey_image, shuffled_image, separated by commas")
    answering.add_argument("--train_file", metavar="PATH", help="items that the majority is counted in; default: the test set itself, an upper bound")
    theirs = parser.add_argument_group("answers of any system")
    theirs.add_argument("--predictions", metavar="FILE", help="JSON lines, JSON, CSV, or a folder of --out; no model is loaded")
    theirs.add_argument("--compare", metavar="FILE", help="answers of another system on the same items, for paired tests")
    theirs.add_argument("--text_field", metavar="NAME", help="field of the answer in these files; default prediction, response, text or answer")
    theirs.add_argument("--unmatched", default="error", choices=("error", "wrong"), help="missing, duplicate, surplus ids: default an error")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--metrics", choices=("compat", "strict", "both"), default="both")
    scoring.add_argument("--closed", choices=("batch", "run_eval", "pvqa"), default="batch", help="compat's closed accuracy in tables and tests")
    scoring.add_argument("--candidates", metavar="FILE", help="JSON of candidate answers, for open_accuracy_run_eval")
    scoring.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="resamplings; default 2000")
    scoring.add_argument("--resample", choices=("question", "image"), default="question", help="what is drawn together")
    scoring.add_argument("--min_group", type=int, default=20, metavar="N", help="groups of fewer items have no interval; default 20")
    scoring.add_argument("--seed", type=int, default=0, help="of resamplings and shuffled pictures")
    out = parser.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", help="answers.jsonl (continued if it exists), report.json, .html, table.tex, .md, manifest.json")
    out.add_argument("--answers_file", metavar="FILE", help="JSON lines; continued if it exists")


def _baselines(text: str) -> list[str]:
    from stllava.evaluate.baselines import BASELINES
    names = [name for part in text.split(",") if (name := part.strip().replace("-", "_"))]
    for name in names:
        if name not in BASELINES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(BASELINES)}{did_you_mean(name, BASELINES)}")
    return list(dict.fromkeys(names))


class Items(NamedTuple):
    """`path`: what was read."""

    items: list[dict[str, Any]]
    pictures: ItemPictures
    title: str
    benchmark: str | None
    path: Path


class Answered(NamedTuple):
    """facts: for readers and the manifest. files: those the answers lie in."""

    answers: Answers
    baselines: list[Answers]
    facts: dict[str, Any]
    files: list[Path]


def run_eval(args: argparse.Namespace) -> None:
    _check(args)
    from stllava.errors import FormatError
    from stllava.evaluate.evaluation import Answers, evaluate
    from stllava.evaluate.identity import items_digest
    from stllava.evaluate.predictions import predictions_file, read_predictions, system_name
    from stllava.evaluate.render.terminal import print_evaluation
    from stllava.evaluate.runs import facts_of, has_jinja, write_evaluation
    from stllava.evaluate.vqa import evaluate_vqa
    how, test = _scoring(args), _read(args)

    def tried(source: object, rows: list[dict[str, Any]], unmatched: Literal["error", "wrong"]) -> None:
        """What would fail after hours of answers fails now, with the file's name."""
        try:
            evaluate_vqa(test.items, rows, "strict", unmatched=unmatched)
        except FormatError as error:
            raise FormatError(f"{source}: {error}", field=error.field) from error

    def read(path: str) -> Answers:
        rows = read_predictions(path, args.text_field)
        tried(path, rows, how.unmatched)
        return Answers(system_name(path, rows), rows)

    tried(test.path, [], "wrong")

    other = None if args.compare is None else read(args.compare)
    majorities = _majorities(args, test)
    if args.predictions is not None:
        answered: Answered | None = Answered(read(args.predictions), [], facts_of(Path(args.predictions)), [predictions_file(args.predictions)])
    else:
        answered = _answer(args, test)
    if answered is None:
        return
    ours, baselines, facts, files = answered
    found = evaluate(test.items, ours, how, title=test.title, benchmark=test.benchmark, baselines=[*majorities, *baselines], other=other, facts=facts)
    print_evaluation(found)
    if args.out is not None:
        if not has_jinja():
            print("stllava eval: no report.html: it needs jinja2 (pip install 'stllava[report]')", file=sys.stderr)
        manifest = {"title": test.title, "benchmark": test.benchmark, "items": {"file": test.path.name, "sha256": items_digest(test.items)}}
        write_evaluation(found, Path(args.out), manifest, files, test.pictures)
        print(f"report: {args.out}")


def _check(args: argparse.Namespace) -> None:
    """What argparse cannot say. Raises ValueError."""
    from stllava.data.benchmarks import BENCHMARKS
    from stllava.evaluate.baselines import MODEL_BASELINES
    args.model_name_or_path = args.model_name_or_path or args.model
    if args.model not in (None, args.model_name_or_path):
        raise ValueError(f"two models: {args.model} and --model_name_or_path {args.model_name_or_path}; give one")
    if args.predictions is None and args.model_name_or_path is None:
        raise ValueError("nothing to evaluate: give a checkpoint directory, or --predictions FILE")
    if args.predictions is not None and args.model_name_or_path is not None:
        raise ValueError("a model and --predictions: give one; --compare FILE has answers beside the model's")
    if (args.benchmark is None and args.data is None) == (args.question_file is None):
        raise ValueError("give one test set: --benchmark NAME --data PATH, --benchmark FILE, or --question_file FILE")
    if args.data is None and args.benchmark is not None and not Path(args.benchmark).exists():
        raise ValueError(f"--benchmark {args.benchmark}: give --data PATH, where its published files lie"
                         if args.benchmark.lower() in BENCHMARKS else
                         f"--benchmark {args.benchmark}: no such file, and not one of {', '.join(BENCHMARKS)}"
                         f"{did_you_mean(args.benchmark, BENCHMARKS)}")
    if args.num_chunks > 1 and args.out is None and args.answers_file is None:
        raise ValueError("--num_chunks: give --out DIR, or an --answers_file of its own for each part; else the answers are lost")
    needs_model = [name for name in args.baselines if name in MODEL_BASELINES]
    if args.predictions is not None and needs_model:
        raise ValueError(f"--baselines {','.join(needs_model)}: the model has to answer, and --predictions has none")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}, want at least 1")


def _read(args: argparse.Namespace) -> Items:
    from stllava.evaluate.pictures import ItemPictures
    if args.question_file is not None:
        from stllava.data.records import read_records
        path, name, items, title = Path(args.question_file), None, read_records(args.question_file), Path(args.question_file).stem
    else:
        from stllava.data.benchmarks import load_benchmark
        path = Path(args.data or args.benchmark)
        wanted = None if args.data is None and path.exists() else args.benchmark
        found = load_benchmark(path, wanted, args.split, args.language)
        for note in found.notes:
            print(f"stllava eval: {path}: {note}", file=sys.stderr)
        items, name = found.items, found.name
        title = " ".join(part for part in (found.name or path.stem, found.split, found.language) if part)
    folder = Path(args.image_folder) if args.image_folder is not None else path if path.is_dir() else path.parent
    pictures = ItemPictures(items, folder)
    return Items(pictures.items, pictures, title, name, path)


def _scoring(args: argparse.Namespace) -> Scoring:
    from stllava.evaluate.scoring import Scoring
    candidates = None
    if args.candidates is not None:
        from stllava.checkpoint.strict_json import parse
        from stllava.limits import MAX_DATA_BYTES
        from stllava.paths import read_regular
        try:
            candidates = parse(read_regular(args.candidates, MAX_DATA_BYTES).decode())
        except ValueError as error:
            raise ValueError(f"--candidates {args.candidates}: not JSON: {error}") from error
    sets: Mapping[str, Any] = {"both": ("compat", "strict")}
    return Scoring(sets.get(args.metrics, (args.metrics,)), args.closed, candidates, args.unmatched, args.bootstrap, args.seed,
                   by_image=args.resample == "image", min_group=args.min_group)


def _majorities(args: argparse.Namespace, test: Items) -> list[Answers]:
    from stllava.evaluate.baselines import BASELINES, majority_answers
    from stllava.evaluate.evaluation import Answers
    train = None
    if args.train_file is not None:
        from stllava.data.benchmarks import load_benchmark
        train = load_benchmark(args.train_file, None, "train", args.language).items
    where = "the test set itself, an upper bound" if train is None else Path(args.train_file).name
    return [Answers(name, majority_answers(test.items, train, by_type=name == "majority_by_type"), f"{BASELINES[name]}, counted in {where}")
            for name in args.baselines if name.startswith("majority")]


def _answer(args: argparse.Namespace, test: Items) -> Answered | None:
    """The model's answers, its baselines', and facts about it; None: a part was answered, which is not scored."""
    from stllava import __version__
    from stllava.conv_mode import model_name_of
    from stllava.evaluate.answers import read_questions
    from stllava.evaluate.baselines import BASELINES, MODEL_BASELINES
    from stllava.evaluate.evaluation import Answers
    from stllava.evaluate.identity import model_digest
    from stllava.evaluate.runs import AnswerRun
    from stllava.feature_cache import FeatureCache
    questions = read_questions(test.items, test.path)
    test.pictures.require()
    model = load_model(args)
    template, name = template_for(args, model), model_name_of(args.model_name_or_path)
    settings = {"max_new_tokens": args.max_new_tokens}
    identity = {"model": model_digest(model), "pictures": test.pictures.digest()}
    run = AnswerRun(model, name, template, questions, test.pictures, identity, settings,
                    folder=None if args.out is None else Path(args.out), answers_file=None if args.answers_file is None else Path(args.answers_file),
                    n_chunks=args.num_chunks, chunk=args.chunk_idx, batch_size=args.batch_size, seed=args.seed,
                    feature_cache=None if args.feature_cache is None else FeatureCache(args.feature_cache, model))
    rows = {baseline: run.answers(baseline) for baseline in (None, *(one for one in args.baselines if one in MODEL_BASELINES))}
    if args.num_chunks > 1:
        print(f"part {args.chunk_idx} of {args.num_chunks}: {len(rows[None])} answers in {run.path(None, args.num_chunks, args.chunk_idx)}; when all "
              "parts are there, the same command without --num_chunks scores them")
        return None
    facts = {"package": f"stllava {__version__}", "model": {"name": name, "digest": identity["model"]}, "pictures": identity["pictures"],
             "template": template, "dtype": args.dtype, "decoding": {"temperature": 0.0, **settings}}
    baselines = [Answers(one, answers, BASELINES[one]) for one, answers in rows.items() if one is not None]
    return Answered(Answers(name, rows[None]), baselines, facts, [path for one in rows if (path := run.path(one)) is not None])


VERBS: Verbs = {"eval": (add_eval, run_eval)}
