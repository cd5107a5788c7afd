"""Names of slots: ``content`` and ``style``, or ``content.1``, ``content.2``, … for several.

Any other name, such as ``turbo``, is that of a LoRA that always acts.
"""

from __future__ import annotations

from collections.abc import Iterable

from klora_runtime.artifact.schedule import ALWAYS, CONTENT, ROLES, STYLE

#: The roles that a rule schedules.
SCHEDULED = (CONTENT, STYLE)


def slot_names(contents: int, styles: int) -> tuple[str, ...]:
    """Return the slots of ``contents`` content and ``styles`` style LoRAs, in order."""
    return (*_of_role(CONTENT, contents), *_of_role(STYLE, styles))


def role_of(slot: str) -> str:
    """Return the role of a slot, from its name."""
    stem = slot.partition(".")[0]
    return stem if stem in SCHEDULED else ALWAYS


def scheduled(slots: Iterable[str]) -> tuple[str, ...]:
    """Return the slots that a rule schedules, in the given order."""
    return tuple(slot for slot in slots if role_of(slot) != ALWAYS)


def in_order(slots: Iterable[str]) -> tuple[str, ...]:
    """Sort slots: contents, styles, the rest by name; ``content.2`` comes before ``content.10``."""
    return tuple(sorted(slots, key=_place))


def _of_role(role: str, count: int) -> tuple[str, ...]:
    return (role,) if count == 1 else tuple(f"{role}.{number}" for number in range(1, count + 1))


def _place(slot: str) -> tuple[int, str, int, str]:
    stem, _, number = slot.partition(".")
    digits = number.lstrip("0")
    # The digits sort like numbers, of any length.
    return ROLES.index(role_of(slot)), stem, len(digits), digits
