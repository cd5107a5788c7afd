"""Slots of one layer that take turns in the buffers of its branch.

A branch multiplies with the slots that act now and not with all that ever will: where two LoRAs
take turns, that halves its products. The others wait on the same device, ready to be copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from klora_runtime.artifact.timeline import Timeline

#: down (rank, in) or (rank, in, height, width), and up (rank, out), of one slot or of a buffer.
Pair = tuple[torch.Tensor, torch.Tensor]


def turns_of(timeline: Timeline, ranks: Mapping[str, int]) -> list[dict[str, int]]:
    """Of each segment: slot -> where its ranks begin; only slots that act there, side by side.

    Args:
        timeline: of the layer.
        ranks: of its slots, in the order in which they are placed.
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
    """The most ranks that act at one time."""
    return max(sum(ranks[slot] for slot in turn) for turn in turns_of(timeline, ranks))


class Turns:
    """The factors of one layer, and which of them its buffers hold.

    Args:
        timeline: of the layer.
        pairs: its factors by slot, in the dtype and on the device of the buffers.
        buffers: into which those that act are copied.
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
        self._held: dict[str, int] | None = None  # None: what the buffers hold is not known

    @property
    def change(self) -> bool:
        """Whether the buffers ever hold something else; if not, they need no second copy."""
        return any(turn != self._turns[0] for turn in self._turns)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self._pairs.values() for tensor in pair)

    def forget(self) -> None:
        """Take what the buffers hold as not known."""
        self._held = None

    def due(self, progress: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What has to be copied before ``progress``: parts of the buffers and their new values.

        The caller copies them all, or calls :meth:`forget`.
        """
        segment = self._timeline.segment(progress)
        if self._turns[segment] == self._held:
            return []
        self._held = self._turns[segment]
        return self._copies[segment]
