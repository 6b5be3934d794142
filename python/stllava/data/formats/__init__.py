"""Published layouts of instruction, preference and question data -> neutral records. `data.records.read_records` is the door to it.

    rows       files -> rows: JSON list, JSON lines, objects joined by commas, pickle, Parquet
    layouts    the table of layouts: told by fields, each with its neutral form
    messages   TRL and Hugging Face rows        vqa      VQA-RAD, SLAKE, PathVQA        directory   published directories
    load       all of it, and what was found    write    neutral records -> a layout
"""

from __future__ import annotations

from .layouts import LAYOUTS, Layout, known_layouts, neutral
from .load import Description, Loaded, describe, load, neutral_records, why_not
from .messages import images_of

__all__ = ["LAYOUTS", "Description", "Layout", "Loaded", "describe", "images_of", "known_layouts", "load", "neutral", "neutral_records", "why_not"]
