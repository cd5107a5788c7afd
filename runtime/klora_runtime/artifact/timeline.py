"""How much of each slot acts at which progress: piecewise-constant coefficients.

Progress is the middle of a step: step i of N is at (i + 1/2) / N, in (0, 1). A timeline holds
for every N, because its breakpoints are progress and not steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

#: Segments of one timeline at most; see ``FORMAT.md``.
MAX_SEGMENTS = 4_096


def progress_of_step(index: int, steps: int) -> float:
    """Progress of step ``index`` (0-based) of ``steps``: (index + 1/2) / steps."""
    return (index + 0.5) / steps


@dataclass(frozen=True)
class Timeline:
    """Coefficients of one layer's slots over progress; immutable.

    Segment j acts while ``starts[j] <= progress < starts[j + 1]``.
    """

    starts: tuple[float, ...]
    """Where each segment begins: progress in [0, 1), strictly increasing, the first is 0."""
    coefficients: Mapping[str, tuple[float, ...]]
    """Slot name -> one finite coefficient per segment, without a unit; 0 means no effect."""

    @classmethod
    def constant(cls, coefficients: Mapping[str, float]) -> Timeline:
        """A timeline of one segment."""
        return cls((0.0,), {slot: (value,) for slot, value in coefficients.items()})

    def segment(self, progress: float) -> int:
        """Index of the segment that acts at ``progress``."""
        return max(0, bisect_right(self.starts, progress) - 1)

    def at(self, progress: float) -> dict[str, float]:
        """Slot name -> coefficient at ``progress``."""
        return self.row(self.segment(progress))

    def row(self, segment: int) -> dict[str, float]:
        """Slot name -> coefficient in segment ``segment``."""
        return {slot: values[segment] for slot, values in self.coefficients.items()}

    def rows(self) -> Iterator[tuple[float, dict[str, float]]]:
        """Each segment's start and coefficients, in order."""
        for index, start in enumerate(self.starts):
            yield start, self.row(index)

    def uses(self, slot: str) -> bool:
        """Whether ``slot`` has any effect at any time."""
        return any(self.coefficients.get(slot, ()))

    @property
    def switches(self) -> bool:
        """Whether anything changes between progress 0 and 1."""
        return len(self.starts) > 1


class Agenda:
    """The switches of many timelines in one sorted list: which layers change between two moments.

    Args:
        timelines: one per layer; a layer is known by its index here.
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
        """Layers with a breakpoint between two progress values, in either direction; sorted."""
        low, high = sorted((one, other))
        first = bisect_right(self._moments, low)
        last = bisect_right(self._moments, high)
        return sorted(set(self._layers[first:last]))
