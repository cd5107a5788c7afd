"""Fusions: a schedule together with the numbers that it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.making import made
from klora_runtime.artifact.schedule import EntryOf, ScheduleOf


@dataclass(frozen=True)
class Entry(EntryOf[Stored]):
    """One adapted parameter, a *layer*, with its numbers."""


@dataclass(frozen=True, repr=False)
class Fusion(ScheduleOf[Stored]):
    """Two or more LoRAs and the schedule that fuses them: the content of an artifact."""

    entries: tuple[Entry, ...]
    """Sorted by component, module and parameter."""

    @classmethod
    def linked(cls, entries: Callable[[], tuple[Entry, ...]], **fields: Any) -> Fusion:
        """Return a fusion whose entries are made when they are first needed.

        Args:
            entries: returns them, and raises nothing.
            fields: all other fields.
        """
        return made(cls, _entries=entries, **fields)

    def __getattr__(self, name: str) -> Any:
        """Make the entries of :meth:`linked`."""
        make = vars(self).get("_entries")
        if name != "entries" or (make is None and "entries" not in vars(self)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if make is not None:  # else another thread has made them meanwhile
            vars(self).setdefault("entries", make())
            vars(self).pop("_entries", None)
        return vars(self)["entries"]

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the entries themselves."""
        return {"entries": self.entries} | vars(self)
