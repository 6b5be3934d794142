"""What else LLaVA's scripts import."""

from __future__ import annotations

__all__ = ["disable_torch_init"]


def disable_torch_init() -> None:
    """Nothing: our weights are read, never drawn first. Source: `llava/utils.py`, where it keeps torch from drawing weights that are overwritten."""
