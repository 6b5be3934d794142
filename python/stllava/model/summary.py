"""A model in one line, for `repr` and for notebooks; from the core's tables, no weight is read."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from stllava.checkpoint import names

if TYPE_CHECKING:
    from .llava import LlavaModel

__all__ = ["html_table", "model_html", "model_line", "short_count"]


def model_line(model: LlavaModel) -> str:
    facts = _facts(model)
    return f"{type(model).__name__}({', '.join(f'{name}: {text}' for name, text in facts.items())})"


def model_html(model: LlavaModel) -> str:
    return html_table([_facts(model)])


def _facts(model: LlavaModel) -> dict[str, str]:
    stored: Counter[str] = Counter()
    n_adapters = n_trainable = 0
    for info in model.core.tensors():
        if info.offset >= 0:
            n_trainable += info.size
        if names.is_lora(info.name):
            n_adapters += info.size
        elif info.bound:
            stored[info.dtype] += info.size
    parts = [f"{part} r={config.r}" for part, config in model.lora.items()]
    adapters = f"{' + '.join(parts)}, {short_count(n_adapters)}{'' if model.adapters_enabled else ', switched off'}" if parts else "none"
    return {"model": model.config.model_type, "parameters": short_count(stored.total()),
            "weights": " + ".join(dtype for dtype, _ in stored.most_common()), "computes in": f"{model.dtype} on cpu", "adapters": adapters,
            "trainable": short_count(n_trainable)}


def short_count(n: int) -> str:
    """``7.24 B``, ``965 k``: three digits are enough to recognise a model by."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= 0.9995 * size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def html_table(rows: list[dict[str, str]]) -> str:
    """A table whose headings are the keys of the first row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row.values())}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
