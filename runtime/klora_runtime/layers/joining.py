"""One entry of several, for a program that keeps in one parameter what diffusers keeps in several.

Some programs join query, key and value in one module. An entry then changes some rows of a
parameter, and other entries with timelines of their own change the others. Modes know one entry per
parameter. So the entries are joined: each slot of each part becomes a slot of the joined entry,
with zeros in all rows that are not its part's, and acts when its part says. Several fusions on one
model are joined in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from klora_runtime.artifact.delta import Delta, Dense, LowRank, Stored
from klora_runtime.artifact.fusion import Entry
from klora_runtime.artifact.timeline import Timeline

#: Fate of a joined entry.
JOINED = "joined"


@dataclass(frozen=True)
class Part:
    """What one entry adds to a parameter."""

    entry: Entry
    rows: tuple[range, ...] | None = None
    """Rows of the parameter that the entry's rows are, in this order; None for all."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Slot -> the user's factor on its deltas; a missing slot has 1."""


def joined_entry(
    component: str, module: str, parameter: str, shape: Sequence[int], parts: Sequence[Part]
) -> Entry:
    """Return one entry that acts as all its parts together, at every progress.

    Args:
        component: the component's name in the program.
        module: path of the program's module inside its component.
        parameter: name of the parameter in the module.
        shape: the parameter's shape.
        parts: what acts on it. Parts may have the same rows: their deltas add up.
    """
    starts = sorted({start for part in parts for start in part.entry.timeline.starts})
    coefficients: dict[str, tuple[float, ...]] = {}
    factors: dict[str, Stored] = {}
    for index, part in enumerate(parts):
        for slot, stored in part.entry.acting.items():
            values = part.entry.timeline.coefficients[slot]
            segments = map(part.entry.timeline.segment, starts)
            name = f"{index}.{slot}"
            coefficients[name] = tuple(values[segment] for segment in segments)
            delta = (
                stored.delta if part.rows is None else _in_rows(stored.delta, part.rows, shape[0])
            )
            scale = stored.scale * part.weights.get(slot, 1.0)
            factors[name] = replace(stored, scale=scale, delta=delta)
    timeline = Timeline(tuple(starts), coefficients)
    return Entry(component, module, parameter, tuple(shape), JOINED, timeline, factors, {})


def _in_rows(delta: Delta, rows: tuple[range, ...], out: int) -> Delta:
    """Return a delta of ``out`` rows that is zero outside of these."""
    index = torch.tensor([row for each in rows for row in each], dtype=torch.long)
    if isinstance(delta, LowRank):
        return LowRank(delta.down, _spread(delta.up, index, out))
    return Dense(_spread(delta.values, index, out))


def _spread(values: torch.Tensor, index: torch.Tensor, out: int) -> torch.Tensor:
    """Return a tensor of ``out`` rows with ``values`` at ``index``, and zeros elsewhere."""
    with torch.inference_mode(False):
        whole = values.new_zeros(out, *values.shape[1:])
        whole[index.to(values.device)] = values
    return whole
