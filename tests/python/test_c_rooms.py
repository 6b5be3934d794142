"""The C tests, one case a binary, and the rules of csrc that a compiler does not check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

# Which rooms a room may include, besides itself and libc (design: arrows between rooms). "" holds stllava.c and the public door stllava.h,
# whose types the rooms that implement a public function share.
ARROWS = {
    "base": set(),
    "tensor": {"base"},
    "ops": {"tensor", "base"},
    "image": {"tensor", "base", ""},
    "model": {"ops", "tensor", "base", ""},
    "train": {"model", "ops", "tensor", "base", ""},
    "infer": {"model", "ops", "tensor", "base", ""},
    "": {"base", "tensor", "ops", "image", "model", "train", "infer"},
}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h"})


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


def room(path: Path) -> str:
    parts = path.relative_to(CSRC).parts
    return parts[0] if len(parts) > 1 else ""


def project_includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_follow_the_arrows(path: Path) -> None:
    own = room(path)
    assert own in ARROWS, f"{path}: a room that the table of arrows does not know"
    for include in project_includes(path):
        assert (CSRC / include).exists(), f'{path.name} includes "{include}", which is not in csrc'
        target = room(CSRC / include)
        assert target == own or target in ARROWS[own], f'{path.relative_to(CSRC)} includes "{include}": {own} may not see {target or "the public door"}'


def without_comments_and_strings(text: str) -> str:
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', " ", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_core_is_silent_and_never_ends_the_process(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "Python.h" not in text
    found = re.search(r"\b(exit|_exit|abort|printf|fprintf|puts|perror)\s*\(", without_comments_and_strings(text))
    assert not found, f"{path.relative_to(CSRC)} calls {found and found.group(1)}"


def test_file_names_are_unique_and_listed() -> None:
    names = [path.name for path in SOURCES]
    assert len(names) == len(set(names))
    listed = re.findall(r"^(?:once|typed)\s+(\S+)$", (CSRC / "sources.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    on_disk = {str(path.relative_to(CSRC)) for path in SOURCES if path.suffix == ".c"}
    assert on_disk <= set(listed), f"not in sources.txt: {sorted(on_disk - set(listed))}"
