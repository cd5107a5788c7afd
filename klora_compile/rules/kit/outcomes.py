"""Choices for a layer that several rules share, with one sentence about each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: Start as progress, and slot -> coefficient; slots that are not named have 0.
Segment = tuple[float, Mapping[str, float]]


@dataclass(frozen=True)
class Choice:
    """A rule's decision for one layer."""

    fate: str
    """A key of :attr:`klora_compile.rules.rule.Rule.fates`."""
    segments: tuple[Segment, ...]
    """One or more segments; the first starts at 0."""
    ratio: float | None = None
    """The ratio that decides, 1 if both sides are equal; None if nothing is compared."""


#: Fates of rules in which a content and a style compete for a layer, each with one sentence.
DUEL: Mapping[str, str] = {
    "always content": "the content LoRA at every step",
    "always style": "the style LoRA at every step",
    "switching": "one LoRA at a time, changing at the timeline's breakpoints",
}

#: Fates of rules in which all LoRAs act together, each with one sentence.
SUM: Mapping[str, str] = {"summed": "all its LoRAs together, at constant weights"}


def duel(
    content: str, style: str, choices: Sequence[tuple[float, bool]], ratio: float | None
) -> Choice:
    """Return the choice of one LoRA at a time.

    Args:
        content: the slot that acts in segments whose choice is true.
        style: the slot that acts in the other segments.
        choices: segments from :func:`klora_runtime.linking.breakpoints.switches`.
        ratio: see :class:`Choice`.
    """
    fate = "switching"
    if len(choices) == 1:
        fate = "always content" if choices[0][1] else "always style"
    segments = tuple((start, {content if chosen else style: 1.0}) for start, chosen in choices)
    return Choice(fate, segments, ratio)


def total(slots: Iterable[str]) -> Choice:
    """Return the choice of all LoRAs at weight 1."""
    return Choice("summed", ((0.0, dict.fromkeys(slots, 1.0)),))
