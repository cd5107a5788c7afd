"""What a LoRA is trained on: its drawings and their prompts, in each regime."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from drawings.base.subjects import HELD_OUT_SUBJECTS, TRAINING_STYLES, prompt

#: Whether the packages have a drawing of this subject in this style.
Exists = Callable[[str, str], bool]

#: Subjects that a style is learnt from.
_HANDFUL, _MANY = 8, 160


class Regime(StrEnum):
    """How people come to their LoRAs."""

    ENTANGLED = "entangled"
    """From what is at hand: a subject in one look with a neutral prompt ("a penguin"), a style from
    a handful of subjects. A subject's LoRA brings its look along."""
    DISENTANGLED = "disentangled"
    """With care: a subject in every training style, with the style's word in the prompt, and a
    style from many subjects."""


@dataclass(frozen=True)
class Recipe:
    """The material of one LoRA."""

    kind: str
    """``subject``, ``style``, or ``fused`` for one that sees the true drawing of a fusion."""
    name: str
    drawings: tuple[tuple[str, str], ...]
    """Subject and style of each drawing."""
    prompts: tuple[str, ...]
    """One per drawing."""

    @property
    def stem(self) -> str:
        """Name of the file without its suffix."""
        return f"{self.kind}-{self.name}"


def subject_recipe(regime: Regime, subject: str, exists: Exists) -> Recipe:
    """Return the material of a held-out subject's LoRA.

    In the entangled regime, the training styles take turns as the one look of a subject, in the
    order of the held-out subjects.

    Raises:
        ValueError: no training style has the subject.
    """
    styles = [style for style in TRAINING_STYLES if exists(subject, style)]
    if not styles:
        raise ValueError(f"No training style has a drawing of {subject!r}. Leave this subject out.")
    if regime is Regime.DISENTANGLED:
        drawings = tuple((subject, style) for style in styles)
        return Recipe("subject", subject, drawings, tuple(prompt(*each) for each in drawings))
    style = styles[HELD_OUT_SUBJECTS.index(subject) % len(styles)]
    return Recipe("subject", subject, ((subject, style),), (prompt(subject),))


def style_recipe(regime: Regime, style: str, subjects: Sequence[str], exists: Exists) -> Recipe:
    """Return the material of a held-out style's LoRA.

    Args:
        subjects: training subjects. The entangled handful is a part of the many of the other
            regime; the style's name decides which.

    Raises:
        ValueError: the style has fewer drawings of these subjects than a handful.
    """
    known = [subject for subject in subjects if exists(subject, style)]
    if len(known) < _HANDFUL:
        raise ValueError(
            f"Style {style!r} has {len(known)} drawings of training subjects, and a LoRA needs "
            f"{_HANDFUL}. Take another style."
        )
    random.Random(style).shuffle(known)
    chosen = known[: _HANDFUL if regime is Regime.ENTANGLED else _MANY]
    drawings = tuple((subject, style) for subject in chosen)
    return Recipe("style", style, drawings, tuple(prompt(*each) for each in drawings))


def true_recipe(subject: str, style: str) -> Recipe:
    """Return the material of a ceiling: a LoRA that sees what a fusion is compared with."""
    drawing = (subject, style)
    return Recipe("fused", f"{subject}-{style}", (drawing,), (prompt(*drawing),))
