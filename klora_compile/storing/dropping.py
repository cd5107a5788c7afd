"""Fusions without the factors that their schedule never uses: smaller, for one schedule only."""

from __future__ import annotations

from dataclasses import replace

from klora_compile.planning.fates import fate_with
from klora_runtime.artifact.fusion import Entry, Fusion


def drop_unused(fusion: Fusion) -> Fusion:
    """Return a fusion that holds only what its schedule uses.

    Pictures stay the same to the bit. :func:`~klora_compile.rescheduling.reschedule` then makes
    only schedules that use no dropped slot.

    Args:
        fusion: a compiled or loaded fusion.
    """
    return replace(fusion, entries=tuple(map(without_unused, fusion.entries)))


def without_unused(entry: Entry) -> Entry:
    """Return an entry that holds only the slots that act."""
    uses = entry.timeline.uses
    factors = {slot: stored for slot, stored in entry.factors.items() if uses(slot)}
    references = {slot: place for slot, place in entry.references.items() if uses(slot)}
    fate = fate_with(entry.fate, (*factors, *references))
    return replace(entry, fate=fate, factors=factors, references=references)


def holds_unused(entry: Entry) -> bool:
    """Return whether an entry holds a slot that never acts."""
    return not all(map(entry.timeline.uses, (*entry.factors, *entry.references)))
