"""Axes of a sweep: settings with several values, or a list of cells with settings each."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_compile.trying.names import flattened, value_of
from klora_runtime.errors import ConfigError, shown

#: The axis that is a list of cells, and the name of a cell in such a list.
CELLS, LABEL = "cells", "label"

#: Axes that a sweep may have: columns, rows, sheets.
MOST_AXES = 3


@dataclass(frozen=True)
class Value:
    """One place on an axis."""

    label: str
    settings: Mapping[str, Any]
    """By full names, see :mod:`klora_compile.trying.names`."""


@dataclass(frozen=True)
class Axis:
    """A setting with its values."""

    name: str
    values: tuple[Value, ...]


def axes_of(
    given: Mapping[str, Iterable[Any]], *, most: int | None = MOST_AXES
) -> tuple[Axis, ...]:
    """Return axes of names with their values.

    Args:
        given: full name of a setting -> values; ``cells`` -> mappings with settings each.
        most: how many there may be; None for any number.

    Raises:
        ConfigError: there are too many axes, or none; an axis has no values, or one twice.
    """
    if most is not None and not 1 <= len(given) <= most:
        raise ConfigError(
            f"a sweep takes 1 to {most} settings with several values, found {len(given)}; "
            "give the others one value each."
        )
    return tuple(_axis(name, values) for name, values in given.items())


def listed_cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a file: JSON objects in a list, or rows of a CSV with names above.

    Raises:
        ConfigError: it cannot be read as such a list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = _rows(text) if path.suffix.lower() == ".csv" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{shown(path)} cannot be read: {shown(error)}.") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ConfigError(f"{shown(path)}: expected a list of JSON objects, a cell each.")
    return found


def words(settings: Mapping[str, Any]) -> str:
    """Return settings in a few words, such as ``bias 0.3, style 0.8``."""
    return ", ".join(_word(name, value) for name, value in settings.items())


def _axis(name: str, given: Iterable[Any]) -> Axis:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ConfigError(f"{name}: expected one value or more, found {given!r}.")
    values = list(given)
    if not values:
        raise ConfigError(f"{name}: expected one value or more, found none.")
    made = tuple(_cell(each) if name == CELLS else _value(name, each) for each in values)
    twice = [label for label, count in Counter(each.label for each in made).items() if count > 1]
    if twice:
        raise ConfigError(f"{name}: {shown(twice[0])} occurs twice; name it once.")
    return Axis(name, made)


def _value(name: str, value: Any) -> Value:
    settings = flattened({name: value})
    return Value(words(settings), settings)


def _cell(cell: Any) -> Value:
    if not isinstance(cell, Mapping):
        raise ConfigError(f"{CELLS}: expected settings by name, found {cell!r}.")
    settings = flattened({name: value for name, value in cell.items() if name != LABEL})
    return Value(str(cell.get(LABEL) or words(settings) or "default"), settings)


def _rows(text: str) -> list[dict[str, Any]]:
    """Return the rows of a CSV; an empty field leaves its setting out."""
    found: list[dict[str, Any]] = []
    for row in csv.DictReader(text.splitlines(), strict=True):
        if None in row or None in row.values():
            raise ConfigError(f"row {len(found) + 1} has more or fewer fields than the first line")
        settings = {name.strip(): value.strip() for name, value in row.items() if value.strip()}
        found.append(
            {
                name: value if name == LABEL else value_of(name.replace("-", "_"), value)
                for name, value in settings.items()
            }
        )
    return found


def _word(name: str, value: Any) -> str:
    short = name.removeprefix("weight.").removeprefix("rule.").replace("_", " ")
    if name == "prompt":
        return str(value)
    if isinstance(value, float):
        value = f"{value:g}"
    return f"{short} {value if not isinstance(value, Mapping) else 'table'}"
