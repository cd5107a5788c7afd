"""K-LoRA's gamma, which balances the magnitudes of two LoRAs (arXiv 2502.18461, eq. 8-9)."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: The authors' code excludes layers from gamma whose ratio is at least this many times the mean.
_OUTLIER = 3.0


def gamma_of_sums(l1_c: Sequence[float], l1_s: Sequence[float]) -> float | None:
    """Return gamma as in the paper (eq. 9): the ratio of the sums of L1 norms.

    Args:
        l1_c: L1 norm of each content delta, over the layers that both LoRAs adapt.
        l1_s: L1 norm of each style delta, over the same layers.

    Returns:
        gamma; None if there are no layers or all style deltas are zero.
    """
    style = math.fsum(l1_s)
    return math.fsum(l1_c) / style if style > 0 else None


def gamma_of_ratios(l1_c: Sequence[float], l1_s: Sequence[float]) -> float | None:
    """Return gamma as in the authors' code: the mean of per-layer ratios without large ones.

    Layers with a zero style delta have no ratio. Ratios of at least three times the mean are
    dropped, then the mean is computed again.
    """
    ratios = [c / s for c, s in zip(l1_c, l1_s, strict=True) if s > 0]
    if not ratios:
        return None
    mean = math.fsum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < _OUTLIER * mean] or ratios
    return math.fsum(kept) / len(kept)
