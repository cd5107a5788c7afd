"""Means over subjects with their intervals: of a row, and of its difference to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: One row's cells: "subject, style" -> one verdict per seed.
Cells = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """Return the mean with the interval behind it, each number in a format such as ``.2f``."""
        low, mean, high = (format(value, form) for value in (self.low, self.mean, self.high))
        return f"{mean} ({low} to {high})"


def bootstrap(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean over subjects with its bootstrap interval.

    Args:
        values: one per subject (a mean over its styles and seeds), in any unit.
        resamples: number of resamples, drawn with replacement.
        seed: seed of the resampling.
    """
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.percentile(array[chosen].mean(axis=1), (2.5, 97.5))
    return Interval(float(array.mean()), float(low), float(high))


def by_subject(cells: Cells, key: str) -> dict[str, float]:
    """Return subject -> mean of a number over its styles and seeds."""
    values: dict[str, list[float]] = {}
    for pair, found in cells.items():
        values.setdefault(pair.partition(",")[0], []).extend(each[key] for each in found)
    return {subject: sum(each) / len(each) for subject, each in values.items()}


def interval(cells: Cells, key: str) -> Interval:
    """Return the mean over subjects with its interval."""
    return bootstrap(list(by_subject(cells, key).values()))


def difference(cells: Cells, other: Cells, key: str) -> Interval:
    """Return the mean over subjects of one row's number minus another's, with its interval."""
    here, there = by_subject(cells, key), by_subject(other, key)
    return bootstrap([here[subject] - there[subject] for subject in here])
