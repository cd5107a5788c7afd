"""Means of scores with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """Return the mean with the interval behind it.

        Args:
            form: the format of each number, such as ``.2f``.
        """
        low, mean, high = (format(value, form) for value in (self.low, self.mean, self.high))
        return f"{mean} ({low} to {high})"


def bootstrap(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return a mean with its bootstrap interval (Efron 1979, percentiles).

    Args:
        values: one for each thing that the mean is over, such as a subject, in any unit.
        resamples: number of resamples, drawn with replacement.
        seed: seed of the resampling.
    """
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.percentile(array[chosen].mean(axis=1), (2.5, 97.5))
    return Interval(float(array.mean()), float(low), float(high))
