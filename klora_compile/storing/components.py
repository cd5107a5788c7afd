"""Components of a delta, whose errors add up to its error, and their optimal steps.

Each pair of factors is replaced by its singular value decomposition, with sqrt(sigma) on either
side. To first order, the squared error of the delta is then the sum of the squared errors of its
components. The bytes are least if all components lose the same: large ones get more bits, and
those smaller than that loss get none (*reverse water-filling*: Cover and Thomas, Elements of
Information Theory, 10.3.3). This determines all steps up to one number, the step at level 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klora_runtime.artifact.delta import Delta, Dense, LowRank, Singular
from klora_runtime.artifact.q.form import MAX_LEVEL

#: Mean squared error of large numbers on the trellis' grids, in steps squared; measured.
_LOSS = 0.8 / 12

#: Factors whose Cholesky pivots differ by more than this have their components from a QR
#: decomposition.
_LEAST_PIVOT = 1e-4


@dataclass(frozen=True)
class Components:
    """The components of one slot of one layer."""

    parts: tuple[torch.Tensor, ...]
    """The stored matrices, float64: (components, inputs) and (components, outputs); for a dense
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

    def step_at_levels(self, levels: torch.Tensor, energy: float) -> float:
        """Return the step at which the components at these levels are expected to lose ``energy``.

        Args:
            levels: of the components that are kept, which come first; the others lose all.
        """
        if self.dense:
            numbers = self.parts[0].numel()
            return float(math.sqrt(energy / (numbers * _LOSS)) * 2.0 ** (int(levels[0]) / 8))
        numbers = sum(part.shape[1] for part in self.parts)
        squares = torch.exp2(-levels.double() / 4)
        of_one = numbers * _LOSS * float((squares * self.sizes[: len(levels)]).sum())
        return math.sqrt(max(0.0, energy - self.dropped(len(levels))) / of_one)

    def dropped(self, kept: int) -> float:
        """Return the energy of the components after the first ``kept``."""
        return 0.0 if self.dense else float(self.energies[kept:].sum())

    def error(self, found: Sequence[torch.Tensor]) -> float:
        """Return the relative Frobenius error of a delta with other parts.

        The errors of the parts are computed in float64, and the products of these small numbers in
        float32: that changes the result by about 1e-6 of its own size.

        Args:
            found: float32, the parts of the components that :meth:`kept` gives, which come first.
        """
        whole = float(self.energies.sum())
        errors = [part.clone() for part in self.parts]
        for error, part in zip(errors, found, strict=True):
            error[: len(part)] -= part
        if self.dense:
            return math.sqrt(float(errors[0].square().sum()) / whole)
        down, up = self.parts[0].float(), self.parts[1].float()
        own_down = torch.zeros_like(down)
        own_down[: len(found[0])] = found[0]
        d_down, d_up = (error.float() for error in errors)
        # The difference is d_up^T own_down + up^T d_down; up up^T is diagonal.
        lost = ((d_up @ d_up.T) * (own_down @ own_down.T)).sum(dtype=torch.float64)
        lost += 2 * ((d_up @ up.T) * (own_down @ d_down.T)).sum(dtype=torch.float64)
        lost += (errors[0].square().sum(1) * self.sizes).sum()
        return math.sqrt(max(0.0, float(lost)) / whole)

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
        rows = values.double().reshape(1 if values.dim() == 1 else len(values), -1)
        energy = rows.square().sum().reshape(1)
        return Components((rows,), energy / len(rows), energy)
    found = _fast_singular(delta) or delta.singular()
    roots = found.values.sqrt()[:, None]
    parts = roots * found.right, roots * found.left.T
    return Components(parts, found.values, found.values.square())


def _fast_singular(delta: LowRank) -> Singular | None:
    """Return :meth:`LowRank.singular` from Cholesky factors of the Gram matrices.

    They take the place of the QR decompositions: up = Q R with R^T R = up^T up. The loss of
    precision grows with the square of the condition of the factors; None if that is large.
    """
    flat = delta.in_float64()
    cores = []
    for gram in (flat.up.T @ flat.up, flat.down @ flat.down.T):
        core, info = torch.linalg.cholesky_ex(gram, upper=True)
        sizes = core.diagonal()
        if int(info) or float(sizes.min()) < _LEAST_PIVOT * float(sizes.max()):
            return None
        cores.append(core)
    left, values, right = torch.linalg.svd(cores[0] @ cores[1].T, full_matrices=False)
    solved = torch.linalg.solve_triangular(cores[0], left, upper=True)
    turned = torch.linalg.solve_triangular(cores[1], right.T, upper=True)
    return Singular(flat.up @ solved, values, turned.T @ flat.down)
