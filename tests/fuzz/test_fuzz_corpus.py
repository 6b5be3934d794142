"""The corpus through every target, and, with --long, a minute of search from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import parsers
import pytest

import stllava_c

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
C_TARGETS = sorted(path.stem for path in HERE.glob("fuzz_*.c"))
INPUTS = sorted(path.relative_to(CORPUS) for path in CORPUS.rglob("*") if path.is_file())

no_compiler = ("C targets have sanitizers of their own, which a preloaded one disturbs" if stllava_c.build_info()["sanitizers"]
               else "" if shutil.which("make") and shutil.which("cc") else "needs make and a C compiler")
needs_compiler = pytest.mark.skipif(bool(no_compiler), reason=no_compiler)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", *arguments], capture_output=True, text=True, check=False)


def test_corpus_belongs_to_targets_and_is_small() -> None:
    targets = {*parsers.TARGETS, *(name.removeprefix("fuzz_") for name in C_TARGETS)}
    assert {path.parts[0] for path in INPUTS} == targets
    assert sum((CORPUS / path).stat().st_size for path in INPUTS) < 200_000


@pytest.mark.parametrize("target", sorted(parsers.TARGETS))
def test_python_target(target: str) -> None:
    outcomes = {path.name: parsers.run(target, (CORPUS / path).read_bytes()) for path in INPUTS if path.parts[0] == target}
    assert "read" in outcomes.values(), outcomes  # a target that refuses all its seeds searches nothing


@needs_compiler
@pytest.mark.parametrize("target", C_TARGETS)
def test_c_target(target: str) -> None:
    n = sum(path.parts[0] == target.removeprefix("fuzz_") for path in INPUTS)
    done = make("-C", str(HERE), f"-j{os.cpu_count() or 1}", f"replay-{target}")
    assert done.returncode == 0 and done.stdout.endswith(f"{n} inputs\n"), done.stdout + done.stderr


@needs_compiler
@pytest.mark.long
@pytest.mark.skipif(not shutil.which("clang"), reason="libFuzzer needs clang")
@pytest.mark.parametrize("target", C_TARGETS)
def test_c_search(target: str) -> None:
    done = make("-C", str(HERE), f"fuzz-{target}", "SECONDS=60")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.long
@pytest.mark.parametrize("target", sorted(parsers.TARGETS))
def test_python_search(target: str) -> None:
    done = make("-C", str(HERE), f"search-{target}", f"PYTHON={sys.executable}", "SECONDS=60")
    if "no atheris" in done.stderr:
        pytest.skip(done.stderr.strip()[-300:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
