"""The language of the demo: what is true of an image, and every question and answer about it.

Each question type has one wording, so that the whole language fits a vocabulary of 512 pieces. `Facts` is the truth of one
image; a fact that is unknown or does not apply is None, and questions about it are not asked. Question types follow those of
VQA-RAD and SLAKE (modality, organ, plane, position, colour, presence); "organ" includes the abdomen and the cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CLOSED", "DESCRIBE", "FORMS", "Facts", "Form", "OPEN", "Question", "caption", "corpus_lines", "parse", "question_texts"]

DESCRIBE = "Can you describe the image in detail?"  # the first turn of the asking step (spec 1.4 step A)

MRI = ("T1 MRI", "T2 MRI", "EPI MRI")
TISSUE_MAPS = ("grey matter map", "white matter map")
MODALITIES = (*MRI, *TISSUE_MAPS, "fundus photograph", "histology", "microscopy", "CT", "ultrasound")
ORGANS = ("brain", "eye", "colon", "cell", "spine", "abdomen", "lymph node", "heart")
PLANES = ("axial", "coronal", "sagittal")
COLOURS = ("red", "green", "blue", "yellow")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")


@dataclass(frozen=True, slots=True)
class Facts:
    """The truth of one image.

    `plane` is None for pictures without one; `cerebellum` and `ventricles` are None where the anatomy is not certain or not shown
    by this modality; `marker` says whether a marker was drawn, `colour` and `quadrant` are None without one.
    """

    modality: str
    organ: str
    plane: str | None = None
    cerebellum: bool | None = None
    ventricles: bool | None = None
    marker: bool = False
    colour: str | None = None
    quadrant: str | None = None

    @property
    def is_mri(self) -> bool | None:
        """None for tissue maps, which are computed from an MRI but are not one."""
        return None if self.modality in TISSUE_MAPS else self.modality in MRI

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Facts:
        return cls(**record)


@dataclass(frozen=True, slots=True)
class Form:
    """One question type. `text` may hold a slot `{}`, filled from `choices`; `answer(facts, choice)` is None when not known."""

    type: str
    text: str
    answer: Callable[[Facts, str], str | None]
    choices: tuple[str, ...] = ()
    true_choice: str = ""  # name of the fact that the slot is compared with

    @property
    def closed(self) -> bool:
        return self.type in CLOSED


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image with its true answer."""

    type: str
    question: str
    answer: str


def caption(facts: Facts) -> str:
    """One line with every fact: "a coronal T1 MRI of the brain, showing the cerebellum, with a red marker in the lower left"."""
    kind = facts.modality
    if kind in ("histology", "microscopy"):
        kind += " picture"
    words = f"{facts.plane} {kind}" if facts.plane else kind
    article = "an" if words.startswith(("axial", "ultrasound")) else "a"
    text = f"{article} {words} of the {facts.organ}"
    structures = (("the cerebellum", facts.cerebellum), ("the lateral ventricles", facts.ventricles))
    seen = [name for name, visible in structures if visible]
    if seen:
        text += ", showing " + " and ".join(seen)
    if facts.marker:
        text += f", with a {facts.colour} marker in the {facts.quadrant}"
    return text


def _yes_no(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _same(value: str | None, choice: str) -> str | None:
    return None if value is None else _yes_no(value == choice)


FORMS = (
    Form("describe", DESCRIBE, lambda f, _: caption(f)),
    Form("caption", "what does the image show?", lambda f, _: caption(f)),
    Form("modality", "what is the modality?", lambda f, _: f.modality),
    Form("organ", "which organ is shown?", lambda f, _: f.organ),
    Form("plane", "what is the plane?", lambda f, _: f.plane),
    Form("quadrant", "where is the marker?", lambda f, _: f.quadrant),
    Form("colour", "what colour is the marker?", lambda f, _: f.colour),
    Form("is_mri", "is this an MRI?", lambda f, _: _yes_no(f.is_mri)),
    Form("is_plane", "is the plane {}?", lambda f, choice: _same(f.plane, choice), PLANES, "plane"),
    Form("is_organ", "is the organ the {}?", lambda f, choice: _same(f.organ, choice), ORGANS, "organ"),
    Form("marker", "is there a marker?", lambda f, _: _yes_no(f.marker)),
    Form("is_colour", "is the marker {}?", lambda f, choice: _same(f.colour, choice), COLOURS, "colour"),
    Form("cerebellum", "is the brain shown with the cerebellum?", lambda f, _: _yes_no(f.cerebellum)),
    Form("ventricles", "is the brain shown with the lateral ventricles?", lambda f, _: _yes_no(f.ventricles)),
)
BY_TYPE = {form.type: form for form in FORMS}
OPEN = ("caption", "modality", "organ", "plane", "quadrant", "colour")
CLOSED = ("is_mri", "is_plane", "is_organ", "marker", "is_colour", "cerebellum", "ventricles")
# Never asked in the base model's training, only named by its captions. They are worded in words that the base writes: pieces it never wrote
# ("are", "visible") cannot be told apart by its frozen embeddings, and a quarter of what it asks itself after stage 1 would be garbled.
STRUCTURES = ("cerebellum", "ventricles")


def ask(type_: str, facts: Facts, rng: np.random.Generator) -> Question | None:
    """A question of one type about an image, or None when its answer is not known.

    A slot gets the true value half of the time, so that a verification question is "yes" as often as "no".
    """
    form = BY_TYPE[type_]
    choice = ""
    if form.choices:
        truth = getattr(facts, form.true_choice)
        if truth is None:
            return None
        choice = truth if rng.random() < 0.5 else str(rng.choice([c for c in form.choices if c != truth]))
    answer = form.answer(facts, choice)
    return None if answer is None else Question(type_, form.text.format(choice), answer)


def ask_all(types: tuple[str, ...], facts: Facts, rng: np.random.Generator) -> list[Question]:
    """Every question of the given types whose answer is known, in the given order."""
    asked = (ask(type_, facts, rng) for type_ in types)
    return [question for question in asked if question is not None]


def normalise(text: str) -> str:
    """Lower case, single spaces, no space before the question mark."""
    return re.sub(r"\s+([?.,])", r"\1", " ".join(text.lower().split()))


def parse(text: str) -> tuple[Form, str] | None:
    """The form and slot value of a question text in any letter case; None when it is not one of the known questions."""
    return _KNOWN.get(normalise(text))


def question_texts() -> list[str]:
    """Every question that exists, slots filled."""
    return [form.text.format(choice) for form in FORMS for choice in form.choices or ("",)]


_KNOWN = {normalise(form.text.format(choice)): (form, choice) for form in FORMS for choice in form.choices or ("",)}


def corpus_lines(n_captions: int = 4000, *, seed: int = 0) -> Iterator[str]:
    """Text for training a vocabulary: every question and short answer, and `n_captions` captions of random facts."""
    yield from question_texts()
    yield from (*MODALITIES, *ORGANS, *PLANES, *COLOURS, *QUADRANTS, "yes", "no")
    rng = np.random.Generator(np.random.Philox(seed))
    for _ in range(n_captions):
        facts = _random_facts(rng)
        yield caption(facts)
        for question in ask_all((*OPEN[1:], *CLOSED), facts, rng):
            yield question.question
            yield question.answer


def _random_facts(rng: np.random.Generator) -> Facts:
    def pick(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    brain = rng.random() < 0.62
    marker = bool(rng.random() < 0.58)
    return Facts(
        modality=pick(MODALITIES[:5] if brain else MODALITIES[5:]),
        organ="brain" if brain else pick(ORGANS[1:]),
        plane=pick(PLANES) if brain else None,
        cerebellum=bool(rng.random() < 0.5) if brain else None,
        ventricles=bool(rng.random() < 0.5) if brain else None,
        marker=marker,
        colour=pick(COLOURS) if marker else None,
        quadrant=pick(QUADRANTS) if marker else None,
    )
