"""The grid of a sweep: which trial is in which cell, with the plain sum in the first column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from klora_compile.sweeping.axes import Axis, Value, words
from klora_compile.trying.loras import PLAIN_SUM
from klora_compile.trying.names import RULE, all_settings, flattened, shared_settings, split
from klora_compile.trying.trial import Trial, idle, trial_of
from klora_runtime.errors import ConfigError

#: The place of an axis that a sweep does not have.
_ALONE = (Value("", {}),)


@dataclass(frozen=True)
class Cell:
    """One cell of a sheet."""

    sheet: int
    row: int
    column: int
    name: str
    """Its labels, without those of the plain sum's settings."""
    settings: Mapping[str, Any]
    """Everything that was named for it, by full names."""
    trial: Trial
    idle: tuple[str, ...] = ()
    """Settings of its row or column that its rule does not have."""
    repeats: bool = False
    """Whether an earlier cell of its row is equal, because its column's setting is idle."""


@dataclass(frozen=True)
class Grid:
    """All cells of a sweep, with the labels around them."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    sheets: tuple[str, ...]
    cells: tuple[Cell, ...]
    """By sheet, row and column."""
    common: Mapping[str, Any]
    """Settings of all cells but the plain sum's, which has those that it can have."""

    def row(self, sheet: int, row: int) -> list[Cell]:
        """Return the cells of a row, by column."""
        return [cell for cell in self.cells if (cell.sheet, cell.row) == (sheet, row)]


def grid_of(axes: Sequence[Axis], base: Mapping[str, Any]) -> Grid:
    """Return the grid of axes: columns, rows, sheets.

    An axis that does not change the plain sum, such as a rule or its bias, comes first, so that
    one column of the plain sum suffices; otherwise each value has one.

    Args:
        axes: one to three.
        base: settings of all cells.

    Raises:
        ConfigError: a setting acts in no cell, or is wrong in one.
    """
    base = flattened(base)
    order = sorted(axes, key=lambda axis: any(_of_plain_sum(each) for each in axis.values))
    places = [*(axis.values for axis in order), _ALONE, _ALONE][:3]
    columns, rows, sheets = _columns(places[0]), places[1], places[2]
    cells = tuple(_cells(columns, rows, sheets, base))
    _refuse_idle(cells, axes, base)
    return Grid(
        tuple(label for label, _ in columns),
        tuple(each.label for each in rows),
        tuple(each.label for each in sheets),
        cells,
        _common(axes, base),
    )


def _common(axes: Sequence[Axis], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that no axis changes."""
    changed = {name for axis in axes for value in axis.values for name in value.settings}
    return {name: value for name, value in base.items() if name not in changed}


def _columns(values: Sequence[Value]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the label and the settings of each column: the plain sum's, then the others."""
    plain: list[tuple[str, Mapping[str, Any]]] = []
    for value in values:
        settings = plain_sum(value.settings)
        label = ", ".join(("direct sum", *filter(None, [words(_of_plain_sum(value))])))
        if settings not in [each for _, each in plain]:
            plain.append((label, settings))
    taken = [settings for _, settings in plain]
    others = [(each.label, each.settings) for each in values if each.settings not in taken]
    return [*plain, *others]


def _of_plain_sum(value: Value) -> dict[str, Any]:
    """Return the settings of a value that the plain sum has too."""
    return {name: each for name, each in plain_sum(value.settings).items() if name != RULE}


def plain_sum(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the plain sum for the rule, without settings of other rules.

    Args:
        settings: by full names.
    """
    of_rules = all_settings().keys() - shared_settings().keys()
    kept = {name: each for name, each in settings.items() if split(name)[0] not in of_rules}
    return {**kept, RULE: PLAIN_SUM}


def _cells(
    columns: Sequence[tuple[str, Mapping[str, Any]]],
    rows: Sequence[Value],
    sheets: Sequence[Value],
    base: Mapping[str, Any],
) -> Iterator[Cell]:
    for (sheet, of_sheet), (row, of_row) in product(enumerate(sheets), enumerate(rows)):
        seen: set[str] = set()
        for column, (label, settings) in enumerate(columns):
            name = ", ".join(filter(None, [of_sheet.label, of_row.label, label]))
            whole = {**base, **of_sheet.settings, **of_row.settings, **settings}
            if settings == plain_sum(settings):
                whole = plain_sum(whole)
            unused = idle(whole)
            kept = {key: value for key, value in whole.items() if key not in unused}
            try:
                trial = trial_of(kept)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
            repeats = trial.key in seen and bool(set(unused) & settings.keys())
            seen.add(trial.key)
            yield Cell(sheet, row, column, name, kept, trial, unused, repeats)


def _refuse_idle(cells: Sequence[Cell], axes: Sequence[Axis], base: Mapping[str, Any]) -> None:
    """Refuse settings that no rule of the sweep has."""
    named = dict.fromkeys(base)
    for axis in axes:
        for value in axis.values:
            named.update(dict.fromkeys(value.settings))
    rules = list(dict.fromkeys(cell.trial.config.rule.name for cell in cells))
    for name in named:
        if not any(name in cell.settings for cell in cells):
            raise ConfigError(
                f"{name}: of the rules {', '.join(rules)} none has this setting; leave it out, or "
                "name a rule that has it."
            )
