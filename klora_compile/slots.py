"""The names of slots: ``content`` and ``style``; ``content.1``, ``content.2``, … where a role has
several."""

from __future__ import annotations

from collections.abc import Iterable

CONTENT, STYLE = "content", "style"
ROLES = (CONTENT, STYLE)


def slot_names(contents: int, styles: int) -> tuple[str, ...]:
    """The slots of so many content and so many style LoRAs, in their order."""
    return (*_of_role(CONTENT, contents), *_of_role(STYLE, styles))


def role_of(slot: str) -> str:
    """``content`` or ``style``."""
    return slot.partition(".")[0]


def in_order(slots: Iterable[str]) -> tuple[str, ...]:
    """Slots as the LoRAs were given: contents first, ``content.2`` before ``content.10``."""
    return tuple(sorted(slots, key=_place))


def _of_role(role: str, count: int) -> tuple[str, ...]:
    return (role,) if count == 1 else tuple(f"{role}.{number}" for number in range(1, count + 1))


def _place(slot: str) -> tuple[str, int, str]:
    role, _, number = slot.partition(".")
    digits = number.lstrip("0")
    return role, len(digits), digits  # as numbers, of any length
