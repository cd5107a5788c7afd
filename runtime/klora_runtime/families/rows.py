"""The rows of layout tables: each maps one module of a file to modules of diffusers.

A pattern is a module path with dots in which each ``{}`` is a number. The numbers go, in order,
into the ``{}`` of the diffusers paths. The same rows also read files that write underscores for
dots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

#: A number in a module path, without leading zeros: no module is called ``blocks.01``.
_NUMBER = re.compile(r"0(?![0-9])|[1-9][0-9]*")

#: (rows of the file's weight, columns) -> the rows of each diffusers module.
Split = Callable[[int, int], list[list[range]]]


class Placement(NamedTuple):
    """The destination of some rows of a file's module."""

    module: str
    """Dotted diffusers module path."""
    rows: tuple[range, ...] | None
    """Rows of the file's weight, in this order; None for all rows in their order."""
    parameter: str | None = None
    """Name of the parameter in the module, if it is neither weight nor bias."""

    @property
    def path(self) -> str:
        """The module's path, followed by the parameter if there is one."""
        return ".".join(filter(None, (self.module, self.parameter)))


@dataclass(frozen=True)
class Row:
    """A module (or one module per number) of a layout."""

    source: str
    """Pattern of the file's module path."""
    targets: tuple[str, ...]
    """Patterns of the diffusers modules that it maps to."""
    split: Split | None = None
    """Split of the rows among the targets; None if a single target takes all rows."""
    ratio: Fraction | None = None
    """Rows / columns, if this distinguishes the family from another one with the same name."""
    component: str | None = None
    """Component, if it is not the table's."""
    is_parameter: bool = False
    """Whether the patterns end in a parameter that is neither weight nor bias, such as a table of
        shifts and scales; a file has it as one *module*."""

    def targets_of(self, numbers: Sequence[str]) -> tuple[Placement, ...]:
        """Return the destinations of the module, whatever its rows."""
        return tuple(self._placement(target.format(*numbers), None) for target in self.targets)

    def placements(self, numbers: Sequence[str], out: int, inner: int) -> tuple[Placement, ...]:
        """Return the destinations of the module's rows.

        Args:
            numbers: values of the source's ``{}``.
            out: rows of the file's weight.
            inner: columns of the file's weight.

        Raises:
            ValueError: the rows cannot be split; the message says why.
        """
        paths = [target.format(*numbers) for target in self.targets]
        if self.split is None:
            return (self._placement(paths[0], None),)
        shares = self.split(out, inner)
        return tuple(
            self._placement(path, tuple(share)) for path, share in zip(paths, shares, strict=True)
        )

    def _placement(self, path: str, rows: tuple[range, ...] | None) -> Placement:
        if not self.is_parameter:
            return Placement(path, rows)
        module, _, parameter = path.rpartition(".")
        return Placement(module, rows, parameter)

    def numbers_of(self, numbers: Sequence[str]) -> tuple[str, ...] | None:
        """Return the values of ``{}`` among a module's numbers; None if a fixed number differs."""
        pairs = list(zip(numbers, self.numbers, strict=True))
        if any(own not in ("{}", number) for number, own in pairs):
            return None
        return tuple(number for number, own in pairs if own == "{}")

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """Return the source's numbers, with ``{}`` for any number."""
        return tuple(re.findall(r"[0-9]+|\{\}", self.source))

    @property
    def is_pattern(self) -> bool:
        """Return whether the source has a ``{}``."""
        return "{}" in self.source

    @cached_property
    def outline(self) -> str:
        """The source with every number replaced by 0."""
        return outline(self.source.replace("{}", "0"))


class RowsAlike:
    """Rows of one table whose sources differ only in their numbers, in the table's order.

    Some tables have a row per number; a dictionary finds these. It is made on first use: most rows
    of the hundred tables are never asked for.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    @cached_property
    def _patterns(self) -> Sequence[tuple[int, Row]]:
        return [(place, row) for place, row in enumerate(self._rows) if row.is_pattern]

    @cached_property
    def _constant(self) -> Mapping[tuple[str, ...], tuple[int, Row]]:
        found: dict[tuple[str, ...], tuple[int, Row]] = {}
        for place, row in enumerate(self._rows):
            if not row.is_pattern:
                found.setdefault(row.numbers, (place, row))
        return found

    def find(self, numbers: tuple[str, ...]) -> tuple[Row, tuple[str, ...]] | None:
        """Return the first row that fits a module's numbers, and the values of its ``{}``."""
        last, constant = self._constant.get(numbers, (0, None))
        for position, row in self._patterns:
            taken = row.numbers_of(numbers)
            if taken is not None and (constant is None or position < last):
                return row, taken
        return None if constant is None else (constant, ())


@dataclass(frozen=True)
class Layout:
    """The module names of one component in one kind of file."""

    name: str
    """Name of the naming, such as ``bfl`` or ``ldm``."""
    family: str
    """Key of the base model's record, or a word for the text encoder."""
    component: str
    rows: tuple[Row, ...]
    is_whole: bool = True
    """Whether the layout names every module of the component that has a weight."""
    without_adapters: str | None = None
    """Why files with PEFT's adapter name behind these names are refused; None if they are read."""
    spelling: str | None = None
    """Name of its files in reports, if ``peft`` and ``kohya`` do not suffice."""

    def match(self, stem: str, *, flat: bool) -> tuple[Row, tuple[str, ...]] | None:
        """Return the row of a module and the numbers in its name, or None.

        Args:
            stem: the module path without the component's prefix.
            flat: whether underscores replace dots.
        """
        plain, numbers = _split(stem)
        alike = self.by_outline(flat=flat).get(plain)
        return None if alike is None else alike.find(numbers)

    def in_diffusers_names(self) -> Layout:
        """The layout of files that write the same modules under diffusers' own names."""
        targets = {target: row.is_parameter for row in self.rows for target in row.targets}
        rows = tuple(Row(t, (t,), is_parameter=parameter) for t, parameter in targets.items())
        return replace(self, name="diffusers", rows=rows)

    def by_outline(self, *, flat: bool) -> Mapping[str, RowsAlike]:
        """Return the rows by the :func:`outline` of their sources.

        Args:
            flat: whether underscores stand for dots.
        """
        return self._flat if flat else self._dotted

    @cached_property
    def _dotted(self) -> Mapping[str, RowsAlike]:
        return self._outlined(flat=False)

    @cached_property
    def _flat(self) -> Mapping[str, RowsAlike]:
        return self._outlined(flat=True)

    def _outlined(self, *, flat: bool) -> Mapping[str, RowsAlike]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            name = row.outline.replace(".", "_") if flat else row.outline
            found.setdefault(name, []).append(row)
        return {name: RowsAlike(rows) for name, rows in found.items()}


def outline(path: str) -> str:
    """Return a module path with every number replaced by 0."""
    return _NUMBER.sub("0", path)


@lru_cache(maxsize=4096)
def _split(path: str) -> tuple[str, tuple[str, ...]]:
    """Return the outline of a module path, and its numbers; each table asks it of each module."""
    return outline(path), tuple(_NUMBER.findall(path))


def thirds(out: int, _: int) -> list[list[range]]:
    """Split a weight into query, key and value."""
    if out % 3:
        raise ValueError(f"{out} rows are not three equal parts")
    size = out // 3
    return [[range(size * i, size * (i + 1))] for i in range(3)]


def halves(out: int, _: int) -> list[list[range]]:
    """Split a weight into two projections."""
    if out % 2:
        raise ValueError(f"{out} rows are not two equal parts")
    return [[range(out // 2)], [range(out // 2, out)]]


def square_thirds_and_rest(out: int, inner: int) -> list[list[range]]:
    """Split off query, key and value, each as wide as the input, from the rest."""
    if out <= 3 * inner:
        raise ValueError(f"{out} rows are not three times {inner} and a rest")
    parts = [[range(inner * i, inner * (i + 1))] for i in range(3)]
    return [*parts, [range(3 * inner, out)]]


def square_and_halves(out: int, inner: int) -> list[list[range]]:
    """Split a weight into a query as wide as the input, and a key and a value of fewer heads."""
    rest = out - inner
    if rest <= 0 or rest % 2:
        raise ValueError(f"{out} rows are not {inner} and two equal parts")
    middle = inner + rest // 2
    return [[range(inner)], [range(inner, middle)], [range(middle, out)]]


def swapped_where_two(out: int, inner: int) -> list[list[range]]:
    """Split a modulation; diffusers swaps shift and scale if it has only these two."""
    return swapped_halves(out, inner) if out == 2 * inner else [[range(out)]]


def swapped_halves(out: int, _: int) -> list[list[range]]:
    """Split into shift and scale, which diffusers stores in the opposite order."""
    if out % 2:
        raise ValueError(f"{out} rows are not two equal parts")
    return [[range(out // 2, out), range(out // 2)]]


def same(*names: str, under: str = "") -> Iterator[Row]:
    """Yield the rows of modules with the same name in the file and in diffusers.

    Args:
        under: the common parent path, such as that of a list's blocks.
    """
    paths = (f"{under}.{name}" if under else name for name in names)
    return (Row(path, (path,)) for path in paths)


def parameters(*names: str) -> Iterator[Row]:
    """Return the rows of parameters with the same name in the file and in diffusers.

    The parameters are neither weight nor bias of a module.
    """
    return (replace(row, is_parameter=True) for row in same(*names))


def renamed(prefix: str, target: str, names: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of the modules of one block: ``prefix.key`` becomes ``target.value``."""
    return (Row(f"{prefix}.{key}", (f"{target}.{value}",)) for key, value in names.items())


def with_ratios(rows: Iterable[Row], ratios: Mapping[str, Fraction | int]) -> Iterator[Row]:
    """Yield the rows, with the ratio of their source's last name if there is one."""
    for row in rows:
        found = (Fraction(ratio) for end, ratio in ratios.items() if row.source.endswith(end))
        yield replace(row, ratio=next(found, None))
