"""What a stored delta lost of its source's."""

from __future__ import annotations

import math

import torch

from klora_runtime.artifact.delta import Dense, Factors


def relative_error(exact: Factors | Dense, found: Factors | Dense) -> float:
    """||found - exact|| / ||exact|| of two deltas without their scales, in float64; 0 where both
    are zero."""
    if isinstance(exact, Factors) and isinstance(found, Factors):
        up = torch.cat([-_matrix(exact.up), _matrix(found.up)], 1)
        down = torch.cat([_matrix(exact.down), _matrix(found.down)])
        lost, whole = _energy(up, down), _energy(_matrix(exact.up), _matrix(exact.down))
    else:
        one, other = (f.matrix(torch.float64, torch.device("cpu")) for f in (exact, found))
        lost, whole = float((other - one).square().sum()), float(one.square().sum())
    if whole == 0.0:
        return 0.0 if lost == 0.0 else math.inf
    return math.sqrt(max(0.0, lost) / whole)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().flatten(1)


def _energy(up: torch.Tensor, down: torch.Tensor) -> float:
    """Squared Frobenius norm of up @ down."""
    return float(((up.T @ up) * (down @ down.T)).sum())
