"""Means over subjects with their intervals: of a row, and of its difference to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from klora_compile.judging.intervals import Interval, bootstrap

#: One row's cells: "subject, style" -> one verdict per seed.
Cells = Mapping[str, Sequence[Mapping[str, float]]]


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
