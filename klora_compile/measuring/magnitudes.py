"""What is measured of a layer's delta, and how the K largest values are summed exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Float32 values.
Values = NDArray[np.float32]
#: Whether each of some values is meant.
Flags = NDArray[np.bool_]

#: How many times K values may wait before the smaller ones are dropped.
_SLACK = 4
#: Whole numbers up to this are float64 values.
_WHOLE = 2.0**53


@dataclass(frozen=True)
class Statistics:
    """Magnitudes of one layer's delta, without its scaling."""

    l1: float
    """Sum of all absolute values (float64)."""
    top_k: Mapping[int, float]
    """K -> sum of the K largest absolute values (float64, exact for the float32 products)."""
    frobenius: float
    """Square root of the sum of all squares."""


class Largest:
    """The K largest of all values seen, exactly.

    Args:
        k: how many.
        threshold: values up to this are passed over; it rises as larger ones are found.
    """

    def __init__(self, k: int, threshold: float) -> None:
        self._k = k
        self._threshold = np.float32(threshold)
        self._found: list[Values] = []
        self._count = 0

    @property
    def complete(self) -> bool:
        """Whether nothing that was passed over can change the sum of the K largest."""
        return self._count >= self._k or bool(self._threshold <= 0)

    def add(self, values: Values, flags: Flags) -> None:
        """Look at more values, none below zero; ``flags`` is memory for as many."""
        if self._k == 0:
            return
        self._found.append(values[np.greater(values, self._threshold, out=flags)])
        self._count += len(self._found[-1])
        if self._count > _SLACK * self._k:
            largest = np.partition(self.values(), self._count - self._k)[-self._k :]
            self._found, self._count = [largest], self._k
            self._threshold = largest[0]  # others cannot change the sum

    def values(self) -> Values:
        """Return those that were not passed over: the K largest are among them, zeros apart."""
        return np.concatenate(self._found) if self._found else np.empty(0, np.float32)


def sums_of_largest(values: Values, ks: Sequence[int]) -> dict[int, float]:
    """Sum the largest of some values, exactly rounded.

    Args:
        values: none below zero; where there are fewer than a K, the others are zero.
        ks: how many to sum.

    Returns:
        K -> the sum of the K largest.
    """
    if not ks or not len(values):
        return dict.fromkeys(ks, 0.0)
    largest = np.sort(values)[::-1][: max(ks)]
    running = largest.cumsum(dtype=np.float64)
    # All are whole multiples of the smallest one's last digit: float64 adds those without rounding
    # as long as the sum is less than 2^53 of them.
    if running[-1] < _WHOLE * float(np.spacing(largest[-1])):
        return {k: float(running[min(k, len(running)) - 1]) for k in ks}
    return {k: math.fsum(largest[:k].tolist()) for k in ks}
