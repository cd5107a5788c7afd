"""The result of a sweep: its cells with their pictures, its sheets, its index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from klora_compile.sweeping.grid import Grid

#: Called before each picture that is made, with its name and how many pictures remain.
OnPicture = Callable[[str, int], None]


@dataclass(frozen=True)
class SweptCell:
    """One cell of a sweep, with its picture."""

    name: str
    """Its labels."""
    sheet: int
    row: int
    column: int
    settings: Mapping[str, Any]
    """What was named for it: name of a setting -> value."""
    idle: tuple[str, ...]
    """Settings of its row or column that its rule does not have."""
    repeats: bool
    """Whether an earlier cell of its row is equal, because its column's setting is idle."""
    picture: Image.Image | None
    """The picture, or the middle frame of a video; None if it failed."""
    error: str | None = None
    """Why it failed."""
    file: Path | None = None
    """The file of its picture; None without a folder."""
    mode: str | None = None
    """How the fusion acted; None if the picture is from an earlier sweep."""
    seconds: float | None = None
    """Seconds of sampling; None if the picture was there, or failed."""
    changing: float = 0.0
    """Seconds to make the schedule and write it into the model."""
    deriving: float = 0.0
    """Seconds to compute derived slots that its rule needs."""


@dataclass(frozen=True)
class Sweep:
    """All cells of a sweep."""

    grid: Grid
    cells: tuple[SweptCell, ...]
    """By sheet, row and column."""
    title: str
    """What all cells have in common, in a line."""

    def sheet(self, number: int = 0) -> Image.Image:
        """Return a sheet: labelled rows and columns of pictures.

        Args:
            number: which sheet, from 0; there are several with three axes.
        """
        from klora_compile.sweeping.drawing import drawn

        return drawn(self, number)

    def json(self) -> dict[str, Any]:
        """Return labels, settings and times as JSON values; pictures by their files' names."""
        return {
            "title": self.title,
            **{name: list(getattr(self.grid, name)) for name in ("columns", "rows", "sheets")},
            "cells": [_json(cell) for cell in self.cells],
        }

    def times(self) -> list[str]:
        """Return sentences on how long it took."""
        cells = {id(each.picture): each for each in reversed(self.cells) if each.seconds}
        made = list(reversed(cells.values()))
        if not made:
            return ["every picture was there"]
        sampled = median(cell.seconds or 0.0 for cell in made)
        changed = median(cell.changing for cell in made)
        lines = [
            f"made {len(made)} pictures: {sampled:.2f} s each, and {changed:.3f} s to change the "
            "settings (medians)"
        ]
        derived = [cell for cell in made if cell.deriving]
        lines += [f"derived for {cell.name}: {cell.deriving:.2f} s" for cell in derived]
        return lines


def _json(cell: SweptCell) -> dict[str, Any]:
    facts = {each.name: getattr(cell, each.name) for each in fields(cell)}
    del facts["picture"]
    return facts | {
        "settings": dict(cell.settings),
        "idle": list(cell.idle),
        "file": None if cell.file is None else cell.file.name,
    }
