"""Timelines: piecewise-constant coefficients of slots over progress, and clocks, which tell it.

A timeline is valid for every number of steps, because its breakpoints are progress values. A clock
says which progress a step has:

* ``step``: the middle of the step: step i of N is at (i + 1/2) / N, in (0, 1);
* ``noise``: what is gone of the noise in the middle of the step, in [0, 1). Where the noise falls
  linearly, the two are equal.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

ClockName = Literal["step", "noise"]

#: Names of all clocks; the first is the one of a fusion that names none.
CLOCKS: tuple[ClockName, ...] = get_args(ClockName)

#: The greatest number of segments of a timeline; see ``FORMAT.md``.
MAX_SEGMENTS = 4_096

#: The last float64 below 1.
_LAST = math.nextafter(1.0, 0.0)


def progress_of_step(index: int, steps: int) -> float:
    """Return the progress of step ``index`` (0-based) of ``steps``: (index + 1/2) / steps."""
    return (index + 0.5) / steps


def progress_between(before: float, after: float) -> float:
    """Return the progress of a step by noise: 1 - (before + after) / 2, clamped into [0, 1).

    Args:
        before: noise level before the step, 1 for noise and 0 for none.
        after: noise level after the step.
    """
    return min(max(1.0 - (before + after) / 2.0, 0.0), _LAST)


@dataclass(frozen=True)
class Timeline:
    """Coefficients of one layer's slots over progress; immutable.

    Segment j acts while ``starts[j] <= progress < starts[j + 1]``.
    """

    starts: tuple[float, ...]
    """Start of each segment: progress in [0, 1), strictly increasing; the first is 0."""
    coefficients: Mapping[str, tuple[float, ...]]
    """Slot name -> one finite coefficient per segment, without unit; 0 means no effect."""

    @classmethod
    def constant(cls, coefficients: Mapping[str, float]) -> Timeline:
        """Return a timeline of one segment."""
        return cls((0.0,), {slot: (value,) for slot, value in coefficients.items()})

    def segment(self, progress: float) -> int:
        """Return the index of the segment that acts at ``progress``."""
        return max(0, bisect_right(self.starts, progress) - 1)

    def at(self, progress: float) -> dict[str, float]:
        """Return slot name -> coefficient at ``progress``."""
        return self.row(self.segment(progress))

    def row(self, segment: int) -> dict[str, float]:
        """Return slot name -> coefficient in segment ``segment``."""
        return {slot: values[segment] for slot, values in self.coefficients.items()}

    def rows(self) -> Iterator[tuple[float, dict[str, float]]]:
        """Yield each segment's start and coefficients, in order."""
        for index, start in enumerate(self.starts):
            yield start, self.row(index)

    def uses(self, slot: str) -> bool:
        """Return whether ``slot`` has an effect at any progress."""
        return any(self.coefficients.get(slot, ()))

    @property
    def switches(self) -> bool:
        """Whether a coefficient changes between progress 0 and 1."""
        return len(self.starts) > 1


class Agenda:
    """The breakpoints of many timelines in one sorted list.

    Args:
        timelines: one per layer; the index identifies the layer.
    """

    def __init__(self, timelines: Sequence[Timeline]) -> None:
        events = sorted(
            (start, layer)
            for layer, timeline in enumerate(timelines)
            for start in timeline.starts[1:]
        )
        self._moments = [moment for moment, _ in events]
        self._layers = [layer for _, layer in events]

    def __len__(self) -> int:
        return len(self._moments)

    def between(self, one: float, other: float) -> list[int]:
        """Return the layers with a breakpoint between two progress values, in any order; sorted."""
        low, high = sorted((one, other))
        first = bisect_right(self._moments, low)
        last = bisect_right(self._moments, high)
        return sorted(set(self._layers[first:last]))
