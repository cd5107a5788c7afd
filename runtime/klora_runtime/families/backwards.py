"""The inverse of the layout tables: from a module of diffusers to a file's module and its rows.

If a file's module joins several modules of diffusers (query, key and value), each of them fills
some of its rows. The number of rows follows from the parts that are present, unless the size of a
missing part is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from klora_runtime.families.rows import Layout, Row, halves, thirds

#: Splits into equal parts: the size of one part gives the size of all.
_EQUAL = (halves, thirds)


@dataclass(frozen=True)
class Home:
    """The place of a module of diffusers in a file."""

    row: Row
    index: int
    """Index of the module in the row's targets."""
    numbers: tuple[str, ...]

    @property
    def module(self) -> str:
        """The file's module path with dots."""
        return self.row.source.format(*self.numbers)

    @property
    def others(self) -> tuple[str, ...]:
        """The other modules of diffusers that the file's module joins."""
        targets = [target.format(*self.numbers) for target in self.row.targets]
        return tuple(targets[: self.index] + targets[self.index + 1 :])


@dataclass(frozen=True)
class Backwards:
    """A layout that is looked up by diffusers' names."""

    layout: Layout

    def home(self, module: str) -> Home | None:
        """Return the place of ``module``; None if the table does not name it."""
        match = self._reversed.match(module, flat=False)
        if match is None:
            return None
        row, numbers = match
        return Home(*self._rows[row.source], numbers)

    @cached_property
    def _rows(self) -> Mapping[str, tuple[Row, int]]:
        """Pattern of a diffusers module -> its row, and its index in the row's targets."""
        rows = self.layout.rows
        return {target: (row, i) for row in rows for i, target in enumerate(row.targets)}

    @cached_property
    def _reversed(self) -> Layout:
        rows = (Row(target, (row.source,)) for target, (row, _) in self._rows.items())
        return replace(self.layout, rows=tuple(rows))


def shares(
    row: Row, numbers: tuple[str, ...], sizes: Mapping[int, int], inner: int
) -> tuple[int, Mapping[int, tuple[range, ...] | None]] | None:
    """Return the rows that modules of diffusers fill in the joined module of a file.

    Args:
        row: row of the table.
        numbers: values of its ``{}``.
        sizes: index of a target -> rows of its parameter, for the targets that are present.
        inner: columns of the weights.

    Returns:
        The number of rows of the file's module, and for each present target the rows that it fills
        (None for all); None if the size of a missing target is unknown.
    """
    for out in _candidates(row, sizes, inner):
        try:
            placed = [placement.rows for placement in row.placements(numbers, out, inner)]
        except ValueError:
            continue
        filled = {i: out if placed[i] is None else sum(map(len, placed[i] or ())) for i in sizes}
        if filled == dict(sizes):
            return out, {index: placed[index] for index in sizes}
    return None


def _candidates(row: Row, sizes: Mapping[int, int], inner: int) -> Iterator[int]:
    """Yield possible numbers of rows of the file's module."""
    if len(sizes) == len(row.targets):
        yield sum(sizes.values())
        return
    if row.ratio is not None and math.floor(row.ratio * inner) == row.ratio * inner:
        yield int(row.ratio * inner)
    if row.split in _EQUAL:
        yield len(row.targets) * max(sizes.values())
