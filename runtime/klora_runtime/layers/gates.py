"""The gates of many branches in one tensor on the device, which follows progress.

A gate is the factor of one rank of one branch: scale * coefficient * weight of its slot. A switch
writes the tensor in place: it sends two numbers to the device, allocates nothing, and does not
wait.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from klora_runtime.artifact.timeline import Timeline
from klora_runtime.layers.turns import turns_of

#: The gates of each branch begin at a multiple of this, so that they are aligned.
_ALIGNMENT = 16
_NEVER = 2**31 - 1


class Gates:
    """The gates of the branches that compute in one dtype on one device.

    Args:
        ranks: number of gates of each branch, padding included.
        device: device on which the branches compute.
        dtype: dtype in which the branches compute.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self._begins = [0]
        for rank in ranks:
            self._begins.append(self._begins[-1] + -(-rank // _ALIGNMENT) * _ALIGNMENT)
        self._ranks = list(ranks)
        self._moments: list[float] = []
        with torch.inference_mode(False):
            self._now = torch.zeros(self._begins[-1], dtype=dtype, device=device)
            self._mask = torch.empty(self._begins[-1], dtype=torch.bool, device=device)
        self._starts = self._values = self._now.new_empty(0)

    def of(self, branch: int) -> torch.Tensor:
        """Return the gates of one branch, (rank,): always the same view."""
        begin = self._begins[branch]
        return self._now[begin : begin + self._ranks[branch]]

    def load(
        self, timelines: Sequence[Timeline], slots: Sequence[Sequence[tuple[str, int, float]]]
    ) -> None:
        """Set the values of the gates for every progress.

        Args:
            timelines: the timeline of each branch.
            slots: the slots of each branch in order of placement: name, number of ranks, factor on
                the timeline's coefficient. Slots that act at the same time are side by side, from
                the first rank on (:func:`turns_of`).
        """
        moments = sorted({start for timeline in timelines for start in timeline.starts})
        order = {moment: index for index, moment in enumerate(moments)}
        segments = max((len(timeline.starts) for timeline in timelines), default=1)
        starts = [[_NEVER] * len(self._now) for _ in range(segments)]
        values = [[0.0] * len(self._now) for _ in range(segments)]
        for branch, (timeline, parts) in enumerate(zip(timelines, slots, strict=True)):
            begin, rank = self._begins[branch], self._ranks[branch]
            turns = turns_of(timeline, {slot: ranks for slot, ranks, _ in parts})
            for segment, (start, row) in enumerate(timeline.rows()):
                for slot, ranks, factor in parts:
                    if slot in turns[segment]:
                        first = begin + turns[segment][slot]
                        values[segment][first : first + ranks] = [row[slot] * factor] * ranks
                starts[segment][begin : begin + rank] = [order[start]] * rank
        starts[0] = [0] * len(self._now)  # the gates of padding are always 0
        self._moments = moments
        self._starts = torch.tensor(starts, dtype=torch.int32, device=self._now.device)
        self._values = torch.tensor(values, dtype=self._now.dtype, device=self._now.device)

    def show(self, progress: float) -> None:
        """Write every gate for ``progress``."""
        moment = bisect_right(self._moments, progress) - 1
        for starts, values in zip(self._starts, self._values, strict=True):
            torch.le(starts, moment, out=self._mask)
            torch.where(self._mask, values, self._now, out=self._now)

    def close(self) -> None:
        """Write 0 into every gate."""
        self._now.zero_()

    @property
    def nbytes(self) -> int:
        tensors = (self._now, self._mask, self._starts, self._values)
        return sum(tensor.nbytes for tensor in tensors)
