"""The pages' templates: jinja2 (extra `report`) that escapes every value, since answers and data are other people's text."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["html_template"]


def html_template(package: str, name: str, **filters: Callable[..., Any]) -> Template:
    """The template `name` among the files of `package`. A name that it uses and nobody gives is an error. Raises ImportError without jinja2."""
    from jinja2 import Environment, StrictUndefined
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.from_string((resources.files(package) / name).read_text(encoding="utf-8"))
