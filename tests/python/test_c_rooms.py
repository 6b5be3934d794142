"""The C tests, one case a binary."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH and the like do not matter to make; -s keeps its own lines out of `names`.
    return subprocess.run(["make", "-s", "-C", str(ROOT / "tests/c"), *arguments], capture_output=True, text=True, check=False)


def binaries() -> list[str]:
    if not (shutil.which("make") and shutil.which("cc")):
        return []
    listing = make("names")
    return listing.stdout.split() if listing.returncode == 0 else []


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("cc")), reason="needs make and a C compiler")
def test_every_test_source_has_a_binary() -> None:
    names = binaries()
    for source in sorted((ROOT / "tests/c").glob("test_*.c")):
        assert any(name == source.stem or name in {f"{source.stem}_f32", f"{source.stem}_f64"} for name in names), source.name


@pytest.mark.parametrize("name", binaries() or [pytest.param("", marks=pytest.mark.skip(reason="needs make and a C compiler"))])
def test_c(name: str) -> None:
    program = ROOT / "build/c-tests" / name
    build = make(f"-j{os.cpu_count() or 1}", str(program))
    assert build.returncode == 0, build.stdout + build.stderr
    environment = {key: value for key, value in os.environ.items() if key != "STLLAVA_CPU"}
    result = subprocess.run([program], capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
