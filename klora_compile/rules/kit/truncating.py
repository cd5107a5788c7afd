"""Low-rank factors of a matrix that has no low rank, and what they lose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klora_runtime.artifact.delta import Delta, Dense, LowRank

#: Directions beyond the rank, which make the search for the largest ones sure.
_MORE = 8

#: Rounds of the search. After two, masked products of two LoRAs (1280 x 1280 to 1280 x 10240, rank
#: 32 and 128) lose at most 0.1 % more than their largest singular vectors would.
_ROUNDS = 2

#: Seed of the directions that the search begins with.
_SEED = 0


def truncated(
    matrix: torch.Tensor,
    rank: int,
    inputs: torch.Tensor,
    shape: Sequence[int],
) -> tuple[Delta, float]:
    """Return a delta of a rank that is near to a matrix, and the share of its norm that is lost.

    The largest singular vectors come from a randomised subspace iteration (Halko, Martinsson,
    Tropp, "Finding structure with randomness", 2011, algorithm 4.4), whose first directions are
    given. What it loses is computed from the stored factors, so it is exact, whatever was found.

    Args:
        matrix: (out, inner), float32.
        rank: 1 or more.
        inputs: (n, inner), float32: directions that the matrix mostly reacts to; n may be 0.
        shape: shape of the delta, (out, in, *kernel).

    Returns:
        Factors in float32, or the matrix itself if factors have no fewer numbers; and the relative
        Frobenius error, 0 to 1.
    """
    out, inner = matrix.shape
    if rank * (out + inner) >= out * inner:
        return Dense(matrix.reshape(*shape)), 0.0
    basis = _outputs(matrix, min(rank + _MORE, out, inner), inputs)
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    up, down = (basis @ left[:, :rank]) * roots, roots[:, None] * right[:rank]
    norm = _norm(matrix)
    error = min(1.0, _norm(matrix - up @ down) / norm) if norm else 0.0
    if any(size > 1 for size in shape[2:]):
        down = down.reshape(rank, *shape[1:])
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
    return LowRank(down.contiguous(), up.contiguous()), error


def _outputs(matrix: torch.Tensor, count: int, inputs: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the outputs that a matrix mostly has, (out, count)."""
    random = torch.Generator().manual_seed(_SEED)
    more = torch.randn(max(0, count - len(inputs)), matrix.shape[1], generator=random)
    start = torch.cat([inputs[:count], more])
    basis: torch.Tensor = torch.linalg.qr(matrix @ start.T).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
