"""Names of slots: ``content`` and ``style``, or ``content.1``, ``content.2``, … for several.

``merged`` is what a rule merged them to. Any other name, such as ``turbo``, is that of a LoRA that
always acts. A LoRA in two files, for models with a denoiser for high noise and one for low noise,
has the sources ``content.high`` and ``content.low``; any other LoRA's source has the name of its
slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from klora_runtime.artifact.schedule import ALWAYS, CONTENT, MERGED, ROLES, STYLE

#: The roles that a rule schedules.
SCHEDULED = (CONTENT, STYLE)


#: The halves of a LoRA in two files, and the component that the second one changes.
HIGH, LOW = HALVES = ("high", "low")
SECOND_DENOISER: Literal["transformer_2"] = "transformer_2"


def slot_names(contents: int, styles: int) -> tuple[str, ...]:
    """Return the slots of ``contents`` content and ``styles`` style LoRAs, in order."""
    return (*_of_role(CONTENT, contents), *_of_role(STYLE, styles))


def role_of(slot: str) -> str:
    """Return the role of a slot, from its name."""
    stem = slot.partition(".")[0]
    return stem if stem in (*SCHEDULED, MERGED) else ALWAYS


def scheduled(slots: Iterable[str]) -> tuple[str, ...]:
    """Return the slots of LoRAs that a rule schedules, in the given order."""
    return tuple(slot for slot in slots if role_of(slot) in SCHEDULED)


def made(slots: Iterable[str]) -> tuple[str, ...]:
    """Return the slots that a rule made beside those of LoRAs, in the given order."""
    return tuple(slot for slot in slots if role_of(slot) == MERGED)


def slot_of(source: str) -> str:
    """Return the slot of a source."""
    stem, _, half = source.rpartition(".")
    return stem if stem and half in HALVES else source


def half_of(component: str) -> str:
    """Return which half of a LoRA changes a component."""
    return LOW if component == SECOND_DENOISER else HIGH


def slots_of(sources: Iterable[str]) -> tuple[str, ...]:
    """Return the slots of sources, in the given order."""
    return tuple(dict.fromkeys(map(slot_of, sources)))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort slots or sources: contents, styles, the rest by name; numbers sort by value."""
    return tuple(sorted(names, key=_place))


def _of_role(role: str, count: int) -> tuple[str, ...]:
    return (role,) if count == 1 else tuple(f"{role}.{number}" for number in range(1, count + 1))


def _place(source: str) -> tuple[int, str, int, str, str]:
    slot = slot_of(source)
    stem, _, number = slot.partition(".")
    digits = number.lstrip("0")
    # The digits sort like numbers, of any length.
    return ROLES.index(role_of(slot)), stem, len(digits), digits, source
