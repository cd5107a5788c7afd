"""Contact sheets: a labelled row per prompt, a column per seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from klora_compile.sampling.labels import font_for, wrapped

_PAPER, _INK = "#ffffff", "#222222"


@dataclass(frozen=True)
class Row:
    """A row of a sheet."""

    label: str
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class _Layout:
    """All measures of a sheet, in pixels."""

    font: Any
    text: int
    """Size of the font."""
    gap: int
    column: int
    labels: int
    """Width of the labels' column."""

    def label(self, row: Row) -> str:
        return wrapped(row.label, self.font, self.labels)

    def height(self, row: Row) -> int:
        """Return the height of a row: the larger of its label's and its pictures'."""
        lines = self.label(row).count("\n") + 1
        return max(lines * (self.text + self.spacing), *(image.height for image in row.images))

    @property
    def spacing(self) -> int:
        """Space between two lines of a label."""
        return self.text // 3


def contact_sheet(rows: Sequence[Row], headings: Sequence[str]) -> Image.Image:
    """Return a sheet with unscaled pictures, each row's label to its left.

    Args:
        rows: labels and pictures; rows may differ in length.
        headings: one heading per column.
    """
    layout = _layout(rows, headings)
    gap, step = layout.gap, layout.column + layout.gap
    left, top = layout.labels + 2 * gap, layout.text + 2 * gap
    heights = [layout.height(row) for row in rows]
    size = (left + len(headings) * step, top + sum(height + gap for height in heights))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, heading in enumerate(headings):
        place = (left + index * step, top - gap // 2)
        draw.text(place, heading, fill=_INK, font=layout.font, anchor="ld")
    for row, height in zip(rows, heights, strict=True):
        draw.multiline_text(
            (gap, top + height / 2),
            layout.label(row),
            fill=_INK,
            font=layout.font,
            anchor="lm",
            spacing=layout.spacing,
        )
        for index, image in enumerate(row.images):
            sheet.paste(image.convert("RGB"), (left + index * step, top))
        top += height + gap
    return sheet


def _layout(rows: Sequence[Row], headings: Sequence[str]) -> _Layout:
    images = [image for row in rows for image in row.images]
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    text = min(40, max(12, round(min(width, height) / 26)))
    font = font_for("".join([*headings, *(row.label for row in rows)]), text)
    return _Layout(
        font=font,
        text=text,
        gap=max(6, text // 2),
        column=max(width, *(math.ceil(font.getlength(heading)) for heading in headings)),
        labels=min(14 * text, max(8 * text, width // 2)),
    )
