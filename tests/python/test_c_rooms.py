"""The C tests, one case a binary: under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer, and those with threads under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import stllava_c

ROOT = Path(__file__).resolve().parents[2]

if stllava_c.build_info()["sanitizers"]:
    pytest.skip("the C tests have sanitizers of their own, which a preloaded one disturbs", allow_module_level=True)
if not (shutil.which("make") and shutil.which("cc")):
    pytest.skip("needs make and a C compiler", allow_module_level=True)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH and the like do not matter to make; -s keeps its own lines out of `names`.
    return subprocess.run(["make", "-s", "-C", str(ROOT / "tests/c"), *arguments], capture_output=True, text=True, check=False)


NAMES = make("names").stdout.split()


def check(build: str, name: str, *cases: str, timeout_s: int = 300, **variables: str) -> None:
    """Builds one binary in build/`build` and runs it: every case passes, and no sanitizer reports anything."""
    program = ROOT / "build" / build / name
    built = make(f"-j{os.cpu_count() or 1}", f"BUILD={program.parent}", *(f"{key}={value}" for key, value in variables.items()), str(program))
    assert built.returncode == 0, built.stdout + built.stderr
    environment = {key: value for key, value in os.environ.items() if key != "STLLAVA_CPU" and not key.endswith("SAN_OPTIONS")}
    result = subprocess.run([program, *cases], capture_output=True, text=True, check=False, env=environment, timeout=timeout_s)
    # Sizes that are meant to be refused make AddressSanitizer warn; everything else it says is a report.
    reports = [line for line in result.stderr.splitlines() if "Sanitizer" in line and "failed to allocate" not in line]
    assert result.returncode == 0 and not reports, result.stdout + result.stderr


def test_every_test_source_has_a_binary() -> None:
    for source in sorted((ROOT / "tests/c").glob("test_*.c")):
        assert any(name == source.stem or name in {f"{source.stem}_f32", f"{source.stem}_f64"} for name in NAMES), source.name


@pytest.mark.parametrize("name", NAMES)
def test_c(name: str) -> None:
    check("c-tests", name)


@pytest.mark.parametrize(("name", "cases"), [("test_base", ""), ("test_gemm_f32", "thread"), ("test_attention_f32", "thread"), ("test_model_f32", "")])
def test_threads(name: str, cases: str) -> None:
    check("c-tests-thread", name, cases, SANITIZE="thread")


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_binary_under_thread_sanitizer(name: str) -> None:
    check("c-tests-thread", name, timeout_s=3600, SANITIZE="thread")


@pytest.mark.parametrize(("sanitizer", "statements", "report"), [
    ("address", "p = malloc(8); p = NULL;", "LeakSanitizer"),
    ("address", "p = malloc(8); p[8] = 1;", "heap-buffer-overflow"),
    ("undefined", "int most = 2147483647; most += argc;", "signed integer overflow"),
    ("thread", "pthread_t t; p = malloc(1); pthread_create(&t, NULL, write_to, (void *)p); p[0] = 1; pthread_join(t, NULL);", "data race")])
def test_sanitizers_see(sanitizer: str, statements: str, report: str, tmp_path: Path) -> None:
    """A container may forbid what a sanitizer needs (LeakSanitizer: ptrace); its silence would then mean nothing."""
    (tmp_path / "bad.c").write_text(
        "#include <pthread.h>\n#include <stdlib.h>\n"
        "void *write_to(void *p) { *(volatile char *)p = 2; return NULL; }\n"
        f"int main(int argc, char **argv) {{ volatile char *p = argv[0]; {statements} return argc > 9 && p; }}\n")
    command = ["cc", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "bad.c", "-o", "bad"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run(["./bad"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0 and report in done.stderr, done.stderr
