"""Statistics of one layer's delta, and the version of their measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Increases when the same layer would get other numbers.
MEASURE_VERSION = 1

#: Called after each layer with its name, the number of finished layers, and the total.
OnLayer = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Statistics:
    """Statistics of one layer's delta, without its scaling."""

    l1: float
    """Sum of all absolute values (float64)."""
    top_k: Mapping[int, float]
    """K -> sum of the K largest absolute values (float64, exact for the float32 products)."""
    frobenius: float
    """Square root of the sum of all squares."""
