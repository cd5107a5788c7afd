"""Factoring of dense deltas, where factors are smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence

from klora_runtime.artifact.delta import Delta, LowRank
from klora_runtime.lazy_torch import torch

#: A part of a matrix that is this much wider than the rank may prove that factors do not pay.
_MARGIN = 1.25

#: Shares of the energy below this are rounding in a float64 Gram matrix.
_NOISE = 1e-11


def pays(rank: int, out: int, inner: int) -> bool:
    """Return whether factors of this rank have fewer numbers than the matrix."""
    return rank * (out + inner) < out * inner


def low_rank(down: torch.Tensor, up: torch.Tensor, kernel: Sequence[int] = ()) -> LowRank:
    """Return float32 factors from matrices (rank, in * kernel) and (out, rank)."""
    down, up = down.float(), up.float()
    if any(size > 1 for size in kernel):
        down = down.reshape(len(down), -1, *kernel)
        up = up.reshape(*up.shape, *(1 for _ in kernel))
    return LowRank(down, up)


def compact(delta: Delta, error: float) -> tuple[Delta, int, float]:
    """Return the smallest form of a delta of unknown rank.

    Args:
        delta: factors, which stay unchanged, or a dense delta.
        error: greatest relative Frobenius error, 0 to 1, before rounding to float32.

    Returns:
        Factors of the smallest rank within ``error`` if they have fewer numbers than the delta,
        else the delta; its numerical rank (the full rank if no smaller one was found); and the
        relative Frobenius error.
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
    """Return factors of kron(first, second); its singular values are the products of theirs.

    Args:
        first: (a, b), float64.
        second: (c, d), float64.
        error: see :func:`compact`.

    Returns:
        down (rank, b d), up (a c, rank) and the relative error; None if the smallest rank within
        ``error`` does not pay.
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
    """Return whether a part of a matrix proves that no approximation of this rank suffices.

    A part of the best approximation has no higher rank and loses no more energy.
    """
    side = math.ceil(_MARGIN * rank) + 8
    if side >= min(matrix.shape):
        return False
    rows = torch.linspace(0, matrix.shape[0] - 1, side).long()
    columns = torch.linspace(0, matrix.shape[1] - 1, side).long()
    energies, _ = _eigen(matrix[rows][:, columns], vectors=False)
    return float(energies[rank:].clamp_min(0.0).sum()) > energy


def _eigen(matrix: torch.Tensor, *, vectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared singular values, descending, and right singular vectors as columns."""
    gram = matrix.T @ matrix
    if not vectors:
        return torch.linalg.eigvalsh(gram).flip(0), gram[:0]
    values, basis = torch.linalg.eigh(gram)
    return values.flip(0), basis.flip(1)
