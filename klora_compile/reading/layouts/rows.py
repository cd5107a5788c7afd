"""The form of a layout table: a row says where one module of a file goes in diffusers' model.

A pattern is a module path in dots in which each ``{}`` stands for a number; the numbers go, in
order, into the ``{}`` of the diffusers paths. Files that write underscores for dots are read with
the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

#: (rows of the file's weight, columns) -> the rows that each diffusers module takes.
Split = Callable[[int, int], list[list[range]]]


@dataclass(frozen=True)
class Placement:
    """Where rows of one module of a file go."""

    module: str
    """Dotted diffusers module path."""
    rows: tuple[range, ...] | None
    """Rows of the file's weight, in this order; None for all as they are."""


@dataclass(frozen=True)
class Row:
    """One module (or one per number) of a layout."""

    source: str
    """Pattern of the file's module path."""
    targets: tuple[str, ...]
    """Patterns of the diffusers modules that it becomes."""
    split: Split | None = None
    """How the rows are shared out; None: one target takes all."""

    def placements(self, numbers: Sequence[str], out: int, inner: int) -> tuple[Placement, ...]:
        """Where the module goes.

        Args:
            numbers: what the source's ``{}`` stand for.
            out: rows of the file's weight.
            inner: its columns.

        Raises:
            ValueError: the rows cannot be shared out; says why.
        """
        modules = [target.format(*numbers) for target in self.targets]
        if self.split is None:
            return (Placement(modules[0], None),)
        shares = self.split(out, inner)
        return tuple(
            Placement(module, tuple(share)) for module, share in zip(modules, shares, strict=True)
        )


@dataclass(frozen=True)
class Layout:
    """The module names of one kind of file, for one component."""

    name: str
    """Whose names these are, such as ``bfl`` or ``ldm``."""
    family: str
    """Base model family as in ``klora_runtime.families``, or a word for it where that has none."""
    component: str
    rows: tuple[Row, ...]

    def match(self, stem: str, *, flat: bool) -> tuple[Row, tuple[str, ...]] | None:
        """The row of a module and the numbers in its name, or None.

        Args:
            stem: the module path without what says which component.
            flat: whether underscores stand for dots.
        """
        pattern = self._flat if flat else self._dotted
        found = pattern.fullmatch(stem)
        if found is None:
            return None
        index = next(i for i in range(len(self.rows)) if found[f"row{i}"] is not None)
        numbers = re.findall(r"\d+", self._numbers(index, found[0], flat=flat))
        return self.rows[index], tuple(numbers)

    def _numbers(self, index: int, stem: str, *, flat: bool) -> str:
        match = re.fullmatch(_expression(self.rows[index].source, flat=flat), stem)
        assert match is not None
        return " ".join(match.groups())

    @cached_property
    def _dotted(self) -> re.Pattern[str]:
        return _alternatives(self.rows, flat=False)

    @cached_property
    def _flat(self) -> re.Pattern[str]:
        return _alternatives(self.rows, flat=True)


def thirds(out: int, _: int) -> list[list[range]]:
    """Query, key and value in one weight."""
    if out % 3:
        raise ValueError(f"{out} rows are not three equal parts")
    size = out // 3
    return [[range(size * i, size * (i + 1))] for i in range(3)]


def halves(out: int, _: int) -> list[list[range]]:
    """Two projections in one weight."""
    if out % 2:
        raise ValueError(f"{out} rows are not two equal parts")
    return [[range(out // 2)], [range(out // 2, out)]]


def square_thirds_and_rest(out: int, inner: int) -> list[list[range]]:
    """Query, key and value, each as wide as the input, and what remains."""
    if out <= 3 * inner:
        raise ValueError(f"{out} rows are not three times {inner} and a rest")
    parts = [[range(inner * i, inner * (i + 1))] for i in range(3)]
    return [*parts, [range(3 * inner, out)]]


def swapped_halves(out: int, _: int) -> list[list[range]]:
    """Shift and scale, which diffusers stores the other way round."""
    if out % 2:
        raise ValueError(f"{out} rows are not two equal parts")
    return [[range(out // 2, out), range(out // 2)]]


def same(*paths: str) -> Iterator[Row]:
    """Rows of modules that have one name in the file and in diffusers."""
    return (Row(path, (path,)) for path in paths)


def renamed(prefix: str, target: str, names: dict[str, str]) -> Iterator[Row]:
    """Rows of the modules of one block: ``prefix.key`` becomes ``target.value``."""
    return (Row(f"{prefix}.{key}", (f"{target}.{value}",)) for key, value in names.items())


def _alternatives(rows: Sequence[Row], *, flat: bool) -> re.Pattern[str]:
    return re.compile(
        "|".join(
            f"(?P<row{i}>{_expression(row.source, flat=flat, capture=False)})"
            for i, row in enumerate(rows)
        )
    )


def _expression(source: str, *, flat: bool, capture: bool = True) -> str:
    path = source.replace(".", "_") if flat else source
    number = r"(\d+)" if capture else r"\d+"
    return number.join(map(re.escape, path.split("{}")))
