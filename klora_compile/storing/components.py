"""A delta as vectors whose errors add up to its error, and how the least bytes share it out.

Each pair of factors is turned into its singular value decomposition, sqrt(sigma) on either side.
Then, to first order, the squared error of the delta is the sum of those of its components, and the
least bytes lose the same of each: large ones get more bits, and those that are smaller than that
loss get none (*reverse water-filling*: Cover and Thomas, Elements of Information Theory, 10.3.3).
That fixes the steps of all components but for one number, the step at level 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from klora_runtime.artifact.delta import Delta, Dense
from klora_runtime.artifact.q.form import MAX_LEVEL

#: What numbers of many steps lose of a step squared, on the grids of the trellis; measured.
_LOSS = 0.79 / 12


@dataclass(frozen=True)
class Components:
    """The vectors of one slot of one layer."""

    parts: tuple[torch.Tensor, ...]
    """What is stored, float32: (components, inputs) and (components, outputs); of a dense delta
    (rows, numbers), all of one component."""
    sizes: torch.Tensor
    """(components,), float64: sigma; of a dense delta the mean energy of a row."""
    energies: torch.Tensor
    """(components,), float64: squared norm of the delta of each."""

    @property
    def dense(self) -> bool:
        return len(self.parts) == 1

    def expected_loss(self, step: float) -> torch.Tensor:
        """(components,), float64: the energy that each loses; never more than it has."""
        if self.dense:
            found = self.parts[0].numel() * _LOSS * step**4 / self.sizes
        else:
            numbers = sum(part.shape[1] for part in self.parts)
            found = torch.full_like(self.energies, numbers * _LOSS * step**4)
        return torch.minimum(found, self.energies)

    def kept(self, step: float) -> torch.Tensor:
        """(kept,) int64: the components that have more to lose than that; of a dense delta always
        the one that it has."""
        if self.dense:
            return torch.zeros(1, dtype=torch.int64)
        return (self.energies > self.expected_loss(step)).nonzero().flatten()

    def levels(self, step: float) -> torch.Tensor:
        """(kept,) int64, descending: those at which the kept ones lose alike."""
        ratios = self.sizes[self.kept(step)] / step**2
        return (4 * ratios.log2()).round().clamp(0, MAX_LEVEL).long()

    def step_that_loses(self, energy: float) -> float:
        """Return the step at which the components are expected to lose that, all together."""
        low, high = -100.0, 100.0  # exponents
        for _ in range(48):
            middle = (low + high) / 2
            if float(self.expected_loss(2.0**middle).sum()) > energy:
                high = middle
            else:
                low = middle
        return math.exp2(low)


def components_of(delta: Delta) -> Components:
    """Return the components of a delta; on as many threads as torch has."""
    if isinstance(delta, Dense):
        values = delta.values
        rows = values.float().reshape(1 if values.dim() == 1 else len(values), -1)
        energy = values.double().square().sum().reshape(1)
        return Components((rows,), energy / len(rows), energy)
    found = delta.singular()
    roots = found.values.sqrt()[:, None]
    parts = (roots * found.right).float(), (roots * found.left.T).float()
    return Components(parts, found.values, found.values.square())
