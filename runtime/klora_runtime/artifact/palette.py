"""Colours of slots: cool ones for contents, warm ones for styles; two for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from klora_runtime.artifact.schedule import ALWAYS, CONTENT, MERGED, ROLES, STYLE, Schedule, Slot

Rgb = tuple[int, int, int]

#: The colours of the roles: a blue and an orange that differ in print and for colour-blind readers,
#: a purple for what they were merged to, and a grey for what acts beside them.
CONTENT_RGB: Rgb = (38, 103, 168)
STYLE_RGB: Rgb = (232, 133, 44)
MERGED_RGB: Rgb = (127, 90, 160)
ALWAYS_RGB: Rgb = (110, 110, 110)
#: Role -> colours of its slots, in their order; further slots have them again, lighter.
_OF_ROLES: Mapping[str, tuple[Rgb, ...]] = {
    CONTENT: (CONTENT_RGB, (0, 140, 110), (90, 185, 225), (75, 70, 150)),
    STYLE: (STYLE_RGB, (196, 56, 84), (222, 194, 45), (140, 86, 52)),
    MERGED: (MERGED_RGB,),
    ALWAYS: (ALWAYS_RGB, (170, 170, 170)),
}

_WHITE: Rgb = (255, 255, 255)

#: How much of its colour a slot keeps each time that the colours of its role are used again.
_KEPT = 0.6


def colours(slots: Mapping[str, Slot]) -> dict[str, Rgb]:
    """Return slot -> colour: contents, styles, the rest; each role in the order of its LoRAs."""
    roles = {name: slot.role for name, slot in slots.items()}
    ordered = sorted(roles, key=lambda name: _place(name, roles[name]))
    found = {}
    for name in ordered:
        kin = [other for other in ordered if roles[other] == roles[name]]
        hues = _OF_ROLES[roles[name]]
        rounds, place = divmod(kin.index(name), len(hues))
        found[name] = mixed([(hues[place], _KEPT**rounds), (_WHITE, 1.0 - _KEPT**rounds)])
    return found


def shown_slots(fusion: Schedule) -> dict[str, Slot]:
    """Return the slots that reports show: all but a merged one that acts nowhere."""
    return {
        name: slot
        for name, slot in fusion.slots.items()
        if slot.role != MERGED or any(entry.timeline.uses(name) for entry in fusion.entries)
    }


def mixed(parts: Sequence[tuple[Rgb, float]]) -> Rgb:
    """Mix colours in the given shares, which add up to 1."""
    red, green, blue = (round(sum(share * colour[i] for colour, share in parts)) for i in range(3))
    return red, green, blue


def parts_of(row: Mapping[str, float]) -> dict[str, float]:
    """Return slot -> its share of the sum of |coefficients|; empty if nothing acts."""
    largest = max(map(abs, row.values()), default=0.0)
    if not largest:
        return {}
    sizes = {slot: abs(value) / largest for slot, value in row.items() if value}
    total = sum(sizes.values())
    return {slot: size / total for slot, size in sizes.items()}


def _place(name: str, role: str) -> tuple[int, str, int, str]:
    """Return a sort key that puts ``content.2`` before ``content.10``."""
    stem, _, number = name.partition(".")
    digits = number.lstrip("0")
    return ROLES.index(role), stem, len(digits), digits
