"""Turns: slots of one layer that share the buffers of its branch, one after another.

A branch multiplies only with the slots that act now. If two LoRAs take turns, this halves its
products. Slots that do not act wait on the same device, ready to be copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from klora_runtime.artifact.timeline import Timeline

#: down, (rank, in) or (rank, in, height, width), and up, (rank, out), of a slot or of a buffer.
Pair = tuple[torch.Tensor, torch.Tensor]


def turns_of(timeline: Timeline, ranks: Mapping[str, int]) -> list[dict[str, int]]:
    """Return, per segment, slot -> its first rank, for the slots that act there, side by side.

    Args:
        timeline: the layer's timeline.
        ranks: rank of each slot, in order of placement.
    """
    turns = []
    for _, row in timeline.rows():
        begins, end = dict[str, int](), 0
        for slot, rank in ranks.items():
            if row.get(slot, 0.0):
                begins[slot], end = end, end + rank
        turns.append(begins)
    return turns


def rank_in_turns(timeline: Timeline, ranks: Mapping[str, int]) -> int:
    """Return the greatest number of ranks that act at the same time."""
    return max(sum(ranks[slot] for slot in turn) for turn in turns_of(timeline, ranks))


class Turns:
    """The factors of one layer, and a record of which ones its buffers hold.

    Args:
        timeline: the layer's timeline.
        pairs: the layer's factors by slot, in the dtype and on the device of the buffers.
        buffers: the buffers for the factors that act.
    """

    def __init__(self, timeline: Timeline, pairs: Mapping[str, Pair], buffers: Pair) -> None:
        self._timeline = timeline
        self._pairs = pairs
        self.device = buffers[0].device
        self._turns = turns_of(timeline, {slot: len(down) for slot, (down, _) in pairs.items()})
        self._copies = [
            [
                (buffer[begin : begin + len(values)], values)
                for slot, begin in turn.items()
                for buffer, values in zip(buffers, pairs[slot], strict=True)
            ]
            for turn in self._turns
        ]
        self._held: dict[str, int] | None = None  # None: the buffers' contents are unknown

    @property
    def change(self) -> bool:
        """Whether the buffers' contents ever change; if not, no second copy is needed."""
        return any(turn != self._turns[0] for turn in self._turns)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self._pairs.values() for tensor in pair)

    def forget(self) -> None:
        """Treat the buffers' contents as unknown."""
        self._held = None

    def due(self, progress: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the copies needed before ``progress``: parts of the buffers and their new values.

        The caller must make all the copies, or call :meth:`forget`.
        """
        segment = self._timeline.segment(progress)
        if self._turns[segment] == self._held:
            return []
        self._held = self._turns[segment]
        return self._copies[segment]
