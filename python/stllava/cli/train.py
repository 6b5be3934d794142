"""`stllava sft`, `stllava dpo` and `stllava rerun`: the two stages from files, with the command lines of the original's scripts."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from .flags import Flag, Verbs, add_flags, flags_of, given

if TYPE_CHECKING:
    from stllava.data.dpo import DPODataset
    from stllava.data.sft import SFTDataset
    from stllava.model import LlavaModel
    from stllava.train.resolve import Settings

__all__ = ["VERBS", "script_flags"]

SIGNALS = ("On SIGTERM the running step is finished and a checkpoint written, then the exit code is 143; on Ctrl-C the last checkpoint stands, 130. "
           "The same command with --resume_from_checkpoint auto goes on from the newest checkpoint, or begins: same weights, same log.")
ALIASES = {"model_name_or_path": ("--model_path",)}


@functools.cache
def _groups(stage: str) -> dict[str, list[Flag]]:
    """The flags of `stllava sft` or `stllava dpo`, under the titles of their help."""
    from stllava.train.no_effect import NO_EFFECT
    from stllava.train.resolve import STAGES
    from stllava.train.script import DataArguments, ModelArguments, ScriptArguments
    groups = {title: flags_of(cls) for title, cls in
              (("model", ModelArguments), ("data", DataArguments), ("training", STAGES[stage]), ("how it is run", ScriptArguments))}
    names = {flag.name for flags in groups.values() for flag in flags}
    hidden = [Flag(name, entry.kind, entry.many, default=entry.default, hidden=True) for name, entry in NO_EFFECT.items() if name not in names]
    return {**groups, "without effect": hidden}


def script_flags(stage: str) -> list[Flag]:
    """Every flag of `stllava sft` or `stllava dpo`."""
    return [flag for flags in _groups(stage).values() for flag in flags]


def _add(parser: argparse.ArgumentParser, stage: str) -> None:
    parser.usage = "%(prog)s --model_name_or_path DIR --data_path FILE --output_dir DIR [--FLAG [VALUE] ...]"
    parser.epilog = f"{SIGNALS} Other flags of transformers and of LLaVA's scripts are taken too; each says what happens instead."
    for title, flags in _groups(stage).items():  # none is required here: a configuration file may give it
        add_flags(parser.add_argument_group(title), flags, required=False, aliases=ALIASES)


def _settings(args: argparse.Namespace) -> Settings:
    from stllava.train.resolve import resolve

    from .config_file import read_config
    flags = script_flags(args.verb)
    words = given(args, flags)
    of_files: dict[str, Any] = {}
    for file in words.get("config", ()):
        of_files |= read_config(file, flags)
    lines: list[str] = []
    settings = resolve(args.verb, of_files | words, lines.append)
    for line in lines:  # behind it, so that a mistake stands alone
        _say(args.verb, line)
    return settings


def _say(verb: str, line: str) -> None:
    print(f"stllava {verb}: {line}", file=sys.stderr)


def _dataset(settings: Settings, model: LlavaModel, path: str) -> SFTDataset | DPODataset:
    from stllava.data.dpo import DPODataset
    from stllava.data.records import DataError
    from stllava.data.sft import SFTDataset, summary
    data = settings.data
    options: dict[str, Any] = {
        "tokenizer": model.tokenizer, "image_processor": model.image_processor, "image_folder": data.image_folder, "template": data.version,
        "max_length": data.model_max_length, "tokens_per_image": model.core.tokens_per_image, "on_bad_sample": data.on_bad_sample}
    try:
        found = DPODataset(path, **options) if settings.stage == "dpo" else SFTDataset(path, **options, sq_r=data.sq_r, seed=settings.training.seed)
    except DataError as error:
        if data.image_folder is None and any(problem.kind == "image" for problem in error.problems):
            raise DataError(f"no --image_folder, so image names begin here: {error}", error.problems) from error
        raise
    if found.problems:
        print(f"left out {len(found.problems)} records: {summary(found.problems)}", file=sys.stderr)
    return found


def _train(settings: Settings, command: list[str], recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs to the end. Returns the record of the run. recorded: the inputs of another, which must be the same."""
    import stllava_c
    from stllava.data.sft import summary
    from stllava.errors import FormatError
    from stllava.train.dpo import DPOTrainer
    from stllava.train.manifest import RunRecord, check_inputs, hash_inputs
    from stllava.train.setup import build_model
    from stllava.train.sft import SFTTrainer
    if settings.script.num_threads > 0:
        stllava_c.set_num_threads(settings.script.num_threads)
    folder = settings.data.image_folder
    if folder is not None and not os.path.exists(folder):
        raise FormatError(f"image_folder {folder}: no such folder or archive; give the one where the records' image names begin", path=folder)
    model, trainable = build_model(settings.model, settings.training, settings.data)
    if not model.has_tokenizer or model.config.vision is None:
        raise FormatError(f"{settings.model.model_name_or_path}: has no tokenizer or no vision tower, and training from files needs both; put "
                          "tokenizer.model or tokenizer.json there, or give vision_tower", path=settings.model.model_name_or_path)
    data = _dataset(settings, model, settings.data.data_path)
    evaluation = None if settings.data.eval_data_path is None else _dataset(settings, model, settings.data.eval_data_path)
    images = [record.get("image") for part in (data, evaluation) if part is not None for record in part.records]
    inputs = hash_inputs(settings.given, images)
    if recorded is not None:
        check_inputs(recorded, inputs)
    record = RunRecord(settings, command, inputs)
    trainer: Any = DPOTrainer if settings.stage == "dpo" else SFTTrainer
    run = trainer(model, settings.training, data, evaluation, trainable=trainable)
    result = run.train()
    run.save_model()
    counts = {"records": len(data.records), "used": len(data.records) - len(data.problems), "left_out": summary(data.problems),
              "updates": result.global_step, "updates_left_out": run.updater.n_skipped, "tensors_trained": len(trainable)}
    written = record.write(settings.training.output_dir, counts=counts, metrics=result.metrics)
    return {**written, "printed": {"global_step": result.global_step, **result.metrics}}


def _run(args: argparse.Namespace) -> int:
    from stllava.train.terminate import TERMINATED, Terminated
    try:
        record = _train(_settings(args), ["stllava", *args.words])
    except Terminated as stop:
        print(f"stllava: {stop}", file=sys.stderr)
        return TERMINATED
    print(json.dumps(record["printed"]))
    return 0


def add_sft(parser: argparse.ArgumentParser) -> None:
    """Stage 1: visual self-questioning SFT."""
    _add(parser, "sft")


def add_dpo(parser: argparse.ArgumentParser) -> None:
    """Stage 2: preference training."""
    _add(parser, "dpo")


def add_rerun(parser: argparse.ArgumentParser) -> None:
    """Repeat a run from its manifest.json; the weights must come out the same (exit code 1 if not)."""
    parser.add_argument("manifest", metavar="MANIFEST|DIR", help="manifest.json that `stllava sft` or `stllava dpo` wrote, or its directory")
    parser.add_argument("--out", default=None, help="output directory; default: the run's own name and -rerun")


def run_rerun(args: argparse.Namespace) -> int:
    from pathlib import Path

    from stllava.errors import ConfigError
    from stllava.train.manifest import machine, read_run
    from stllava.train.resolve import resolve
    from stllava.train.terminate import TERMINATED, Terminated
    before = read_run(args.manifest)
    wanted = dict(before["settings"])
    out = args.out or f"{str(wanted.get('output_dir', 'out')).rstrip('/')}-rerun"
    if Path(out).resolve() == Path(str(wanted.get("output_dir"))).resolve():
        raise ConfigError(f"--out {out} is the run's own output directory; choose another, so that both can be compared", field="out")
    known = {flag.name for flag in script_flags(before["stage"])}
    if unknown := sorted(wanted.keys() - known):
        raise ConfigError(f"{args.manifest}: run.settings has {unknown[0]!r}, which this version does not know", field=unknown[0])
    settings = resolve(before["stage"], {**wanted, "output_dir": out, "resume_from_checkpoint": None}, functools.partial(_say, args.verb))
    try:
        after = _train(settings, ["stllava", *args.words], before["inputs"])
    except Terminated as stop:
        print(f"stllava: {stop}", file=sys.stderr)
        return TERMINATED
    is_same = after["weights_sha256"] == before["weights_sha256"]
    print(json.dumps({"output_dir": out, "same_weights": is_same, "weights_sha256": after["weights_sha256"]}))
    if not is_same:
        now = machine()
        other = [key for key, value in now.items() if before.get("machine", {}).get(key) != value]
        _say(args.verb, f"the weights differ from the recorded run's; of the machine differ: {', '.join(other) or 'nothing'}")
    return 0 if is_same else 1


VERBS: Verbs = {"sft": (add_sft, _run), "dpo": (add_dpo, _run), "rerun": (add_rerun, run_rerun)}
