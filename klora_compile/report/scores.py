"""What an artifact says that its rule measured: provenance, which any tool may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora_runtime.artifact.schedule import Schedule, ScheduledEntry


def number_of(fusion: Schedule, entry: ScheduledEntry, *names: str) -> float | None:
    """One number of a layer, or None where the scores of the fusion's rule have none there.

    Args:
        fusion: whose rule counts.
        entry: the layer.
        names: from the outermost on: ``"ratio"``, or ``"content", "l1"``.
    """
    value: Any = entry.scores.get(fusion.rule.name)
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) else None
