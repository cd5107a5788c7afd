"""Fusions: a schedule together with the numbers that it applies."""

from __future__ import annotations

from dataclasses import dataclass

from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.schedule import EntryOf, ScheduleOf


@dataclass(frozen=True)
class Entry(EntryOf[Stored]):
    """One adapted parameter, a *layer*, with its numbers."""


@dataclass(frozen=True, repr=False)
class Fusion(ScheduleOf[Stored]):
    """Two or more LoRAs and the schedule that fuses them: the content of an artifact."""

    entries: tuple[Entry, ...]
    """Sorted by component, module and parameter."""
