"""Verbs about checkpoint files: inspect, merge, convert. None of them needs the memory that the model needs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import Verbs, base_flags

if TYPE_CHECKING:
    from stllava.checkpoint.describe import Description
    from stllava.checkpoint.directory import Checkpoint

__all__ = ["VERBS"]

DTYPES = ("f32", "f16", "bf16", "keep")
MAX_LINES = 4


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Say what a checkpoint directory or weight file is and what would be loaded from it, without reading a weight."""
    parser.add_argument("path", metavar="DIR|FILE")
    base_flags(parser)
    parser.add_argument("--tensors", action="store_true", help="also every tensor with its shape, dtype and file")
    parser.add_argument("--json", action="store_true")


def run_inspect(args: argparse.Namespace) -> int:
    """Exit code 1 where the directory cannot be loaded."""
    from stllava.checkpoint.describe import describe
    found = describe(args.path, args.model_base, args.vision_tower)
    if args.json:
        values = dataclasses.asdict(found)
        if not args.tensors:
            del values["tensors"]
        print(json.dumps(values))
    else:
        _print(found, args.tensors)
    return int(found.problem is not None)


def _print(found: Description, with_tensors: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    console = Console(file=sys.stdout)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(f"[bold]{escape(found.path)}[/bold]: {found.form}\n  told by {found.why}")
    if found.problem is not None:
        say(f"[red]cannot be loaded:[/red] {escape(found.problem)}")
    table = Table(title="loaded" if found.problem is None else "what is there", title_justify="left")
    for heading in ("part", "file", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("tensors", "values", "MB"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(row.part, escape(_short(row.file, found.path)), row.dtype, str(row.n_tensors), f"{row.n_values:,}", _mb(row.n_bytes))
    console.print(table)
    for adapter in found.adapters:
        say(f"adapter on the {adapter['part']}, {adapter['n_modules']} modules: "
            + escape(", ".join(f"{key} {value}" for key, value in adapter.items() if key not in ("part", "n_modules"))))
    if found.memory:
        say("memory of the weights, MB: " + ", ".join(f"{dtype} {_mb(size)}" for dtype, size in found.memory.items()))
    for heading, lines in (("note", found.notes), ("left out", found.ignored)):
        for line in lines if with_tensors else lines[:MAX_LINES]:
            say(f"{heading}: {escape(line)}")
        if len(lines) > MAX_LINES and not with_tensors:
            say(f"{heading}: {len(lines) - MAX_LINES} more, with --tensors")
    if with_tensors:
        tensors = Table("tensor", "shape", "dtype", "file")
        for tensor in found.tensors:
            tensors.add_row(escape(tensor["name"]), "x".join(map(str, tensor["shape"])), tensor["dtype"], escape(_short(tensor["file"], found.path)))
        console.print(tensors)


def _short(file: str, path: str) -> str:
    return str(Path(file).relative_to(path)) if Path(file).is_relative_to(path) and file != path else file


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f}"


def _target_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision_tower", help="the tower's directory, where the checkpoint does not hold it")
    parser.add_argument("--layout", choices=("llava", "hf"), default="llava", help="hf: LlavaForConditionalGeneration of transformers")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of every tensor; what rounding costs is printed")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--shard_size", type=int, default=5 * 10**9, help="bytes per file")


def _rewrite(args: argparse.Namespace, checkpoint: Checkpoint, sources: list[str | None], out: str) -> None:
    from stllava.checkpoint.lock import run_lock
    from stllava.checkpoint.rewrite import Target, rewrite
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    with run_lock(out):
        errors = rewrite(checkpoint, sources, out, Target(args.layout, args.dtype, args.format, args.shard_size))
    for part, error in errors.items():
        zeros = f", {error.n_to_zero} values became 0" if error.n_to_zero else ""
        print(f"{part}: largest rounding error {error.absolute:.3g} absolute, {error.relative:.3g} relative{zeros}")
    print(f"wrote {out}")


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Write full weights W + s B A of an adapter directory and its base."""
    parser.add_argument("--model_name_or_path", "--model_path", required=True, help="adapter directory, or one that holds a trained projector")
    parser.add_argument("--model_base", help="its base; default: the directory that adapter_config.json names")
    parser.add_argument("--out", "--save_model_path", required=True, help="directory to write")
    _target_flags(parser)


def run_merge(args: argparse.Namespace) -> None:
    from stllava.checkpoint.directory import read_checkpoint
    from stllava.checkpoint.index import has_weights
    if has_weights(args.model_name_or_path) and args.model_base is None:
        raise ValueError(f"{args.model_name_or_path}: holds full weights, there is nothing to merge; `stllava convert` writes them in another form")
    checkpoint = read_checkpoint(args.model_name_or_path, args.model_base, args.vision_tower, check_finite=False)
    _rewrite(args, checkpoint, [args.model_name_or_path, *_bases(checkpoint), args.vision_tower], args.out)


def _bases(checkpoint: Checkpoint) -> list[Any]:
    """The base's directory, also where adapter_config.json named it."""
    return [checkpoint.sources["model.embed_tokens.weight"].parent, checkpoint.sources["model.norm.weight"].parent]


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Write a full checkpoint in another layout, format or dtype, one tensor at a time."""
    parser.add_argument("path", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    _target_flags(parser)


def run_convert(args: argparse.Namespace) -> None:
    from stllava.checkpoint.directory import read_checkpoint
    from stllava.checkpoint.index import has_weights
    if Path(args.path).is_dir() and not has_weights(args.path):
        raise ValueError(f"{args.path}: holds no full weights; `stllava merge` makes them of adapters and their base")
    checkpoint = read_checkpoint(args.path, vision_tower=args.vision_tower, check_finite=False)
    _rewrite(args, checkpoint, [args.path, args.vision_tower], args.out)


VERBS: Verbs = {"inspect": (add_inspect, run_inspect), "merge": (add_merge, run_merge), "convert": (add_convert, run_convert)}
