"""The sum of the dense deltas that act now in one branched layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from klora_runtime.artifact.delta import Dense
from klora_runtime.layers.branch_factors import weight_shape
from klora_runtime.layers.targets import Target


def dense_slots(target: Target) -> dict[str, Dense]:
    """Return the dense deltas of a target by slot, without their scales."""
    deltas = ((slot, stored.delta) for slot, stored in target.entry.acting.items())
    return {slot: delta for slot, delta in deltas if isinstance(delta, Dense)}


class DenseSum:
    """The sum of scale * coefficient * weight * delta in one buffer that is written in place.

    Args:
        target: a layer with :func:`dense_slots`.
        device: device on which the module computes.
        dtype: dtype in which the module computes.

    Attributes:
        buffer: the sum, in the weight's shape.
    """

    def __init__(self, target: Target, device: torch.device, dtype: torch.dtype) -> None:
        self._target = target
        self._deltas: dict[str, torch.Tensor] = {}
        self._factors: dict[str, float] = {}
        self._shown: dict[str, float] | None = None  # None: the buffer's contents are unknown
        self.buffer = torch.zeros(weight_shape(target), device=device, dtype=dtype)

    def fill(self, target: Target) -> None:
        """Copy the deltas of a target's slots to the buffer's device."""
        self._target, self._shown = target, None
        shape, device = self.buffer.shape, self.buffer.device
        self._deltas = {
            slot: delta.values.to(device).reshape(shape)
            for slot, delta in dense_slots(target).items()
        }

    def load(self, weights: Mapping[str, float]) -> None:
        """Set the user's factors: slot -> weight; a missing slot has 1."""
        stored = self._target.entry.factors
        self._factors = {s: stored[s].scale * weights.get(s, 1.0) for s in self._deltas}
        self._shown = None

    def show(self, progress: float) -> None:
        """Write the sum for ``progress``; it is accumulated in float32."""
        row = self._target.entry.timeline.at(progress)
        sizes = {slot: factor * row.get(slot, 0.0) for slot, factor in self._factors.items()}
        acting = {slot: size for slot, size in sizes.items() if size}
        if acting == self._shown:
            return
        self._shown = None
        total = torch.zeros(self.buffer.shape, dtype=torch.float32, device=self.buffer.device)
        for slot, size in acting.items():
            total.add_(self._deltas[slot].to(torch.float32), alpha=size)
        self.buffer.copy_(total)
        self._shown = acting

    def close(self) -> None:
        """Write 0 into the buffer."""
        self._shown = None
        self.buffer.zero_()

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes + sum(delta.nbytes for delta in self._deltas.values())
