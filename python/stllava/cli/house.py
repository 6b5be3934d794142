"""`stllava doctor | demo | demo-base`: what is installed, and the whole method on real images."""

from __future__ import annotations

import argparse
from pathlib import Path

from .flags import Verbs

__all__ = ["VERBS"]


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Print what was built and found."""
    parser.add_argument("--json", action="store_true")


def run_doctor(args: argparse.Namespace) -> int | None:
    from stllava import doctor
    return doctor.main(json=args.json)


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The whole method on real medical images: SFT, self-training, DPO, evaluation, report."""
    parser.add_argument("--out", default="build/demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the same path on a tenth of the data")


def run_demo(args: argparse.Namespace) -> None:
    from stllava.demo.run import run
    run(Path(args.out), seed=args.seed, num_threads=args.num_threads, quick=args.quick)


def add_demo_base(parser: argparse.ArgumentParser) -> None:
    """Train the demo's base model anew."""
    parser.add_argument("--out", default="build/demo-base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=0)


def run_demo_base(args: argparse.Namespace) -> None:
    from stllava.demo.base import train_base
    train_base(Path(args.out), seed=args.seed, num_threads=args.num_threads)


VERBS: Verbs = {"demo": (add_demo, run_demo), "demo-base": (add_demo_base, run_demo_base), "doctor": (add_doctor, run_doctor)}
