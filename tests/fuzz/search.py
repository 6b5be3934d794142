"""libFuzzer on a Python target, by atheris: `python tests/fuzz/search.py TARGET [libFuzzer's flags] [FOLDER...]`.

`make fuzz` installs atheris (build/fuzz/atheris), gives the corpus and the time. It is no test dependency: there is not a wheel for every interpreter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["stllava"], enable_loader_override=False):
    import parsers

name = sys.argv.pop(1)
if name not in parsers.TARGETS:
    raise SystemExit(f"no target {name!r}, want one of {', '.join(parsers.TARGETS)}")


def one_input(data: bytes) -> None:
    parsers.run(name, data)


atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
