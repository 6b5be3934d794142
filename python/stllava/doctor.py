"""What was built and what is here: the first thing to look at, and to send along, when something is odd."""

from __future__ import annotations

import importlib.metadata
import json as json_module
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = ["doctor", "main"]

REQUIRED = ("numpy", "pillow", "sentencepiece", "tqdm", "rich")
OPTIONAL = {"tokenizers": "tokenizers", "gguf": "gguf", "matplotlib": "demo", "jinja2": "demo", "pytest": "test", "hypothesis": "test",
            "safetensors": "test", "nltk": "test"}


def doctor() -> dict[str, Any]:
    """Facts as a plain dictionary: python, build (from the extension), threads, packages (version or None), cuda, base_model."""
    import stllava_c

    from .demo.base import base_model_path
    side_library = next(iter(sorted((Path(stllava_c.__file__).parent / "libs").glob("libstllava_cuda*"))), None)
    return {
        "python": platform.python_version(), "platform": platform.platform(), "build": stllava_c.build_info(),
        "threads": stllava_c.get_num_threads(),
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "cuda": {"nvcc": shutil.which("nvcc") is not None, "kernels_built": side_library is not None},
        "demo_base_model": (base_model_path() / "config.json").exists()}


def main(json: bool = False) -> int:
    """Prints the facts; exit code 1 if a required package is missing."""
    facts = doctor()
    if json:
        print(json_module.dumps(facts))
    else:
        _print(facts)
    return int(any(facts["packages"][name] is None for name in REQUIRED))


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    build = facts["build"]
    table = Table("what", "found", title=f"stllava {build['version']} on Python {facts['python']}")
    table.add_row("kernels", f"{build['cpu_level']}, {facts['threads']} threads")
    table.add_row("BLAS", build["blas"])
    table.add_row("stb_image", "yes" if build["stb_image"] else "no: pictures are decoded by Pillow (Debian: libstb-dev, then build again)")
    table.add_row("CUDA kernels", "built" if facts["cuda"]["kernels_built"] else "not built" + (" (nvcc is here)" if facts["cuda"]["nvcc"] else ""))
    table.add_row("build", "sanitizers" if build["sanitizers"] else "debug" if build["debug"] else "release")
    table.add_row("demo base model", "yes" if facts["demo_base_model"] else "no")
    for name, version in facts["packages"].items():
        extra = OPTIONAL.get(name)
        table.add_row(name, version or (f"missing: pip install 'stllava[{extra}]'" if extra else "missing: pip install stllava"))
    Console(file=sys.stdout).print(table)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
