"""The error of a stored delta against its source's."""

from __future__ import annotations

import math

import torch

from klora_runtime.artifact.delta import Delta, LowRank


def relative_error(exact: Delta, found: Delta) -> float:
    """Return ||found - exact|| / ||exact|| in float64; 0 if both deltas are zero."""
    if isinstance(exact, LowRank) and isinstance(found, LowRank):
        difference = _difference(exact, found)
        lost, whole = difference.inner(difference), exact.inner(exact)
    else:
        one, other = exact.matrix(), found.matrix()
        lost, whole = float((other - one).square().sum()), float(one.square().sum())
    if whole == 0.0:
        return 0.0 if lost == 0.0 else math.inf
    return math.sqrt(max(0.0, lost) / whole)


def _difference(exact: LowRank, found: LowRank) -> LowRank:
    """Return found - exact as concatenated factors."""
    one, other = exact.in_float64(), found.in_float64()
    return LowRank(torch.cat([one.down, other.down]), torch.cat([-one.up, other.up], 1))
