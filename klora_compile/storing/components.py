"""Components of a delta, whose errors add up to its error, and their optimal steps.

Each pair of factors is replaced by its singular value decomposition, with sqrt(sigma) on either
side. To first order, the squared error of the delta is then the sum of the squared errors of its
components. The bytes are least if all components lose the same: large ones get more bits, and
those smaller than that loss get none (*reverse water-filling*: Cover and Thomas, Elements of
Information Theory, 10.3.3). This determines all steps up to one number, the step at level 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from klora_runtime.artifact.delta import Delta, Dense
from klora_runtime.artifact.q.form import MAX_LEVEL

#: Mean squared error of large numbers on the trellis' grids, in steps squared; measured.
_LOSS = 0.79 / 12


@dataclass(frozen=True)
class Components:
    """The components of one slot of one layer."""

    parts: tuple[torch.Tensor, ...]
    """The stored matrices, float32: (components, inputs) and (components, outputs); for a dense
        delta (rows, numbers), all of one component."""
    sizes: torch.Tensor
    """(components,), float64: sigma; for a dense delta the mean energy of a row."""
    energies: torch.Tensor
    """(components,), float64: squared norm of each component's delta."""

    @property
    def dense(self) -> bool:
        return len(self.parts) == 1

    def expected_loss(self, step: float) -> torch.Tensor:
        """Return (components,), float64: the energy that each loses, at most all of its energy."""
        if self.dense:
            found = self.parts[0].numel() * _LOSS * step**4 / self.sizes
        else:
            numbers = sum(part.shape[1] for part in self.parts)
            found = torch.full_like(self.energies, numbers * _LOSS * step**4)
        return torch.minimum(found, self.energies)

    def kept(self, step: float) -> torch.Tensor:
        """Return (kept,) int64: the components with more energy than that loss.

        A dense delta always keeps its only component.
        """
        if self.dense:
            return torch.zeros(1, dtype=torch.int64)
        return (self.energies > self.expected_loss(step)).nonzero().flatten()

    def levels(self, step: float) -> torch.Tensor:
        """Return (kept,) int64, descending: the levels at which kept components lose the same."""
        ratios = self.sizes[self.kept(step)] / step**2
        return (4 * ratios.log2()).round().clamp(0, MAX_LEVEL).long()

    def step_that_loses(self, energy: float) -> float:
        """Return the step at which the components together are expected to lose ``energy``."""
        low, high = -100.0, 100.0  # exponents
        for _ in range(48):
            middle = (low + high) / 2
            if float(self.expected_loss(2.0**middle).sum()) > energy:
                high = middle
            else:
                low = middle
        return math.exp2(low)


def components_of(delta: Delta) -> Components:
    """Return the components of a delta; this uses torch's number of threads."""
    if isinstance(delta, Dense):
        values = delta.values
        rows = values.float().reshape(1 if values.dim() == 1 else len(values), -1)
        energy = values.double().square().sum().reshape(1)
        return Components((rows,), energy / len(rows), energy)
    found = delta.singular()
    roots = found.values.sqrt()[:, None]
    parts = (roots * found.right).float(), (roots * found.left.T).float()
    return Components(parts, found.values, found.values.square())
