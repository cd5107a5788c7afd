"""Exact sums of the K largest values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Float32 values.
Values = NDArray[np.float32]
#: Mask that selects some values.
Flags = NDArray[np.bool_]

#: Collect up to this many times K values before dropping the smaller ones.
_SLACK = 4
#: float64 holds all whole numbers up to this one.
_WHOLE = 2.0**53


class Largest:
    """A collector of the K largest values, exactly.

    Args:
        k: number of values.
        threshold: values up to this are skipped; it rises as larger values arrive.
    """

    def __init__(self, k: int, threshold: float) -> None:
        self._k = k
        self._threshold = np.float32(threshold)
        self._found: list[Values] = []
        self._count = 0

    @property
    def complete(self) -> bool:
        """Whether no skipped value can change the sum of the K largest."""
        return self._count >= self._k or bool(self._threshold <= 0)

    def add(self, values: Values, flags: Flags) -> None:
        """Add values >= 0; ``flags`` is scratch memory of the same size."""
        if self._k == 0:
            return
        self._found.append(values[np.greater(values, self._threshold, out=flags)])
        self._count += len(self._found[-1])
        if self._count > _SLACK * self._k:
            largest = np.partition(self.values(), self._count - self._k)[-self._k :]
            self._found, self._count = [largest], self._k
            self._threshold = largest[0]  # smaller values cannot change the sum

    def values(self) -> Values:
        """Return the collected values, which include the K largest (except zeros)."""
        return np.concatenate(self._found) if self._found else np.empty(0, np.float32)


def sums_of_largest(values: Values, ks: Sequence[int]) -> dict[int, float]:
    """Return sums of the largest values, correctly rounded.

    Args:
        values: values >= 0; if there are fewer than K, the others count as zero.
        ks: every K to sum for.

    Returns:
        K -> sum of the K largest.
    """
    if not ks or not len(values):
        return dict.fromkeys(ks, 0.0)
    largest = np.sort(values)[::-1][: max(ks)]
    running = largest.cumsum(dtype=np.float64)
    # All values are whole multiples of the smallest one's last digit: float64 adds them exactly
    # as long as the sum is less than 2^53 of these digits.
    if running[-1] < _WHOLE * float(np.spacing(largest[-1])):
        return {k: float(running[min(k, len(running)) - 1]) for k in ks}
    return {k: math.fsum(largest[:k].tolist()) for k in ks}
