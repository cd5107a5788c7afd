"""An index of all layout tables by the module names in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from klora_runtime.families.rows import Layout, Row, outline


class Stem(NamedTuple):
    """A module in a file's spelling."""

    name: str
    flat: bool
    """Whether underscores replace dots."""


#: Looks a module up in one table: its row and the numbers in its name, or None.
Match = Callable[[Layout, Stem], tuple[Row, tuple[str, ...]] | None]


class TableIndex:
    """The tables of denoisers, by the outlines of the module names in them.

    A file has up to a thousand modules, and there are a hundred tables. The index leaves a few
    candidates for each module.
    """

    def __init__(self, tables: Iterable[Layout]) -> None:
        self._tables = [each for each in tables if each.component in ("unet", "transformer")]

    def __iter__(self) -> Iterator[Layout]:
        return iter(self._tables)

    def having_all(self, stems: Collection[Stem], match: Match) -> list[Layout]:
        """Return the tables that match every module, in their order."""
        counts = self._counts(stems, match)
        return [self._tables[i] for i in sorted(counts) if counts[i] == len(stems)]

    def having_most(self, stems: Collection[Stem], match: Match) -> Layout:
        """Return the table that matches most modules, the first one of equals."""
        counts = self._counts(stems, match)
        return self._tables[min(counts, key=lambda i: (-counts[i], i), default=0)]

    def have(self, stem: Stem, match: Match) -> bool:
        """Return whether any table matches a module."""
        return bool(self._counts([stem], match))

    def _counts(self, stems: Collection[Stem], match: Match) -> Counter[int]:
        """Count the matching modules by the position of the table."""
        return Counter(
            i for stem in stems for i in self._candidates(stem) if match(self._tables[i], stem)
        )

    def _candidates(self, stem: Stem) -> Sequence[int]:
        """Return the positions of the tables that may match a module in any reading."""
        return self._by_outline.get(outline(stem.name.replace(".", "_")), ())

    @cached_property
    def _by_outline(self) -> Mapping[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, table in enumerate(self._tables):
            for name in table.by_outline(flat=True):
                found.setdefault(name, []).append(i)
        return found
