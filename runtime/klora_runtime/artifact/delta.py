"""The numbers of one slot of one entry: how much a LoRA changes a parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klora_runtime.artifact.q.quantised import Quantised

#: For :meth:`Factors.matrix`.
ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Factors:
    """One slot of one entry: delta = scale * up @ down."""

    scale: float
    """alpha / rank of the source (float64); 1 where the network alpha is ignored."""
    down: torch.Tensor
    """(rank, in), or (rank, in, height, width) for a convolution; dtype and bytes of the source."""
    up: torch.Tensor
    """(out, rank), or (out, rank, 1, 1) for a convolution."""
    quantised: Quantised | None = None
    """How they are stored, where that is not as they are; what it stands for is ``down`` and
    ``up``, in float32."""

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All its numbers."""
        return self.down, self.up

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def matrix(
        self, dtype: torch.dtype, device: torch.device, rows: slice = ALL_ROWS
    ) -> torch.Tensor:
        """The delta without its scale, as (rows, all other dimensions).

        Args:
            dtype: to compute in.
            device: to compute on.
            rows: which of them.
        """
        up, down = self.up[rows].to(device, dtype), self.down.to(device, dtype)
        return up.flatten(1) @ down.flatten(1)


@dataclass(frozen=True)
class Dense:
    """One slot of one entry whose delta is no product: scale * delta."""

    scale: float
    """As of :class:`Factors`."""
    delta: torch.Tensor
    """Of the parameter's shape; float32, float16 or bfloat16."""
    quantised: Quantised | None = None
    """As of :class:`Factors`."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All its numbers."""
        return (self.delta,)

    @property
    def nbytes(self) -> int:
        return self.delta.nbytes

    def matrix(
        self, dtype: torch.dtype, device: torch.device, rows: slice = ALL_ROWS
    ) -> torch.Tensor:
        """See :meth:`Factors.matrix`."""
        values = self.delta[rows].to(device, dtype)
        return values.reshape(len(values), -1)
