"""Builds stllava_c._core: the C core (csrc/) and its binding (stllava_c/src/), in one extension module.

Switches, all environment variables:

    STLLAVA_BLAS=bundled|system|none   OpenBLAS for large weight gradients: from the scipy-openblas32 wheel, copied beside the extension | the
                             system's -lopenblas | not at all                                                              (bundled)
    STLLAVA_CUDA=auto|0|1    GPU kernels, a library of their own: where nvcc works | never | or fail    (auto)
    STLLAVA_CUDA_ARCH=sm_90  the architecture they are compiled for
    STLLAVA_DEBUG=1          -O0 -g, asserts on
    STLLAVA_SANITIZE=1       the same under AddressSanitizer and UndefinedBehaviorSanitizer (run with libasan preloaded: `make asan`)
    STLLAVA_WERROR=1         warnings are errors: our own builds. Not the default, since users' compilers warn about other things than ours.

Objects stay in build/objects/, so that the next build compiles only what changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
CORE, BINDING = HERE / "csrc", HERE / "stllava_c" / "src"
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "python/stllava/__init__.py").read_text(), re.MULTILINE)[1]

# Numbers must be a property of the source, not of the compiler's mood: no -ffast-math, and no contraction of a*b+c, which would give
# clones of one function for several CPUs different bits. The two -fno switches change no value: nobody reads errno after sqrt, nobody
# unmasks floating point traps, and without them loops with sqrt or comparisons are not vectorised.
NUMERICS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra"]
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LIMITED_API = "0x030B0000"  # 3.11: the first with the buffer protocol


def switch(name: str, default: str = "0", values: tuple[str, ...] = ("0", "1")) -> str:
    value = os.environ.get(name, default)
    if value not in values:
        raise SystemExit(f"setup.py: {name}={value!r}, supported: {', '.join(values)}")
    return value


DEBUG, SANITIZE, WERROR = (switch(f"STLLAVA_{name}") == "1" for name in ("DEBUG", "SANITIZE", "WERROR"))


def compile_flags() -> list[str]:
    flags = ["-std=c11", "-fPIC", "-fvisibility=hidden", "-pthread", *NUMERICS, *WARNINGS, f'-DSTV_VERSION="{VERSION}"']
    if DEBUG or SANITIZE:
        flags += ["-O1" if SANITIZE else "-O0", "-g", "-UNDEBUG", "-DSTV_DEBUG"]
    else:
        flags += ["-O3", "-DNDEBUG"]
    if SANITIZE:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-DSTV_SANITIZERS"]
    return flags + (["-Werror"] if WERROR else [])


def core_sources() -> list[tuple[Path, list[str], str]]:
    """(source, extra flags, object name) of every object of the core, from the list that is kept there."""
    objects = []
    for line in (CORE / "sources.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            kind, name = line.split()
            variants = ("32", "64") if kind == "typed" else ("",)
            objects += [(CORE / name, [f"-DSTV_REAL_BITS={bits}"] if bits else [], name + bits) for bits in variants]
    return objects


def binding_sources() -> list[tuple[Path, list[str], str]]:
    flags = [f"-I{sysconfig.get_path('include')}", f"-I{numpy.get_include()}", "-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION",
             "-DNPY_TARGET_VERSION=NPY_2_0_API_VERSION"]
    if not FREE_THREADED:
        flags.append(f"-DPy_LIMITED_API={LIMITED_API}")
    return [(source, flags, f"binding/{source.name}") for source in sorted(BINDING.glob("*.c"))]


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        libs = target.parent / "libs"
        shutil.rmtree(libs, ignore_errors=True)
        self.cc = list(self.compiler.compiler_so)
        flags = [f"-I{CORE}", *compile_flags()]
        if self._compiles("#include <stddef.h>\n#include <stb/stb_image.h>\n"):
            flags.append("-DSTV_HAVE_STB")
        else:
            print("stllava: no stb/stb_image.h (Debian: libstb-dev); pictures are decoded by Pillow alone", flush=True)

        blas, link = self._blas(libs)
        flags += blas
        digest = hashlib.sha256(shlex.join(self.cc + flags).encode()).hexdigest()[:12]
        self.objects = HERE / "build" / "objects" / digest
        jobs = core_sources() + binding_sources()
        self._record(flags, jobs)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
            cuda = pool.submit(self._build_cuda, libs)
            compiled = list(pool.map(lambda job: self._compile(flags, *job), jobs))
            cuda.result()

        link += ["-pthread", "-Wl,-z,relro,-z,now"] if os.uname().sysname == "Linux" else ["-pthread"]
        if SANITIZE:
            link.append("-fsanitize=address,undefined")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object([str(o) for o in compiled], str(target), libraries=["m"], extra_postargs=link)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the libraries go along."""
        super().copy_extensions_to_source()
        shutil.rmtree(HERE / "stllava_c" / "libs", ignore_errors=True)
        for library in Path(self.build_lib, "stllava_c", "libs").glob("*"):
            place(library, HERE / "stllava_c" / "libs")

    def _blas(self, libs: Path) -> tuple[list[str], list[str]]:
        """(compiler flags, linker flags); the bundled library is found beside the extension, nothing has to be installed afterwards."""
        wanted = switch("STLLAVA_BLAS", "bundled", ("bundled", "system", "none"))
        if wanted == "none":
            return [], []
        if wanted == "system":
            return ["-DSTV_HAVE_BLAS"], ["-lopenblas"]
        import scipy_openblas32
        source = next(Path(scipy_openblas32.get_lib_dir()).glob(f"lib{scipy_openblas32.get_library()}.so*"))
        place(source, libs)
        return ["-DSTV_HAVE_BLAS", "-DSTV_BLAS_BUNDLED"], [str(libs / source.name), "-Wl,-rpath,$ORIGIN/libs"]

    def _record(self, flags: list[str], jobs: list[tuple[Path, list[str], str]]) -> None:
        """build/compile_commands.json, for editors and clang-tidy; of a source that is compiled twice, the f32 command."""
        commands = {str(source): [*self.cc, *flags, *extra, "-c", str(source)] for source, extra, _ in reversed(jobs)}
        self.objects.mkdir(parents=True, exist_ok=True)
        (HERE / "build" / "compile_commands.json").write_text(json.dumps(
            [{"directory": str(HERE), "file": file, "arguments": arguments} for file, arguments in commands.items()], indent=1))

    def _compile(self, flags: list[str], source: Path, extra: list[str], name: str) -> Path:
        target = (self.objects / name).with_name(Path(name).name + ".o")
        if not up_to_date(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            run([*self.cc, *flags, *extra, "-MMD", "-MP", "-c", str(source), "-o", str(target)])
        return target

    def _compiles(self, text: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.c")
            probe.write_text(text)
            command = [*self.cc, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _build_cuda(self, libs: Path) -> None:
        """The GPU kernels as libs/libstllava_cuda.so, which nothing loads before a GPU is asked for; so the CPU build is the same without."""
        wanted = switch("STLLAVA_CUDA", "auto", ("auto", "0", "1"))
        sources = sorted((CORE / "ops").glob("*.cu"))
        if wanted == "0" or not sources:
            return
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
        problem = "no nvcc on PATH or in CUDA_HOME"
        if nvcc:
            target = self.objects / "libstllava_cuda.so"
            inputs = [*sources, *CORE.rglob("*.h")]
            arch = os.environ.get("STLLAVA_CUDA_ARCH", "sm_90")
            command = [nvcc, "-O3", f"-arch={arch}", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CORE}",
                       *map(str, sources), "-o", str(target)]
            if not target.exists() or any(i.stat().st_mtime > target.stat().st_mtime for i in inputs):
                self.objects.mkdir(parents=True, exist_ok=True)
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                problem = f"{shlex.join(command)}\n{done.stdout}{done.stderr}" if done.returncode else ""
            else:
                problem = ""
            if not problem:
                place(target, libs)
                return
        if wanted == "1":
            raise SystemExit(f"setup.py: STLLAVA_CUDA=1, but: {problem}")
        print(f"stllava: no GPU kernels: {problem}", flush=True)


def place(file: Path, folder: Path) -> None:
    """Copies by renaming: a process that has the old file loaded keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, folder / f"{file.name}.new")
    os.replace(folder / f"{file.name}.new", folder / file.name)


def up_to_date(target: Path) -> bool:
    """True when the object is newer than everything its dependency file names."""
    record = target.with_suffix(".d")
    if not (target.exists() and record.exists()):
        return False
    names = record.read_text().replace("\\\n", " ").split("\n")[0].split()[1:]
    try:
        return all(os.stat(name).st_mtime <= target.stat().st_mtime for name in names)
    except FileNotFoundError:
        return False


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"setup.py: the compiler failed\n{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, flush=True)


setup(
    version=VERSION,
    ext_modules=[Extension("stllava_c._core", sources=[], py_limited_api=not FREE_THREADED)],
    cmdclass={"build_ext": Build},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
