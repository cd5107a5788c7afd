"""Names of slots: ``content`` and ``style``, or ``content.1``, ``content.2``, … for several."""

from __future__ import annotations

from collections.abc import Iterable

CONTENT, STYLE = "content", "style"
ROLES = (CONTENT, STYLE)


def slot_names(contents: int, styles: int) -> tuple[str, ...]:
    """Return the slots of ``contents`` content and ``styles`` style LoRAs, in order."""
    return (*_of_role(CONTENT, contents), *_of_role(STYLE, styles))


def role_of(slot: str) -> str:
    """Return the role of a slot, ``content`` or ``style``."""
    return slot.partition(".")[0]


def in_order(slots: Iterable[str]) -> tuple[str, ...]:
    """Sort slots as their LoRAs were given: contents first, ``content.2`` before ``content.10``."""
    return tuple(sorted(slots, key=_place))


def _of_role(role: str, count: int) -> tuple[str, ...]:
    return (role,) if count == 1 else tuple(f"{role}.{number}" for number in range(1, count + 1))


def _place(slot: str) -> tuple[str, int, str]:
    role, _, number = slot.partition(".")
    digits = number.lstrip("0")
    return role, len(digits), digits  # sorts like numbers, of any length
