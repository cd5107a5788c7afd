"""Scores of an artifact: provenance, which any tool may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora_runtime.artifact.schedule import Schedule, ScheduledEntry


def number_of(fusion: Schedule, entry: ScheduledEntry, *names: str) -> float | None:
    """Return one number of a layer; None if the scores of the fusion's rule lack it.

    Args:
        fusion: the fusion, whose rule selects the scores.
        entry: the layer.
        names: keys from the outermost on: ``"ratio"``, or ``"content", "l1"``.
    """
    value: Any = entry.scores.get(fusion.rule.name)
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) else None
