"""Factors for deltas that a file does not hold as factors, where they pay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from klora_runtime.artifact.delta import Delta, LowRank

#: Where a matrix is proven to be of a higher rank than pays, by a part of it this much wider.
_MARGIN = 1.25

#: Shares of the energy below this are rounding of a float64 Gram matrix.
_NOISE = 1e-11


def pays(rank: int, out: int, inner: int) -> bool:
    """Whether factors of this rank are fewer numbers than the matrix itself."""
    return rank * (out + inner) < out * inner


def low_rank(down: torch.Tensor, up: torch.Tensor, kernel: Sequence[int] = ()) -> LowRank:
    """Factors in float32 out of matrices (rank, in * kernel) and (out, rank)."""
    down, up = down.float(), up.float()
    if any(size > 1 for size in kernel):
        down = down.reshape(len(down), -1, *kernel)
        up = up.reshape(*up.shape, *(1 for _ in kernel))
    return LowRank(down, up)


def compact(delta: Delta, error: float) -> tuple[Delta, int, float]:
    """The smallest form of a delta whose rank is not known.

    Args:
        delta: factors, which stay as they are, or a dense delta.
        error: how much of its Frobenius norm may be lost, 0 to 1; what float32 loses comes on top.

    Returns:
        Factors of the smallest rank that holds it to ``error`` where they are fewer numbers than
        the delta itself, else the delta; its numerical rank (where no such rank was found: the
        full one); and the relative Frobenius norm of what is lost.
    """
    if isinstance(delta, LowRank):
        return delta, delta.rank, 0.0
    if len(delta.shape) < 2:
        return delta, 1, 0.0
    matrix = delta.matrix()
    out, inner = matrix.shape
    full = min(out, inner)
    limit = math.ceil(out * inner / (out + inner)) - 1  # the highest rank that pays
    total = float(matrix.square().sum())
    if total == 0.0:
        return low_rank(matrix[:1] * 0, matrix[:, :1] * 0, delta.shape[2:]), 1, 0.0
    if limit < 1 or _is_above(matrix, limit, max(error**2, _NOISE) * total):
        return delta, full, 0.0
    energies, vectors = _eigen(matrix if inner <= out else matrix.T)
    lost = total - energies.cumsum(0)
    rank = 1 + int((lost > max(error**2 * total, 0.0)).sum())
    if rank > limit:
        return delta, min(rank, full), 0.0
    basis = vectors[:, :rank]
    down, up = (basis.T, matrix @ basis) if inner <= out else (basis.T @ matrix, basis)
    found = low_rank(down, up, delta.shape[2:])
    return found, rank, float((found.matrix() - matrix).norm()) / math.sqrt(total)


def kronecker(
    first: torch.Tensor, second: torch.Tensor, error: float
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Factors of kron(first, second), whose singular values are the products of theirs.

    Args:
        first: (a, b), float64.
        second: (c, d), float64.
        error: see :func:`compact`.

    Returns:
        down (rank, b d), up (a c, rank) and the share of the norm that is lost; None where the
        smallest rank that holds the product to ``error`` does not pay.
    """
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(m, full_matrices=False) for m in (first, second))
    values, order = torch.outer(s1, s2).flatten().sort(descending=True)
    energies = values.square()
    total = float(energies.sum())
    lost = (total - energies.cumsum(0)).clamp_min(0.0)
    rank = min(1 + int((lost > error**2 * total).sum()), len(values))
    out, inner = len(first) * len(second), first.shape[1] * second.shape[1]
    if not pays(rank, out, inner):
        return None
    one, other = order[:rank] // len(s2), order[:rank] % len(s2)
    up = (u1[:, None, one] * u2[None, :, other]).reshape(out, rank) * values[:rank]
    down = (v1[one, :, None] * v2[other, None, :]).reshape(rank, inner)
    share = 0.0 if total == 0.0 else math.sqrt(float(lost[rank - 1]) / total)
    return down, up, share


def _is_above(matrix: torch.Tensor, rank: int, energy: float) -> bool:
    """Whether a part of a matrix proves that no matrix of this rank is as near as ``energy``.

    A part of the best approximation is of no higher rank, and loses no more.
    """
    side = math.ceil(_MARGIN * rank) + 8
    if side >= min(matrix.shape):
        return False
    rows = torch.linspace(0, matrix.shape[0] - 1, side).long()
    columns = torch.linspace(0, matrix.shape[1] - 1, side).long()
    energies, _ = _eigen(matrix[rows][:, columns], vectors=False)
    return float(energies[rank:].clamp_min(0.0).sum()) > energy


def _eigen(matrix: torch.Tensor, *, vectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values, descending, and the right singular vectors as columns."""
    gram = matrix.T @ matrix
    if not vectors:
        return torch.linalg.eigvalsh(gram).flip(0), gram[:0]
    values, basis = torch.linalg.eigh(gram)
    return values.flip(0), basis.flip(1)
