"""A colour for each slot: blues for contents, oranges for styles, from dark to light."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from klora_compile.slots import CONTENT, in_order, role_of

Rgb = tuple[int, int, int]

#: Colours of the two roles: a blue and an orange that stay apart in print and for colour-blind
#: readers.
CONTENT_RGB: Rgb = (38, 103, 168)
STYLE_RGB: Rgb = (232, 133, 44)

_WHITE: Rgb = (255, 255, 255)

#: How far the last slot of a role is on its way to white.
_LIGHTEST = 0.6


def colours(slots: Iterable[str]) -> dict[str, Rgb]:
    """Slot -> colour, in the order of the LoRAs."""
    ordered = in_order(slots)
    found = {}
    for slot in ordered:
        kin = [other for other in ordered if role_of(other) == role_of(slot)]
        share = _LIGHTEST * kin.index(slot) / max(1, len(kin) - 1)
        base = CONTENT_RGB if role_of(slot) == CONTENT else STYLE_RGB
        found[slot] = mixed([(base, 1.0 - share), (_WHITE, share)])
    return found


def mixed(parts: Sequence[tuple[Rgb, float]]) -> Rgb:
    """Colours mixed in these parts, which add up to 1."""
    red, green, blue = (round(sum(share * colour[i] for colour, share in parts)) for i in range(3))
    return red, green, blue


def parts_of(row: Mapping[str, float]) -> dict[str, float]:
    """Slot -> its part of all that acts, by the size of coefficients; empty where nothing acts."""
    total = sum(map(abs, row.values()))
    return {slot: abs(value) / total for slot, value in row.items() if value} if total else {}
