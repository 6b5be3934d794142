"""Damaged files of every format: the right result or a documented exception; no signal, no hang, no memory without bounds."""

from __future__ import annotations

import formats
import isolate
import pytest

SMALL = ("manifest", "tokenizer_config", "added_tokens", "preprocessor", "hf_processor", "adapter_expressions", "dpo")  # share their reader with another format


@pytest.mark.parametrize("name", formats.FORMATS)
def test_damaged_files(name: str, amount, capsys) -> None:
    n = amount(50 if name in SMALL else 200, 2000)
    report = isolate.run(name, n)
    if n == 2000:
        with capsys.disabled():
            print(f"\n{name}: {report}", end="")
    assert not report.failures, str(report)
    assert report.outcomes["read"] and len(report.outcomes) > 1, report.outcomes  # both ends of the road are reached
