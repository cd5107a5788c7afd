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

    def heading(self, text: str) -> str:
        return wrapped(text, self.font, self.column)

    def title(self, text: str, columns: int) -> str:
        width = self.labels + columns * (self.column + self.gap)
        return "\n".join(wrapped(line, self.font, width) for line in text.splitlines())

    def block(self, *texts: str) -> int:
        """Return the height of texts side by side; 0 without text."""
        lines = max(text.count("\n") + 1 for text in texts) if any(texts) else 0
        return lines * (self.text + self.spacing) - self.spacing if lines else 0

    def height(self, row: Row) -> int:
        """Return the height of a row: the larger of its label's and its pictures'."""
        lines = self.label(row).count("\n") + 1
        return max(lines * (self.text + self.spacing), *(image.height for image in row.images))

    @property
    def spacing(self) -> int:
        """Space between two lines of a label."""
        return self.text // 3


def contact_sheet(rows: Sequence[Row], headings: Sequence[str], title: str = "") -> Image.Image:
    """Return a sheet with unscaled pictures, each row's label to its left.

    Args:
        rows: labels and pictures; rows may differ in length.
        headings: one heading per column.
        title: lines above everything.
    """
    layout = _layout(rows, headings, title)
    gap, step = layout.gap, layout.column + layout.gap
    lines = layout.title(title, len(headings))
    left = layout.labels + 2 * gap
    above = layout.block(lines) + gap if lines else 0
    top = above + layout.block(*(layout.heading(each) for each in headings)) + 2 * gap
    heights = [layout.height(row) for row in rows]
    size = (left + len(headings) * step, top + sum(height + gap for height in heights))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    style: dict[str, Any] = {"fill": _INK, "font": layout.font, "spacing": layout.spacing}
    draw.multiline_text((gap, gap), lines, **style)
    for index, heading in enumerate(headings):
        place = (left + index * step, top - gap // 2)
        draw.multiline_text(place, layout.heading(heading), anchor="ld", **style)
    for row, height in zip(rows, heights, strict=True):
        draw.multiline_text(
            (gap, top + height / 2),
            layout.label(row),
            anchor="lm",
            **style,
        )
        for index, image in enumerate(row.images):
            sheet.paste(image.convert("RGB"), (left + index * step, top))
        top += height + gap
    return sheet


def _labels(rows: Sequence[Row], font: Any, most: int) -> int:
    """Return the width of the labels' column, at most ``most``."""
    return int(min(most, max(math.ceil(font.getlength(row.label)) for row in rows)))


def _layout(rows: Sequence[Row], headings: Sequence[str], title: str) -> _Layout:
    images = [image for row in rows for image in row.images]
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    text = min(40, max(12, round(min(width, height) / 26)))
    font = font_for("".join([title, *headings, *(row.label for row in rows)]), text)
    words = [word for heading in headings for word in heading.split()]
    return _Layout(
        font=font,
        text=text,
        gap=max(6, text // 2),
        column=max(width, *(math.ceil(font.getlength(word)) for word in words)),
        labels=_labels(rows, font, min(14 * text, max(8 * text, width // 2))),
    )
