"""Choices that several rules make for a layer, and one sentence on each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: Progress from which it holds, and slot -> coefficient; slots that are not named have none.
Segment = tuple[float, Mapping[str, float]]


@dataclass(frozen=True)
class Choice:
    """What a rule decides for one layer."""

    fate: str
    """In a few words, one of :attr:`klora_compile.rules.rule.Rule.fates`."""
    segments: tuple[Segment, ...]
    """At least one; the first starts at 0."""
    ratio: float | None = None
    """What the choice goes by, 1 where both sides are even; None where nothing is compared."""


#: Fates where a content and a style compete for a layer, each with one sentence.
DUEL: Mapping[str, str] = {
    "always content": "the content LoRA at every step",
    "always style": "the style LoRA at every step",
    "switching": "one LoRA at a time, changing at the timeline's breakpoints",
}

#: The same where all LoRAs act together.
SUM: Mapping[str, str] = {"summed": "all its LoRAs together, at constant weights"}


def duel(
    content: str, style: str, choices: Sequence[tuple[float, bool]], ratio: float | None
) -> Choice:
    """One LoRA at a time.

    Args:
        content: the slot that acts where the choice is true.
        style: the slot that acts elsewhere.
        choices: of :func:`klora_compile.rules.kit.breakpoints.switches`.
        ratio: of :class:`Choice`.
    """
    fate = "switching"
    if len(choices) == 1:
        fate = "always content" if choices[0][1] else "always style"
    segments = tuple((start, {content if chosen else style: 1.0}) for start, chosen in choices)
    return Choice(fate, segments, ratio)


def total(slots: Iterable[str]) -> Choice:
    """All LoRAs at weight 1."""
    return Choice("summed", ((0.0, dict.fromkeys(slots, 1.0)),))
