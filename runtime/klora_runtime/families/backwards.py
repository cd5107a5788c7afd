"""The layout tables backwards: from diffusers' module to the module of a file, and its rows there.

Where a file has several of diffusers' modules in one (query, key and value), each of them fills
rows of it. How many rows the file's module has follows from the parts that are there, unless some
are missing whose size nothing tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from klora_runtime.families.rows import Layout, Row, halves, thirds

#: Splits into equal parts, so that one part tells the size of all.
_EQUAL = (halves, thirds)


@dataclass(frozen=True)
class Home:
    """Where a module of diffusers is in a file."""

    row: Row
    index: int
    """Which of the row's targets it is."""
    numbers: tuple[str, ...]

    @property
    def module(self) -> str:
        """The file's module path in dots."""
        return self.row.source.format(*self.numbers)

    @property
    def others(self) -> tuple[str, ...]:
        """The modules of diffusers that are fused with it."""
        targets = [target.format(*self.numbers) for target in self.row.targets]
        return tuple(targets[: self.index] + targets[self.index + 1 :])


@dataclass(frozen=True)
class Backwards:
    """A layout, looked up by diffusers' names."""

    layout: Layout

    def home(self, module: str) -> Home | None:
        """Where ``module`` goes; None where the table does not name it."""
        match = self._reversed.match(module, flat=False)
        if match is None:
            return None
        row, numbers = match
        return Home(*self._rows[row.source], numbers)

    @cached_property
    def _rows(self) -> Mapping[str, tuple[Row, int]]:
        """Pattern of a diffusers module -> its row, and which target of it."""
        rows = self.layout.rows
        return {target: (row, i) for row in rows for i, target in enumerate(row.targets)}

    @cached_property
    def _reversed(self) -> Layout:
        rows = (Row(target, (row.source,)) for target, (row, _) in self._rows.items())
        return replace(self.layout, rows=tuple(rows))


def shares(
    row: Row, numbers: tuple[str, ...], sizes: Mapping[int, int], inner: int
) -> tuple[int, Mapping[int, tuple[range, ...] | None]] | None:
    """How diffusers' modules lie in the one module of a file that they are fused into.

    Args:
        row: of the table.
        numbers: what its ``{}`` stand for.
        sizes: index of a target -> rows of its parameter, for those that are there.
        inner: columns of the weights.

    Returns:
        Rows of the file's module, and for each of those targets the rows that it fills (None for
        all as they are); None where the rows of a missing one are not known.
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
    """What the rows of the file's module may be."""
    if len(sizes) == len(row.targets):
        yield sum(sizes.values())
        return
    if row.ratio is not None and math.floor(row.ratio * inner) == row.ratio * inner:
        yield int(row.ratio * inner)
    if row.split in _EQUAL:
        yield len(row.targets) * max(sizes.values())
